"""Which counters of the daemons make up the counts and gauges of a sample: one table.

A row names what is added up.  `vm.` are counters of the VMs, all together, `kvmd.` of the host; `iommu.` of
iommufdd, `hwpt.` of its HWPTs; `unit.` of the remapping units, `device.` of the devices.  `guest.` the
machines count themselves: bytes their CPUs load and store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

Raw = Counter[str]

COUNTS: Mapping[str, tuple[str, ...]] = {
    "cpu_faults": ("vm.ept_violations",),
    "cpu_faults_spurious": ("vm.pf_spurious",),
    "io_faults": ("unit.page_requests",),
    "io_faults_failed": ("hwpt.faults.INVALID", "hwpt.faults.FAILURE"),
    "io_faults_spurious": ("vm.io_pf_spurious",),
    "fault_retries": ("vm.fault_retries",),
    "flushes": ("vm.remote_tlb_flush",),
    "invalidations": ("hwpt.invalidations",),
    "cpu_bytes": ("guest.cpu_bytes",),
    "dma_bytes": ("device.bytes_moved",),
    "descriptors": ("device.descriptors",),
}
GAUGES: Mapping[str, tuple[str, ...]] = {
    "pinned_pages": ("vm.pinned_pages",),
    "resident_pages": ("kvmd.frames",),
}
# What must be nothing before a sample: faults, notes and invalidations that are still on their way.
UNDER_WAY: Mapping[str, tuple[str, ...]] = {
    "page requests on their way": ("unit.page_requests", "-iommu.page_requests"),
    "page requests without an answer": ("device.page_requests_outstanding",),
    "page requests that wait for their group": ("iommu.partial_held",),
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


def added_up(rows: Mapping[str, tuple[str, ...]], raw: Raw) -> dict[str, int]:
    """A minus before a name takes it away."""
    return {
        name: sum(-raw[key[1:]] if key.startswith("-") else raw[key] for key in keys)
        for name, keys in rows.items()
    }
