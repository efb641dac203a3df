"""The fewest answers that still fail: delta debugging over what is not the default.

First all answers are dropped, then halves of them, quarters, and so on down to each alone, until none can
go; what is left is moved towards the default [ddmin TSE 2002].  What a dropped answer leaves behind is 0,
so the others stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simulator.search.replay import Answers, trimmed

REPLAYS_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Shrunk:
    answers: Answers
    replays: int


class _OutOfReplaysError(Exception):
    pass


class _Shrinker:
    def __init__(self, answers: Answers, fails: Callable[[Answers], bool], replays_max: int) -> None:
        self.best = trimmed(answers)
        self._fails, self._replays_max = fails, replays_max
        self._tried: set[Answers] = {self.best}

    @property
    def replays(self) -> int:
        return len(self._tried) - 1

    def places(self) -> list[int]:
        return [place for place, answer in enumerate(self.best) if answer]

    def attempt(self, changes: dict[int, int]) -> bool:
        answers = trimmed(changes.get(place, answer) for place, answer in enumerate(self.best))
        if answers in self._tried:
            return False
        if self.replays == self._replays_max:
            raise _OutOfReplaysError
        self._tried.add(answers)
        if self._fails(answers):
            self.best = answers
            return True
        return False

    def drop(self) -> None:
        size = len(self.places())
        while size:
            places, start = self.places(), 0
            while start < len(places):
                if self.attempt(dict.fromkeys(places[start : start + size], 0)):
                    places = self.places()
                else:
                    start += size
            size //= 2

    def lower(self) -> None:
        for place in self.places():
            for answer in range(1, self.best[place]):
                if self.attempt({place: answer}):
                    break


def shrink(answers: Answers, fails: Callable[[Answers], bool], replays_max: int = REPLAYS_MAX) -> Shrunk:
    """`answers` fail; `fails` replays others, and says whether the same invariant breaks.  Of what has been
    found when there are no more replays, the best.
    """
    shrinker = _Shrinker(answers, fails, replays_max)
    try:
        before: Answers | None = None
        while shrinker.best != before:
            before = shrinker.best
            shrinker.drop()
            shrinker.lower()
    except _OutOfReplaysError:
        pass
    return Shrunk(shrinker.best, shrinker.replays)
