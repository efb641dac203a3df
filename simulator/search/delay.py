"""Delay bounding: all schedules with at most b delays, b = 0, 1, 2, ... until there are no others.

A delay passes over the option that would be taken by default: answer k costs k of them [Delay POPL 2011].
Nothing is assumed about what steps touch, so this is what is left where the reduction of `exhaustive.py`
has too much to do; it ends only for small stories, and says at each moment which bound has been done in
full.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from simulator.search.option import Option, UnrepeatableError
from simulator.search.replay import Answers

Widths = tuple[int, ...]
"""How many options there were to choose from, choice by choice."""


class DelayBound:
    """Strategy: each schedule once, those with fewer delays first, up to `delays_max`."""

    watches = False
    redundant = False

    def __init__(self, delays_max: int | None = None) -> None:
        self.delays_max = delays_max
        self.schedules = 0
        self.delays = 0  # of the run under way
        self.done = -1  # each schedule with so many delays, or fewer, has been run
        self.over = False
        self._waiting: defaultdict[int, list[tuple[Answers, Widths]]] = defaultdict(list)
        self._begin((), ())

    def _begin(self, answers: Answers, were: Widths) -> None:
        self._answers, self._were = answers, were
        self._widths: list[int] = []

    def choose(self, options: Sequence[Option]) -> int:
        place = len(self._widths)
        self._widths.append(len(options))
        if place >= len(self._answers):
            return 0
        if len(options) != self._were[place]:
            raise UnrepeatableError(
                f"choice {place} has {len(options)} options, in an earlier run {self._were[place]}"
            )
        return self._answers[place]

    def took(self, step: Option) -> None: ...

    def ended(self, failed: bool) -> bool:
        """Behind the last delay of this run, each place may have the next one."""
        if len(self._widths) < len(self._answers):
            raise UnrepeatableError(
                f"{len(self._widths)} choices, in an earlier run {len(self._answers)} or more"
            )
        self.schedules += 1
        for place in range(len(self._answers), len(self._widths)):
            start = (*self._answers, *[0] * (place - len(self._answers)))
            widths = tuple(self._widths[: place + 1])
            for answer in range(1, self._widths[place]):
                self._waiting[self.delays + answer].append(((*start, answer), widths))
        while not self._waiting[self.delays]:
            del self._waiting[self.delays]
            self.done = self.delays
            if not self._waiting or self.delays == self.delays_max:
                self.over = not self._waiting
                return False
            self.delays += 1
        self._begin(*self._waiting[self.delays].pop())
        return True

    def summary(self) -> str:
        if self.over:
            return f"all {self.schedules} schedules"
        left = sum(len(waiting) for waiting in self._waiting.values())
        return f"{self.schedules} schedules, delay bound {self.done} done, at least {left} left"
