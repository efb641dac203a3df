"""Named Unix sockets: where a daemon listens, and how a peer connects, waiting until it does.

A socket appears under its name only once it listens, so its existence means readiness; one left behind by a
daemon that was killed is removed, one that somebody listens on is not taken over.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import structlog
import trio

from protocol.flow import Wait
from protocol.kernel.port import Kernel, StreamSocket
from protocol.rpc.loop import Loop

MAX_PATH_BYTES = 107  # sun_path
CONNECT_RETRY_S = 0.005
START_PATIENCE_S = 60.0  # for a daemon to be there: its peers and who starts it wait alike

log = structlog.get_logger("rpc")


class Listener:
    """Accepts connections on `path`, which gets `mode` (the umask's); the name is gone at `close`.

    When our fd table is full peers are turned away, in a place of it that is kept for that: nobody waits for
    a place that may never be free.  Raises OSError: no room for those either, or `path` is not to be had.
    """

    def __init__(
        self, loop: Loop, path: Path, on_connect: Callable[[StreamSocket], None], *, mode: int | None = None
    ) -> None:
        check_path(path)
        self._loop = loop
        self._kernel = loop.kernel
        self._path = path
        self._on_connect = on_connect
        self._rests: Wait[None] | None = None
        with ExitStack() as undo:
            self._nothing = self._kernel.reserve()
            undo.callback(self._kernel.close, self._nothing)
            self._spare: int | None = self._kernel.reserve()
            undo.callback(self._kernel.close, self._spare)
            self._is_free: Callable[[], bool] = lambda: True  # or somebody is still being hung up on there
            self._sock = self._kernel.listen(path, mode)  # its name says that we are ready: the last fd
            undo.callback(self._kernel.unlisten, path)
            undo.callback(self._sock.close)
            loop.register(self._sock.fileno(), self._accept)
            undo.pop_all()

    def _place(self) -> int | None:
        """An fd for nothing; None if there is no room now."""
        try:
            return self._kernel.reserve()
        except OSError:
            return None

    def _accept(self, _: int) -> None:
        if self._spare is None:  # the first place that is free again: nobody is served without
            self._spare = self._place()
        try:
            sock, _address = self._sock.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("accept failed", error=error.strerror)
            if not self._turns_away():
                self._rest()
            return
        try:
            self._on_connect(sock)
        except OSError as error:  # it is hung up on
            log.warning("no room for a connection", error=error.strerror)

    def _turns_away(self) -> bool:
        """Whoever is first in line is hung up on, by others: we do not wait for it.  Was there a place?"""
        if self._spare is None or not self._is_free():
            return False
        self._kernel.close(self._spare)
        try:
            sock, _address = self._sock.accept()
        except OSError:
            self._spare = self._place()
            return False
        self._spare = sock.detach()
        self._is_free = self._kernel.replace_received(self._spare, self._nothing)
        return True

    def _rest(self) -> None:
        """Whoever waits does until the next look, and we do not turn in circles till then."""
        self._loop.unregister(self._sock.fileno())
        self._rests = Wait()
        self._loop.expire(self._rests, 0, self._look_again)

    def _look_again(self) -> None:
        self._rests = None
        try:
            self._loop.register(self._sock.fileno(), self._accept)
        except OSError:
            self._rests = Wait()
            self._loop.expire(self._rests, 0, self._look_again)

    def close(self) -> None:
        if self._rests is None:
            self._loop.unregister(self._sock.fileno())
        else:
            self._rests.set(None)
        self._sock.close()
        if self._is_free():  # a place where somebody is still being hung up on goes with the process
            self._kernel.close(self._nothing)
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
    """Raises OSError when nobody listens, or too many wait to be let in."""
    check_path(path)
    return kernel.connect(path)


async def connect(kernel: Kernel, path: Path, patience_s: float = START_PATIENCE_S) -> StreamSocket:
    """Connect, waiting up to `patience_s` for a daemon that is still starting."""
    deadline = trio.current_time() + patience_s
    while True:
        try:
            return connect_now(kernel, path)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
            if trio.current_time() >= deadline:
                why = "no daemon listens there"
                if isinstance(error, BlockingIOError):
                    why = "too many wait to be let in; is the daemon stopped?"
                raise OSError(error.errno, f"{why} (waited {patience_s:.0f} s)", str(path)) from None
        await trio.sleep(CONNECT_RETRY_S)
