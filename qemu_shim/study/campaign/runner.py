"""Runs points until all are done, or somebody interrupts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping

import trio

from protocol.errors import leaves
from qemu_shim.scenarios.run import Run
from qemu_shim.study.campaign.point import Point, point_of
from qemu_shim.study.campaign.pool import all_cores, run_in_processes
from qemu_shim.vmm.daemon_options import merged
from qemu_shim.vmm.interrupt import interruptible
from qemu_shim.vmm.supervisor import DaemonFailed, supervised


class Interrupted(Exception):
    """By a signal; what ran has been stopped and nothing is left of it."""


class DaemonsRefused(Exception):
    """A daemon does not start with the options that were given; what it said."""


def check_options(options: Mapping[str, str]) -> None:
    """Start the daemons once, before a point is run.  DaemonsRefused; Interrupted."""
    if not options:
        return

    async def start() -> None:
        async with supervised(merged({}, options), log_level="warning"):
            pass

    try:
        until_interrupted(start)
    except DaemonFailed as failed:
        raise DaemonsRefused(str(failed)) from None


def run_points(
    points: Iterable[Point], jobs: int | None = None, on_done: Callable[[Run], None] = lambda _: None
) -> list[Run]:
    """The runs in the order of the points, by `jobs` processes (all cores); `on_done` gets each at its end.

    A point that failed has its reasons in its run's `problems`.  Raises Interrupted at SIGINT and SIGTERM.
    """
    wanted = list(dict.fromkeys(points))
    runs: dict[Point, Run] = {}

    def done(run: Run) -> None:
        runs[point_of(run)] = run
        on_done(run)

    until_interrupted(lambda: run_in_processes(wanted, jobs or all_cores(), done))
    return [runs[point] for point in wanted]


def until_interrupted(work: Callable[[], Awaitable[None]]) -> None:
    """Run `work`, and cancel it at a signal: Interrupted.  What it raises comes without its groups."""
    try:
        finished = trio.run(interruptible, work)
    except BaseExceptionGroup as group:
        raise leaves(group)[0] from None
    if not finished:
        raise Interrupted
