"""The strategies by name: what `--strategy` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from simulator.search.delay import DelayBound
from simulator.search.exhaustive import Exhaustive
from simulator.search.mixed import Mixed
from simulator.search.mutation import Mutation
from simulator.search.option import Search
from simulator.search.pct import PriorityChanges
from simulator.search.racing import Racing
from simulator.search.walk import RARELY, RandomWalk


@dataclass(frozen=True, slots=True)
class Named:
    what: str
    make: Callable[[int], Search]  # of a seed
    seeded: bool  # else a second one would only repeat the first: one process, and it ends by itself


def _rare(seed: int) -> RandomWalk:
    return RandomWalk(seed, RARELY)


def _mixed(seed: int) -> Mixed:
    return Mixed(RandomWalk(seed), _rare(seed), PriorityChanges(seed), Racing(seed))


STRATEGIES: Mapping[str, Named] = {
    "mixed": Named("random, rare, pct and racing by turns", _mixed, True),
    "random": Named("a coin at each choice", RandomWalk, True),
    "rare": Named("a coin that leaves the default once in ten", _rare, True),
    "pct": Named("priorities with two changes", PriorityChanges, True),
    "racing": Named("who is about to touch what others touch waits for one of them", Racing, True),
    "mutation": Named("schedules that showed something new, changed", Mutation, True),
    "exhaustive": Named("one run of every trace", lambda seed: Exhaustive(), False),
    "delay": Named("all schedules, those with fewer delays first", lambda seed: DelayBound(), False),
}
DEFAULT = "mixed"
