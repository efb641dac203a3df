"""A change of the memslots, from its checks to its last flush.

Models kvm_set_memslot and the zap before it [KVM kvm_main.c], [RFC 36/42]: a slot that is deleted or moved is
invalid first, so that faults on it wait; everything mapped is zapped and every CPU and importer has acked;
only then the slots change (R21).  An exported root keeps its address and its tables and loses its leaves,
other roots become obsolete.  Creating a slot and switching its logging zap nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from kvmd.core.mm.page import Page
from kvmd.core.slots.dirty_bitmap import bitmap_bytes
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.guest_frames import GuestFrames
from kvmd.core.slots.memslot import MemoryRegion, Memslot, SlotChange
from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.spte import MMIO_GENERATION_MASK
from kvmd.core.tables.tdp import VmTdp
from protocol.errors import UapiError

# Of all slots of a VM: what the kernel would have to find for them, and cannot promise either.
MAX_BITMAP_BYTES = 1 << 30


class SlotPins(Protocol):
    """Pages that importers pinned, as a change of the slots has to do with them (`export/pinning.py`)."""

    def forget(self, slot: Memslot, /) -> list[Page]:
        """`slot` goes: what was pinned of it, for `put` once nobody uses it."""

    def put(self, pages: Iterable[Page], /) -> None: ...
    async def follow(self, slot: Memslot, /) -> None:
        """`slot` came.  UapiError: it must go again."""


class SlotsChange:
    """Of one VM."""

    def __init__(self, frames: GuestFrames, tdp: VmTdp, dirty_log: DirtyLog, pinning: SlotPins) -> None:
        self._slots = frames.slots
        self._private = frames.private
        self._page_track = frames.page_track
        self._tdp = tdp
        self._dirty_log = dirty_log
        self._pinning = pinning

    # awaits: region: cannot change: the request | change, new, old: cannot change: under the slots_lock,
    # which every change of the slots takes
    async def set_memory_region(self, region: MemoryRegion) -> None:
        """KVM_SET_USER_MEMORY_REGION and its second form; one change at a time.  Where everything is pinned a
        slot that cannot be is deleted again."""
        async with self._slots.lock:
            change, old, new = self._slots.plan(region)
            if new is not None and change is not SlotChange.NONE:
                new = await self._private.bind(region, new)
            new = await self._replace(change, old, new)
            if new is None:
                return
            if change is SlotChange.FLAGS_ONLY:
                await self._dirty_log.apply_flags(new)
            elif change in (SlotChange.CREATE, SlotChange.MOVE):
                try:
                    await self._pinning.follow(new)
                except UapiError:
                    await self._replace(SlotChange.DELETE, new, None)
                    raise

    # awaits: new, old, pages, refusal: cannot change: under the slots_lock, which every change of the
    # slots takes
    async def _replace(self, change: SlotChange, old: Memslot | None, new: Memslot | None) -> Memslot | None:
        """The slot that is there now."""
        refusal = self._refusal(change, new)
        self._slots.coming = None if refusal else new
        try:
            if change in (SlotChange.DELETE, SlotChange.MOVE) and old is not None:
                self._slots.going = old
                pages = [] if refusal else self._pinning.forget(old)
                await self._tdp.zapper.zap_all_fast(old.as_id, old.span)
                self._pinning.put(pages)
            if refusal is not None:
                raise refusal
            return new if change is SlotChange.NONE else self._commit(change, old, new)
        finally:
            self._slots.settle()

    def _refusal(self, change: SlotChange, new: Memslot | None) -> UapiError | None:
        """The last checks.  A move that fails them zaps everything all the same, as the kernel's does, but
        for what is pinned: its slot stays, and so do its pins (pinning rule b).
        """
        if new is None or change is SlotChange.NONE:
            return None
        try:
            self._check_room(new)
            if change is not SlotChange.FLAGS_ONLY:
                self._slots.check_limit(new)
                self._private.check_slot(new)
        except UapiError as error:
            if new.private is not None:
                new.private.unbind()
            return error
        return None

    def _commit(self, change: SlotChange, old: Memslot | None, new: Memslot | None) -> Memslot | None:
        """The new slots, in one step."""
        if new is not None:
            new = replace(new, dirty=self._dirty_log.bitmap_for(old, new))
        self._slots.replace(old, new)
        self._replaced(change, old)
        if new is None and old is not None and old.private is not None:
            old.private.unbind()
        return new

    def _replaced(self, change: SlotChange, old: Memslot | None) -> None:
        """What was kept of `old` and of the generation before goes with them."""
        if old is not None:
            if change in (SlotChange.DELETE, SlotChange.MOVE):
                self._page_track.forget(old)
            self._dirty_log.stores.replaced(old)
        if self._slots.generation & MMIO_GENERATION_MASK == 0:  # entries of the last time round look fresh
            tdp_mmu.zap_mmio(self._tdp.mmu)

    def _check_room(self, new: Memslot) -> None:
        """ENOMEM before the slot that logs gets a bitmap the host has no room for."""
        old = self._slots.numbered(new.number)
        if not new.logs or (old is not None and old.logs):  # which has one, of the same size
            return
        if self._slots.bitmap_bytes + bitmap_bytes(new.npages) > MAX_BITMAP_BYTES:
            raise UapiError(errno.ENOMEM, f"slot {new.id}: no room for a bitmap of {new.npages:#x} pages")
