"""All scenarios, by name."""

from __future__ import annotations

from qemu_shim.api import Scenario
from qemu_shim.scenarios.series import (
    coherency,
    dmatest,
    dmatest_nobof,
    dsa_ops,
    memory,
    migration,
    mmio,
    msi,
    nested,
    pinning,
    sharing,
    smm,
    unmap,
    write_tracking,
)

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        dmatest.SCENARIO,
        dmatest_nobof.SCENARIO,
        dsa_ops.SCENARIO,
        unmap.SCENARIO,
        sharing.SCENARIO,
        pinning.PARTIAL_IOPF,
        pinning.PINNED,
        write_tracking.SCENARIO,
        coherency.SCENARIO,
        mmio.SCENARIO,
        nested.SCENARIO,
        msi.SCENARIO,
        smm.SCENARIO,
        migration.SCENARIO,
        memory.SCENARIO,
    )
}
