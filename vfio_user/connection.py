"""One client on the message loop: what the socket gives, one message at a time, and the answers.

The loop's epoll is level-triggered: while a message is under way, or an answer is not taken yet, the socket
is not asked for more, so its buffer is the queue and nobody else waits.  Must hold:
  - no more is received at once than the stream wants, or an fd would get to the wrong message;
  - whatever a client sends, no exception reaches the loop: it is hung up on, or, for a mistake of ours,
    answered EIO and the mistake reported;
  - when it is over the session has given back everything, and only then is the function free for another.
"""

from __future__ import annotations

import array
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from errno import EIO
from typing import Final

import structlog

from protocol.errors import PeerError, UapiError
from protocol.kernel.port import StreamSocket
from protocol.rpc.loop import Loop
from vfio_user.core.function import PciFunction
from vfio_user.core.limits import MAX_MSG_FDS
from vfio_user.core.session import ClientSession, MessageAnswer
from vfio_user.core.stream import ClientMessage, MessageStream, reply_to
from vfio_user.received import ReceivedFds

_ANCILLARY: Final = socket.CMSG_SPACE(MAX_MSG_FDS * array.array("i").itemsize)
_RECEIVES_A_TURN: Final = 64  # then others get theirs
_RECEIVE_FLAGS: Final = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
_SEND_FLAGS: Final = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

log = structlog.get_logger("vfio_user")


class ClientConnection:
    def __init__(
        self,
        loop: Loop,
        sock: StreamSocket,
        function: PciFunction,
        on_close: Callable[[ClientConnection], None],
    ) -> None:
        """OSError: no memory to watch the socket with; it is closed."""
        sock.setblocking(False)
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._on_close = on_close
        self._fds = ReceivedFds(loop.kernel)
        self._stream = MessageStream(self._fds.close)
        self._session = ClientSession(function, self._fds, self._refused)
        self._out, self._out_fds = memoryview(b""), tuple[int, ...]()
        self._busy = False
        self._lost = False
        self._watched = int(select.EPOLLIN)
        try:
            loop.register(self._fd, self._on_event)
        except OSError:
            sock.close()
            raise

    def close(self) -> None:
        self._end("closed by us")

    # -- receiving -------------------------------------------------------------------------------------

    def _on_event(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush()
        for _ in range(_RECEIVES_A_TURN):
            if self._lost or self._waits:
                break
            if not self._receive():
                return
        if self._waits and events & (select.EPOLLHUP | select.EPOLLERR):
            self._end("hung up")

    @property
    def _waits(self) -> bool:
        """For the function, or for the client to take its answer."""
        return self._busy or bool(self._out)

    def _receive(self) -> bool:
        """Is there more?"""
        buffer = self._loop.buffer[: self._stream.wanted]
        try:
            count, ancillary, flags, _ = self._sock.recvmsg_into([buffer], _ANCILLARY, _RECEIVE_FLAGS)
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(f"receive: {error.strerror}")
            return False
        fds = array.array("i")
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
        if flags & socket.MSG_CTRUNC:  # before the stream has them: this one may complete a message
            for fd in fds:
                self._fds.close(fd)
            self._end(f"more than {MAX_MSG_FDS} fds came at once, or there is no room for them", blame=True)
            return False
        try:
            message = self._stream.feed(bytes(buffer[:count]), fds)
        except PeerError as error:
            self._end(str(error), blame=True)
            return False
        if not count:
            self._end("hung up")
            return False
        if message is not None:
            self._begin(message)
        return True

    def _begin(self, message: ClientMessage) -> None:
        self._busy = True
        self._loop.flows.spawn(self._serve(message))
        if self._busy:
            self._watch()

    async def _serve(self, message: ClientMessage) -> None:
        damage = ""
        try:
            answer = await self._session.handle(message)
        except PeerError as error:
            answer, damage = None, str(error)
        except Exception as error:
            self._loop.report(error)
            answer = MessageAnswer(reply_to(message, errno=EIO)) if message.wants_reply else None
        self._busy = False
        if self._lost:  # while the message was under way
            await self._give_back()
        elif damage:
            self._end(damage, blame=True)
        elif answer is not None:
            self._out, self._out_fds = memoryview(answer.data), answer.fds
            self._flush()
        else:
            self._watch()

    def _refused(self, error: UapiError) -> None:
        log.debug("refused", why=str(error))

    # -- sending ---------------------------------------------------------------------------------------

    def _flush(self) -> None:
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self._out_fds))] if self._out_fds else []
        )
        try:
            sent = self._sock.sendmsg([self._out], rights, _SEND_FLAGS)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._end(f"send: {error.strerror}")
            return
        if sent:
            self._out, self._out_fds = self._out[sent:], ()
        self._watch()

    def _watch(self) -> None:
        if self._out:
            wanted = int(select.EPOLLOUT)
        else:
            wanted = 0 if self._busy else int(select.EPOLLIN)
        if wanted == self._watched:
            return
        self._watched = wanted
        try:
            self._loop.modify(self._fd, wanted)
        except OSError as error:
            self._end(f"epoll: {error.strerror}")

    # -- the end ---------------------------------------------------------------------------------------

    def _end(self, reason: str, *, blame: bool = False) -> None:
        """At once for the client; for the function when what is under way has come to its end."""
        if self._lost:
            return
        self._lost = True
        (log.warning if blame else log.info)("client ends", reason=reason)
        self._loop.unregister(self._fd)
        _hang_up(self._loop, self._sock)
        self._stream.close()
        if not self._busy:
            self._loop.flows.spawn(self._give_back())

    async def _give_back(self) -> None:
        try:
            await self._session.close()
        finally:
            self._on_close(self)


def _hang_up(loop: Loop, sock: StreamSocket) -> None:
    """The client sees it at once; what it left in the queue is closed when it may."""
    with suppress(OSError):  # the client is gone already
        sock.shutdown(socket.SHUT_RDWR)
    loop.kernel.close_received(sock.detach())


class FunctionDoor:
    """A socket whose clients get one function, one client at a time."""

    def __init__(self, loop: Loop, function: PciFunction) -> None:
        self._loop = loop
        self._function = function
        self._client: ClientConnection | None = None

    def open(self, sock: StreamSocket) -> None:
        """Somebody connected."""
        if self._client is not None:
            log.warning("client turned away", reason="the function has one")
            _hang_up(self._loop, sock)
            return
        self._client = ClientConnection(self._loop, sock, self._function, self._on_close)

    def _on_close(self, _: ClientConnection) -> None:
        self._client = None

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
