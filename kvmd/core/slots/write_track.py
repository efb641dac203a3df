"""Write tracking begins and ends: the count, and the entries that must not let a store pass.

Models kvm_write_track_add_gfn and kvm_write_track_remove_gfn [KVM page_track.c].  From when the first returns
nobody stores to the page through an entry; what is tracked is `page_track`'s to say.
"""

from __future__ import annotations

import errno

from kvmd.core.slots.guest_frames import GuestFrames
from kvmd.core.slots.memslot import Memslot
from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.tdp import VmTdp
from protocol.errors import UapiError
from protocol.units import Gfn, GfnSpan, Gpa, gfn_of


class WriteTrack:
    """In one VM."""

    def __init__(self, frames: GuestFrames, tdp: VmTdp) -> None:
        self._frames = frames
        self._tdp = tdp

    # awaits: asked: cannot change: tracked in the turn it was asked, and from then on a pin is refused
    async def add(self, gpa: Gpa) -> None:
        """Every store to the page of `gpa` is emulated from now on.  EINVAL: no slot; tracked too often."""
        async with self._frames.slots.lock:
            gfn = gfn_of(gpa)
            if gfn in self._frames.pinned:
                raise UapiError(errno.EBUSY, f"gfn {gfn:#x} is pinned: no store of a device faults there")
            self._frames.page_track.add(self._slot_of(gfn), gfn)
            if tdp_mmu.write_protect(self._tdp.mmu, gfn, as_id=0):
                await self._tdp.flusher.flush(GfnSpan.of_pages(gfn, 1))
            await self._tdp.flusher.drain()

    async def remove(self, gpa: Gpa) -> None:
        """EINVAL: no slot, or not tracked."""
        async with self._frames.slots.lock:
            gfn = gfn_of(gpa)
            self._frames.page_track.remove(self._slot_of(gfn), gfn)

    def _slot_of(self, gfn: Gfn) -> Memslot:
        slot = self._frames.slots.find(gfn)
        if slot is None:
            raise UapiError(errno.EINVAL, f"gfn {gfn:#x} is in no memslot: nothing there to track")
        return slot
