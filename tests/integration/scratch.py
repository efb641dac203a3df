"""`qemu-shim` run as a person runs it, in a temporary directory by which all it leaves behind can be told."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qemu_shim.vmm.daemons import DAEMONS
from tests.integration.plain import Plain
from tests.kit.daemons import BIN, short_directory, until
from tests.patience import WHOLE_RUN_S


class Scratch:
    """A temporary directory of its own, by which everything a run leaves behind can be told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.memfds: set[int] = set()
        self._shm = set(os.listdir("/dev/shm"))
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """In a process group of its own, as a shell starts it."""
        process = subprocess.Popen(
            [str(BIN / "qemu-shim"), *arguments],
            env={**os.environ, "TMPDIR": str(self.directory)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self._started.append(process)
        return process

    def close(self) -> None:
        """A failed test's run goes too, or it would load the machine for all that follow."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.communicate()

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=WHOLE_RUN_S)
        return process.returncode, out, err

    def processes(self) -> list[int]:
        """Those that were told of the directory, by their environment or command."""
        mark = os.fsencode(self.directory)
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    told = (
                        Path(f"/proc/{name}/environ").read_bytes()
                        + Path(f"/proc/{name}/cmdline").read_bytes()
                    )
                except OSError:
                    continue
                if mark in told:
                    found.append(int(name))
        return found

    def wait_working(self) -> None:
        """Returns once DMA runs; remembers the memory it runs on."""
        private = {socket.name for spec in DAEMONS for _, socket in spec.listens}
        sockets = {spec.name for spec in DAEMONS} | private

        def descriptors() -> int:
            found = list(self.directory.glob("tdp-*/device_sim.sock"))
            if not found:
                return 0
            peer = Plain.connect(found[0])
            stats, _ = peer.ask("STATS")
            peer.close()
            count: int = stats["devices"]["dsa0"]["work_descriptors"]
            return count

        until(lambda: descriptors() > 50, "DMA is running")
        assert {path.stem for path in self.directory.glob("tdp-*/*.sock")} == sockets
        assert [path.stat().st_mode & 0o777 for path in self.directory.glob("tdp-*")] == [0o700] * 2
        for pid in self.processes():
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert "/dev/shm/" not in maps
            self.memfds |= {int(line.split()[4]) for line in maps.splitlines() if "/memfd:tdp-" in line}
        assert self.memfds

    def daemon(self, name: str) -> int:
        """The pid of a daemon of the running system."""
        (pid,) = (
            pid
            for pid in self.processes()
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:3] == [b"-m", name.encode()]
        )
        return pid

    def check_nothing_left(self) -> None:
        until(lambda: self.processes() == [], "every process of the run has ended")
        until(lambda: list(self.directory.iterdir()) == [], "the run's directory is gone")
        assert self.memfds.isdisjoint(mapped_memfds())
        assert {name for name in set(os.listdir("/dev/shm")) - self._shm if "tdp" in name} == set()


def mapped_memfds() -> set[int]:
    found = set()
    for name in os.listdir("/proc"):
        try:
            lines = Path(f"/proc/{name}/maps").read_text().splitlines() if name.isdigit() else []
        except OSError:
            continue
        found |= {int(line.split()[4]) for line in lines if "/memfd:tdp-" in line}
    return found


@contextmanager
def scratched() -> Iterator[Scratch]:
    """A place to run in, of which nothing may be left."""
    with short_directory() as directory:
        made = Scratch(directory)
        try:
            yield made
            made.check_nothing_left()
        finally:
            made.close()
