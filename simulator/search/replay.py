"""A schedule that is known: answers given again, and the answers of any strategy written down.

A schedule is the list of its answers; behind its end all are 0, the default, so the zeros at its end say
nothing and are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from simulator.search.causality import Fingerprint
from simulator.search.option import STOP, Option, Strategy

Answers = tuple[int, ...]
UNTRACED = 1 << 12  # steps at a time: together they cost half


def trimmed(answers: Iterable[int]) -> Answers:
    """Without the zeros at its end."""
    found = list(answers)
    while found and not found[-1]:
        found.pop()
    return tuple(found)


class Replay:
    """Strategy: one run with these answers.  One that does not fit (there are fewer options) becomes 0:
    what is left of a schedule when some answers were changed is a schedule too.  `misfits` counts those,
    and those that were never asked for.
    """

    watches = False

    def __init__(self, answers: Iterable[int]) -> None:
        self.answers = trimmed(answers)
        self._asked = self._too_large = 0

    @property
    def misfits(self) -> int:
        return self._too_large + max(0, len(self.answers) - self._asked)

    def choose(self, options: Sequence[Option]) -> int:
        place, self._asked = self._asked, self._asked + 1
        answer = self.answers[place] if place < len(self.answers) else 0
        if answer < len(options):
            return answer
        self._too_large += 1
        return 0

    def took(self, step: Option) -> None: ...

    def ended(self, failed: bool) -> bool:
        return False


class Recorded:
    """Strategy: another one; what it answered in its last run, or the one under way, and that run's trace."""

    def __init__(self, strategy: Strategy, steps: bool = False) -> None:
        """`steps`: keep each step, too (a story shows them)."""
        self.strategy = strategy
        self.watches = True
        self._keep = steps
        self._trace = Fingerprint()
        self._over = True
        self._begin()

    def _begin(self) -> None:
        self._answers: list[int] = []
        self._trace.begin()
        self._untraced: list[Option] = []
        self.steps: list[Option] = []
        self.against: list[int] = []  # of `steps`, the places of those taken against the default
        self._over = False

    @property
    def answers(self) -> Answers:
        return trimmed(self._answers)

    @property
    def trace(self) -> int:
        """The Mazurkiewicz trace, as a number."""
        self._traces()
        return self._trace.value

    def _traces(self) -> None:
        self._trace.add(self._untraced)
        self._untraced.clear()

    def choose(self, options: Sequence[Option]) -> int:
        if self._over:
            self._begin()
        answer = self.strategy.choose(options)
        if answer != STOP:
            self._answers.append(answer)
            if answer and self._keep:
                self.against.append(len(self.steps))
        return answer

    def took(self, step: Option) -> None:
        if self._over:
            self._begin()
        self._untraced.append(step)
        if len(self._untraced) > UNTRACED:
            self._traces()
        if self._keep:
            self.steps.append(step)
        if self.strategy.watches:
            self.strategy.took(step)

    def ended(self, failed: bool) -> bool:
        self._over = True
        return self.strategy.ended(failed)
