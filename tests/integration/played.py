"""A scenario of the library, played on daemons that run."""

from __future__ import annotations

from qemu_shim.scenarios.measure import Report
from qemu_shim.scenarios.runner import run_scenario
from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.vmm.designs import DESIGNS, SHARED
from qemu_shim.vmm.machine import Host


async def played(host: Host, name: str, design: str = SHARED.name, /, **params: int) -> Report:
    report = Report(name)
    await run_scenario(host, SCENARIOS[name], DESIGNS[design], params=params, report=report)
    return report
