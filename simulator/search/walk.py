"""Random walk: at each choice a coin, and no memory.

Near one half the coin finds what is one store wide in a run of many; towards 0 it stays in the running
process for longer.  Half of the choices go to the default whatever the number of options.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from simulator.search.option import Option

SWITCH = 0.5
RARELY = 0.1


class RandomWalk:
    """Strategy without end: leaves the default with probability `switch`, for any of the others alike."""

    watches = False
    redundant = False

    def __init__(self, seed: int, switch: float = SWITCH) -> None:
        self._random = Random(f"walk {seed}")
        self._switch = switch

    def choose(self, options: Sequence[Option]) -> int:
        if self._random.random() >= self._switch:
            return 0
        return 1 + self._random.randrange(len(options) - 1)

    def took(self, step: Option) -> None: ...

    def ended(self, failed: bool) -> bool:
        return True

    def summary(self) -> str:
        return f"leaves the default with p={self._switch}"
