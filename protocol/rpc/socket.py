"""Named Unix sockets: where a daemon listens, and how a peer connects, waiting until it does.

A socket appears under its name only once it listens, so its existence means readiness; one left behind by a
daemon that was killed is removed, one that somebody listens on is not taken over.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog
import trio

from protocol.kernel.port import Kernel, StreamSocket
from protocol.rpc.loop import Loop

MAX_PATH_BYTES = 107  # sun_path
CONNECT_RETRY_S = 0.005
START_PATIENCE_S = 60.0  # for a daemon to be there: its peers and who starts it wait alike

log = structlog.get_logger("rpc")


class Listener:
    """Accepts connections on `path`, which gets `mode` (the umask's); the name is gone at `close`."""

    def __init__(
        self, loop: Loop, path: Path, on_connect: Callable[[StreamSocket], None], *, mode: int | None = None
    ) -> None:
        check_path(path)
        self._loop = loop
        self._kernel = loop.kernel
        self._path = path
        self._on_connect = on_connect
        self._sock = self._kernel.listen(path, mode)
        self._spare = self._spare_place()  # to turn peers away with when our fd table is full
        try:
            loop.register(self._sock.fileno(), self._accept)
        except OSError:
            self._give_up()
            raise

    def _accept(self, _: int) -> None:
        if self._spare is None:  # the first place that is free again: nobody is served without one
            self._spare = self._spare_place()
        try:
            sock, _address = self._sock.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("accept failed", error=error.strerror)
            self._turn_away()
            return
        try:
            self._on_connect(sock)
        except OSError as error:  # it is hung up on
            log.warning("no room for a connection", error=error.strerror)

    def _turn_away(self) -> None:
        """Our fd table is full: with the spare place, hang up on whoever is first in line.  The place is free
        again when that is closed, which is not for us to wait for.
        """
        if self._spare is not None:
            self._kernel.close(self._spare)
            with suppress(OSError):
                self._kernel.close_received(self._sock.accept()[0].detach())
        self._spare = self._spare_place()

    def _spare_place(self) -> int | None:
        """An fd for nothing; None if there is no room now."""
        try:
            return self._kernel.reserve()
        except OSError:
            return None

    def close(self) -> None:
        self._loop.unregister(self._sock.fileno())
        self._give_up()

    def _give_up(self) -> None:
        self._sock.close()
        if self._spare is not None:
            self._kernel.close(self._spare)
        self._kernel.unlisten(self._path)


def check_path(path: Path) -> None:
    """Raises ValueError for a path no Unix socket can have."""
    if len(os.fsencode(path)) > MAX_PATH_BYTES - 16:
        raise ValueError(
            f"socket path {path} is longer than {MAX_PATH_BYTES - 16} bytes: choose a shorter directory"
        )


def connect_now(kernel: Kernel, path: Path) -> StreamSocket:
    """Raises OSError when nobody listens."""
    check_path(path)
    return kernel.connect(path)


async def connect(kernel: Kernel, path: Path, patience_s: float = START_PATIENCE_S) -> StreamSocket:
    """Connect, waiting up to `patience_s` for a daemon that is still starting."""
    deadline = trio.current_time() + patience_s
    while True:
        try:
            return connect_now(kernel, path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if trio.current_time() >= deadline:
                why = f"no daemon listens there (waited {patience_s:.0f} s)"
                raise OSError(error.errno, why, str(path)) from None
        await trio.sleep(CONNECT_RETRY_S)
