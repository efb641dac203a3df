"""Dirty logging: which pages of a slot may have been written since user space last asked.

Models GET, CLEAR and RESET of the dirty log and what a slot goes through when its logging starts and stops
[KVM kvm_main.c], [KVM mmu.c].  A mark means that KVM made a writable mapping or that a CPU set D; clearing a
mark takes W (or D) away again, in the same atomic step as the bit, and the bits go to user space only after
every CPU and importer has acked: what was stored through an old translation is told by bits still to be read.
Invariant I20 has its home here: in a slot that logs, a store to a page whose bit is clear is noticed.

Marks of a vCPU go to its ring where the VM has rings; those of a device, which has none, to the slot's bitmap
(defect B-34).  What user space asks for takes the VM's slots_lock; `apply_flags` is called under it.
"""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from kvmd.core.mm.mm import Mm
from kvmd.core.mm.uaccess import copy_from_user, copy_to_user
from kvmd.core.slots.dirty_bitmap import WORD_PAGES, DirtyBitmap, bitmap_bytes, runs
from kvmd.core.slots.dirty_ring import DirtyRing, reserved_entries
from kvmd.core.slots.memslot import Memslot, Memslots
from kvmd.core.slots.store_record import REGION_PAGES, StoreRecord
from kvmd.core.tables import tdp_log, tdp_mmu
from kvmd.core.tables.root_policy import RootPolicy
from kvmd.core.tables.tdp import VmTdp
from kvmd.core.tables.tdp_mmu import SPLIT_BATCH
from kvmd.core.tables.tdp_table import Root
from protocol.errors import UapiError
from protocol.pt.geometry import entry_span
from protocol.pt.leaf_edit import SomePages
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Hva, Level

MANUAL_PROTECT_ENABLE = 1
MANUAL_INITIALLY_SET = 2
_WALK_PAGES = 512  # entries of a ring that lie this close are protected in one walk
_WHOLE_REGION = (1 << REGION_PAGES) - 1


@dataclass(frozen=True, slots=True)
class ClearDirtyLog:
    """struct kvm_clear_dirty_log, as the caller sent it."""

    slot: int
    num_pages: int
    first_page: int
    dirty_bitmap: Hva


class DirtyLog:
    """The logging of one VM; `level_of(slot, policy, gfn)` is the largest leaf a fault makes there now.
    `stores` is what it is judged by: told of each store where it is made.
    """

    def __init__(
        self,
        slots: Memslots,
        mm: Mm,
        tdp: VmTdp,
        level_of: Callable[[Memslot, RootPolicy, Gfn], Level],
        *,
        pml: bool,
    ) -> None:
        self.manual_protect = 0  # KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2's argument
        self.ring_bytes = 0  # of each vCPU; 0: no rings
        self.ring_with_bitmap = False
        self.rings: dict[int, DirtyRing] = {}  # by vCPU id
        self.stores = StoreRecord(slots)
        self._slots = slots
        self._mm = mm
        self._mmu = tdp.mmu
        self._flusher = tdp.flusher
        self._level_of = level_of
        self.ring_reserve = reserved_entries(pml=pml)

    @property
    def uses_bitmap(self) -> bool:
        return not self.ring_bytes or self.ring_with_bitmap

    @property
    def initially_set(self) -> bool:
        return bool(self.manual_protect & MANUAL_INITIALLY_SET)

    # -- marks -----------------------------------------------------------------------------------------

    def mark(self, slot: Memslot, gfn: Gfn, vcpu_id: int | None, npages: int = 1) -> None:
        """mark_page_dirty_in_slot: `vcpu_id` is the vCPU that runs here, None for a device, whose leaf may be
        huge."""
        if not slot.logs:
            return
        page = gfn - slot.base_gfn
        ring = None if vcpu_id is None else self.rings.get(vcpu_id)
        if (ring is None or not ring.push(slot.number, page)) and slot.dirty is not None:
            slot.dirty.mark(page, npages)

    def ring_full(self, vcpu_id: int) -> bool:
        """Whether that vCPU must not enter the guest before user space has harvested its ring."""
        ring = self.rings.get(vcpu_id)
        return ring is not None and ring.soft_full

    def add_ring(self, vcpu_id: int, memory: memoryview) -> None:
        """A vCPU is made: its ring begins empty."""
        self.rings[vcpu_id] = DirtyRing(memory, self.ring_reserve, vcpu_id)

    # -- a slot's logging starts and stops -------------------------------------------------------------

    def bitmap_for(self, old: Memslot | None, new: Memslot) -> DirtyBitmap | None:
        """What `new` logs into: what it had, or one of its own [KVM kvm_prepare_memory_region]."""
        if not new.logs or not self.uses_bitmap:
            return None
        if old is not None and old.dirty is not None:
            return old.dirty
        return self._mark_unnoticed(new, DirtyBitmap(new.npages, full=self.initially_set))

    def _mark_unnoticed(self, slot: Memslot, dirty: DirtyBitmap) -> DirtyBitmap:
        """Where nobody notices a device's store, to a pinned page (I22, rule c) or in a root that nothing
        write-protects (I23), a page is dirty at all times."""
        for span in tdp_log.unnoticed(self._mmu, slot.as_id, slot.span):
            dirty.mark(span.start - slot.base_gfn, span.npages)
        return dirty

    async def apply_flags(self, slot: Memslot) -> None:
        """Logging of a slot was switched: from here on faults see `slot` [KVM kvm_mmu_slot_apply_flags]."""
        if slot.readonly:
            return
        if not slot.logs:
            await self._recover_huge_pages(slot)
        elif not self.initially_set:  # or all is dirty as it is, and only CLEAR protects
            for root in self._mmu.logged_roots(slot.as_id):
                tdp_mmu.split(self._mmu, root, slot.span, LEVEL_4K)
                tdp_log.protect(self._mmu, root, slot.span)
            told = {slot.number: _WHOLE_REGION}  # who asks copies all first
            with self.stores.telling(lambda number, _: told.get(number, 0)):
                await self._flusher.flush(slot.span)

    # awaits: slot, each root, root, level_of: cannot change: under the slots_lock, which removing a slot or
    # its roots takes | met, region: cannot change: frozen entries are passed by until `thaw`, which looks at
    # the entry again
    async def _recover_huge_pages(self, slot: Memslot) -> None:
        """Tables that only logging asked for: frozen, flushed region by region, cleared; faults map huge
        leaves then (RFC-98)."""
        for root in self._mmu.logged_roots(slot.as_id):
            rest = slot.span
            level_of = partial(self._level_of, slot, root.role.policy)
            while met := tdp_log.freeze_collapsible(self._mmu, root, rest, level_of):
                region = entry_span(met.gfn, met.level)
                await self._flusher.flush(region)
                tdp_log.thaw(self._mmu, root, met)
                rest = GfnSpan(region.end, slot.span.end)

    def lend(self, root: Root) -> bool:
        """The root is exported: what D told, W must tell from now on (B-35).  Whether CPUs must flush."""
        protected = False
        for slot in self._slots:
            if slot.logs and slot.as_id == root.role.as_id:
                protected |= tdp_log.protect(self._mmu, root, slot.span)
        return protected

    # -- what user space asks --------------------------------------------------------------------------

    # awaits: bits: cannot change: taken out of the bitmap, nobody else has them
    async def get(self, number: int, dirty_bitmap: Hva) -> None:
        """KVM_GET_DIRTY_LOG.  The copy comes last: if it fails, bits taken are lost, as in the kernel."""
        async with self._slots.lock:
            slot, dirty = self._logging_slot(number)
            if self.manual_protect:
                await copy_to_user(self._mm, dirty_bitmap, dirty.read())
                return
            bits = dirty.take()
            with self.stores.telling(partial(_tells, slot, 0, bits)):
                self._mark_unnoticed(slot, dirty)
                await self._protect_again(slot, 0, bits)
                await copy_to_user(self._mm, dirty_bitmap, bits)

    # awaits: dirty, slot: cannot change: under the slots_lock, which replacing a slot takes
    async def clear(self, log: ClearDirtyLog) -> None:
        """KVM_CLEAR_DIRTY_LOG: only bits that were set are cleared, and only their pages protected."""
        async with self._slots.lock:
            slot, dirty = self._check_clear(log)
            wanted = await copy_from_user(self._mm, log.dirty_bitmap, bitmap_bytes(log.num_pages))
            cleared = dirty.clear(log.first_page, wanted)
            with self.stores.telling(partial(_tells, slot, log.first_page, cleared)):
                self._mark_unnoticed(slot, dirty)
                await self._protect_again(slot, log.first_page, cleared)

    # awaits: asked: cannot change: rings are made before vCPUs and stay | taken: cannot change: a list of its
    # own
    async def reset_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: protect what user space has harvested.  How many entries."""
        if not self.ring_bytes:
            raise UapiError(errno.EINVAL, "the VM has no dirty rings")
        async with self._slots.lock:
            taken = [entry for ring in self.rings.values() for entry in ring.take_back()]
            pages: dict[tuple[int, int], set[int]] = defaultdict(set)
            for entry in taken:
                pages[entry.slot, entry.offset // _WALK_PAGES].add(entry.offset)
            for (number, _), offsets in pages.items():
                self._protect_offsets(number, offsets)
            if taken:
                with self.stores.telling(partial(_tells_of, pages)):
                    await self._flusher.flush(None)
            return len(taken)

    def is_dirty(self, slot: Memslot, gfn: Gfn) -> bool:
        """Is a store to this page sure to be in what user space still has to read from the bitmap?"""
        return slot.dirty is not None and gfn - slot.base_gfn in slot.dirty

    def tells(self, slot: Memslot, gfn: Gfn) -> bool:
        """Will user space read of a store to this page: from the bitmap, or from an entry it has not given
        back?"""
        if slot.dirty is None and any(ring.overflowed for ring in self.rings.values()):
            return True  # it let its rings run over, and was told
        page = gfn - slot.base_gfn
        return self.is_dirty(slot, gfn) or any(ring.tells(slot.number, page) for ring in self.rings.values())

    def _check_bitmap(self) -> None:
        if not self.uses_bitmap:
            raise UapiError(errno.ENXIO, "the VM logs into dirty rings, without bitmaps")

    def _logging_slot(self, number: int) -> tuple[Memslot, DirtyBitmap]:
        self._check_bitmap()
        slot = self._slots.numbered(number)
        if slot is None or slot.dirty is None:
            what = "does not log" if slot else "does not exist"
            raise UapiError(errno.ENOENT, f"slot {number:#x} {what}")
        return slot, slot.dirty

    def _check_clear(self, log: ClearDirtyLog) -> tuple[Memslot, DirtyBitmap]:
        """In the kernel's order: a first page that is no word's is told before a slot that is not there."""
        self._check_bitmap()
        self._slots.numbered(log.slot)
        if log.first_page % WORD_PAGES:
            raise UapiError(errno.EINVAL, f"first_page {log.first_page:#x}: not a multiple of {WORD_PAGES}")
        slot, dirty = self._logging_slot(log.slot)
        rest = slot.npages - log.first_page
        if log.num_pages > rest or (log.num_pages < rest and log.num_pages % WORD_PAGES):
            asked = f"{log.first_page:#x}+{log.num_pages:#x}"
            raise UapiError(errno.EINVAL, f"pages {asked} of {slot.npages:#x}: whole words, within the slot")
        return slot, dirty

    async def _protect_again(self, slot: Memslot, first_page: int, bits: bytes) -> None:
        """Pages whose bits were just cleared; nothing may await between that and this."""
        base = slot.base_gfn + first_page
        flush, wanted = False, SomePages(Gfn(base), bits)
        for start, end in runs(bits):
            span = GfnSpan(Gfn(base + start), Gfn(min(base + end, slot.span.end)))
            self._protect(slot, span, wanted)
            flush = True
        if flush:
            await self._flusher.flush(slot.span)

    def _protect_offsets(self, number: int, offsets: set[int]) -> None:
        """Of one ring or several; what no slot has any more, or never had, is nothing to protect.  The kernel
        drops up to 63 neighbours with it [KVM kvm_reset_dirty_gfn], whose stores nobody is told of then."""
        try:
            slot = self._slots.numbered(number)
        except UapiError:
            return
        there = {offset for offset in offsets if slot is not None and offset < slot.npages}
        if slot is None or not there:
            return
        base = slot.base_gfn
        span = GfnSpan(Gfn(base + min(there)), Gfn(base + max(there) + 1))
        self._protect(slot, span, SomePages.of(base + offset for offset in there))

    def _protect(self, slot: Memslot, span: GfnSpan, wanted: SomePages) -> None:
        for root in self._mmu.logged_roots(slot.as_id):
            if self.initially_set:  # nothing was split when logging began
                tdp_mmu.split(self._mmu, root, span, LEVEL_4K, SPLIT_BATCH)
            tdp_log.protect(self._mmu, root, span, wanted)


def _tells(slot: Memslot, first_page: int, bits: bytes, number: int, region: int) -> int:
    """Which pages of a region of slot `number` are among `bits`, those of `slot` from `first_page` on."""
    if number != slot.number:
        return 0
    at, size = (region * REGION_PAGES - first_page) // 8, REGION_PAGES // 8
    return int.from_bytes(bits[max(at, 0) : max(at + size, 0)], "little") << 8 * max(-at, 0)


def _tells_of(pages: Mapping[tuple[int, int], set[int]], number: int, region: int) -> int:
    """Which are among `pages`, which are listed by slot and walk."""
    walks = REGION_PAGES // _WALK_PAGES
    listed = [pages.get((number, walk), ()) for walk in range(region * walks, (region + 1) * walks)]
    return sum(1 << page % REGION_PAGES for some in listed for page in some)
