"""Schedules by chance, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.vmm.designs import SHARED
from simulator.search.option import Option
from simulator.world.journal import Journal
from simulator.world.system import Played, play

SMALL: Mapping[str, Mapping[str, int]] = {
    "sharing": {"pages": 8},
    "unmap": {"pages": 4, "rounds": 3, "workers": 2},
}


class Drawn:
    """Half of its answers are the default; `seed` None: all."""

    watches = False

    def __init__(self, seed: int | None) -> None:
        self._random = None if seed is None else Random(seed)

    def choose(self, options: Sequence[Option]) -> int:
        if self._random is None or self._random.random() < 0.5:
            return 0
        return self._random.randrange(len(options))

    def took(self, step: Option) -> None: ...

    def ended(self, failed: bool) -> bool:
        return False


def played(scenario: str, seed: int | None, journal: Journal | None = None) -> Played:
    return play(SCENARIOS[scenario], SHARED, Drawn(seed), params=SMALL[scenario], journal=journal)
