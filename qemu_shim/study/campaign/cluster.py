"""Points on a Dask cluster; needs the extra `dask`, here and on its workers.

A point whose worker dies is run again by another, as the scheduler does with every task; it is a failure
when the scheduler gives it up (`distributed.scheduler.allowed-failures`).  A worker runs as many points at
once as it has threads, each with daemons of its own.  That the campaign was interrupted an event tells them.
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import trio

from protocol.daemon import configure_log
from qemu_shim.scenarios.run import Run
from qemu_shim.study.campaign.code import code_version
from qemu_shim.study.campaign.execute import execute
from qemu_shim.study.campaign.point import Point
from qemu_shim.vmm.supervisor import STOP_ALL_S

CONNECT_S = 10.0
STOP_POLL_S = 2.0  # it is told at once; this is how long a thread may wait in vain


class ClusterFailed(Exception):
    """There is no cluster to run on, or none any more; the message says what to do."""


async def run_on_cluster(points: Sequence[Point], address: str, done: Callable[[Run], None]) -> None:
    """As `run_in_processes`.  Raises ClusterFailed."""
    distributed = _library()
    try:
        client = await trio.to_thread.run_sync(lambda: distributed.Client(address, timeout=CONNECT_S))
    except (OSError, ValueError, TimeoutError) as error:
        raise ClusterFailed(f"--scheduler {address}: {error}") from None
    stop_name = f"tdp-campaign-{uuid.uuid4()}"
    futures: dict[Any, Point] = {}
    try:
        for point in points:
            key = f"{stop_name}/{point.key}"
            futures[client.submit(_on_worker, point, code_version(), stop_name, key=key, pure=False)] = point
        await _collect(futures, address, done)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_stop, distributed, client, stop_name, list(futures))


def _library() -> Any:
    try:
        return importlib.import_module("distributed")
    except ImportError:
        raise ClusterFailed("--scheduler needs the extra dask: make dask, or pip install '.[dask]'") from None


async def _collect(futures: dict[Any, Point], address: str, done: Callable[[Run], None]) -> None:
    """Each as it ends: callbacks come from threads of the library's."""
    here = trio.lowlevel.current_trio_token()
    send, receive = trio.open_memory_channel[Any](len(futures))

    def ended_there(future: Any) -> None:
        with suppress(trio.RunFinishedError):  # nobody waits for it any more
            here.run_sync_soon(send.send_nowait, future)

    for future in futures:
        future.add_done_callback(ended_there)
    for _ in range(len(futures)):
        ended = await receive.receive()
        if ended.status not in ("finished", "error"):
            raise ClusterFailed(f"--scheduler {address}: the scheduler went away")
        done(await trio.to_thread.run_sync(_result, ended, futures[ended]))


def _result(future: Any, point: Point) -> Run:
    """Only death keeps a worker that can run points from giving a run: any other error is not the point's."""
    error = future.exception()
    if isinstance(error, _library().KilledWorker):
        return point.failed(f"the scheduler gave it up: {error}")
    if error is not None:
        raise ClusterFailed(f"a worker of the cluster cannot run points: {error!r}")
    run = future.result()
    assert isinstance(run, Run), "nobody has said stop yet"
    return run


def _stop(distributed: Any, client: Any, stop_name: str, futures: list[Any]) -> None:
    """Tell those that run, and wait until they have stopped; those that do not yet run end at once."""
    left = [future for future in futures if not future.done()]
    with suppress(OSError, TimeoutError):  # the scheduler is gone, and its workers go with it
        if left and client.status == "running":
            distributed.Event(stop_name, client=client).set()
            distributed.wait(left, timeout=STOP_ALL_S)
    client.close(timeout=CONNECT_S)


class OtherCode(Exception):
    """A worker of the cluster has not the code that sent the points."""


def _on_worker(point: Point, code: str, stop_name: str) -> Run | None:
    """What a worker does.  None: it was told to stop."""
    configure_log("warning")
    if code != code_version():
        raise OtherCode(f"the worker's code is {code_version()}, the campaign's {code}")
    event = _library().Event(stop_name)

    async def stop() -> None:
        while not await trio.to_thread.run_sync(event.wait, STOP_POLL_S, abandon_on_cancel=True):
            pass

    return None if event.is_set() else execute(point, stop)
