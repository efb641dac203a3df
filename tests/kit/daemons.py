"""Real daemons for tests: started by their own commands, watched through /proc, stopped and judged."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import trio

from qemu_shim.vmm.daemons import ADMIN, DAEMONS, IMPORTERS, LINK, DaemonSpec, Places, socket_of
from tests.patience import PATIENCE_S

BIN = Path(sys.executable).parent
POLL_S = 0.005

Options = Mapping[str, Sequence[str]]
T = TypeVar("T")

TRUSTING: Options = {"kvmd": ["--trust-importers"]}  # for tests that import themselves


class System:
    """The daemons of one system, with what clients are given in `directory` and the rest below it.
    `planted`: of a daemon, the bug it has (simulator.planted).
    """

    def __init__(
        self, directory: Path, options: Options | None = None, planted: Mapping[str, str] | None = None
    ) -> None:
        self.directory = directory
        self.places = Places(directory, directory / "private", directory / "private")
        self.places.drivers.mkdir(exist_ok=True)
        self._options = options or {}
        self._planted = planted or {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *names: str) -> None:
        """Start these, or all; returns when their sockets are there."""
        specs = [spec for spec in DAEMONS if not names or spec.name in names]
        for spec in specs:
            with self.log_path(spec.name).open("wb") as log:
                self._running[spec.name] = subprocess.Popen(
                    self.argv(spec), stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
                )
        for spec in specs:
            until(lambda spec=spec: self._is_ready(spec), f"{spec.name} is ready")  # type: ignore[misc]

    def argv(self, spec: DaemonSpec) -> list[str]:
        argv = spec.argv(self.places)
        program = [str(BIN / argv[0])]
        if plant := self._planted.get(spec.name):
            program = [sys.executable, "-m", "simulator.planted", plant, spec.module]
        return [*program, *argv[1:], "--exit-with-stdin", *self._options.get(spec.name, ())]

    def _is_ready(self, spec: DaemonSpec) -> bool:
        assert self._running[spec.name].poll() is None, self.log(spec.name)
        return socket_of(spec, self.directory).exists()

    def log_path(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def log(self, name: str) -> str:
        return self.log_path(name).read_text(errors="replace")

    def socket(self, name: str) -> Path:
        return self.directory / f"{name}.sock"

    @property
    def admin(self) -> Path:
        return ADMIN.path(self.places)

    @property
    def importers(self) -> Path:
        """Where kvmd waits for the IOMMU's driver."""
        return IMPORTERS.path(self.places)

    @property
    def link(self) -> Path:
        """Where device_sim waits for its driver."""
        return LINK.path(self.places)

    @property
    def names(self) -> list[str]:
        """The daemons that were started and not killed."""
        return list(self._running)

    def pid(self, name: str) -> int:
        return self._running[name].pid

    def fds(self, name: str) -> int:
        """How many fds the daemon has open."""
        return len(os.listdir(f"/proc/{self.pid(name)}/fd"))

    def all_fds(self) -> dict[str, int]:
        return {name: self.fds(name) for name in self.names}

    def wait_closed(self, before: dict[str, int]) -> None:
        """No daemon keeps more fds open than `before`; fewer, if it still had a former peer's then."""
        more: dict[str, int] = {}

        def closed() -> bool:
            more.clear()
            more.update((name, self.fds(name) - was) for name, was in before.items() if self.fds(name) > was)
            return not more

        until(closed, lambda: f"fds stay open: {more}")

    def signal(self, name: str, number: signal.Signals) -> None:
        self._running[name].send_signal(number)
        if number == signal.SIGSTOP:
            until(lambda: state_of(self.pid(name)) == "T", f"{name} has stopped")

    def exited(self, name: str) -> bool:
        return self._running[name].poll() is not None

    def kill(self, name: str) -> None:
        """As the kernel's OOM killer would."""
        process = self._running.pop(name)
        process.kill()
        process.wait()
        _close_stdin(process)

    @contextmanager
    def fd_limit(self, name: str, room: int) -> Iterator[None]:
        """Let the daemon open `room` fds more, and no others."""
        pid = self.pid(name)
        old = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = self._settled_fds(name)
        free = [fd for fd in range(used[-1] + room + 2) if fd not in used]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[room], old[1]))
        try:
            yield
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, old)

    def _settled_fds(self, name: str) -> list[int]:
        """What a daemon has sent away it closes a moment after the peer has it."""
        seen: list[list[int]] = []

        def settled() -> bool:
            seen.append(sorted(int(fd) for fd in os.listdir(f"/proc/{self.pid(name)}/fd")))
            return len(seen) > 10 and all(look == seen[-1] for look in seen[-10:])

        until(settled, f"{name}'s fds settle")
        return seen[-1]

    def stop(self) -> dict[str, int]:
        """Exit status by daemon, of those that still ran."""
        statuses = {}
        for name, process in reversed(list(self._running.items())):
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                statuses[name] = process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                statuses[name] = process.wait()
            _close_stdin(process)
        self._running.clear()
        return statuses

    def check_stop(self) -> None:
        """Stop; every daemon must end with status 0, having met no bug."""
        statuses = self.stop()
        bad = {name: self.log(name)[-4000:] for name, status in statuses.items() if status}
        assert not bad, "\n".join(f"{name}: status {statuses[name]}\n{log}" for name, log in bad.items())


def _close_stdin(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def short_directory() -> Iterator[Path]:
    """A private directory whose path leaves room for a socket's name."""
    directory = Path(tempfile.mkdtemp(prefix="it-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextmanager
def system(
    options: Options | None = None, planted: Mapping[str, str] | None = None, *names: str
) -> Iterator[System]:
    """A running system; those of its daemons that are not killed must end with status 0."""
    with short_directory() as directory:
        made = System(directory, options, planted)
        try:
            made.start(*names)
            yield made
            made.check_stop()
        finally:
            made.stop()


def until(holds: Callable[[], bool], what: str | Callable[[], str], patience: float = PATIENCE_S) -> None:
    """Wait until it holds; fail with `what` if it never does."""
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, f"never: {what if isinstance(what, str) else what()}"
        time.sleep(POLL_S)


async def eventually(look: Callable[[], Awaitable[T]], holds: Callable[[T], bool], what: str) -> T:
    """The first thing seen that holds; fail with the last one if none does."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        seen = await look()
        if holds(seen):
            return seen
        assert time.monotonic() < deadline, f"never: {what}; last seen {seen}"
        await trio.sleep(POLL_S)
