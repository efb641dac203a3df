"""The strategies by name: what `--strategy` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from simulator.search.delay import DelayBound
from simulator.search.exhaustive import Exhaustive
from simulator.search.mutation import Mutation
from simulator.search.option import Strategy
from simulator.search.pct import PriorityChanges
from simulator.search.walk import RandomWalk


class Search(Strategy, Protocol):
    """A strategy that can say how far it has come."""

    def summary(self) -> str:
        """One line; "all" stands in it only if there is no other schedule."""


@dataclass(frozen=True, slots=True)
class Named:
    what: str
    make: Callable[[int], Search]  # of a seed
    seeded: bool  # else a second one would only repeat the first: one process, and it ends by itself


STRATEGIES: Mapping[str, Named] = {
    "random": Named("a coin at each choice", RandomWalk, True),
    "rare": Named("a coin that leaves the default once in ten", lambda seed: RandomWalk(seed, 0.1), True),
    "pct": Named("priorities with two changes", PriorityChanges, True),
    "mutation": Named("schedules that showed something new, changed", Mutation, True),
    "exhaustive": Named("one run of every trace", lambda seed: Exhaustive(), False),
    "delay": Named("all schedules, those with fewer delays first", lambda seed: DelayBound(), False),
}
DEFAULT = "random"
