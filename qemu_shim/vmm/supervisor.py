"""The embedded default: daemons as child processes in private directories, gone when we are.

One directory is for clients; drivers' and administrators' sockets, and the logs, lie in another whose name
they are not told (docs/decisions/0014).

Each daemon gets its own session, so that a Ctrl-C reaches us alone and they are stopped in order; each
watches its standard input, a pipe of ours, so that they stop even if we are killed.  Their
logs go to files, which only a kill of ours leaves behind; a daemon that fails has the end of its log shown.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from protocol.rpc.socket import START_PATIENCE_S
from qemu_shim.vmm.daemons import ADMIN, DAEMONS, DaemonSpec, Places, socket_of

STOP_PATIENCE_S = 30.0  # for one daemon
STOP_ALL_S = STOP_PATIENCE_S * len(DAEMONS) + 10.0  # for who stops a run with daemons of its own
READY_POLL_S = 0.002
LOG_TAIL_LINES = 15


class DaemonFailed(Exception):
    """A daemon did not start, died, or ended with a status other than 0; its log's end is in the message."""


@dataclass(slots=True)
class _RunningDaemon:
    spec: DaemonSpec
    process: trio.Process
    log: Path
    ready: bool = False

    def explain(self, what: str) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"{self.spec.name} {what}:", *(f"    {line}" for line in lines)])


class Supervisor:
    """`directory` is what clients are given, `private` what they are not; `extra` are further options for a
    daemon, by name; `log_level` is every daemon's.
    """

    def __init__(
        self,
        directory: Path,
        private: Path,
        extra: Mapping[str, Sequence[str]],
        log_level: str,
        daemons: Sequence[DaemonSpec] = DAEMONS,
    ) -> None:
        self.directory = directory
        self._private = private
        self._places = Places(directory, private, private)
        self._daemons = daemons
        self._extra = extra
        self._log_level = log_level
        self._running: list[_RunningDaemon] = []

    @property
    def admin(self) -> Path:
        """kvmd's socket for whoever looks after the host."""
        return ADMIN.path(self._places)

    async def start(self) -> None:
        """Start all of them at once: each waits for the peers it needs."""
        for spec in self._daemons:
            log = self._private / f"{spec.name}.log"
            argv = [sys.executable, "-m", spec.module, *spec.argv(self._places)[1:]]
            argv += ["--exit-with-stdin", "--log-level", self._log_level, *self._extra.get(spec.name, ())]
            with log.open("wb") as output:
                process = await trio.lowlevel.open_process(
                    argv, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
                )
            self._running.append(_RunningDaemon(spec, process, log))

    async def wait_ready(self) -> None:
        """Returns when every socket is there.  Raises DaemonFailed."""
        for running in self._running:
            socket = trio.Path(socket_of(running.spec, self.directory))
            with trio.move_on_after(START_PATIENCE_S) as patience:
                await self._wait_socket(socket)
            if patience.cancelled_caught:
                raise DaemonFailed(running.explain(f"is not ready after {START_PATIENCE_S:.0f} s"))
            running.ready = True

    async def _wait_socket(self, socket: trio.Path) -> None:
        while not await socket.exists():
            self.check()
            await trio.sleep(READY_POLL_S)

    def check(self) -> None:
        """Raises DaemonFailed if one has ended."""
        for running in self._running:
            status = running.process.poll()
            if status is not None:
                raise DaemonFailed(running.explain(f"ended with status {status}"))

    async def kill(self, name: str) -> None:
        """As of `kill -9`; returns when it is dead.  LookupError: none of that name runs."""
        for running in self._running:
            if running.spec.name == name:
                running.process.kill()
                await running.process.wait()
                self._running.remove(running)
                return
        raise LookupError(f"no {name} runs; there are {', '.join(it.spec.name for it in self._running)}")

    async def stop(self) -> list[str]:
        """Stop all, those that need others first; what went wrong, one text each."""
        problems = [problem for running in reversed(self._running) if (problem := await _stop(running))]
        self._running.clear()
        return problems


async def _stop(running: _RunningDaemon) -> str | None:
    process = running.process
    process.terminate()
    with trio.move_on_after(STOP_PATIENCE_S) as patience:
        await process.wait()
    if patience.cancelled_caught:
        process.kill()
        await process.wait()
        return running.explain(f"did not stop within {STOP_PATIENCE_S:.0f} s and was killed")
    if process.returncode == -signal.SIGTERM and not running.ready:
        return None  # it had not got so far as to handle the signal: somebody else stood in the way
    if process.returncode != 0:
        return running.explain(f"ended with status {process.returncode}")
    return None


@asynccontextmanager
async def supervised(
    extra: Mapping[str, Sequence[str]] | None = None,
    log_level: str = "info",
    daemons: Sequence[DaemonSpec] = DAEMONS,
) -> AsyncIterator[Supervisor]:
    """The daemons, ready, in directories of mode 0700 that go away with them.

    Raises DaemonFailed at the end if one of them did not end cleanly.
    """
    directory, private = (Path(tempfile.mkdtemp(prefix=f"tdp-{whose}")) for whose in ("", "private-"))
    supervisor = Supervisor(directory, private, extra or {}, log_level, daemons)
    try:
        await supervisor.start()
        await supervisor.wait_ready()
        yield supervisor
    finally:
        with trio.CancelScope(shield=True):
            problems = await supervisor.stop()
            for made in (directory, private):
                shutil.rmtree(made, ignore_errors=True)
        if problems:  # they say more than what the scenario met because of them
            raise DaemonFailed("\n".join(problems))
