"""Guest memory as KVM's own code reaches it: through the slot's host address, as the VM's process.

Models kvm_vcpu_read_guest and kvm_vcpu_write_guest [KVM kvm_main.c]: no entry of the TDP is looked at or
made, the process's page tables decide, and a store is logged.  What has no slot, or no memory behind it, is
not RAM; the caller says what that means.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto

from kvmd.core.cpu.vcpu_arch import VcpuArch
from kvmd.core.mm.space import FaultOrigin
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.guest_frames import GuestFrames
from kvmd.core.slots.memslot import Memslot
from protocol.errors import UapiError
from protocol.pt.geometry import gfn_limit
from protocol.units import PAGE_OFFSET_MASK, PAGE_SIZE, Gfn, Gpa, Hva, gfn_of


def pages_of(gpa: Gpa, size: int) -> Iterator[tuple[Gpa, int]]:
    """The pieces of an access, one a page."""
    end = gpa + size
    while gpa < end:
        count = min(end - gpa, PAGE_SIZE - (gpa & PAGE_OFFSET_MASK))
        yield gpa, count
        gpa = Gpa(gpa + count)


class CmpxchgResult(Enum):
    """What came of a compare-and-exchange."""

    NO_ADDRESS = auto()  # no slot, or one that is read-only: the host has none to write to
    FAULT = auto()  # there is one, and no memory that may be written
    OTHER_VALUE = auto()
    STORED = auto()


class GuestRam:
    """Address space `as_id` of a VM.  `vcpu` is on whose behalf stores are logged."""

    def __init__(self, vcpu: VcpuArch, as_id: int, frames: GuestFrames, dirty_log: DirtyLog) -> None:
        self._vcpu = vcpu
        self._as_id = as_id
        self._slots = frames.slots
        self._mm = frames.mm
        self._dirty_log = dirty_log

    async def load(self, gpa: Gpa, size: int) -> bytes | None:
        """Bytes within one page.  None: not RAM."""
        found = await self._reach(gpa, size, write=False)
        return None if found is None else bytes(found[1])

    async def store(self, gpa: Gpa, data: bytes) -> bool:
        """Bytes within one page.  False: not RAM, or not to be written."""
        found = await self._reach(gpa, len(data), write=True)
        if found is None:
            return False
        slot, there = found
        there[:] = data
        self._dirty_log.mark(slot, gfn_of(gpa), self._vcpu.id)
        self._dirty_log.stores.stored(self._as_id, gfn_of(gpa))
        return True

    async def compare_exchange(self, gpa: Gpa, old: bytes, new: bytes) -> CmpxchgResult:
        """`new` where `old` is, within one page and at once.  The page counts as written either way: a locked
        access that finds another value writes that back [KVM x86.c]."""
        found = await self._reach(gpa, len(old), write=True)
        gfn = gfn_of(gpa)
        if found is None:
            slot = self._slots.find(gfn, self._as_id) if self._walkable(gfn) else None
            return CmpxchgResult.NO_ADDRESS if slot is None or slot.readonly else CmpxchgResult.FAULT
        slot, there = found
        self._dirty_log.mark(slot, gfn, self._vcpu.id)
        if there != old:
            return CmpxchgResult.OTHER_VALUE
        there[:] = new
        self._dirty_log.stores.stored(self._as_id, gfn)
        return CmpxchgResult.STORED

    # awaits: slot: it may go, move, or be another one; asked again: the loop, before the bytes are used
    # (tests/unit/kvmd/test_emulated_asleep.py::test_slot_goes_while_it_sleeps)
    async def _reach(self, gpa: Gpa, size: int, *, write: bool) -> tuple[Memslot, memoryview] | None:
        """The slot and the bytes as they are now; nothing may await before they are used.  None: not RAM, or
        not to be written.  Whoever waited for a page looks its slot up again (docs/decisions/0017).
        """
        mm = self._mm
        while (slot := await self._slot(gpa)) is not None and not (write and slot.readonly):
            there = mm.bytes_now(_hva(slot, gpa), size, write=write)
            if there is not None:
                return slot, there
            try:
                await mm.fault_in(_hva(slot, gpa), write=write, via=FaultOrigin.KERNEL)
            except UapiError:
                if self._slots.find(gfn_of(gpa), self._as_id) is slot:
                    return None
        return None

    async def _slot(self, gpa: Gpa) -> Memslot | None:
        """What the CPU's walk cannot reach, because the root has too few levels, is not RAM here either."""
        gfn = gfn_of(gpa)
        return await self._slots.settled_slot(gfn, self._as_id) if self._walkable(gfn) else None

    def _walkable(self, gfn: Gfn) -> bool:
        return gfn < gfn_limit(self._vcpu.host.features.root_level(self._vcpu.maxphyaddr))


def _hva(slot: Memslot, gpa: Gpa) -> Hva:
    return Hva(slot.hva_of(gfn_of(gpa)) + (gpa & PAGE_OFFSET_MASK))
