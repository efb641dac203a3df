"""All scenarios, by name."""

from __future__ import annotations

from qemu_shim.scenarios import dmatest, dmatest_nobof, dsa_ops, pinning, sharing, unmap
from qemu_shim.scenarios.scenario import Scenario

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
    )
}
