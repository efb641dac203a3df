"""Which counters of the daemons make up the counts and gauges of a sample: one table.

A row names what is added up.  `vm.` are counters of the VMs, all together, `kvmd.` of the host; `iommu.` of
iommufdd, `hwpt.` of its HWPTs; `unit.` of the remapping units, `device.` of the devices.  `guest.` the
machines count themselves: bytes their CPUs load and store, and the pages these are in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

Raw = Counter[str]

COUNTS: Mapping[str, tuple[str, ...]] = {
    "cpu_faults": ("vm.ept_violations",),
    "cpu_faults_major": ("vm.pf_major",),
    "cpu_faults_spurious": ("vm.pf_spurious",),
    "io_faults": ("unit.page_requests",),
    "io_groups": ("device.page_request_groups",),
    "io_faults_major": ("vm.io_pf_major", "iommu.io_faults_major"),
    "io_faults_failed": ("hwpt.faults.INVALID", "hwpt.faults.FAILURE"),
    "io_faults_spurious": ("vm.io_pf_spurious", "iommu.io_faults_spurious"),
    "fault_retries": ("vm.fault_retries", "iommu.io_fault_retries"),
    "notes": ("vm.notes",),
    "notes_mapped": ("iommu.notes_mapped",),
    "notifier_calls": ("kvmd.memory.notifier_calls",),
    "flushes": ("vm.remote_tlb_flush",),
    "invalidations": ("hwpt.invalidations", "iommu.hmm_invalidations"),  # by KVM, by the host
    "qi_messages": ("unit.invalidation_messages",),
    "iotlb_invalidations": ("unit.iotlb_invalidations",),
    "devtlb_invalidations": ("unit.devtlb_invalidations",),
    # One each: a group of page requests and its response, a fault to who resolves it, a note and the look it
    # is worth, an invalidation to who keeps the table walked, and what that one tells the unit.
    "messages": (
        *("device.page_request_groups", "iommu.responses", "vm.io_pf_taken", "kvmd.memory.hmm_faults"),
        *("vm.notes", "iommu.notes", "-iommu.notes_lost"),
        *("hwpt.invalidations", "iommu.hmm_invalidations", "unit.invalidation_messages"),
    ),
    "pages_pinned": ("kvmd.memory.pages_pinned",),
    "pages_allocated": ("kvmd.memory.pages_allocated",),
    "pages_allocated_cpu": ("vm.pf_allocated",),
    "pages_allocated_io": ("vm.io_pf_allocated", "kvmd.memory.hmm_faults_allocated"),
    "swap_ins": ("kvmd.memory.swap_ins",),
    "swap_outs": ("kvmd.memory.swap_outs",),
    "splits": ("vm.splits", "iommu.splits"),
    "collapses": ("vm.collapses", "iommu.collapses"),
    "cpu_bytes": ("guest.cpu_bytes",),
    "cpu_pages": ("guest.cpu_pages",),
    "dma_bytes": ("device.bytes_moved",),
    "dma_pages": ("device.pages_moved",),
    "descriptors": ("device.descriptors",),
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
        elif isinstance(value, Mapping) and prefix + name != "silicon.devices":
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
