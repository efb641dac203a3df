"""n = 1, 2, 3, ... until a run meets nothing: for each story, process and kind of fault."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.torture.blow import PROCESSES, START, VMM, Aftermath, Blow, How, Torture
from tests.torture.calls import ERRNOS, FAULTS, SINKS, Fault
from tests.torture.daemons import SPECS, Spawner, StruckDaemons
from tests.torture.record import TriedBlows
from tests.torture.stories import STORIES

Told = Callable[[Blow, Aftermath], None]


@dataclass(frozen=True, slots=True)
class Sweep:
    story: str
    victim: str
    fault: Fault


@dataclass(frozen=True, slots=True)
class Bounds:
    """Calls `first`, `first + step`, ... to `last`; at most `most` blows of each sweep.  None: no bound."""

    first: int = 1
    step: int = 1
    last: int | None = None
    most: int | None = None


def sweeps(stories: Sequence[str], victims: Sequence[str], faults: Sequence[Fault]) -> Iterator[Sweep]:
    for story in stories or (START, *STORIES):
        for victim in victims or PROCESSES:
            for fault in faults or FAULTS.values():
                if _can_befall(story, victim, fault):
                    yield Sweep(story, victim, fault)


def _can_befall(story: str, victim: str, fault: Fault) -> bool:
    """A VMM starts with each story, and waits for whoever reads what it prints, as programs do."""
    if fault in SINKS:
        return story != START and victim != VMM
    return (story, victim) != (START, VMM)


class StruckSystem:
    """StruckDaemons, made anew when a blow has left them in a state that no one should begin with."""

    def __init__(self, spawner: Spawner) -> None:
        self._spawner = spawner
        self._daemons: StruckDaemons | None = None
        self._torture: Torture | None = None

    async def strike(self, blow: Blow) -> Aftermath:
        if self._torture is None:
            self._daemons = StruckDaemons(self._spawner, Path(tempfile.mkdtemp(prefix="it-")))
            self._daemons.start(*SPECS)
            self._torture = Torture(self._daemons)
            await self._torture.begin()
        outcome = await self._torture.strike(blow)
        if outcome.how is How.FAILED:
            assert self._daemons is not None
            self._daemons.kill()
            self.end()
        return outcome

    def end(self) -> dict[str, int]:
        """Exit statuses of the daemons."""
        daemons, self._daemons, self._torture = self._daemons, None, None
        if daemons is None:
            return {}
        statuses = daemons.stop()
        shutil.rmtree(daemons.directory, ignore_errors=True)
        return statuses


async def run(sweep: Sweep, bounds: Bounds, world: StruckSystem, record: TriedBlows, told: Told) -> None:
    """What the record has is not tried again."""
    blows = 0
    at, errno_index = bounds.first, 0
    while (bounds.last is None or at <= bounds.last) and (bounds.most is None or blows < bounds.most):
        blow = Blow(sweep.story, sweep.victim, sweep.fault, at, errno_index)
        outcome = record.tried.get(blow)
        if outcome is None:
            outcome = await world.strike(blow)
            record.add(blow, outcome)
            told(blow, outcome)
        if outcome.call is None or sweep.fault in SINKS:
            return
        blows += 1
        errno_index += 1
        if sweep.fault is not Fault.FAIL or errno_index >= len(ERRNOS[outcome.call]):
            at, errno_index = at + bounds.step, 0


def clean_up(world: StruckSystem, spawner: Spawner) -> None:
    with suppress(AssertionError):
        world.end()
    spawner.close()
