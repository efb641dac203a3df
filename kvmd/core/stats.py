"""Counters of a VM under KVM's names, and those the RFC adds: faults told apart by who raised them.

`pf_*` are vCPU faults (EPT violations), `io_pf_*` faults that came through the TDP FD [KVM kvm_host.h].
Counters grow for the life of the VM; `pages_*` and `table_pages` are what is there now.
"""

from __future__ import annotations

from collections import Counter

from kvmd.core.faults.page_fault import EMULATED, RESOLVED, FaultResult, FaultSource
from kvmd.core.vm import Kvm


def vm_stats(vm: Kvm) -> dict[str, int]:
    stats = {
        "vm": vm.id,
        "vcpus": len(vm.vcpus),
        "exported_tdps": len(vm.exports.tdps),
        "vcpus_apart": _vcpus_apart(vm),
        "noncoherent_dma": vm.exports.noncoherent_dma,
        "importers": sum(exported.importers for exported in vm.exports.tdps.values()),
        "ept_violations": sum(vcpu.arch.ept_violations for vcpu in vm.vcpus),
        "pf_mmio_spte_created": sum(vcpu.arch.mmio_sptes_made for vcpu in vm.vcpus),
        "tlb_flush": sum(vcpu.arch.tlb_flushes for vcpu in vm.vcpus),
        "memslot_generation": vm.slots.generation,
        "fault_retries": vm.fault_path.retries,
        "notes": vm.fault_notes.posted,
        "notes_dropped": vm.fault_notes.dropped,
        "remote_tlb_flush": vm.flusher.epoch,
        "pages_4k": sum(root.leaves[1] for root in vm.mmu.roots),
        "pages_2m": sum(root.leaves[2] for root in vm.mmu.roots),
        "pages_1g": sum(root.leaves[3] for root in vm.mmu.roots),
        "pinned_pages": len(vm.pinning.pinned),
        "table_pages": sum(root.tables for root in vm.mmu.roots),
        "table_pages_held": vm.host.pool.held(vm.id),
        "splits": vm.mmu.splits,
        "collapses": vm.mmu.collapses,
        **_tables_by_owner(vm),
    }
    for source, prefix in ((FaultSource.VCPU, "pf"), (FaultSource.IO, "io_pf")):
        taken = {result: vm.fault_path.faults[source, result] for result in FaultResult}
        stats[f"{prefix}_taken"] = sum(taken.values())
        stats[f"{prefix}_fixed"] = taken[FaultResult.FIXED] + taken[FaultResult.FAST]
        stats[f"{prefix}_fast"] = taken[FaultResult.FAST]
        stats[f"{prefix}_spurious"] = taken[FaultResult.SPURIOUS]
        stats[f"{prefix}_major"] = vm.fault_path.tallies[source].major
        stats[f"{prefix}_allocated"] = vm.fault_path.tallies[source].allocated
        emulated = sum(taken[result] for result in EMULATED) if source is FaultSource.VCPU else 0
        if source is FaultSource.VCPU:  # for a device what only KVM could emulate has failed
            stats["pf_emulate"] = emulated
        unresolved = sum(count for result, count in taken.items() if result not in RESOLVED)
        stats[f"{prefix}_failed"] = unresolved - emulated
    return stats


def _vcpus_apart(vm: Kvm) -> int:
    """How many vCPUs were given a width, before the export, for which they need another root than the
    exported one.
    """
    exports = vm.exports
    return sum(
        exports.is_apart(exported, vcpu.arch.maxphyaddr)
        for exported in exports.tdps.values()
        for vcpu in vm.vcpus
    )


def _tables_by_owner(vm: Kvm) -> dict[str, int]:
    """`table_pages.<owner>.<level>`: by who walks them, and the level of their entries."""
    found: Counter[str] = Counter()
    for root in vm.mmu.roots:
        for level in range(1, root.role.level + 1):
            found[f"table_pages.{root.owner}.{level}"] += root.tables_at[level]
    return found
