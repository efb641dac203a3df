"""Open files of an in-memory kernel: what an fd of some process, or one under way in a message, refers to.

Models open file descriptions: one lives as long as anything refers to it, and what its end means happens when
the last reference goes [Linux fs/file_table.c, net/unix/af_unix.c].  Nothing here knows of processes or fd
numbers (`process.py`); time and order are its callers'.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

SOCKET_BYTES = 212_992  # net.core.wmem_default
BUFFER_BYTES = 32_768  # of the kernel's buffers at most this much is one piece [Linux net/unix/af_unix.c]
EVENT_MAX = (1 << 64) - 2
MAP_NORESERVE = 0x4000  # not in the mmap module before Python 3.13


def oserror(number: int) -> OSError:
    """As a failed system call raises it: BlockingIOError for EAGAIN, and so on."""
    return OSError(number, os.strerror(number))


class OpenFile:
    """`users`: fds of processes, and places in messages under way.  `name` says for people, and for who
    compares schedules, which one it is: the n-th that a process made.  `watchers` are told when `events`
    may have another answer.
    """

    name = ""

    def __init__(self) -> None:
        self.users = 0
        self.watchers: list[Interest] = []

    def changed(self) -> None:
        for watcher in self.watchers:
            watcher.told(watcher)

    def get(self) -> OpenFile:
        self.users += 1
        return self

    def put(self) -> None:
        assert self.users > 0, "put more often than it was got"
        self.users -= 1
        if not self.users:
            self.release()
            self.changed()

    def release(self) -> None:
        """Nobody refers to it any more."""

    def events(self) -> int:
        """What a poller would report now."""
        return 0


class Nothing(OpenFile):
    """/dev/null."""

    def events(self) -> int:
        return select.EPOLLIN | select.EPOLLOUT


@dataclass(slots=True)
class _Piece:
    """One buffer of a stream; files go with its first byte that is read."""

    data: bytes
    files: list[OpenFile] = field(default_factory=list)
    read: int = 0


class StreamEnd(OpenFile):
    """One end of a connected Unix stream socket."""

    def __init__(self, cookie: int) -> None:
        super().__init__()
        self.cookie = cookie
        self.peer: StreamEnd | None = None
        self.shut_read = self.shut_write = False
        self._pieces: deque[_Piece] = deque()
        self._unread = 0
        self._reset = False  # the peer went with bytes it had not read
        self._late = False  # what was sent to it, its peer's end too, has not arrived

    @staticmethod
    def pair(numbers: Iterator[int]) -> tuple[StreamEnd, StreamEnd]:
        """Their cookies are the next two."""
        one, other = StreamEnd(next(numbers)), StreamEnd(next(numbers))
        one.peer, other.peer = other, one
        return one, other

    # -- sending ---------------------------------------------------------------------------------------

    def send(self, data: bytes, files: Iterable[OpenFile] = ()) -> int:
        """EPIPE: nobody will read it.  EAGAIN: no room for any of it; files go with the first piece."""
        peer = self.peer
        if peer is None or self.shut_write or peer.shut_read:
            raise oserror(errno.EPIPE)
        sent, files = 0, list(files)
        while sent < len(data):
            piece = data[sent : sent + min(BUFFER_BYTES, peer.room)]
            if not piece:
                break
            peer._pieces.append(_Piece(piece, [file.get() for file in files]))
            peer._unread += len(piece)
            sent, files = sent + len(piece), []
        if data and not sent:
            raise oserror(errno.EAGAIN)
        self._both_changed()
        return sent

    def _both_changed(self) -> None:
        self.changed()
        if self.peer is not None:
            self.peer.changed()

    @property
    def room(self) -> int:
        return max(SOCKET_BYTES - self._unread, 0)

    def peek(self, size: int) -> bytes:
        """The first bytes that are there to be received."""
        if self._pieces:
            first = self._pieces[0]
            whole = first.data[first.read : first.read + size]
            if len(whole) == size:
                return whole
        found = bytearray()
        for piece in self._pieces:
            found += piece.data[piece.read : piece.read + size - len(found)]
            if len(found) == size:
                break
        return bytes(found)

    @property
    def unread(self) -> int:
        return self._unread

    @property
    def on_the_way(self) -> Iterator[OpenFile]:
        """Files that nobody has received."""
        for piece in self._pieces:
            yield from piece.files

    # -- receiving -------------------------------------------------------------------------------------

    def receive(self, into: memoryview) -> tuple[int, list[OpenFile]]:
        """Bytes of several pieces, but of none behind one with files [Linux net/unix/af_unix.c];
        the files are the caller's.  0 bytes: the peer hung up.  EAGAIN, ECONNRESET.
        """
        if self._late:
            raise oserror(errno.EAGAIN)
        got, files = 0, list[OpenFile]()
        while self._pieces and got < len(into) and not files:
            piece = self._pieces[0]
            part = piece.data[piece.read : piece.read + len(into) - got]
            into[got : got + len(part)] = part
            got, piece.read = got + len(part), piece.read + len(part)
            files, piece.files = piece.files, []
            if piece.read == len(piece.data):
                self._pieces.popleft()
        self._unread -= got
        self._both_changed()
        if got or not len(into):
            return got, files
        if self._reset:
            self._reset = False
            raise oserror(errno.ECONNRESET)
        if self.hung_up or self.shut_read:
            return 0, []
        raise oserror(errno.EAGAIN)

    def delay(self, *, late: bool) -> None:
        """What is under way to it arrives when it is not late any more, in order."""
        self._late = late
        self.changed()

    # -- the end ---------------------------------------------------------------------------------------

    @property
    def hung_up(self) -> bool:
        """Nothing will come any more."""
        return self.peer is None or self.peer.shut_write

    def shutdown(self, *, read: bool, write: bool) -> None:
        self.shut_read |= read
        self.shut_write |= write
        self._both_changed()

    def release(self) -> None:
        peer, self.peer = self.peer, None
        pieces = list(self._pieces)
        self._pieces.clear()
        if peer is not None:
            peer.peer = None
            peer._reset = bool(pieces)
            peer.changed()
        for piece in pieces:
            for file in piece.files:
                file.put()

    def events(self) -> int:
        found = 0
        peer = self.peer
        if peer is not None and not (
            self.shut_read
            or self.shut_write
            or peer.shut_read
            or peer.shut_write
            or self._reset
            or self._late
        ):
            found = select.EPOLLIN if self._pieces else 0
            return found | select.EPOLLOUT if peer._unread < SOCKET_BYTES else found
        over = self.hung_up or self.shut_read
        if self._pieces or over:
            found |= select.EPOLLIN
        if over:
            found |= select.EPOLLRDHUP
        if peer is None or ((self.shut_read or peer.shut_write) and (self.shut_write or peer.shut_read)):
            found |= select.EPOLLHUP
        if self._reset:
            found |= select.EPOLLERR
        if self._late:
            found = 0
        if peer is None or peer.room:
            found |= select.EPOLLOUT
        return found


class Listening(OpenFile):
    """A socket that has a name."""

    def __init__(self, numbers: Iterator[int]) -> None:
        super().__init__()
        self._numbers = numbers
        self.waiting: deque[StreamEnd] = deque()
        self.closed = False

    def connect(self) -> StreamEnd:
        """The caller's end.  ECONNREFUSED."""
        if self.closed:
            raise oserror(errno.ECONNREFUSED)
        ours, theirs = StreamEnd.pair(self._numbers)
        theirs.get()
        self.waiting.append(theirs)
        self.changed()
        return ours

    def first(self) -> StreamEnd:
        """Of those that wait, which the caller has now."""
        self.changed()
        return self.waiting.popleft()

    def release(self) -> None:
        self.closed = True
        for end in self.waiting:
            end.put()
        self.waiting.clear()

    def events(self) -> int:
        return select.EPOLLIN if self.waiting else 0


class Counter(OpenFile):
    """An eventfd."""

    def __init__(self) -> None:
        super().__init__()
        self.value = 0

    def put_value(self, value: int) -> None:
        self.value = value
        self.changed()

    def events(self) -> int:
        found = select.EPOLLIN if self.value else 0
        return found | (select.EPOLLOUT if self.value < EVENT_MAX else 0)


class Memory(OpenFile):
    """A memfd; its bytes live as long as somebody maps or holds it."""

    def __init__(
        self, number: int, size: int, *, sealed: bool, data: bytes | None = None, made_as: str = ""
    ) -> None:
        super().__init__()
        self.made_as = made_as
        self.number = number
        self.size = size
        self.sealed = sealed  # against shrinking
        self.mappers: set[str] = set()  # processes, by name
        self.writable = True  # may be mapped for stores
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE  # a fork has its own
        self.bytes = mmap.mmap(-1, max(size, 1), flags=private)  # sparse, as the real one
        if data is not None:
            self.bytes[: len(data)] = data


@dataclass(eq=False, slots=True)
class Interest:
    """One entry of a poller's list: which events of a file it wants, under which fd; `ready`: those there
    were when it was looked at last.
    """

    fd: int
    file: OpenFile
    events: int
    told: Callable[[Interest], None]
    ready: int = 0

    def wants(self, events: int) -> None:
        self.events = events
        self.told(self)

    def look(self) -> None:
        """EPOLLHUP and EPOLLERR are reported unasked."""
        self.ready = self.file.events() & (self.events | select.EPOLLHUP | select.EPOLLERR)
