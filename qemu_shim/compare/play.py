"""Runs one after the other, each on daemons of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import trio

from protocol.errors import PeerError, UapiError, leaves
from qemu_shim.compare.run import Run
from qemu_shim.designs import DESIGNS
from qemu_shim.machine import connect_host
from qemu_shim.supervisor import DaemonFailed, supervised
from qemu_shim.workloads.library import WORKLOADS
from qemu_shim.workloads.runner import run_workload

Point = tuple[str, str, int]  # workload, design, seed


def play_all(points: Sequence[Point], jobs: int) -> Iterator[Run]:
    for point in points:
        yield trio.run(_play, point)


async def _play(point: Point) -> Run:
    name, design, seed = point
    workload = WORKLOADS[name]
    run = Run(name, design, seed, {})
    try:
        async with (
            supervised(workload.options, log_level="warning") as supervisor,
            connect_host(supervisor.directory) as host,
        ):
            run = await run_workload(host, workload, DESIGNS[design], seed)
    except* (DaemonFailed, UapiError, PeerError, OSError) as group:
        run.problems += [str(error) for error in leaves(group)]
    return run
