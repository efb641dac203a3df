"""The way of a page fault on the TDP: slot, host page, was it taken away meanwhile, map.

Models kvm_tdp_page_fault and kvm_mmu_fault_exported_tdp [RFC 37/42] as one path: the RFC copied it for faults
without a vCPU, and nothing in it needs one.  The host page is looked up outside any lock and the lookup may
sleep, so what was found before it is looked at again after it.

Invariants with their home here: I5 a host page looked up before an invalidation is not mapped after it;
I11 an entry maps the page the host has there now.
"""

from __future__ import annotations

import errno
from collections import Counter
from dataclasses import replace

from kvmd.core.faults.fault_notes import FaultNotes
from kvmd.core.faults.leaf_levels import LeafLevels, first_pfn
from kvmd.core.faults.nx_huge import NxHugePages
from kvmd.core.faults.page_fault import (
    LOOKUP_RESULT,
    MAX_TRIES,
    FaultingVcpu,
    FaultResult,
    FaultSource,
    PageFault,
)
from kvmd.core.mm.fault import FaultCounts
from kvmd.core.mm.page import MappedPage
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.guest_frames import GuestFrames
from kvmd.core.slots.memslot import Memslot
from kvmd.core.tables import tdp_log, tdp_mmu
from kvmd.core.tables.root_policy import CPUS
from kvmd.core.tables.tdp import VmTdp
from kvmd.core.tables.tdp_mmu import MapOutcome, Mapped
from kvmd.core.tables.tdp_table import Root
from protocol.errors import UapiError
from protocol.pt.geometry import entry_start, gfn_limit
from protocol.trace import TRACE, KvmMmuSpteRequested
from protocol.units import Gfn, GfnSpan, pages_of_level


class FaultPath:
    """Of one VM."""

    def __init__(
        self,
        frames: GuestFrames,
        levels: LeafLevels,
        tdp: VmTdp,
        nx_huge: NxHugePages,
        dirty_log: DirtyLog,
        notes: FaultNotes,
    ) -> None:
        self.faults: Counter[tuple[FaultSource, FaultResult]] = Counter()
        self.tallies = {source: FaultCounts() for source in FaultSource}
        self.retries = 0
        self._frames = frames
        self._levels = levels
        self._mmu = tdp.mmu
        self._flusher = tdp.flusher
        self._nx_huge = nx_huge
        self._dirty_log = dirty_log
        self._notes = notes

    async def handle_fault(self, fault: PageFault, vcpu: FaultingVcpu | None = None) -> FaultResult:
        """Populate `fault.gfn` in the root of `vcpu`, or in the exported one when a device asks."""
        result = await self._resolve(fault, vcpu)
        self.faults[fault.source, result] += 1
        return result

    # awaits: vcpu: cannot change: it lives as long as its VM
    async def _resolve(self, fault: PageFault, vcpu: FaultingVcpu | None) -> FaultResult:
        for _ in range(MAX_TRIES):
            result = await self._try(fault, vcpu)
            if result is not None:
                return result
            self.retries += 1
        return FaultResult.UNSTABLE

    # awaits: hva, vcpu: cannot change: a number, and a vCPU lives as long as its VM | slot, asked: the slot
    # may go, move, or be another one; asked again: after the lookup, or by the next try
    # (tests/unit/kvmd/test_fault_asleep.py::test_slot_goes_under_a_vcpu_s_fault) | seq, page: the host may
    # take the page, or its kind may change, which moves the sequence too; asked again: `stale`
    # (tests/properties/test_kvmd.py::test_a_planted_bug_is_caught_by_a_schedule_written_out)
    async def _try(self, fault: PageFault, vcpu: FaultingVcpu | None) -> FaultResult | None:
        """None: something was in the way; it may be gone now."""
        frames, gfn = self._frames, fault.gfn
        slot = frames.slots.find(gfn, fault.as_id)
        if slot is None:
            self._remember_mmio(gfn, vcpu, fault.as_id)
            return FaultResult.NO_SLOT
        if slot is frames.slots.going:
            if fault.prefetch:  # who asks in advance can ask again [KVM mmu.c, kvm_mmu_faultin_pfn]
                return FaultResult.UNSTABLE
            await frames.slots.settled
            return None
        if fault.write and slot.readonly:
            return FaultResult.READONLY
        if fault.write and frames.page_track.is_tracked(slot, gfn) and (vcpu or self._mmu.lent_policy.tracks):
            return FaultResult.TRACKED
        if fault.write and self._mmu.may_lack_write and self._fast_page_fault(fault, slot, vcpu):
            return FaultResult.FAST
        pinned = frames.pinned.page_of(slot, gfn)
        if pinned is not None:
            return await self._map(fault, slot, pinned, vcpu)
        private = frames.private.serves(slot, gfn)
        hva = slot.hva_of(gfn)
        if frames.host_changes.is_changing(hva, gfn):  # no use to look the page up until the host is done
            await frames.host_changes.settled(hva, gfn)
            return None
        seq = frames.host_changes.seq
        try:
            if private:
                page = frames.private.page(slot, gfn)
            else:
                tally = self.tallies[fault.source]
                if slot.readonly:  # no use to know whether it may be written [hva_to_pfn_slow]
                    page = await frames.mm.fault_in(hva, write=False, tally=tally)
                else:
                    page = await frames.mm.get_user_page(hva, write=fault.write, tally=tally)
        except UapiError as error:
            return LOOKUP_RESULT.get(error.errno, FaultResult.NO_PAGE)
        stale = seq != frames.host_changes.seq or frames.host_changes.is_changing(hva, gfn)
        if stale or frames.slots.find(gfn, fault.as_id) is not slot or slot is frames.slots.going:
            return None
        return FaultResult.MEMORY_FAULT if page is None else await self._map(fault, slot, page, vcpu)

    # awaits: mapped: cannot change: an answer of its own
    async def _map(
        self, fault: PageFault, slot: Memslot, page: MappedPage, vcpu: FaultingVcpu | None
    ) -> FaultResult | None:
        root = self._fault_root(vcpu, fault.as_id)
        try:
            mapped = self._store(root, fault, slot, page, vcpu)
        except UapiError:  # no page left for a table
            return FaultResult.NO_MEMORY
        flush = mapped.flush
        if self._mmu.lent_policy.filled_beside:
            flush = max(flush, self._map_in_other_roots(root, fault, slot, page), key=_pages)
        if flush is not None:
            await self._flusher.flush(flush)
        if mapped.outcome is MapOutcome.RETRY:  # who froze the entry waits for a flush
            await self._flusher.drain()
            return None
        return FaultResult.FIXED if mapped.outcome is MapOutcome.FIXED else FaultResult.SPURIOUS

    def _store(
        self, root: Root, fault: PageFault, slot: Memslot, page: MappedPage, vcpu: FaultingVcpu | None
    ) -> Mapped:
        """Map `page` into one root, with what that root may have of it.  ENOMEM: no page left for a table."""
        gfn, policy = fault.gfn, root.role.policy
        wanted = self._levels.level_of(slot, gfn, page, policy)
        level = self._nx_huge.level(root, fault, wanted)
        pfn = first_pfn(slot, gfn, page, level)
        if TRACE.on:
            TRACE.emit(KvmMmuSpteRequested(gfn, pfn | gfn & pages_of_level(level) - 1, level))
        tracked = policy.tracks and self._frames.page_track.is_tracked(slot, gfn)
        writable = page.writable and not slot.readonly and not tracked
        mapped = tdp_mmu.map_page(
            self._mmu,
            root,
            gfn,
            pfn,
            level,
            writable=writable,
            accessed=not fault.prefetch,
            fetch=fault.fetch,
        )
        self._nx_huge.mapped(root, fault, wanted)
        if mapped.outcome is MapOutcome.FIXED:
            if writable and slot.logs:
                if policy.logs:  # a small leaf
                    self._dirty_log.mark(slot, gfn, None if vcpu is None else vcpu.id)
                else:
                    self._dirty_log.mark(slot, entry_start(gfn, level), None, pages_of_level(level))
            if self._notes.subscribers and vcpu and not fault.as_id:
                self._notes.post(gfn, level, writable=writable)
        return mapped

    def _map_in_other_roots(
        self, root: Root, fault: PageFault, slot: Memslot, page: MappedPage
    ) -> GfnSpan | None:
        """CPUs and IOMMU both get the page; without room, who needs it there faults.  What to flush."""
        flush = None
        try:
            for other in self._other_roots(root):
                if fault.gfn < gfn_limit(other.role.level):
                    as_a_devices = PageFault(fault.gfn, fault.write, FaultSource.IO, fault.as_id)
                    also = self._store(other, as_a_devices, slot, page, None).flush
                    flush = max(flush, also, key=_pages)
        except UapiError:
            return flush
        return flush

    def _fault_root(self, vcpu: FaultingVcpu | None, as_id: int) -> Root:
        """A vCPU of another width than the exported root's has a root of its own (defect B-28).  ENODEV: the
        TDP FD was released while a device's fault slept.
        """
        if vcpu is not None:
            return vcpu.load_root(as_id)
        root = self._mmu.exported_root(0)
        if root is None:
            raise UapiError(errno.ENODEV, "the TDP is not exported any more")
        return root

    def _other_roots(self, own: Root) -> list[Root]:
        """Where what is faulted into `own` goes as well, when CPUs and IOMMU share none: to the others'.  A
        root of CPUs is made if no vCPU has run since a slot went.  ENOMEM.
        """
        role = own.role
        if not role.policy.cpus:
            self._mmu.put_root(self._mmu.get_root(replace(role, policy=CPUS)))
            return self._mmu.cpu_roots(role.as_id)
        lent = self._mmu.exported_root(role.as_id)
        return [] if lent is None else [lent]

    def _remember_mmio(self, gfn: Gfn, vcpu: FaultingVcpu | None, as_id: int) -> None:
        """An MMIO entry for a vCPU to find; a device's fault leaves nothing, nor what no entry can say."""
        if vcpu is not None and gfn < self._frames.slots.gfn_limit:
            made = tdp_mmu.map_mmio(self._mmu, vcpu.load_root(as_id), gfn, self._frames.slots.generation)
            vcpu.mmio_sptes_made += made

    def _fast_page_fault(self, fault: PageFault, slot: Memslot, vcpu: FaultingVcpu | None) -> bool:
        """The page is mapped and only logging took W: no look at the host page is needed [KVM mmu.c]."""
        root = self._fault_root(vcpu, fault.as_id)
        if not tdp_log.fast_page_fault(self._mmu, root, fault.gfn, logs=slot.logs):
            return False
        self._dirty_log.mark(slot, fault.gfn, None if vcpu is None else vcpu.id)
        return True


def _pages(span: GfnSpan | None) -> int:
    """To tell which is wider of two spans of entries over one gfn."""
    return 0 if span is None else span.npages
