"""Probabilistic concurrency testing: priorities, and few points at which they change.

Each actor has a priority, drawn when it is first seen; the highest one that can go on does.  At d - 1
points of the run, drawn beforehand, the one that was about to go on falls below all others.  A bug that
needs d steps in a certain order is found by a run with a probability of at least 1 / (n * k^(d-1)), for n
actors and k steps [PCT ASPLOS 2010].  Here that is an estimate: it is of runs whose points were drawn from
all k steps, which are not known before a run had as many, and of bugs that go by who goes on alone.

- How an actor goes on, where it may in several ways (which flow, one frame or two, a fault), is a coin, and
  no part of it.
- Steps that only one process can see do not count: a run of 500 stores into a page that nobody can reach yet
  would swallow the points.  Which places several of them touch is learned from the runs so far.  What is
  told a process is an actor each, and its own state is no place that others see.
- Who has gone on many times in a row while others could (a poll, a retry) falls below all others as well,
  and who could have gone on for many more choices, while several others kept each other busy (who polls and
  who answers), rises above all: or nobody would ever get on.  Of a run in which either happened nothing is
  promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from simulator.search.option import Option, is_within
from simulator.search.shared import SharedPlaces

DEPTH = 3
IN_A_ROW_MAX = 500
WAITS_MAX = 5_000  # choices


class PriorityChanges:
    """Strategy without end."""

    watches = True
    redundant = False

    def __init__(
        self,
        seed: int,
        depth: int = DEPTH,
        in_a_row_max: int = IN_A_ROW_MAX,
        waits_max: int = WAITS_MAX,
    ) -> None:
        self._random = Random(f"pct {seed}")
        self._in_a_row_max, self._waits_max = in_a_row_max, waits_max
        self.depth = depth
        self.actors = 1  # the most there were in a run
        self.length = 1  # counted steps of the longest run so far
        self.runs = 0
        self.whole = 0  # of them, whose points were drawn from as many steps, and which nobody held up
        self._shared = SharedPlaces()
        self._begin()

    def _begin(self) -> None:
        self._priority: dict[str, float] = {}
        self._lowest, self._above = 0.0, 2.0
        self._counted = 0
        self._choices = 0
        self._waits_since: dict[str, int] = {}  # of those who could have gone on, and did not
        self._changes = {self._random.randrange(self.length) for _ in range(self.depth - 1)}
        self._running, self._in_a_row = "", 0
        self._held_up = False

    def bound(self) -> float:
        """The estimated probability for each of `whole` to find a bug of this depth, at least."""
        return 1 / (self.actors * float(self.length) ** (self.depth - 1))

    def summary(self) -> str:
        return (
            f"pct, {self.runs} runs: an estimate for {self.whole} of them is that each finds a bug of depth "
            f"{self.depth}, if who goes on decides it, with p >= 1/({self.actors} * "
            f"{self.length}^{self.depth - 1}) = {self.bound():.2g}"
        )

    def choose(self, options: Sequence[Option]) -> int:
        if is_within(options[0].actor):
            return self._random.randrange(len(options))
        self._choices += 1
        for option in options:
            if option.actor not in self._priority:
                self._priority[option.actor] = 1 + self._random.random()
            if self._choices - self._waits_since.setdefault(option.actor, self._choices) > self._waits_max:
                self._promote(option.actor)
        option = self._highest(options)
        if self._is_shared(option):
            self._counted += 1
            if self._counted - 1 in self._changes:
                self._demote(option.actor)
                option = self._highest(options)
        self._in_a_row = self._in_a_row + 1 if option.actor == self._running else 1
        self._running = option.actor
        if self._in_a_row > self._in_a_row_max:
            self._demote(option.actor)
            self._in_a_row = 0
            self._held_up = True
        self._waits_since.pop(option.actor, None)
        ways = [place for place, other in enumerate(options) if other.actor == option.actor]
        return self._random.choice(ways)

    def _highest(self, options: Sequence[Option]) -> Option:
        return max(options, key=lambda option: self._priority[option.actor])

    def _demote(self, actor: str) -> None:
        self._lowest -= 1
        self._priority[actor] = self._lowest

    def _promote(self, actor: str) -> None:
        self._above += 1
        self._priority[actor] = self._above
        self._held_up = True

    def _is_shared(self, step: Option) -> bool:
        return self._shared.has_any_of(step.touches)

    def took(self, step: Option) -> None:
        self._shared.took(step)

    def ended(self, failed: bool) -> bool:
        self.actors = max(self.actors, len(self._priority))
        self.runs += 1
        if self._counted > self.length:
            self.length, self.whole = self._counted, 0
        else:
            self.whole += not self._held_up
        self._begin()
        return True
