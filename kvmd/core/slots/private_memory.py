"""The private memory of one VM: its guest_memfd files, and which page a gfn has.

Models kvm_gmem_create, kvm_gmem_release, kvm_gmem_punch_hole and KVM_SET_MEMORY_ATTRIBUTES
[KVM guest_memfd.c].  What a gfn is, private or shared, or whether it has a page, is changed while faults
on it wait; the call returns, and a frame goes back, only when every CPU and importer has acked (I6).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from kvmd.core.mm.mm import Mm
from kvmd.core.mm.page import MappedPage
from kvmd.core.slots.guest_memfd import GuestMemfd, MemfdFlag, MemoryAttributes
from kvmd.core.slots.host_changes import HostChanges
from kvmd.core.slots.memslot import MemoryRegion, Memslot, Memslots, SlotFlag
from kvmd.core.slots.pinned import PinnedGfns
from protocol.errors import UapiError
from protocol.units import LEVEL_4K, PAGE_SIZE, Gfn, GfnSpan, Gpa, Hva


class PrivateMemory:
    def __init__(
        self,
        vm_id: int,
        slots: Memslots,
        mm: Mm,
        host_changes: HostChanges,
        pinned: PinnedGfns,
        *,
        supported: bool,
    ) -> None:
        self.attributes = MemoryAttributes(supported=supported)
        self._vm_id = vm_id
        self._slots = slots
        self._mm = mm
        self._converting: list[GfnSpan] = []  # to private, and nobody may map them meanwhile
        self._host_changes = host_changes
        self._pinned = pinned

    @property
    def memfd_flags(self) -> MemfdFlag:
        """What KVM_CREATE_GUEST_MEMFD takes; shared from the start is no use to a VM with private memory."""
        return MemfdFlag.MMAP if self.attributes.supported else MemfdFlag.MMAP | MemfdFlag.INIT_SHARED

    def create(self, size: int, flags: int) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD; its `reserved` is ignored, as in the kernel."""
        if flags & ~int(self.memfd_flags):
            raise UapiError(errno.EINVAL, f"guest_memfd flags {flags:#x}: at most {int(self.memfd_flags):#x}")
        if not 0 < size < 1 << 63 or size % PAGE_SIZE:
            raise UapiError(errno.EINVAL, f"guest_memfd of {size:#x} bytes: not whole pages, or no file size")
        memfd = GuestMemfd(self._vm_id, self._mm.memory, self._mm.id, size, MemfdFlag(flags))
        memfd.punch = partial(self.punch_hole, memfd)
        return memfd

    async def close(self, memfd: GuestMemfd) -> None:
        """Its last fd is closed, its last mapping gone.  Its slots keep their place and lose its pages."""
        memfd.closed = True
        await self._drop(memfd, range(memfd.npages))

    async def punch_hole(self, memfd: GuestMemfd, offset: int, size: int) -> None:
        """fallocate(2) with FALLOC_FL_PUNCH_HOLE: the next touch finds zeroes.  EINVAL: not whole pages."""
        await self._drop(memfd, memfd.pages_of_hole(offset, size))

    async def _drop(self, memfd: GuestMemfd, pages: range) -> None:
        # await: memfd: cannot change: nobody is bound to it under its invalidate_lock
        async with memfd.invalidate_lock, self._host_changes.zapped_gfns(memfd.spans_of(pages)):
            # await: memfd: cannot change: the lock is held, and none is mapped when this returns
            await memfd.unmap(pages.start, pages.stop, copies_too=False)
            memfd.drop(pages)

    async def set_attributes(self, address: Gpa, size: int, attributes: int, flags: int) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES: once it returns nobody reaches the pages the gfns had before.  EBUSY: a
        page of them is pinned, or is to become private and mapped by another MMU."""
        span = self.attributes.check(address, size, attributes, flags)
        # await: span: cannot change: numbers, of the caller's
        async with self._slots.lock:
            pinned = self._pinned.within(0, span)
            if pinned:
                raise UapiError(errno.EBUSY, f"gfn {pinned[0]:#x} is pinned: what it maps must stay")
            to_private = [span] if attributes else []
            for slot in self._slots:
                self._check_unmapped(slot, to_private)
            self._converting += to_private
            try:
                # await: span: somebody may pin it, or map it by himself; asked again: by him, `_pinnable`
                # after the change and `replaces` in it
                # (tests/unit/kvmd/test_private_claims.py::test_while_it_is_converted_nobody_maps_it)
                async with self._host_changes.zapped_gfns([span]):
                    self.attributes.set(span, private=bool(attributes))
            finally:
                self._converting = []

    # awaits: asked, new: cannot change: not a slot yet, nobody else has it
    async def bind(self, region: MemoryRegion, new: Memslot) -> Memslot:
        """`new` with its part of the guest_memfd that `region` names, if it names one [KVM kvm_gmem_bind]."""
        if SlotFlag.GUEST_MEMFD not in new.flags:
            return new
        binding = await region.guest_memfd().bind(self._vm_id, region.guest_memfd_offset, new.span)
        return replace(new, private=binding)

    def check_slot(self, slot: Memslot) -> None:
        """May it be there?  EBUSY: gfns of it are private, and another MMU maps what it has for them."""
        self._check_unmapped(slot, self.attributes)

    def _check_unmapped(self, slot: Memslot, spans: Iterable[GfnSpan]) -> None:
        for span in spans:
            if (hvas := slot.hvas_of(span)) is not None:
                self._mm.claims.check_replacing(*hvas)

    def replaces(self, start: Hva, end: Hva) -> bool:
        """Is private memory in the place of the process's start..end, or soon?"""
        if not (self.attributes or self._converting):
            return False
        coming = [] if self._slots.coming is None else [self._slots.coming]
        spans = [span for slot in [*self._slots, *coming] if (span := slot.gfns_of(start, end)) is not None]
        return any(
            self.attributes.any_private(span) or any(span.overlaps(other) for other in self._converting)
            for span in spans
        )

    def serves(self, slot: Memslot, gfn: Gfn) -> bool:
        """Does the page of `gfn` come from a guest_memfd, or would it, had the slot one?"""
        if self.attributes.supported and self.attributes.is_private(gfn):
            return True
        return slot.private is not None and slot.private.serves_shared

    def page(self, slot: Memslot, gfn: Gfn) -> MappedPage | None:
        """The private page of `gfn`, made now if it never was.  None: there is none to have."""
        binding = slot.private
        if binding is None or binding.memfd.closed:
            return None
        page = binding.memfd.page(binding.index_of(gfn))
        return MappedPage(slot.hva_of(gfn), page.pfn, LEVEL_4K, writable=True)
