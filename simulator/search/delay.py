"""Delay bounding: all schedules with at most b delays, b = 0, 1, 2, ... until there are no others.

A delay passes over the option that would be taken by default: answer k costs k of them [Delay POPL 2011].
Nothing is assumed about what steps touch, so this is what is left where the reduction of `exhaustive.py`
has too much to do; it ends only for small stories, and says at each moment which bound has been done in
full.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from simulator.search.option import Option
from simulator.search.replay import Answers


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
        self._waiting: defaultdict[int, list[Answers]] = defaultdict(list)
        self._begin(())

    def _begin(self, answers: Answers) -> None:
        self._answers = answers
        self._widths: list[int] = []

    def choose(self, options: Sequence[Option]) -> int:
        place = len(self._widths)
        self._widths.append(len(options))
        return self._answers[place] if place < len(self._answers) else 0

    def took(self, step: Option) -> None: ...

    def ended(self, failed: bool) -> bool:
        """Behind the last delay of this run, each place may have the next one."""
        self.schedules += 1
        for place in range(len(self._answers), len(self._widths)):
            start = (*self._answers, *[0] * (place - len(self._answers)))
            for answer in range(1, self._widths[place]):
                self._waiting[self.delays + answer].append((*start, answer))
        while not self._waiting[self.delays]:
            del self._waiting[self.delays]
            self.done = self.delays
            if not self._waiting or self.delays == self.delays_max:
                self.over = not self._waiting
                return False
            self.delays += 1
        self._begin(self._waiting[self.delays].pop())
        return True

    def summary(self) -> str:
        if self.over:
            return f"all {self.schedules} schedules"
        left = sum(len(waiting) for waiting in self._waiting.values())
        return f"{self.schedules} schedules, delay bound {self.done} done, at least {left} left"
