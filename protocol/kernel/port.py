"""What a process wants of the kernel it runs on: sockets, memory and events to share, a clock.

A port with two implementations (docs/decisions/0023): `linux.py` asks the real one, the simulator's keeps
everything in memory and takes time and order from its seed.  `tests/unit/protocol/kernel/` holds both to the
same answers.  A `Loop` has one, and whoever has a loop reaches it there.

Fds are numbers of a process, as always: whoever is given one owns it.  Errors are OSError with the kernel's
errno.  What has methods with the names of `socket.socket` and `select.epoll` is one or behaves as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Protocol

BACKLOG: Final = 64  # of who listens: one more waits to be accepted, and whoever comes then is told EAGAIN
SCM_MAX_FD: Final = 253  # in one message; more are EINVAL [Linux net/core/scm.c]

Bytes = bytes | bytearray | memoryview


class StreamSocket(Protocol):
    """A Unix stream socket [socket.socket]; its fd is closed with it unless it was detached."""

    def fileno(self) -> int: ...
    def setblocking(self, blocking: bool, /) -> None: ...
    def send(self, data: Bytes, flags: int = 0, /) -> int: ...
    def sendmsg(
        self, buffers: Sequence[Bytes], ancillary: Sequence[tuple[int, int, Any]] = (), flags: int = 0, /
    ) -> int: ...
    def recv(self, size: int, /) -> bytes: ...
    def recvmsg_into(
        self, buffers: Sequence[memoryview], ancillary_bytes: int = 0, flags: int = 0, /
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Any]: ...
    def accept(self) -> tuple[StreamSocket, Any]: ...
    def shutdown(self, how: int, /) -> None: ...
    def detach(self) -> int: ...
    def close(self) -> None: ...


class Poller(Protocol):
    """Level-triggered readiness of fds [select.epoll]."""

    def register(self, fd: int, events: int, /) -> None: ...
    def modify(self, fd: int, events: int, /) -> None: ...
    def unregister(self, fd: int, /) -> None: ...
    def poll(self, timeout_s: float, most: int, /) -> list[tuple[int, int]]: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


class BrokenEvent(Exception):
    """Its counter is full, or it is no eventfd: whoever holds the other end is not to be trusted."""


class SharedEvent(Protocol):
    """An eventfd that two processes share: one signals, the other is woken and drains it.  Never waits,
    whatever the other makes of it."""

    @property
    def fd(self) -> int: ...
    def signal(self) -> None:
        """Raises BrokenEvent."""

    def drain(self) -> None:
        """Whatever was signalled until now.  Raises BrokenEvent."""

    def close(self) -> None: ...


class Mapping(Protocol):
    """Shared memory as this process sees it; stores through `view` only if it was mapped for that."""

    @property
    def view(self) -> memoryview: ...
    def discard(self, offset: int, size: int) -> None:
        """Whole pages read as zeroes again, for everybody, and cost nothing."""

    def compiled(self, module: str, ready: Callable[[ModuleType], None]) -> None:
        """Import a module of compiled code that works on such memory, beside what runs, and call `ready` with
        it, from another thread; never where it cannot be had, or may not work here.
        """

    def close(self) -> None:
        """BufferError: somebody still has part of `view`."""


class Kernel(Protocol):
    # sockets
    def socketpair(self) -> tuple[StreamSocket, StreamSocket]: ...
    def socket_of(self, fd: int) -> StreamSocket:
        """The socket behind an fd, which is its own from now on."""

    def listen(self, path: Path, mode: int | None) -> StreamSocket:
        """Non-blocking, under that name, with `mode` or the umask's.  A name that somebody listens under is
        EADDRINUSE, one of something else EEXIST; one left behind is taken over.
        """

    def unlisten(self, path: Path) -> None:
        """The name is gone; one that cannot be taken away stays, as after a death, and is taken over."""

    def connect(self, path: Path) -> StreamSocket:
        """Never waits.  ENOENT, ECONNREFUSED: nobody listens there; EAGAIN: BACKLOG wait already."""

    def cookie_of(self, fd: int) -> int:
        """The number that names the socket behind an fd in every process, never given twice; 0 for any other
        file.
        """

    # fds
    def dup(self, fd: int) -> int: ...
    def close(self, fd: int) -> None:
        """One that we made, or a copy of it."""

    def close_received(self, fd: int) -> None:
        """One that somebody sent: it may be anything, and closing it may take its time, but not ours."""

    def replace_received(self, fd: int, by: int) -> Callable[[], bool]:
        """The same, and a copy of `by`, which stays open, takes its place in the fd table.  Has it?  Until
        then `fd` is not to be touched.
        """

    def reserve(self) -> int:
        """An fd for nothing: it keeps a place in the fd table."""

    # events
    def poller(self) -> Poller: ...
    def event(self) -> SharedEvent:
        """A new one."""

    def event_of(self, fd: int) -> SharedEvent:
        """The one behind an fd, which is its own from now on."""

    # memory
    def memfd(self, name: str, size: int, *, peer_writes: bool) -> tuple[int, Mapping]:
        """Zeroes that nobody can resize, mapped for stores; unless the peer writes, this mapping is the only
        one there can be that stores, whatever happens to copies of the fd.
        """

    def map_peer(self, fd: int, size: int, *, writable: bool) -> Mapping:
        """The first `size` bytes of a memfd.  ValueError: smaller, or free to become so."""

    def file_with(self, name: str, parts: Iterable[Bytes]) -> int:
        """An fd of a file that holds these bytes, to be read from its start."""

    def contents(self, fd: int) -> bytes:
        """All bytes of such a file from where its fd stands; the fd is closed.  EINVAL: no file."""

    def memory_of(self, fd: int) -> tuple[int, int]:
        """What names the file behind an fd: the same for every fd of it."""

    # time
    def monotonic_ns(self) -> int: ...
    def wall_ns(self) -> int:
        """Since 1970, as somebody has set it."""
