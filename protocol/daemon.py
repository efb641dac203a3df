"""The main of every daemon: settings, log, signals, readiness, orderly stop.

A daemon is ready once its socket exists (it is renamed into place when it listens).  SIGTERM, SIGINT
and, with `--exit-with-stdin`, the end of standard input stop it: exit status 0, or 1 if a bug of ours
surfaced on the way.  `python -O` is refused: the asserts are part of the model.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import os
import signal
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import structlog
import trio

from protocol.errors import PeerError, UapiError, leaves
from protocol.flow import Flows
from protocol.kernel.linux import LINUX
from protocol.log import LogFile, RateLimit
from protocol.rpc.channel import Body, Fds
from protocol.rpc.door import Door
from protocol.rpc.loop import Loop
from protocol.rpc.socket import Listener
from protocol.trace import TRACE
from protocol.uapi.message import StartedWith

log = structlog.get_logger("daemon")

EXIT_CANNOT_START = 2
_ENDS = (stat.S_IFIFO, stat.S_IFSOCK)  # of the kinds of file, those with another end
LOG_PATIENCE_S = 0.5  # at the end, for a reader of the log


class DaemonApp(Protocol):
    """What a daemon is, apart from its main."""

    door: Door[Any]
    private_doors: Mapping[Path, Door[Any]]
    """For the few: by the socket, which only our own user can connect to."""

    async def start(self) -> None:
        """Runs before the socket appears, with the loop serving: reach the peers it needs."""

    def close(self) -> None: ...


class HasOptions(Protocol):
    """Of `Settings`, what every daemon's has."""

    @property
    def started_with(self) -> tuple[str, ...]: ...


class Configured(Protocol):
    @property
    def settings(self) -> HasOptions: ...


def tell_options(app: Configured, message: StartedWith, fds: Fds) -> Body:
    """What answers STARTED_WITH at every front door."""
    return {"options": list(app.settings.started_with)}


def configure_log(level: str) -> LogFile:
    """One line an event, to standard error, if we were given one."""
    file = LogFile(None if sys.__stderr__ is None else sys.__stderr__.fileno())
    atexit.register(file.drain, LOG_PATIENCE_S)
    structlog.configure(
        processors=[
            RateLimit(),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", key="at"),
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["at", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    return file


def refuse_optimised() -> None:
    if not __debug__:
        raise SystemExit("python -O removes the asserts this model is made of: run without it")


def run(name: str, options: argparse.Namespace, build: Callable[[Loop], DaemonApp]) -> int:
    """Run a daemon until it is told to stop; its exit status."""
    refuse_optimised()
    # Tracebacks too, and whatever else speaks there.
    sys.stderr = configure_log(options.log_level)
    for number in (signal.SIGTERM, signal.SIGINT):
        # While `_run` is not listening, before and after, a signal ends us just as cleanly.
        signal.signal(number, lambda *_: sys.exit(0))
    status = EXIT_CANNOT_START
    try:
        if options.exit_with_stdin:
            _check_that_stdin_can_end()
        if options.trace is not None:
            _trace_to(options.trace)
        status = trio.run(_run, name, options, build)
    except* (OSError, ValueError, UapiError, PeerError) as group:
        for error in leaves(group):
            print(f"{name}: {error}", file=sys.stderr)
    return status


def _check_that_stdin_can_end() -> None:
    """Raises ValueError for one whose end nobody tells us: the poll of Linux takes no such file."""
    watched = sys.__stdin__ is not None and (os.isatty(0) or stat.S_IFMT(os.fstat(0).st_mode) in _ENDS)
    if not watched:
        raise ValueError(
            "--exit-with-stdin: standard input is no pipe, socket or terminal: it has no other end"
        )


def _trace_to(path: Path) -> None:
    """A line an event, complete when the event is over, whatever becomes of us."""
    file = path.open("w", buffering=1, encoding="utf-8")
    atexit.register(file.close)

    def write(line: str) -> None:
        try:
            file.write(line + "\n")
        except OSError as error:
            TRACE.stop()
            log.error("no more tracing", why=str(error))

    TRACE.start(write)


async def _run(name: str, options: argparse.Namespace, build: Callable[[Loop], DaemonApp]) -> int:
    crashes = 0

    def on_crash(error: BaseException) -> None:
        nonlocal crashes
        crashes += 1
        log.error("bug", daemon=name, exc_info=error)

    loop = Loop(LINUX, Flows(on_crash))
    app = build(loop)
    stop = trio.Event()

    def on_stdin(_: int) -> None:
        try:
            ended = not os.read(0, 4096)
        except OSError:  # EIO: its terminal is gone
            ended = True
        if ended:
            loop.unregister(0)
            loop.kick()
            stop.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signal, stop)
        if options.exit_with_stdin:
            loop.register(0, on_stdin)
        gc.freeze()  # what is there by now lives as long as we do: never looked at for garbage again
        await serve(name, loop, app, options.socket, stop)
        nursery.cancel_scope.cancel()
    loop.close()
    log.info("stopped", daemon=name, bugs=crashes)
    return 1 if crashes else 0


async def serve(name: str, loop: Loop, app: DaemonApp, socket: Path, stop: trio.Event) -> None:
    """Start `app` and serve whoever connects, until `stop`; what a daemon is on any kernel."""
    listeners: list[Listener] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.serve)
        try:
            if not await _start(app, stop):
                return
            for path, door in app.private_doors.items():
                listeners.append(Listener(loop, path, door.open, mode=0o600))
            listeners.append(Listener(loop, socket, app.door.open))  # last: it says that we are ready
            log.info("ready", daemon=name, socket=str(socket), pid=os.getpid())
            await stop.wait()
        finally:
            for listener in listeners:
                listener.close()
            app.close()
            loop.settle()
            nursery.cancel_scope.cancel()


async def _start(app: DaemonApp, stop: trio.Event) -> bool:
    """False if we are told to stop while peers we need are not there yet."""
    async with trio.open_nursery() as starting:

        async def give_up() -> None:
            await stop.wait()
            starting.cancel_scope.cancel()

        starting.start_soon(give_up)
        await app.start()
        starting.cancel_scope.cancel()
    return not stop.is_set()


async def _stop_on_signal(stop: trio.Event, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            stop.set()
