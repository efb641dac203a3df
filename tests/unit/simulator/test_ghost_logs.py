"""The ghost beside what user space is told: of stores, and of what it made private itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest

from kvmd.core.slots.dirty_log import MANUAL_PROTECT_ENABLE, ClearDirtyLog
from kvmd.core.slots.dirty_ring import DIRTY_GFN_BYTES, F_RESET, DirtyRing
from kvmd.core.slots.guest_memfd import ATTRIBUTE_PRIVATE
from kvmd.core.vm import Kvm, VmType
from protocol.uapi import names
from protocol.units import PAGE_SIZE, Gpa, Hva
from simulator.ghost.ghost import Ghost
from simulator.ghost.probes.watching import watching
from simulator.ghost.violation import Verdicts
from simulator.planted.plant import Edit, Plant
from tests.kit.kvmd import BITMAP, World
from tests.unit.kvmd.own_root import Managed

LOG = "kvmd.core.slots.dirty_log:DirtyLog"
ENTRIES = 4


def _reported() -> None:
    world = World()
    world.map(1, hva=BITMAP)
    world.set_slot(0, 0x100, 128, world.map(128), names.KVM_MEM_LOG_DIRTY_PAGES)
    vcpu = world.create_vcpu()
    for page in (3, 70):
        world.guest_write(vcpu, 0x100 + page << 12, b"cpu")
    world.do(world.vm.dirty_log.get(0, BITMAP))


def _cleared() -> None:
    """Of two pages that are reported one is cleared."""
    guest = Managed()
    guest.vm.dirty_log.manual_protect = MANUAL_PROTECT_ENABLE
    guest.log()
    guest.write(3, 70)
    guest.dirty()
    guest.do(guest.mm.write(BITMAP, bytes([1 << 3])))
    guest.do(guest.mm.write(Hva(BITMAP + 8), bytes(8)))
    guest.do(guest.vm.dirty_log.clear(ClearDirtyLog(0, 128, 0, BITMAP)))


def _taken_back() -> None:
    """Of two entries the first is given back."""
    memory = bytearray(ENTRIES * DIRTY_GFN_BYTES)
    ring = DirtyRing(memoryview(memory), 0)
    for page in (3, 4):
        ring.push(0, page)
    memory[0] |= F_RESET
    assert ring.take_back()


def _converted() -> None:
    world = World()
    world.vm = Kvm(world.host, world.mm, kind=VmType.SW_PROTECTED)
    for address, attributes in (
        (0, ATTRIBUTE_PRIVATE),
        (4, ATTRIBUTE_PRIVATE),
        (1, ATTRIBUTE_PRIVATE),
        (4, 0),
    ):
        at = Gpa(address * PAGE_SIZE)
        world.run(world.vm.private.set_attributes(at, 2 * PAGE_SIZE, attributes, 0))


# Each with a mistake, and what that breaks.
CASES: dict[str, tuple[Callable[[], None], Edit, str]] = {
    "bits are copied when they are taken": (
        _reported,
        Edit(f"{LOG}.get", "dirty_bitmap, bits)", "dirty_bitmap, dirty.read())"),
        "I25",
    ),
    "all bits are cleared": (
        _cleared,
        Edit("kvmd.core.slots.dirty_bitmap:DirtyBitmap.clear", ' & int.from_bytes(wanted, "little")', ""),
        "I25",
    ),
    "entries are taken that nobody has read": (
        _taken_back,
        Edit("kvmd.core.slots.dirty_ring:DirtyRing.take_back", "if not flags & F_RESET:", "if not flags:"),
        "I25",
    ),
    "what touches private pages stays private with them": (
        _converted,
        Edit(
            "kvmd.core.slots.guest_memfd:MemoryAttributes.set",
            "bisect_right(self._edges, span.end)",
            "bisect_right(self._edges, span.end - 1)",
        ),
        "R24",
    ),
}


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_user_space_was_told_is_what_it_has(case: str, wrong: bool) -> None:
    play, edit, invariant = CASES[case]
    ghost = Ghost(Verdicts())
    with Plant(case, case, invariant, [edit]).apply() if wrong else nullcontext(), watching(ghost):
        play()
    assert {found.invariant for found in ghost.verdicts.found} == ({invariant} if wrong else set())
