"""`python -m tests.torture.zygote`: starts the programs, by fork from an interpreter that has them all.

A daemon that dies a thousand times is started a thousand times, and most of a start is importing.  A request
is a line of JSON on standard input, its answer one on standard output; when the input ends, all are killed.

    {"program": "kvmd", "argv": [...], "order": PATH, "log": PATH}   -> {"pid": PID}
    or "log": "full-disk", "full-pipe"
    {"poll": PID}                                                    -> {"status": null, or its exit status}
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import device_sim.__main__
import iommufdd.__main__
import kvmd.__main__
import protocol.daemon
import qemu_shim.cli
from qemu_shim.scenarios import recorder
from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.vmm.machine import connect_host
from tests.torture.calls import Fault
from tests.torture.order import Order
from tests.torture.stories import QUIET_S, STORIES
from tests.torture.struck import struck_kernel

FULL_DISK = "/dev/full"  # [full(4)]
MAINS: dict[str, Callable[[list[str]], int]] = {
    "kvmd": kvmd.__main__.main,
    "iommufdd": iommufdd.__main__.main,
    "device_sim": device_sim.__main__.main,
    "qemu_shim": qemu_shim.cli.main,
}


def full_pipe() -> tuple[int, int]:
    """Both ends, and nobody reads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(select.PIPE_BUF))
    os.set_blocking(writer, True)
    return reader, writer


def output_to(log: str) -> tuple[int, int]:
    """(Standard input, standard output and error.)"""
    if log == Fault.FULL_PIPE.kind:
        return full_pipe()  # whoever could read it is the one who writes
    path = FULL_DISK if log == Fault.FULL_DISK.kind else log
    return os.open(os.devnull, os.O_RDONLY), os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def become(program: str, argv: list[str], order: Path, log: str) -> NoReturn:
    """The program, on a kernel that does what the order says; its output goes to the log."""
    os.setsid()
    given, output = output_to(log)
    for fd, old in ((0, given), (1, output), (2, output)):
        os.dup2(old, fd)
    os.closerange(3, 64)
    kernel = struck_kernel(Order(order))
    vars(protocol.daemon)["LINUX"] = kernel
    vars(qemu_shim.cli)["connect_host"] = partial(connect_host, kernel=kernel)
    sys.argv = [program, *argv]
    status = 1
    try:
        status = MAINS[program](argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)  # the stack below is the zygote's


class Zygote:
    def __init__(self) -> None:
        self._running: set[int] = set()

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        if "poll" in asked:
            return {"status": self._status(asked["poll"])}
        pid = os.fork()
        if not pid:
            become(asked["program"], asked["argv"], Path(asked["order"]), asked["log"])
        self._running.add(pid)
        return {"pid": pid}

    def _status(self, pid: int) -> int | None:
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            return None
        self._running.discard(pid)
        return os.waitstatus_to_exitcode(status)

    def kill_all(self) -> None:
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started us tells us to end
    recorder.PATIENCE_S = QUIET_S
    played = {story.scenario.name: story.scenario for story in STORIES.values()}
    vars(qemu_shim.cli)["SCENARIOS"] = SCENARIOS | played  # `run` plays workloads here
    gc.freeze()
    zygote = Zygote()
    try:
        for line in sys.stdin:
            print(json.dumps(zygote.answer(json.loads(line))), flush=True)
    finally:
        zygote.kill_all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
