"""What is counted, once: each counter's name, unit and meaning, and which counters of daemons it adds up.

A source names what is added up.  `vm.` are counters of the VMs, all together, `kvmd.` of the host; `iommu.`
of iommufdd, `hwpt.` of its HWPTs; `unit.` of the remapping units, `device.` of the devices.  `guest.` the
machines count themselves: bytes their CPUs load and store, and the pages these are in.  A minus takes away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

Raw = Counter[str]


def counted(unit: str, meaning: str, *sources: str, exact: bool = True) -> Any:
    """`exact`: the same for the same scenario, design and seed, whoever is faster."""
    return field(default=0, metadata={"unit": unit, "meaning": meaning, "sources": sources, "exact": exact})


@dataclass(slots=True)
class Counters:
    """What happened in a span of time.  `_major`, `_spurious` and `_failed` are some of the faults, not
    others beside them; pages are of 4 KiB.
    """

    cpu_faults: int = counted("faults", "EPT violations of vCPUs", "vm.ept_violations")
    cpu_faults_major: int = counted("faults", "of them, read back from swap", "vm.pf_major")
    cpu_faults_spurious: int = counted("faults", "of them, whose entry was there already", "vm.pf_spurious")
    io_faults: int = counted("pages", "asked for by page requests of devices", "unit.page_requests")
    io_groups: int = counted("groups", "page request groups they came in", "device.page_request_groups")
    io_faults_major: int = counted(
        "faults", "of devices, read back from swap", "vm.io_pf_major", "iommu.io_faults_major"
    )
    io_faults_failed: int = counted(
        "groups", "answered with no page", "hwpt.faults.INVALID", "hwpt.faults.FAILURE"
    )
    io_faults_spurious: int = counted(
        "faults", "whose entry was there already", "vm.io_pf_spurious", "iommu.io_faults_spurious"
    )
    fault_retries: int = counted(
        "times", "a fault was overtaken by an invalidation", "vm.fault_retries", "iommu.io_fault_retries"
    )
    notes: int = counted("notes", "of KVM to iommufdd: a page was faulted in", "vm.notes")
    notes_mapped: int = counted("notes", "of them, that became an entry", "iommu.notes_mapped")
    notifier_calls: int = counted(
        "calls", "of MMU notifiers by the host's memory management", "kvmd.memory.notifier_calls"
    )
    flushes: int = counted("flushes", "KVM told all that walk its tables, and waited", "vm.remote_tlb_flush")
    invalidations: int = counted(
        "messages",
        "an importer was told, by KVM or the host",
        "hwpt.invalidations",
        "iommu.hmm_invalidations",
    )
    invalidation_waits: int = counted(
        "waits",
        "for remapping units to end the invalidation descriptors before them, one a submission",
        "unit.invalidation_waits",
    )
    iotlb_invalidations: int = counted("descriptors", "IOTLB invalidations", "unit.iotlb_invalidations")
    devtlb_invalidations: int = counted(
        "descriptors", "device-TLB invalidations", "unit.devtlb_invalidations"
    )
    kicks: int = counted(
        "kicks",
        "of remapping units: stores to the tail of a queue, behind invalidations and their wait or behind the"
        " response to a group",
        "iommu.kicks",
    )
    messages: int = counted(
        "messages",
        "of faults, notes and invalidations between KVM or the host and IOMMUFD: a fault to who resolves it,"
        " a note and the look it is worth, an invalidation to who keeps the table walked, one each",
        *("vm.io_pf_taken", "kvmd.memory.hmm_faults"),
        *("vm.notes", "iommu.notes", "-iommu.notes_lost"),
        *("hwpt.invalidations", "iommu.hmm_invalidations"),
    )
    pages_pinned: int = counted("pages", "pinned for long", "kvmd.memory.pages_pinned")
    pages_allocated: int = counted("pages", "the host allocated, for whomever", "kvmd.memory.pages_allocated")
    pages_allocated_cpu: int = counted("pages", "of them, by a vCPU's fault", "vm.pf_allocated")
    pages_allocated_io: int = counted(
        "pages", "of them, by an IO page fault", "vm.io_pf_allocated", "kvmd.memory.hmm_faults_allocated"
    )
    swap_ins: int = counted("pages", "read from swap", "kvmd.memory.swap_ins")
    swap_outs: int = counted("pages", "written to swap", "kvmd.memory.swap_outs")
    splits: int = counted("leaves", "taken apart", "vm.splits", "iommu.splits")
    collapses: int = counted("leaves", "put together", "vm.collapses", "iommu.collapses")
    cpu_bytes: int = counted("bytes", "loaded and stored by vCPUs", "guest.cpu_bytes")
    cpu_pages: int = counted("pages", "that these accesses met", "guest.cpu_pages")
    dma_bytes: int = counted("bytes", "moved by devices", "device.bytes_moved")
    dma_pages: int = counted("pages", "that this DMA met", "device.pages_moved")
    work_descriptors: int = counted("descriptors", "devices executed", "device.work_descriptors")
    pages_written: int = counted("pages", "written while logged, as the scenario knows")
    pages_reported: int = counted("pages", "reported dirty")
    pages_missed: int = counted("pages", "written and never reported")

    pages_mapped_cpu: int = counted("pages", "KVM mapped for a vCPU's fault", "vm.pf_fixed", exact=False)
    pages_mapped_io: int = counted("pages", "KVM mapped for a device's", "vm.io_pf_fixed", exact=False)
    io_faults_refused: int = counted("faults", "of devices, that KVM refused", "vm.io_pf_failed", exact=False)
    stores_emulated: int = counted("accesses", "KVM emulated", "vm.pf_emulate", exact=False)
    mmio_entries: int = counted("entries", "of MMIO that KVM cached", "vm.pf_mmio_spte_created", exact=False)
    memslot_generations: int = counted(
        "generations", "the memslots went through", "vm.memslot_generation", exact=False
    )
    invalidation_descriptors: int = counted(
        "descriptors",
        "IOTLB and device-TLB invalidations together",
        "unit.invalidation_descriptors",
        exact=False,
    )
    iotlb_hits: int = counted("requests", "the IOTLB answered", "unit.iotlb_hits", exact=False)
    iotlb_misses: int = counted("requests", "it did not", "unit.iotlb_misses", exact=False)
    devtlb_hits: int = counted("accesses", "the device TLB answered", "device.devtlb_hits", exact=False)
    devtlb_misses: int = counted("accesses", "it did not", "device.devtlb_misses", exact=False)
    interrupts: int = counted(
        "interrupts", "units passed on: DMA writes of 4 bytes to 0xfeexxxxx", "unit.interrupts", exact=False
    )
    faults_recorded: int = counted("faults", "units recorded", "unit.faults_recorded", exact=False)
    records_lost: int = counted(
        "errors", "in SWERR: lost records, failed translations", "device.software_errors", exact=False
    )
    dma_faults: int = counted(
        "descriptors", "that ended in a page fault", "device.statuses.PAGE_FAULT_NOBOF", exact=False
    )
    stale_accesses: int = counted(
        "accesses", "of devices to frames given up (I6: none)", "device.stale_accesses", exact=False
    )

    def take(self, other: Counters) -> None:
        """Be equal to it: for who was handed out before it was known."""
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))

    @classmethod
    def of(cls, raw: Raw) -> Counters:
        """Added up of the daemons' own counters."""
        return cls(**added_up(SOURCES, raw))


SOURCES: Mapping[str, tuple[str, ...]] = {each.name: each.metadata["sources"] for each in fields(Counters)}
# Those a run keeps of each step; a scenario's own come from nobody else.
COUNTS = {
    each.name: SOURCES[each.name]
    for each in fields(Counters)
    if each.metadata["exact"] and SOURCES[each.name]
}
GAUGES: Mapping[str, tuple[str, ...]] = {
    "pinned_pages": ("kvmd.memory.pinned_pages",),
    "resident_pages": ("kvmd.frames",),
}
# What must be nothing before a sample, counted since the run began: faults, notes and invalidations that are
# still on their way.
UNDER_WAY: Mapping[str, tuple[str, ...]] = {
    "page requests on their way": ("unit.page_requests", "-iommu.page_requests"),
    "page requests without an answer": ("device.page_requests_outstanding",),
    "page requests that wait for their group": ("iommu.partial_held",),
    "notes on their way": ("vm.notes", "-iommu.notes"),
    "notes not looked at": ("iommu.notes_pending",),
}


def flatten(kvmd: Mapping[str, Any], iommu: Mapping[str, Any], silicon: Mapping[str, Any]) -> Raw:
    """All numbers of the daemons' STATS under the prefixes above."""
    raw: Raw = Counter()
    _add(raw, "kvmd.", kvmd)
    _add(raw, "iommu.", iommu)
    _add(raw, "unit.", silicon["unit"])
    for prefix, each in (
        ("vm.", kvmd["vms"]),
        ("hwpt.", iommu["hwpts"]),
        ("device.", silicon["devices"].values()),
    ):
        for stats in each:
            _add(raw, prefix, stats)
    return raw


def _add(raw: Raw, prefix: str, stats: Mapping[str, Any]) -> None:
    for name, value in stats.items():
        if isinstance(value, int):
            raw[prefix + name] += value
        elif isinstance(value, Mapping):
            _add(raw, f"{prefix}{name}.", value)


def tables(raw: Raw) -> dict[str, int]:
    """The gauges of table pages: whoever keeps tables says so under the gauge's own name."""
    found: Counter[str] = Counter()
    for name, count in raw.items():
        _, dot, gauge = name.partition(".")
        if dot and gauge.startswith("table_pages."):
            found[gauge] += count
    return dict(sorted(found.items()))


def grown(raw: Raw, before: Raw | None) -> Raw:
    """What came since `before`."""
    since = Counter(raw)
    since.subtract(before or {})
    return since


def added_up(rows: Mapping[str, tuple[str, ...]], raw: Raw) -> dict[str, int]:
    """A minus before a name takes it away."""
    return {
        name: sum(-raw[key[1:]] if key.startswith("-") else raw[key] for key in keys)
        for name, keys in rows.items()
    }
