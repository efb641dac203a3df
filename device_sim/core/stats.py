"""Counters of the remapping unit and of a device, for people and scenarios.

Names follow the hardware: hits and misses of the IOTLB (in the unit) and of the device TLB (in the
function), page requests (entries of the queue) and groups (answered once each), interrupt messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from device_sim.core.dmar import RemappingUnit
from device_sim.core.root_complex import Device


def unit_stats(units: Sequence[RemappingUnit]) -> dict[str, object]:
    """Of all units together."""
    total: Counter[str] = Counter()
    for unit in units:
        total.update(_counters(unit))
    return {
        **total,
        "interrupt_messages": [list(message) for unit in units for message in unit.interrupt_messages],
    }


def _counters(unit: RemappingUnit) -> dict[str, int]:
    return {
        "iotlb_hits": unit.iotlb.hits,
        "iotlb_misses": unit.iotlb.misses,
        "psc_hits": unit.iotlb.psc_hits,
        "walks": unit.walks,
        "invalidation_descriptors": unit.invalidation_descriptors,
        "iotlb_invalidations": unit.iotlb_invalidations,
        "devtlb_invalidations": unit.devtlb_invalidations,
        "invalidation_waits": unit.invalidation_waits,
        "page_requests": unit.prq.requests,
        "page_requests_dropped": unit.prq.dropped,
        "faults_recorded": unit.faults.recorded,
        "faults_lost": unit.faults.lost,
        "interrupts": unit.interrupts,
    }


def device_stats(device: Device) -> dict[str, object]:
    dsa, function = device.dsa, device.function
    return {
        "work_descriptors": dsa.counters.descriptors,
        "bytes_moved": dsa.counters.bytes_moved,
        "pages_moved": dsa.counters.pages_moved,
        "software_errors": dsa.counters.software_errors,
        "statuses": {status.name: count for status, count in dsa.counters.statuses.items()},
        "devtlb_hits": function.devtlb.hits,
        "devtlb_misses": function.devtlb.misses,
        "page_request_groups": function.pri.groups,
        "page_requests_outstanding": function.pri.outstanding,
        "io_faults": function.io_faults,
        "fault_latencies_ns": list(function.fault_latencies_ns),
        "stale_accesses": function.stale,
        "stale_notes": function.stale_notes,
        "pasid_entry": device.unit.pasid_entry(device.traits.rid),
    }
