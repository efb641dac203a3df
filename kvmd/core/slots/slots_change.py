"""A change of the memslots, from its checks to its last flush.

Models kvm_set_memslot and the zap before it [KVM kvm_main.c], [RFC 36/42]: a slot that is deleted or moved is
invalid first, so that faults on it wait; everything mapped is zapped and every CPU and importer has acked;
only then the slots change.  An exported root keeps its address and its tables and loses its leaves, other
roots become obsolete.  Creating a slot and switching its logging zap nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from kvmd.core.mm.page import Page
from kvmd.core.slots.dirty_bitmap import bitmap_bytes
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.memslot import MemoryRegion, Memslot, Memslots, SlotChange, SlotFlag
from kvmd.core.slots.private_memory import PrivateMemory
from kvmd.core.tables.flush import Flusher
from kvmd.core.tables.tdp_table import Root, RootState, TdpMmu
from kvmd.core.tables.zap import Zapper
from protocol.errors import UapiError
from protocol.flow import RwLock
from protocol.units import GfnSpan

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

    def __init__(
        self,
        vm_id: int,
        lock: RwLock,
        slots: Memslots,
        mmu: TdpMmu,
        flusher: Flusher,
        dirty_log: DirtyLog,
        zapper: Zapper,
        replaced: Callable[[SlotChange, Memslot | None], None],
        pinning: SlotPins,
        private: PrivateMemory,
    ) -> None:
        self._vm_id = vm_id
        self._lock = lock
        self._slots = slots
        self._mmu = mmu
        self._flusher = flusher
        self._dirty_log = dirty_log
        self._zapper = zapper
        self._replaced = replaced
        self._pinning = pinning
        self._private = private

    # awaits: region: cannot change: the request | change, new, old: cannot change: under the slots_lock,
    # which every change of the slots takes
    async def set_memory_region(self, region: MemoryRegion) -> None:
        """KVM_SET_USER_MEMORY_REGION and its second form; one change at a time.  Where everything is pinned a
        slot that cannot be is deleted again."""
        async with self._lock:
            change, old, new = self._slots.plan(region)
            if new is not None and change is not SlotChange.NONE:
                new = await self._bind(region, new)
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
                await self.zap_all_fast()
                self._pinning.put(pages)
            if refusal is not None:
                raise refusal
            return new if change is SlotChange.NONE else self._commit(change, old, new)
        finally:
            self._slots.settle()

    # awaits: asked, new: cannot change: not a slot yet, nobody else has it
    async def _bind(self, region: MemoryRegion, new: Memslot) -> Memslot:
        if SlotFlag.GUEST_MEMFD not in new.flags:
            return new
        binding = await region.guest_memfd().bind(self._vm_id, region.guest_memfd_offset, new.span)
        return replace(new, private=binding)

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

    def _check_room(self, new: Memslot) -> None:
        """ENOMEM before the slot that logs gets a bitmap the host has no room for."""
        others = (slot for slot in self._slots if slot.logs and slot.number != new.number)
        held = sum(bitmap_bytes(slot.npages) for slot in others)
        if new.logs and held + bitmap_bytes(new.npages) > MAX_BITMAP_BYTES:
            raise UapiError(errno.ENOMEM, f"slot {new.id}: no room for a bitmap of {new.npages:#x} pages")

    # awaits: each root, obsolete: cannot change: copies; under the slots_lock, and `zap` and `dismantle`
    # pass by a root that went
    async def zap_all_fast(self) -> None:
        """Other roots become obsolete, exported ones lose their leaves [RFC 36/42], or as their policy
        has it only those of the slot that goes.  Under the slots_lock."""
        unflushed = self._mmu.invalidate_roots()
        obsolete = [root for root in self._mmu.roots if root.state is RootState.INVALID]
        for root in [root for root in self._mmu.roots if root.exported]:
            lost = [root.everything] if root.role.policy.zapped_whole else self._gone_from(root)
            if lost:
                await self._zapper.zap(lost, [root], unflushed=unflushed)
                unflushed = False
        if unflushed:
            await self._flusher.flush(None)
        await self._flusher.drain()
        await self._zapper.dismantle(obsolete)

    def _gone_from(self, root: Root) -> list[GfnSpan]:
        going = self._slots.going
        return [going.span] if going is not None and going.as_id == root.role.as_id else []
