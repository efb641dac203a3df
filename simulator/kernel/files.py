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
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from operator import attrgetter
from pathlib import Path

from protocol.kernel.port import BACKLOG
from protocol.units import PAGE_SIZE, align_up

SOCKET_BYTES = 212_992  # what unread buffers of one sender may cost: net.core.wmem_default
SKB_BYTES, SHARED_INFO_BYTES, CACHE_LINE = 256, 320, 64  # struct sk_buff and skb_shared_info, both aligned
HEAD_BYTES = PAGE_SIZE - SHARED_INFO_BYTES  # SKB_MAX_HEAD(0)
BUFFER_BYTES = HEAD_BYTES + 32_768  # with UNIX_SKB_FRAGS_SZ: more goes in several [Linux net/unix/af_unix.c]
ROOMY_BYTES = SOCKET_BYTES // 4  # who costs no more has room [Linux net/unix/af_unix.c unix_writable]
EVENT_MAX = (1 << 64) - 2
_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_UNASKED = select.EPOLLHUP | select.EPOLLERR
_BY_NUMBER = attrgetter("number")
MAP_NORESERVE = 0x4000  # not in the mmap module before Python 3.13


def oserror(number: int) -> OSError:
    """As a failed system call raises it: BlockingIOError for EAGAIN, and so on."""
    return OSError(number, os.strerror(number))


@cache
def truesize(size: int) -> int:
    """What a buffer with so many bytes costs: struct sk_buff, the power of two that kmalloc() gives for its
    head, and whole pages for what is behind that [Linux unix_stream_sendmsg, alloc_skb_with_frags].
    """
    paged = min(size, align_up(max(size - HEAD_BYTES, 0), PAGE_SIZE))
    head = align_up(size - paged, CACHE_LINE) + SHARED_INFO_BYTES
    return SKB_BYTES + (1 << (head - 1).bit_length()) + align_up(paged, PAGE_SIZE)


class OpenFile:
    """`users`: fds of processes, and places in messages under way.  `name` says for people, and for who
    compares schedules, which one it is: the n-th that a process made.  `watchers` are told when `events`
    may have another answer.
    """

    name = ""
    cookie = 0  # no socket
    peer: StreamEnd | None = None
    has_poll = True  # may an epoll set have it?
    is_shared = False  # others have it, or will: it was sent

    def __init__(self) -> None:
        self.users = 0
        self.watchers: list[Interest] = []

    def changed(self) -> None:
        for watcher in self.watchers:
            watcher.told(watcher)

    def get(self) -> OpenFile:
        self.users += 1
        return self

    def goes_out(self) -> OpenFile:
        self.is_shared = True
        return self.get()

    def put(self) -> None:
        assert self.users > 0, "put more often than it was got"
        self.users -= 1
        if not self.users:
            self.release()
            self.changed()

    @property
    def is_lent(self) -> bool:
        """Our end of a lease: it is not read, and tells when nobody has the other."""
        return False

    def release(self) -> None:
        """Nobody refers to it any more."""

    def events(self) -> int:
        """What a poller would report now."""
        return 0

    def contents(self) -> bytes:
        """Of a file, what read(2) gives until it has nothing more.  EINVAL."""
        raise oserror(errno.EINVAL)


class Nothing(OpenFile):
    """/dev/null."""

    has_poll = False


@dataclass(slots=True)
class _Piece:
    """One buffer of a stream; files go with its first byte that is read, and what it costs (`truesize`) with
    its last.
    """

    data: bytes
    cost: int
    files: list[OpenFile] = field(default_factory=list)
    read: int = 0


class StreamEnd(OpenFile):
    """One end of a connected Unix stream socket."""

    def __init__(self, cookie: int) -> None:
        super().__init__()
        self.cookie = cookie
        self.peer: StreamEnd | None = None
        self.shut_read = self.shut_write = False
        self.embryo = False  # nobody has accepted it yet
        self._pieces: deque[_Piece] = deque()
        self._late: deque[_Piece] | None = None  # None: nothing is late, nor is its peer's end
        self._unread = 0
        self._cost = 0  # of all pieces, those that are late too
        self._reset = False  # the peer went with bytes it had not read, or before it was accepted

    @staticmethod
    def pair(numbers: Iterator[int]) -> tuple[StreamEnd, StreamEnd]:
        """Their cookies are the next two."""
        one, other = StreamEnd(next(numbers)), StreamEnd(next(numbers))
        one.join(other)
        return one, other

    def join(self, other: StreamEnd) -> None:
        self.peer, other.peer = other, self

    @property
    def is_lent(self) -> bool:
        return self.shut_read

    @property
    def ends(self) -> list[OpenFile]:
        """This one, and the other while it is there."""
        return [self] if self.peer is None else [self, self.peer]

    # -- sending ---------------------------------------------------------------------------------------

    def send(self, data: bytes, files: Iterable[OpenFile] = ()) -> int:
        """EPIPE: nobody will read it.  EAGAIN: no room for any of it.  Where there is some, a whole buffer
        goes; files go with the first [Linux net/core/sock.c sock_alloc_send_pskb].
        """
        peer = self.peer
        if peer is None or self.shut_write or peer.shut_read:
            raise oserror(errno.EPIPE)
        sent, files, was_roomy = 0, list(files), peer._cost <= ROOMY_BYTES
        while sent < len(data) and peer._cost < SOCKET_BYTES:
            part = data[sent : sent + BUFFER_BYTES]
            peer._comes(_Piece(part, truesize(len(part)), [file.goes_out() for file in files]))
            sent, files = sent + len(part), []
        if data and not sent:
            raise oserror(errno.EAGAIN)
        peer.changed()
        if (peer._cost <= ROOMY_BYTES) != was_roomy:
            self.changed()
        return sent

    def _comes(self, piece: _Piece) -> None:
        self._cost += piece.cost
        if self._late is None:
            self._pieces.append(piece)
            self._unread += len(piece.data)
        else:
            self._late.append(piece)

    def _both_changed(self) -> None:
        self.changed()
        if self.peer is not None:
            self.peer.changed()

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
        for piece in self._under_way:
            yield from piece.files

    @property
    def _under_way(self) -> Iterator[_Piece]:
        return chain(self._pieces, self._late or ())

    # -- receiving -------------------------------------------------------------------------------------

    def receive(self, into: memoryview) -> tuple[int, list[OpenFile]]:
        """Bytes of several pieces, but of none behind one with files [Linux net/unix/af_unix.c];
        the files are the caller's.  0 bytes: the peer hung up.  EAGAIN, ECONNRESET.
        """
        got, room, was_roomy = 0, len(into), self._cost <= ROOMY_BYTES
        files: list[OpenFile] = []
        while self._pieces and got < room and not files:
            piece = self._pieces[0]
            part = piece.data[piece.read : piece.read + room - got]
            into[got : got + len(part)] = part
            got, piece.read = got + len(part), piece.read + len(part)
            files, piece.files = piece.files, []
            if piece.read == len(piece.data):
                self._pieces.popleft()
                self._cost -= piece.cost
        self._unread -= got
        self.changed()
        if (self._cost <= ROOMY_BYTES) != was_roomy and self.peer is not None:
            self.peer.changed()
        if got or not room:
            return got, files
        if self._late is not None:
            raise oserror(errno.EAGAIN)
        if self._reset:
            self._reset = False
            raise oserror(errno.ECONNRESET)
        if self.hung_up or self.shut_read:
            return 0, []
        raise oserror(errno.EAGAIN)

    @property
    def pieces(self) -> int:
        """How many have arrived and are unread."""
        return len(self._pieces)

    @property
    def is_late(self) -> bool:
        """A piece is, and what comes behind it."""
        return self._late is not None

    def delay(self, first: int) -> None:
        """Of the pieces that are there, those from that one on are late, and so is what comes behind them."""
        assert self._late is None, "one message is late at a time"
        there = list(self._pieces)
        self._pieces, self._late = deque(there[:first]), deque(there[first:])
        self._unread -= sum(len(piece.data) for piece in self._late)
        self.changed()

    def arrives(self) -> None:
        """What was late, in order."""
        late, self._late = self._late or (), None
        for piece in late:
            self._pieces.append(piece)
            self._unread += len(piece.data)
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
        pieces = list(self._under_way)
        self._pieces.clear()
        self._late = None
        if peer is not None:
            peer.peer = None
            peer._reset = bool(pieces) or self.embryo
            peer.changed()
        for piece in pieces:
            for file in piece.files:
                file.put()

    def events(self) -> int:
        peer = self.peer
        found = _IN if self._pieces else 0
        if peer is None or peer._cost <= ROOMY_BYTES:
            found |= _OUT
        if self._late is not None:
            return found  # whatever happened at the other end is late, too
        if peer is not None and not (
            self.shut_read or self.shut_write or peer.shut_read or peer.shut_write or self._reset
        ):
            return found
        if self.hung_up or self.shut_read:
            found |= select.EPOLLIN | select.EPOLLRDHUP
        if peer is None or ((self.shut_read or peer.shut_write) and (self.shut_write or peer.shut_read)):
            found |= select.EPOLLHUP
        return found | select.EPOLLERR if self._reset else found


class Listening(OpenFile):
    """A socket that has a name."""

    def __init__(self, numbers: Iterator[int], name: str) -> None:
        super().__init__()
        self.name = name
        self.cookie = next(numbers)
        self._numbers = numbers
        self.waiting: deque[StreamEnd] = deque()
        self.closed = False

    def connect(self, ours: StreamEnd) -> StreamEnd:
        """Its new peer.  ECONNREFUSED.  EAGAIN: too many wait [Linux net/unix/af_unix.c unix_recvq_full]."""
        if self.closed:
            raise oserror(errno.ECONNREFUSED)
        if len(self.waiting) > BACKLOG:
            raise oserror(errno.EAGAIN)
        theirs = StreamEnd(next(self._numbers))
        ours.join(theirs)
        theirs.embryo = True
        theirs.get()
        self.waiting.append(theirs)
        self.changed()
        return theirs

    def first(self) -> StreamEnd:
        """Of those that wait, which the caller has now."""
        self.changed()
        end = self.waiting.popleft()
        end.embryo = False
        return end

    def release(self) -> None:
        self.closed = True
        for end in self.waiting:
            end.put()
        self.waiting.clear()

    def events(self) -> int:
        return select.EPOLLIN if self.waiting else 0


class SocketName(OpenFile):
    """Of sockets, in the file system: who was bound there last, and is not unlinked."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.name = f"name {path}"
        self.listening: Listening | None = None

    @property
    def bound(self) -> list[OpenFile]:
        """What whoever looks the name up goes by."""
        return [self] if self.listening is None else [self, self.listening]

    @property
    def is_taken(self) -> bool:
        return self.listening is not None and not self.listening.closed

    def connect(self, ours: StreamEnd) -> tuple[Listening, StreamEnd]:
        """Who listens, and the new peer.  ENOENT, and as `Listening.connect`."""
        if self.listening is None:
            raise oserror(errno.ENOENT)
        return self.listening, self.listening.connect(ours)


class SocketNames(dict[Path, SocketName]):
    """All there are; one that nobody ever had is as one that was unlinked."""

    def __missing__(self, path: Path) -> SocketName:
        name = self[path] = SocketName(path)
        return name


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

    has_poll = False

    def __init__(
        self, number: int, size: int, *, sealed: bool, data: bytes | None = None, made_as: str = ""
    ) -> None:
        super().__init__()
        self.made_as = made_as
        self.number = number
        self.size = size
        self.sealed = sealed  # against shrinking
        self.at = 0  # where who reads its fd goes on: one place for all copies
        self.writable = True  # may be mapped for stores
        self.only_writer = ""  # a process, by name, if nobody else can ever store there
        self._mappers: set[str] = set()  # processes, by name, that ever have: what they saw, they saw
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE  # a fork has its own
        self.bytes = mmap.mmap(-1, max(size, 1), flags=private)  # sparse, as the real one
        if data is not None:
            self.bytes[: len(data)] = data

    def mapped_by(self, name: str) -> Memory:
        self._mappers.add(name)
        self.is_shared |= len(self._mappers) > 1
        return self

    def matters(self, name: str, writes: bool) -> bool:
        """Does it, who comes first, where that process is about to store, or load?"""
        return self.is_shared and (writes or self.only_writer != name)

    def contents(self) -> bytes:
        found, self.at = self.bytes[self.at : self.size], self.size
        return found


@dataclass(eq=False, slots=True)
class Interest:
    """One entry of a poller's list, its `number`-th: which events of a file it wants, under which fd;
    `ready`: those there were when it was looked at last.
    """

    number: int
    fd: int
    file: OpenFile
    events: int
    told: Callable[[Interest], None]
    ready: int = 0

    def wants(self, events: int) -> None:
        self.events = events
        self.told(self)

    def look(self, among: list[Interest]) -> None:
        """EPOLLHUP and EPOLLERR are reported unasked.  `among`: who is ready, in the order of numbers."""
        before, self.ready = self.ready, self.file.events() & (self.events | _UNASKED)
        if before and not self.ready:
            among.remove(self)
        elif self.ready and not before:
            insort(among, self, key=_BY_NUMBER)


class Interests(dict[tuple[int, OpenFile], Interest]):
    """A poller's list, by fd and file, as Linux has it [fs/eventpoll.c ep_find]."""

    _names: tuple[str, ...] | None = None

    def __setitem__(self, key: tuple[int, OpenFile], interest: Interest) -> None:
        self._names = None
        super().__setitem__(key, interest)

    def __delitem__(self, key: tuple[int, OpenFile]) -> None:
        self._names = None
        super().__delitem__(key)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the files, and of the other ends they had when the list last changed."""
        if self._names is None:
            files = [file for _, file in self]
            ends = [file.peer for file in files if file.peer is not None]
            self._names = tuple(file.name for file in (*files, *ends))
        return self._names
