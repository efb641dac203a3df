"""Runs one point, on daemons of its own, in whatever process and thread it is called.

Whatever goes wrong with the point is in its run's `problems`, so that one point costs no other.
"""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from protocol.errors import leaves
from qemu_shim.scenarios.run import Run
from qemu_shim.scenarios.runner import run_scenario
from qemu_shim.study.campaign.point import Point
from qemu_shim.study.workloads.library import workload_of
from qemu_shim.vmm.daemon_options import merged
from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.machine import connect_host
from qemu_shim.vmm.supervisor import DaemonFailed, supervised

LIMIT_S = 900.0  # a point that hangs is a failure like another, and must not hold up the campaign

Stop = Callable[[], Awaitable[object]]  # returns when the point is to be given up


def execute(point: Point, stop: Stop = trio.sleep_forever) -> Run | None:
    """The run of `point`; None: it was stopped, and has left nothing."""
    return trio.run(_execute, point, stop)


async def _execute(point: Point, stop: Stop) -> Run | None:
    run: Run | None = None
    stopped = False

    async def watch() -> None:
        nonlocal stopped
        await stop()
        stopped = True
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        with trio.move_on_after(LIMIT_S) as limit:
            run = await _guarded(point)
        if limit.cancelled_caught and not stopped:
            run = point.failed(f"came to no end within {LIMIT_S:.0f} s")
        nursery.cancel_scope.cancel()
    return None if stopped else run


async def _guarded(point: Point) -> Run:
    """Any failure of the point as its run; only being cancelled passes."""
    try:
        return await _play(point)
    except* Exception as group:
        problems = [_told(error) for error in leaves(group)]
    run = point.failed(problems[0])
    run.problems += problems[1:]
    return run


async def _play(point: Point) -> Run:
    workload = workload_of(point.workload)
    options = dict(point.options)
    async with (
        supervised(merged(workload.options, options), log_level="warning") as daemons,
        connect_host(daemons.directory) as host,
    ):
        host.killer = daemons.kill
        run = await run_scenario(host, workload, DESIGNS[point.design], point.seed, dict(point.params))
    run.workload, run.options = point.workload, options
    if not (run.samples or run.refusals or run.problems):
        run.problems.append("it booted no machine by its Context, so that nothing was counted")
    return run


def _told(error: BaseException) -> str:
    """With where it came from, unless it says so itself."""
    if isinstance(error, DaemonFailed):
        return str(error)
    what = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{what} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else what
