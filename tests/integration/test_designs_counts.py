"""What each design costs in faults and tables, counted on real daemons; every expectation is exact."""

from __future__ import annotations

import pytest

from qemu_shim.compare.run import Run
from qemu_shim.designs import DESIGNS
from qemu_shim.machine import Host
from qemu_shim.workloads.library import WORKLOADS
from qemu_shim.workloads.runner import run_workload


async def played(host: Host, workload: str, design: str, seed: int = 1, **params: int) -> Run:
    run = await run_workload(host, WORKLOADS[workload], DESIGNS[design], seed, params)
    assert (run.problems, run.refusals) == ([], [])
    return run


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("design", ["shared"])
async def test_two_runs_with_one_seed_are_equal(host: Host, design: str, workload: str) -> None:
    first = await played(host, workload, design)
    second = await played(host, workload, design)
    assert first == second
    assert first.samples[0].step == "start"
