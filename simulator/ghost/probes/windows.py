"""What a slot shows: its process's memory, and pages of its guest_memfd where gfns are private."""

from __future__ import annotations

from kvmd.core.slots.memslot import Memslot, SlotFlag
from protocol.pt import bits
from protocol.units import PAGE_SHIFT
from simulator.ghost.backing import Shown
from simulator.ghost.probes.watch import Watch


def windows(watch: Watch, slots: object, slot: Memslot) -> list[tuple[int, int, Shown]]:
    """Pages start..end of the VM's address space each, in order; none where there is no page to have."""
    rights = bits.READ if SlotFlag.READONLY in slot.flags else bits.READ | bits.WRITE
    start, end = slot.span.start, slot.span.end
    of_process = Shown(watch.names[id(slots)], slot.hva >> PAGE_SHIFT, rights)
    of_file = None
    if slot.private is not None:
        of_file = Shown(watch.name(slot.private.memfd, "guest_memfd"), slot.private.first, rights)
        if slot.private.serves_shared:
            return [(start, end, of_file)]
    private = watch.private_of.get(id(slots))
    found: list[tuple[int, int, Shown]] = []
    at: int = start
    for span in () if private is None else private.attributes:
        low, high = max(span.start, at), min(span.end, end)
        if low < high:
            if at < low:
                found.append((at, low, of_process.moved(at - start)))
            if of_file is not None:
                found.append((low, high, of_file.moved(low - start)))
            at = high
    if at < end:
        found.append((at, end, of_process.moved(at - start)))
    return found


def tell_private(watch: Watch, slots: object, slot: Memslot, start: int, end: int, *, there: bool) -> None:
    """Where of pages start..end of the slot, while it is there, private memory is in place of its
    process's."""
    mmus, view = watch.ghost.mmus, watch.view(slots, slot.as_id)
    mmus.turns(view, start, end, None)
    private = watch.private_of.get(id(slots)) if there else None
    for span in () if private is None else private.attributes:
        low, high = max(span.start, start), min(span.end, end)
        if low < high:
            page = (slot.hva >> PAGE_SHIFT) + low - slot.span.start
            mmus.turns(view, low, high, Shown(watch.names[id(slots)], page, 0))
