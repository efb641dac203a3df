"""Write tracking: pages whose every store somebody in the kernel wants to see.

Models kvm_page_track's write tracking [KVM page_track.c]: a count per gfn of a slot, kept by the
slot, so that it goes with it.  While it is not zero the gfn is writable in no root and mapped in 4 KiB
pages only; a vCPU's store is emulated, a device's is refused, because nobody can emulate DMA (defect B-24).

Invariant with its home here: I19 a tracked gfn is writable for nobody.
"""

from __future__ import annotations

import errno
from collections import Counter

from kvmd.core.slots.memslot import Memslot
from protocol.errors import UapiError
from protocol.units import Gfn, GfnSpan

MAX_COUNT = (1 << 16) - 1  # KVM counts in 16 bits


class PageTrack:
    """The tracked gfns of one VM."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, int], Counter[Gfn]] = {}

    def add(self, slot: Memslot, gfn: Gfn) -> None:
        """EINVAL: tracked too often."""
        counts = self._counts.setdefault((slot.as_id, slot.id), Counter())
        if counts[gfn] == MAX_COUNT:
            raise UapiError(errno.EINVAL, f"gfn {gfn:#x} is tracked {MAX_COUNT} times already")
        counts[gfn] += 1

    def remove(self, slot: Memslot, gfn: Gfn) -> None:
        """EINVAL: not tracked."""
        counts = self._counts.get((slot.as_id, slot.id), Counter())
        if not counts[gfn]:
            raise UapiError(errno.EINVAL, f"gfn {gfn:#x} is not tracked")
        counts[gfn] -= 1
        if not counts[gfn]:
            del counts[gfn]

    def is_tracked(self, slot: Memslot, gfn: Gfn) -> bool:
        counts = self._counts.get((slot.as_id, slot.id)) if self._counts else None
        return counts is not None and gfn in counts

    def any_in(self, slot: Memslot, span: GfnSpan) -> bool:
        counts = self._counts.get((slot.as_id, slot.id))
        return bool(counts) and any(gfn in span for gfn in counts or ())

    def forget(self, slot: Memslot) -> None:
        """The slot is deleted or moved: its counts go with it."""
        self._counts.pop((slot.as_id, slot.id), None)
