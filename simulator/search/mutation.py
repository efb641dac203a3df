"""Mutation guided by coverage: schedules that showed something new are kept, and changed.

The first runs are random walks.  From then on each run starts from one that has been kept: an answer is
flipped, some are left out, or the end of another kept one is put behind its beginning; behind the last
answer the run goes on by default or at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from simulator.search.coverage import Coverage
from simulator.search.option import Option
from simulator.search.replay import Answers, trimmed
from simulator.search.walk import RandomWalk

FIRST_RUNS = 16
CHANGES_MAX = 4
LEFT_OUT_MAX = 8
FLIP_TO_MAX = 3
"""Answers above it are left to random walks: there are rarely more options than that."""


class Mutation:
    """Strategy without end."""

    watches = True
    redundant = False

    def __init__(self, seed: int) -> None:
        self._random = Random(f"mutation {seed}")
        self._walk = RandomWalk(seed)
        self._coverage = Coverage()
        self._runs = 0
        self.kept: list[Answers] = []
        self._begin(())

    def _begin(self, answers: Answers) -> None:
        self._answers = answers
        self._given: list[int] = []
        self._walks_on = self._runs < FIRST_RUNS or self._random.random() < 0.5

    def choose(self, options: Sequence[Option]) -> int:
        place = len(self._given)
        if place < len(self._answers):
            answer = self._answers[place] if self._answers[place] < len(options) else 0
        else:
            answer = self._walk.choose(options) if self._walks_on else 0
        self._given.append(answer)
        return answer

    def took(self, step: Option) -> None:
        self._coverage.took(step)

    def ended(self, failed: bool) -> bool:
        self._runs += 1
        if self._coverage.ended():
            self.kept.append(trimmed(self._given))
        self._begin(self._changed() if self.kept and self._runs >= FIRST_RUNS else ())
        return True

    def _changed(self) -> Answers:
        answers = list(self._random.choice(self.kept))
        for _ in range(self._random.randint(1, CHANGES_MAX)):
            self._random.choice(_CHANGES)(self, answers)
        return trimmed(answers)

    def _flip(self, answers: list[int]) -> None:
        place = self._random.randrange(len(answers) + 1)
        answers[place : place + 1] = [self._random.randint(0, FLIP_TO_MAX)]

    def _leave_out(self, answers: list[int]) -> None:
        place = self._random.randrange(len(answers) + 1)
        del answers[place : place + self._random.randint(1, LEFT_OUT_MAX)]

    def _splice(self, answers: list[int]) -> None:
        other = self._random.choice(self.kept)
        place = self._random.randrange(len(answers) + 1)
        answers[place:] = other[self._random.randrange(len(other) + 1) :]

    def summary(self) -> str:
        return f"{len(self._coverage.covered)} transitions and races covered, {len(self.kept)} schedules kept"


_CHANGES: tuple[Callable[[Mutation, list[int]], None], ...] = (
    Mutation._flip,
    Mutation._flip,
    Mutation._leave_out,
    Mutation._splice,
)
