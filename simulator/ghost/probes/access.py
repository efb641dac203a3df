"""Accesses at host addresses: a process's own, those the kernel makes for it, and copies of whole
pages."""

from __future__ import annotations

import ctypes
from typing import Any

from kvmd.core.cpu.guest_ram import GuestRam
from kvmd.core.mm.memory import PageAllocator
from kvmd.core.mm.mm import Mm
from protocol.units import PAGE_SHIFT, PAGE_SIZE, Gpa, Hva, Pfn
from simulator.ghost.probes.watch import Seams, Watch

seams = Seams()


@seams.around(Mm, "_bytes_at")
async def _bytes_at(
    watch: Watch, original: Any, mm: Mm, hva: Hva, size: int, *, write: bool, user: bool
) -> Any:
    """Which frame it is, the bytes themselves say: they are used at once."""
    part = await original(mm, hva, size, write=write, user=user)
    who = "the process" if user else "the kernel for the process"
    watch.ghost.accesses.touched(who, f"mm{mm.id}", hva >> PAGE_SHIFT, _frame_of(mm, part), write=write)
    return part


def _frame_of(mm: Mm, part: memoryview) -> int:
    frames = mm.memory.frames
    whole = getattr(frames.view, "_view", frames.view)  # a world watches it (simulator/world/memory.py)
    return (frames.base + _address(part) - _address(whole)) >> PAGE_SHIFT


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@seams.around(GuestRam, "_reach")
async def _reach(watch: Watch, original: Any, ram: GuestRam, gpa: Gpa, size: int, *, write: bool) -> Any:
    """KVM's own access for a guest, by a slot."""
    found = await original(ram, gpa, size, write=write)
    if found is None:
        return found
    slot, part = found
    view, page = watch.view(ram._slots, ram._as_id), gpa >> PAGE_SHIFT
    watch.goes_by(ram._slots, slot, f"KVM's access to page {page:#x} of {view}")
    if slot.private is None:  # else it is not what the view shows that KVM goes to
        watch.ghost.accesses.used("KVM", view, page, _frame_of(ram._mm, part), write=write)
    return found


@seams.around(PageAllocator, "view")
def _view(watch: Watch, original: Any, memory: PageAllocator, pfn: Pfn, size: int) -> Any:
    """Swap, migration, copies on write, merging."""
    watch.ghost.accesses.copied(pfn, -(-size // PAGE_SIZE))
    return original(memory, pfn, size)
