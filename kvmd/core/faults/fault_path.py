"""The way of a page fault on the TDP: slot, host page, was it taken away meanwhile, map.

Models kvm_tdp_page_fault and kvm_mmu_fault_exported_tdp [RFC 37/42] as one path: the RFC copied it for faults
without a vCPU, and nothing in it needs one.  The host page is looked up outside any lock and the lookup may
sleep, so what was found before it is looked at again after it.

Invariants with their home here: I5 a host page looked up before an invalidation is not mapped after it;
I11 an entry maps the page the host has there now.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmd.core.cpu.vcpu import Vcpu
from kvmd.core.faults.page_fault import (
    LOOKUP_RESULT,
    MAX_TRIES,
    FaultResult,
    FaultSource,
    PageFault,
    first_pfn,
)
from kvmd.core.mm.page import MappedPage
from kvmd.core.slots.memslot import Memslot
from kvmd.core.tables import tdp_log, tdp_mmu
from kvmd.core.tables.tdp_mmu import Mapped, Outcome
from kvmd.core.tables.tdp_table import Root
from protocol.errors import UapiError
from protocol.pt.geometry import entry_start, gfn_limit
from protocol.trace import TRACE, KvmMmuSpteRequested
from protocol.units import PAGE_SHIFT, Gfn, GfnSpan, pages_of_level

if TYPE_CHECKING:
    from kvmd.core.vm import Kvm


class FaultPath:
    """Of one VM."""

    def __init__(self, vm: Kvm) -> None:
        self._vm = vm

    async def handle_fault(self, fault: PageFault, vcpu: Vcpu | None = None) -> FaultResult:
        """Populate `fault.gfn` in the root of `vcpu`, or in the exported one when a device asks."""
        result = await self._resolve(fault, vcpu)
        self._vm.faults[fault.source, result] += 1
        return result

    # awaits: vcpu: cannot change: it lives as long as its VM
    async def _resolve(self, fault: PageFault, vcpu: Vcpu | None) -> FaultResult:
        for _ in range(MAX_TRIES):
            result = await self._try(fault, vcpu)
            if result is not None:
                return result
            self._vm.retries += 1
        return FaultResult.UNSTABLE

    # awaits: hva, vcpu: cannot change: a number, and a vCPU lives as long as its VM | slot, asked: the slot
    # may go, move, or be another one; asked again: after the lookup, or by the next try
    # (tests/unit/kvmd/test_fault_asleep.py::test_slot_goes_under_a_vcpu_s_fault) | private, seq, page: the
    # host may take the page, or its kind may change; asked again: `stale`
    # (tests/properties/test_kvmd.py::test_a_planted_bug_is_caught_by_a_schedule_written_out)
    async def _try(self, fault: PageFault, vcpu: Vcpu | None) -> FaultResult | None:
        """None: something was in the way; it may be gone now."""
        vm = self._vm
        gfn = fault.gfn
        slot = vm.slots.find(gfn, fault.as_id)
        if slot is None:
            self._remember_mmio(gfn, vcpu, fault.as_id)
            return FaultResult.NO_SLOT
        if slot is vm.slots.going:
            if fault.prefetch:  # who asks in advance can ask again [KVM mmu.c, kvm_mmu_faultin_pfn]
                return FaultResult.UNSTABLE
            await vm.slots.settled
            return None
        if fault.write and slot.readonly:
            return FaultResult.READONLY
        if fault.write and vm.page_track.is_tracked(slot, gfn) and (vcpu or vm.lent_policy.tracks):
            return FaultResult.TRACKED
        if fault.write and vm.mmu.may_lack_write and self._fast_page_fault(fault, slot, vcpu):
            return FaultResult.FAST
        pinned = vm.pinning.pinned.page_of(slot, gfn)
        if pinned is not None:
            return await self._map(fault, slot, pinned, vcpu)
        private = vm.private.serves(slot, gfn)
        hva = slot.hva_of(gfn)
        if vm.host_changes.is_changing(hva, gfn):  # no use to look the page up: wait until the host is done
            await vm.host_changes.over
            return None
        seq = vm.host_changes.seq
        try:
            if private:
                page = vm.private.page(slot, gfn)
            else:
                tally = vm.tallies[fault.source]
                if slot.readonly:  # no use to know whether it may be written [hva_to_pfn_slow]
                    page = await vm.mm.fault_in(hva, write=False, tally=tally)
                else:
                    page = await vm.mm.get_user_page(hva, write=fault.write, tally=tally)
        except UapiError as error:
            return LOOKUP_RESULT.get(error.errno, FaultResult.NO_PAGE)
        stale = seq != vm.host_changes.seq or vm.host_changes.is_changing(hva, gfn)
        stale |= vm.private.serves(slot, gfn) != private
        if stale or vm.slots.find(gfn, fault.as_id) is not slot or slot is vm.slots.going:
            return None
        return FaultResult.MEMORY_FAULT if page is None else await self._map(fault, slot, page, vcpu)

    # awaits: mapped: cannot change: an answer of its own
    async def _map(
        self, fault: PageFault, slot: Memslot, page: MappedPage, vcpu: Vcpu | None
    ) -> FaultResult | None:
        vm = self._vm
        root = self._fault_root(vcpu, fault.as_id)
        try:
            mapped = self._store(root, fault, slot, page, vcpu)
        except UapiError:  # no page left for a table
            return FaultResult.NO_MEMORY
        flush = mapped.flush
        if vm.lent_policy.filled_beside:
            flush = max(flush, self._store_beside(root, fault, slot, page), key=_pages)
        if flush is not None:
            await vm.flusher.flush(flush)
        if mapped.outcome is Outcome.RETRY:  # who froze the entry waits for a flush
            await vm.flusher.drain()
            return None
        return FaultResult.FIXED if mapped.outcome is Outcome.FIXED else FaultResult.SPURIOUS

    def _store(
        self, root: Root, fault: PageFault, slot: Memslot, page: MappedPage, vcpu: Vcpu | None
    ) -> Mapped:
        """Map `page` into one root, with what that root may have of it.  ENOMEM: no page left for a table."""
        vm, gfn, policy = self._vm, fault.gfn, root.role.policy
        wanted = vm.level_of(slot, gfn, page, policy)
        level = vm.nx_huge.level(root, fault, wanted)
        pfn = first_pfn(slot, gfn, page, level)
        if TRACE.on:
            TRACE.emit(KvmMmuSpteRequested(gfn, pfn | gfn & pages_of_level(level) - 1, level))
        tracked = policy.tracks and vm.page_track.is_tracked(slot, gfn)
        writable = page.writable and not slot.readonly and not tracked
        mapped = tdp_mmu.map_page(
            vm.mmu,
            root,
            gfn,
            pfn,
            level,
            writable=writable,
            accessed=not fault.prefetch,
            fetch=fault.fetch,
        )
        vm.nx_huge.mapped(root, fault, wanted)
        if mapped.outcome is Outcome.FIXED:
            if writable and slot.logs:
                if policy.logs:  # a small leaf
                    vm.mark_page_dirty(slot, gfn, vcpu)
                else:
                    vm.dirty_log.mark(slot, entry_start(gfn, level), None, pages_of_level(level))
            if vm.fault_notes.subscribers and vcpu and not fault.as_id:
                vm.fault_notes.post(gfn, level, writable=writable)
        return mapped

    def _store_beside(self, root: Root, fault: PageFault, slot: Memslot, page: MappedPage) -> GfnSpan | None:
        """CPUs and IOMMU both get the page; without room, who needs it there faults.  What to flush."""
        flush = None
        try:
            for other in self._vm.roots_beside(root):
                if fault.gfn < gfn_limit(other.role.level):
                    as_a_devices = PageFault(fault.gfn, fault.write, FaultSource.IO, fault.as_id)
                    also = self._store(other, as_a_devices, slot, page, None).flush
                    flush = max(flush, also, key=_pages)
        except UapiError:
            return flush
        return flush

    def _fault_root(self, vcpu: Vcpu | None, as_id: int) -> Root:
        """A vCPU of another width than the exported root's has a root of its own (defect B-28).  ENODEV: the
        TDP FD was released while a device's fault slept.
        """
        vm = self._vm
        if vcpu is not None:
            return vm.load_root(vcpu, as_id)
        if 0 not in vm.exported:
            raise UapiError(errno.ENODEV, "the TDP is not exported any more")
        return vm.exported[0].root

    def _remember_mmio(self, gfn: Gfn, vcpu: Vcpu | None, as_id: int) -> None:
        """An MMIO entry for a vCPU to find; a device's fault leaves nothing, nor what no entry can say."""
        vm = self._vm
        if vcpu is not None and gfn < 1 << (vm.host.features.maxphyaddr - PAGE_SHIFT):
            made = tdp_mmu.map_mmio(vm.mmu, vm.load_root(vcpu, as_id), gfn, vm.slots.generation)
            vcpu.mmio_sptes_made += made

    def _fast_page_fault(self, fault: PageFault, slot: Memslot, vcpu: Vcpu | None) -> bool:
        """The page is mapped and only logging took W: no look at the host page is needed [KVM mmu.c]."""
        vm = self._vm
        root = self._fault_root(vcpu, fault.as_id)
        if not tdp_log.fast_page_fault(vm.mmu, root, fault.gfn, logs=slot.logs):
            return False
        vm.mark_page_dirty(slot, fault.gfn, vcpu)
        return True


def _pages(span: GfnSpan | None) -> int:
    """To tell which is wider of two spans of entries over one gfn."""
    return 0 if span is None else span.npages
