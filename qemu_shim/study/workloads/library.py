"""All workloads, by name."""

from __future__ import annotations

from qemu_shim.api import Scenario
from qemu_shim.scenarios.files import is_file, scenario_of
from qemu_shim.study.workloads import (
    balloon,
    boot_touch,
    device_first,
    dmatest,
    hotplug_storm,
    huge_pages,
    late_attach,
    migration,
    overcommit,
    ring_and_buffers,
    streaming,
)

WORKLOADS: dict[str, Scenario] = {
    workload.name: workload
    for workload in (
        boot_touch.WORKLOAD,
        device_first.WORKLOAD,
        late_attach.WORKLOAD,
        ring_and_buffers.WORKLOAD,
        streaming.WORKLOAD,
        balloon.WORKLOAD,
        migration.WORKLOAD,
        hotplug_storm.WORKLOAD,
        huge_pages.WORKLOAD,
        overcommit.WORKLOAD,
        dmatest.WORKLOAD,
    )
}


def workload_of(name: str) -> Scenario:
    """One of them, or a file's.  LookupError: there is none."""
    if is_file(name):
        return scenario_of(name)
    if name not in WORKLOADS:
        raise LookupError(f"there is no workload {name!r}, only {', '.join(WORKLOADS)}")
    return WORKLOADS[name]
