"""All workloads, by name."""

from __future__ import annotations

from qemu_shim.workloads import boot_touch, device_first, dmatest
from qemu_shim.workloads.workload import Workload

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        boot_touch.WORKLOAD,
        device_first.WORKLOAD,
        dmatest.WORKLOAD,
    )
}
