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
from simulator.search.walk import RandomWalk

RARELY = 0.1  # with which probability `rare` leaves the default


@dataclass(frozen=True, slots=True)
class Named:
    what: str
    make: Callable[[int], Search]  # of a seed
    seeded: bool  # else a second one would only repeat the first: one process, and it ends by itself


def _rare(seed: int) -> RandomWalk:
    return RandomWalk(seed, RARELY)


def _mixed(seed: int) -> Mixed:
    return Mixed(RandomWalk(seed), _rare(seed), PriorityChanges(seed))


STRATEGIES: Mapping[str, Named] = {
    "mixed": Named("random, rare and pct by turns", _mixed, True),
    "random": Named("a coin at each choice", RandomWalk, True),
    "rare": Named("a coin that leaves the default once in ten", _rare, True),
    "pct": Named("priorities with two changes", PriorityChanges, True),
    "mutation": Named("schedules that showed something new, changed", Mutation, True),
    "exhaustive": Named("one run of every trace", lambda seed: Exhaustive(), False),
    "delay": Named("all schedules, those with fewer delays first", lambda seed: DelayBound(), False),
}
DEFAULT = "mixed"
