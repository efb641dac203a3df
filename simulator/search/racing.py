"""Race directed: who is about to touch what others touch is held until one of them has.

A bug of order is often one access that comes before another though nothing says that it must.  A few times
in a run somebody is held at such a step, and the others go on; when one of them has touched the place, who
was held goes on at once: the two accesses come one right behind the other, in the order that is not the
usual one [RaceFuzzer PLDI 2008].  Beside that a run seldom leaves the default.  Which step of all that
several processes touch it is, is drawn beforehand, as change points of PCT are.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from simulator.search.option import Option, Touch, dependent, is_within
from simulator.search.shared import SharedPlaces
from simulator.search.walk import RARELY

HOLDS = 3  # in a run
HELD_MAX = 1_000  # choices: others may keep each other busy for ever (who polls, and who answers)


class Racing:
    """Strategy without end."""

    watches = True
    redundant = False

    def __init__(self, seed: int, holds: int = HOLDS, switch: float = RARELY) -> None:
        self._random = Random(f"racing {seed}")
        self._holds = holds
        self._switch = switch
        self._shared = SharedPlaces()
        self._length = 1  # steps at shared places, of the longest run so far
        self.runs = 0
        self.met = 0  # who was held went on behind somebody who came to the same place
        self._begin()

    def _begin(self) -> None:
        self._counted = 0
        self._holds_at = {self._random.randrange(self._length) for _ in range(self._holds)}
        self._held: dict[str, frozenset[Touch]] = {}
        self._choices_held = 0  # since the last hold
        self._goes_first = ""

    def choose(self, options: Sequence[Option]) -> int:
        if is_within(options[0].actor):
            return self._random.randrange(len(options))
        for number, option in enumerate(options):
            if option.actor == self._goes_first:
                self._goes_first = ""
                return number
        self._choices_held += 1
        if self._choices_held > HELD_MAX:
            self._held.clear()
        while free := [place for place, option in enumerate(options) if option.actor not in self._held]:
            number = self._random.choice(free) if self._random.random() < self._switch else free[0]
            if not self._holds_back(options[number]):
                return number
        self._held.clear()  # nobody else could go on
        return 0

    def _holds_back(self, option: Option) -> bool:
        """Is the step one of those that were drawn?"""
        touches = self._shared.among(option.touches)
        if not touches:
            return False
        self._counted += 1
        if self._counted - 1 not in self._holds_at:
            return False
        self._held[option.actor] = touches
        self._choices_held = 0
        return True

    def took(self, step: Option) -> None:
        """Who was held and goes on was the only one who could."""
        self._shared.took(step)
        self._held.pop(step.actor, None)
        for actor, touches in self._held.items():
            if dependent(touches, step.touches):
                self.met += 1
                self._goes_first = actor
                del self._held[actor]
                return

    def ended(self, failed: bool) -> bool:
        self.runs += 1
        self._length = max(self._length, self._counted)
        self._begin()
        return True

    def summary(self) -> str:
        return f"racing, {self.runs} runs: {self.met} times who was held came right behind another's access"
