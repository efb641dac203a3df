"""The three daemons, each on a kernel that can strike; started again one by one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from qemu_shim.vmm.daemons import DAEMONS, DaemonSpec, Places, socket_of
from tests.kit.daemons import state_of, until
from tests.torture.calls import SINKS, Fault
from tests.torture.order import Order

ROOT = Path(__file__).parents[2]
OPTIONS = {"kvmd": ("--ram", "1G", "--table-ram", "64M"), "device_sim": ("--devices", "1")}
DEBUG = ("--log-level", "debug")
TALKS = {Fault.FULL_DISK: (*DEBUG, "--trace", "/dev/full"), Fault.FULL_PIPE: DEBUG}
SPECS = {spec.name: spec for spec in DAEMONS}


class Spawner:
    """The zygote, and what it started."""

    def __init__(self) -> None:
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
            start_new_session=True,
        )

    def _ask(self, **asked: Any) -> dict[str, Any]:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        print(json.dumps(asked), file=self._zygote.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._zygote.stdout.readline())
        return answer

    def spawn(self, program: str, argv: list[str], order: Path, log: Path | str) -> Running:
        """`log`: the name of a file, or of what is in its place (tests/torture/zygote.py)."""
        pid = self._ask(program=program, argv=argv, order=str(order), log=str(log))["pid"]
        return Running(self, program, pid)

    def status(self, pid: int) -> int | None:
        status: int | None = self._ask(poll=pid)["status"]
        return status

    def close(self) -> None:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.close()
        self._zygote.wait()
        self._zygote.stdout.close()


class Running:
    """A process of a program."""

    def __init__(self, spawner: Spawner, program: str, pid: int) -> None:
        self._spawner = spawner
        self.program = program
        self.pid = pid
        self._status: int | None = None

    @property
    def status(self) -> int | None:
        """None: it runs, or is stopped."""
        if self._status is None:
            self._status = self._spawner.status(self.pid)
        return self._status

    @property
    def stopped(self) -> bool:
        return self.status is None and state_of(self.pid) == "T"

    def signal(self, number: signal.Signals) -> None:
        if self.status is None:  # and until we ask again its number is nobody else's
            os.kill(self.pid, number)

    def ended(self) -> int:
        until(lambda: self.status is not None, f"{self.program} ends")
        assert self._status is not None
        return self._status


class StruckDaemons:
    """`log` and `order` of a daemon outlive it: the next of its name has the same."""

    def __init__(self, spawner: Spawner, directory: Path) -> None:
        self._spawner = spawner
        self.directory = directory
        self._places = Places(directory, directory / "private", directory / "private")
        self._places.drivers.mkdir(exist_ok=True)
        self.orders = {name: Order(self._order_path(name)) for name in (*SPECS, "qemu_shim")}
        self.running: dict[str, Running] = {}
        self._read: dict[str, int] = {}

    def _order_path(self, name: str) -> Path:
        return self.directory / f"{name}.order"

    def log_path(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def socket(self, name: str) -> Path:
        return socket_of(SPECS[name], self.directory)

    def start(self, *names: str) -> None:
        """Returns when they are ready."""
        for name in names:
            self.launch(name)
        for name in names:
            until(lambda name=name: self.ready(name), f"{name} is ready")  # type: ignore[misc]

    def launch(self, name: str, sink: Fault = Fault.NOTHING) -> Running:
        """`sink`: what its log goes to instead of a file, all of it."""
        spec: DaemonSpec = SPECS[name]
        self.socket(name).unlink(missing_ok=True)  # a dead one's, which would pass for ready
        argv = [*spec.argv(self._places)[1:], *OPTIONS.get(name, ()), *TALKS.get(sink, ())]
        log = sink.kind if sink in SINKS else self.log_path(name)
        self.running[name] = running = self._spawner.spawn(name, argv, self._order_path(name), log)
        return running

    def spawn(self, name: str, argv: list[str]) -> Running:
        return self._spawner.spawn(name, argv, self._order_path(name), self.log_path(name))

    def ready(self, name: str) -> bool:
        assert self.running[name].status is None, (
            f"{name} has ended: {self.log_path(name).read_text()[-500:]}"
        )
        return self.socket(name).exists()

    @property
    def alive(self) -> list[str]:
        return [name for name, running in self.running.items() if running.status is None]

    def new_log(self, name: str) -> str:
        """What it said since we looked last."""
        path = self.log_path(name)
        if not path.exists():
            return ""
        with path.open("rb") as log:
            log.seek(self._read.get(name, 0))
            text = log.read()
        self._read[name] = self._read.get(name, 0) + len(text)
        return text.decode(errors="replace")

    def kill(self) -> None:
        for running in self.running.values():
            running.signal(signal.SIGKILL)
            running.ended()
        self.running.clear()

    def stop(self) -> dict[str, int]:
        """Exit status of each that still ran: 0 if it met no bug."""
        statuses = {}
        for name in reversed(list(self.running)):
            running = self.running.pop(name)
            if running.status is None:
                running.signal(signal.SIGCONT)
                running.signal(signal.SIGTERM)
                try:
                    statuses[name] = running.ended()
                except AssertionError:
                    running.signal(signal.SIGKILL)
                    statuses[name] = running.ended()
        return statuses
