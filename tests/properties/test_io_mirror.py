"""Any schedule of faults, notes, invalidations, maps and pins keeps iommufdd's mirror right; a planted bug
breaks it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from iommufdd.core.hmm import Lookup
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.mirror_pins import MirrorPins
from protocol.hw.qi import ResponseCode
from protocol.units import Iova
from tests.properties.io_mirror_machine import MirrorMachine

STEPS = 200
WEIGHTS: dict[Callable[[MirrorMachine], None], int] = {
    MirrorMachine.arrive: 40,
    MirrorMachine.device_reads: 20,
    MirrorMachine.fault: 14,
    MirrorMachine.cpu_touches: 8,
    MirrorMachine.host_gives_up: 8,
    MirrorMachine.host_collapses: 4,
    MirrorMachine.pin: 4,
    MirrorMachine.unpin: 3,
    MirrorMachine.remap: 1,
}


def play(seed: int) -> MirrorMachine:
    machine, random = MirrorMachine(seed), Random(seed)
    for step in random.choices(list(WEIGHTS), list(WEIGHTS.values()), k=STEPS):
        step(machine)
        machine.check()
    machine.end()
    return machine


def play_all(seeds: int) -> None:
    for seed in range(seeds):
        play(seed)


@pytest.mark.parametrize("seed", range(20))
def test_no_schedule_breaks_the_mirror(seed: int) -> None:
    machine = play(seed)
    for wait in machine.running:
        wait.result()  # it came to its end, and without a bug
    assert machine.flows.waiting == 0
    assert (machine.counts.notes_pending, machine.counts.pinned_pages) == (0, 0)
    assert machine.hwpt.acked == machine.hwpt.iotlb_syncs
    assert not machine.codes[ResponseCode.FAILURE]


def test_the_schedules_reach_what_they_are_about() -> None:
    counts = [play(seed).counts for seed in range(8)]
    for name in ("io_fault_retries", "io_faults_spurious", "notes_mapped", "splits"):
        assert sum(getattr(one, name) for one in counts), name


def never_stale(*_: Any) -> bool:
    return False


async def ack_first(self: HwptPaging) -> None:
    """Acks without waiting for the units; the flush goes on behind it."""
    machine = next(iter(self.attached.values()))
    assert isinstance(machine, MirrorMachine)
    machine.flows.spawn(self.flush())


async def ack_own_only(self: HwptPaging) -> None:
    """Whoever finds nothing left acks, though another's flush is under way."""
    await self.flush()


async def forget_nothing(self: Hwpt, start: int, size: int) -> None:
    """Tables that were cut off are free at once, and the units know nothing of it."""


async def pin_anew(self: MirrorPins, name: int, start: int, end: int) -> None:
    """A pin over a pinned page maps what the process has there by now."""
    while start < end:
        start = await self._pin_gap(name, Iova(start), Iova(end))


async def keep_entries(self: MirrorPins, name: int) -> None:
    """What is unpinned stays mapped."""
    leaves = [leaf for pin in self for leaf in self._hwpt.table.leaves_in(pin.start, pin.end - pin.start)]
    await unpin(self, name)
    for leaf in leaves:
        self._hwpt.put_run(leaf.iova, [leaf.hpa], leaf.level, writable=leaf.writable)


async def unpin_first(self: MirrorPins, name: int) -> None:
    """The host is told before entries and units are without it."""
    for pin in self._requests.get(name, []):
        if pin.holders == 1:
            await self._watched.host.unpin(pin.part.hva, pin.end - pin.start, area=pin.name)
    await unpin(self, name)


unpin = MirrorPins.unpin
BUGS: dict[str, tuple[type, str, Any]] = {
    "no sequence check": (Lookup, "stale", never_stale),
    "ack before flush": (HwptPaging, "give_up", ack_first),
    "ack before the flush of another": (HwptPaging, "give_up", ack_own_only),
    "no flush": (Hwpt, "forget", forget_nothing),
    "a pin over a pin": (MirrorPins, "_pin_span", pin_anew),
    "an unpin that leaves entries": (MirrorPins, "unpin", keep_entries),
    "an unpin that tells the host first": (MirrorPins, "unpin", unpin_first),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    owner, name, planted = BUGS[bug]
    monkeypatch.setattr(owner, name, planted)
    with pytest.raises(AssertionError, match=r"I6|R1|I28"):
        play_all(60)
