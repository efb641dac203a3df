"""One Unix stream socket: frames in, frames out, and the file descriptors that travel with them.

Rules of ownership (invariant I14): an fd handed to `send` is the channel's and closed once sent; an fd
received belongs to the message it came with and is closed with it unless somebody takes it.  Fds travel with
the last bytes of their frame, which the kernel delivers at once: half a frame holds none, or a peer could
leave an object's own fd in it, which would keep the object for ever.  The kernel never joins two batches, so
a first-in-first-out queue matches them to frames.  A plain `recv` would drop them: this file uses recvmsg
only.

What a peer can do wrong ends its own connection with a log line and nothing else; who waits for
a reply of one that is gone, or asks it anew, is told (I31).
"""

from __future__ import annotations

import array
import contextlib
import errno
import select
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import msgpack
import structlog

from protocol.errors import PeerError, UapiError, shown
from protocol.flow import Wait
from protocol.kernel.port import SCM_MAX_FD, Kernel, StreamSocket
from protocol.rpc.body import decode
from protocol.rpc.loop import RECV_BYTES, Loop
from protocol.rpc.session import HEADER_BYTES, MAX_IN_FLIGHT, Framer, Kind, Session, header

MAX_ERRNO = 4096
MAX_WHY_CHARS = 4096
MAX_UNSENT_BYTES = 16 << 20  # a peer that does not read is cut off beyond this
# As plain numbers: arithmetic on the enum members costs more than the system call.
_NOSIGNAL, _CLOEXEC, _CTRUNC = int(socket.MSG_NOSIGNAL), int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC)
FD_TAIL_BYTES = 4096  # a piece so small is one buffer of the kernel's: it arrives whole [af_unix.c]
_ANCILLARY_BYTES = socket.CMSG_SPACE(SCM_MAX_FD * array.array("i").itemsize)
"""For all that can come: what the kernel has no room for it closes itself, and may sleep over it."""
_PACK = msgpack.Packer(autoreset=True).pack

log = structlog.get_logger("rpc")

T = TypeVar("T")
Body = dict[str, Any]


class PeerGone(PeerError):
    """The other end hung up, or we hung up on it, before it answered."""


class Fds:
    """File descriptors that came with one message, or as if; those nobody takes are closed with it."""

    __slots__ = ("_fds", "_kernel")

    def __init__(self, kernel: Kernel | None = None, fds: Iterable[int] = ()) -> None:
        """None: none came."""
        self._fds: list[int | None] = list(fds)
        assert kernel is not None or not self._fds, "fds that nobody could close"
        self._kernel = kernel

    def __len__(self) -> int:
        return len(self._fds)

    def take(self, index: int) -> int:
        """Hand the fd over to the caller.  Raises UapiError(EBADF) if there is none."""
        fd = self.peek(index)
        self._fds[index] = None
        return fd

    def peek(self, index: int) -> int:
        """Look at the fd; it stays the message's."""
        fd = self._fds[index] if 0 <= index < len(self._fds) else None
        if fd is None:
            raise UapiError(errno.EBADF, f"no file descriptor {index} came with the message")
        return fd

    def close(self) -> None:
        if self._kernel is not None:
            _close_received(self._kernel, self._fds)
        self._fds.clear()


NO_FDS = Fds()


class Reply(NamedTuple):
    body: Body
    fds: Fds = NO_FDS


Serve = Callable[["Channel", int, Body, Fds], None]


def _refuse(channel: Channel, request_id: int, body: Body, fds: Fds) -> None:
    raise PeerError(f"{channel.name} serves no requests")


class Channel:
    """`on_request(channel, id, body, fds)` must lead to one `answer` or `answer_error`, now or later.

    `is_ours`: nobody else has a copy of the socket, whose peer may be anybody.
    """

    def __init__(
        self,
        loop: Loop,
        sock: StreamSocket,
        name: str,
        *,
        on_request: Serve = _refuse,
        on_notify: Callable[[Channel, Body, Fds], None] | None = None,
        on_close: Callable[[Channel], None] | None = None,
        is_ours: bool = False,
    ) -> None:
        sock.setblocking(False)
        self.name = name
        self.loop = loop
        self._kernel = loop.kernel
        self._buffers = (loop.buffer,)
        self._sock = sock
        self._fd = sock.fileno()
        self._on_request = on_request
        self._on_notify = on_notify
        self._on_close = on_close
        self._is_ours = is_ours
        self._session: Session[Wait[Reply]] = Session()
        self._framer = Framer()
        self._received: deque[int | None] = deque()  # None: the fds of one batch, lost on the way in
        self._out: deque[tuple[bytes | memoryview, Sequence[int]]] = deque()
        self._unsent = 0
        self._dirty = False
        self._blocked = False
        self.closed = False
        try:
            loop.register(self._fd, self._on_event)
        except OSError:
            sock.close()
            raise

    @property
    def unsent_bytes(self) -> int:
        """Written, and not taken by the socket yet."""
        return self._unsent

    # -- sending ---------------------------------------------------------------------------------------

    def call(self, op: str, body: Body | None = None, fds: Sequence[int] = ()) -> Wait[Reply]:
        """Ask; the Wait gets the Reply, or fails with the peer's UapiError or PeerGone."""
        wait: Wait[Reply] = Wait()
        if self._session.in_flight >= MAX_IN_FLIGHT:
            self._lost(f"answers nothing: {MAX_IN_FLIGHT} requests in flight", blame=True)
        if self.closed:
            _close_all(self._kernel, fds)
            wait.fail(PeerGone(f"{self.name} hung up"))
            return wait
        request_id = self._session.open(wait)
        try:
            self._send(Kind.REQUEST, request_id, {"op": op, **(body or {})}, fds)
        except BaseException:  # no message can say that
            self._session.answered(request_id)
            raise
        return wait

    async def ask(self, op: str, body: Body | None = None, fds: Sequence[int] = ()) -> Reply:
        """`call`, awaited from a trio task."""
        wait = self.call(op, body, fds)
        try:
            return await self.loop.result(wait)
        except BaseException:
            wait.on_done(_close_unwanted)
            raise

    def notify(self, op: str, body: Body | None = None, fds: Sequence[int] = ()) -> None:
        """Tell; nothing comes back.  Dropped when the peer is gone."""
        if self.closed:
            _close_all(self._kernel, fds)
            return
        self._send(Kind.NOTIFY, 0, {"op": op, **(body or {})}, fds)

    def answer(self, request_id: int, body: Body, fds: Sequence[int] = ()) -> None:
        if self.closed:
            _close_all(self._kernel, fds)
            return
        data = _encode(Kind.REPLY, request_id, body, len(fds))  # may fail, and then it is not answered yet
        self._session.answer(request_id)
        self._queue(data, fds)

    def answer_error(self, request_id: int, error: UapiError) -> None:
        if not self.closed:
            self._session.answer(request_id)
            self._send(Kind.ERROR, request_id, {"errno": error.errno, "why": error.why[:MAX_WHY_CHARS]}, ())

    def _send(self, kind: Kind, request_id: int, body: Body, fds: Sequence[int]) -> None:
        try:
            data = _encode(kind, request_id, body, len(fds))
        except BaseException:
            _close_all(self._kernel, fds)
            raise
        self._queue(data, fds)

    def _queue(self, data: bytes, fds: Sequence[int]) -> None:
        self._out.append((data, fds))
        self._unsent += len(data)
        self._mark_dirty()

    def _mark_dirty(self) -> None:
        if not self._dirty:
            self._dirty = True
            self.loop.mark_dirty(self)

    def flush(self) -> None:
        """Send what was written; what the socket does not take now goes when it is writable."""
        self._dirty = False
        out = self._out
        try:
            while out and not self.closed:
                data, fds = out[0]
                if fds and len(data) > FD_TAIL_BYTES:
                    sent = self._sock.send(memoryview(data)[:-FD_TAIL_BYTES], _NOSIGNAL)
                elif fds:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                    sent = self._sock.sendmsg([data], rights, _NOSIGNAL)
                    _close_all(self._kernel, fds)
                    fds = ()
                else:
                    if len(out) > 1:
                        data = self._join_plain()
                    sent = self._sock.send(data, _NOSIGNAL)
                self._unsent -= sent
                if sent == len(data):
                    out.popleft()
                else:
                    out[0] = (memoryview(data)[sent:], fds)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS or not self._is_whole():
                self._lost(f"send: {error.strerror}")
                return
            self._without_fds()
        if out or self._blocked:
            self._watch_writable(bool(out))
        if self._unsent > MAX_UNSENT_BYTES:
            self._lost(f"does not read: {self._unsent} bytes unsent")

    def _is_whole(self) -> bool:
        """Has nothing of what is next been sent?"""
        return type(self._out[0][0]) is bytes

    def _without_fds(self) -> None:
        """As many fds as this user may have under way are so [unix(7)], and nobody at the other end is to
        blame: what is next goes as an error, or not at all.
        """
        data, fds = self._out.popleft()
        self._unsent -= len(data)
        _close_all(self._kernel, fds)
        ((kind, _, body),) = Framer().feed(memoryview(data))
        request_id, _ = decode(body)
        refused = UapiError(errno.ETOOMANYREFS, "too many fds of this user's are under way")
        if kind is Kind.REQUEST:
            self._guarded(self._session.answered(request_id).fail, refused)
        elif kind is Kind.REPLY:
            self._send(Kind.ERROR, request_id, {"errno": refused.errno, "why": refused.why}, ())
        self._mark_dirty()

    def _join_plain(self) -> bytes:
        """Merge the leading frames that carry no fds into one, for one send."""
        parts = []
        while self._out and not self._out[0][1]:
            parts.append(self._out.popleft()[0])
        joined = b"".join(parts)
        self._out.appendleft((joined, ()))
        return joined

    def _watch_writable(self, blocked: bool) -> None:
        if blocked != self._blocked and not self.closed:
            self._blocked = blocked
            try:
                self.loop.modify(self._fd, select.EPOLLIN | (select.EPOLLOUT if blocked else 0))
            except OSError as error:
                self._lost(f"epoll: {error.strerror}")

    # -- receiving -------------------------------------------------------------------------------------

    def _on_event(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self.flush()
        if events & ~select.EPOLLOUT and not self.closed:
            try:
                while self._receive() == RECV_BYTES and self._received:
                    pass  # the end of their frame is there, behind what our buffer held
                if self._received:
                    raise PeerError(f"{len(self._received)} fds came without the end of their frame")
            except PeerError as error:
                self._lost(str(error), blame=True)

    def _receive(self) -> int:
        """Take what is there, up to RECV_BYTES, and handle the frames it completes; how much it was."""
        try:
            count, ancillary, flags, _ = self._sock.recvmsg_into(self._buffers, _ANCILLARY_BYTES, _CLOEXEC)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._lost(f"receive: {error.strerror}")
            return 0
        if ancillary or flags & _CTRUNC:
            self._collect_fds(ancillary, truncated=bool(flags & _CTRUNC))
        if not count:
            self._lost("hung up")
            return 0
        for kind, nfds, body in self._framer.feed(self._buffers[0][:count]):
            try:
                self._handle(kind, nfds, body)
            except PeerError:
                raise
            except Exception as error:  # ours: the frames behind it are served all the same
                self.loop.report(error)
            if self.closed:
                break
        return int(count)

    def _collect_fds(self, ancillary: list[tuple[int, int, bytes]], truncated: bool) -> None:
        fds = array.array("i")
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
        if truncated:  # our fd table is full
            _close_received(self._kernel, fds)
            self._received.append(None)
        else:
            self._received.extend(fds)

    def _take_fds(self, nfds: int) -> Fds | None:
        """The frame's fds; None when they were lost on the way in."""
        taken: list[int] = []
        while len(taken) < nfds:
            if not self._received:
                _close_received(self._kernel, taken)
                raise PeerError(f"frame announces {nfds} fds, {len(taken)} came")
            fd = self._received.popleft()
            if fd is None:
                _close_received(self._kernel, taken)
                return None
            taken.append(fd)
        return Fds(self._kernel, taken)

    def _handle(self, kind: Kind, nfds: int, raw: memoryview) -> None:
        request_id, body = decode(raw)
        fds = self._take_fds(nfds) if nfds else NO_FDS
        try:
            self._dispatch(kind, request_id, body, fds)
        except PeerError:
            if fds is not None:
                fds.close()
            raise

    def _dispatch(self, kind: Kind, request_id: int, body: Body, fds: Fds | None) -> None:
        if kind is Kind.REQUEST:
            self._session.received(request_id)
            if fds is None:
                self.answer_error(request_id, UapiError(errno.EMFILE, "no room for the fds sent along"))
            else:
                try:
                    self._on_request(self, request_id, body, fds)
                except PeerError:
                    raise
                except Exception:  # ours: whoever asked must not wait for ever
                    if self._session.owes(request_id):
                        self.answer_error(request_id, UapiError(errno.EIO, "internal error; see the log"))
                    raise
        elif kind is Kind.NOTIFY:
            if self._on_notify is None:
                raise PeerError(f"{self.name} takes no notifications")
            try:
                self._on_notify(self, body, fds or NO_FDS)
            finally:
                if fds:
                    fds.close()
        else:
            self._handle_answer(kind, request_id, body, fds)

    def _handle_answer(self, kind: Kind, request_id: int, body: Body, fds: Fds | None) -> None:
        wait = self._session.answered(request_id)
        try:
            self._settle(wait, kind, body, fds)
        except Exception:
            if not wait.done:  # ours: whoever waits must not do so for ever
                wait.fail(PeerGone(f"{self.name}: its answer was not understood"))
            raise

    def _settle(self, wait: Wait[Reply], kind: Kind, body: Body, fds: Fds | None) -> None:
        if kind is Kind.REPLY and fds is not None:
            wait.set(Reply(body, fds))
        elif kind is Kind.REPLY:
            wait.fail(UapiError(errno.EMFILE, "no room in our fd table for the fd in the reply"))
        else:
            if fds is not None:
                fds.close()
            number, why = body.get("errno"), body.get("why")
            if type(number) is not int or not 0 < number < MAX_ERRNO:
                problem = PeerGone(f"{self.name}: error reply with errno {shown(number)}")
                wait.fail(problem)
                raise problem
            wait.fail(UapiError(number, why[:MAX_WHY_CHARS] if type(why) is str else shown(why)))

    # -- the end ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Hang up; requests in flight fail with PeerGone, `on_close` is called."""
        self._lost("closed by us")

    def _lost(self, reason: str, *, blame: bool = False) -> None:
        if self.closed:
            return
        self.closed = True
        (log.warning if blame else log.debug)("connection ends", channel=self.name, reason=reason)
        self.loop.unregister(self._fd)
        self._close_socket()
        _close_received(self._kernel, self._received)
        self._received.clear()
        for _, fds in self._out:
            _close_all(self._kernel, fds)
        self._out.clear()
        for wait in self._session.abandon():
            self._guarded(wait.fail, PeerGone(f"{self.name}: {reason}"))
        if self._on_close is not None:
            self._guarded(self._on_close, self)

    def _close_socket(self) -> None:
        """What a peer left in the queue of our end is closed with it: not here, if that may be anything."""
        if self._is_ours:
            with contextlib.suppress(OSError):  # the peer is gone already
                self._sock.shutdown(socket.SHUT_RDWR)  # at once, for whoever is at the other end
            self._kernel.close_received(self._sock.detach())
        else:
            self._sock.close()

    def _guarded(self, told: Callable[[T], object], what: T) -> None:
        """One who does not take it well must not keep it from the others."""
        try:
            told(what)
        except Exception as error:
            self.loop.report(error)


def _encode(kind: Kind, request_id: int, body: Body, nfds: int) -> bytes:
    payload: bytes = _PACK((request_id, body))
    return header(kind, len(payload), nfds) + payload


def _close_all(kernel: Kernel, fds: Iterable[int]) -> None:
    for fd in fds:
        kernel.close(fd)


def _close_received(kernel: Kernel, fds: Iterable[int | None]) -> None:
    for fd in fds:
        if fd is not None:
            kernel.close_received(fd)


def _close_unwanted(wait: Wait[Reply]) -> None:
    """A reply nobody waits for any more: its fds must not stay open."""
    with contextlib.suppress(UapiError, PeerError):
        wait.result().fds.close()


assert HEADER_BYTES == 8
