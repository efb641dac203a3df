"""Points on all cores of this machine: worker processes, a point at a time each.

A worker that dies takes one point with it and nothing else: that point is run again by a new one, and is a
failure after TRIES workers died of it.  (concurrent.futures' pool ends all its workers when one dies, and
cannot say whose point it was.)  A worker is a plain new process, not a fork: it costs 0.3 s once, and a point
over a second for its daemons.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from qemu_shim.scenarios.run import Run
from qemu_shim.study.campaign.point import Point, line_of, point_as_json, run_of
from qemu_shim.vmm.supervisor import STOP_ALL_S

WORKER = (sys.executable, "-m", "qemu_shim.study.campaign.worker")
TRIES = 3

Done = Callable[[Run], None]


def all_cores() -> int:
    return len(os.sched_getaffinity(0))


async def run_in_processes(points: Sequence[Point], jobs: int, done: Done) -> None:
    """`done` gets the run of each point as it ends.  Cancelled, it stops what runs and leaves nothing."""
    work = _Work(deque(points), done)
    async with trio.open_nursery() as nursery:
        for _ in range(min(jobs, len(points))):
            nursery.start_soon(work.lane)


class _Work:
    """What is left to do, and a lane for each worker."""

    def __init__(self, left: deque[Point], done: Done) -> None:
        self._left = left
        self._done = done
        self._deaths: Counter[Point] = Counter()

    async def lane(self) -> None:
        while self._left:
            async with _worker() as process:
                await self._feed(process)

    async def _feed(self, process: trio.Process) -> None:
        """Returns when there is nothing left, or the worker is dead."""
        while self._left:
            point = self._left.popleft()
            line = await _ask(process, line_of(point_as_json(point)))
            if not line:
                self._died(point, await process.wait())
                return
            self._done(run_of(json.loads(line)))

    def _died(self, point: Point, status: int) -> None:
        self._deaths[point] += 1
        if self._deaths[point] < TRIES:
            self._left.appendleft(point)
        else:
            self._done(point.failed(f"{TRIES} workers died of it, the last with status {status}"))


@asynccontextmanager
async def _worker() -> AsyncIterator[trio.Process]:
    """In a session of its own, so that a Ctrl-C reaches us alone and it is stopped by us."""
    scratch = tempfile.mkdtemp(prefix="tdp-worker-")
    process = await trio.lowlevel.open_process(
        [*WORKER, scratch],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            await _stop(process)
        shutil.rmtree(scratch, ignore_errors=True)


async def _stop(process: trio.Process) -> None:
    assert process.stdin is not None
    await process.stdin.aclose()
    with trio.move_on_after(STOP_ALL_S):
        await process.wait()
    process.kill()
    await process.wait()


async def _ask(process: trio.Process, line: bytes) -> bytes:
    """The answer, a line; empty: there will be none."""
    assert process.stdin is not None
    assert process.stdout is not None
    answer = bytearray()
    try:
        await process.stdin.send_all(line)
        while not answer.endswith(b"\n"):
            piece = await process.stdout.receive_some()
            if not piece:
                return b""
            answer += piece
    except trio.BrokenResourceError:
        return b""
    return bytes(answer)
