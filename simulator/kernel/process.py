"""A process of an in-memory kernel: its fds, and the port `Kernel` for whoever runs in it.

A process that dies loses all of them at once, whatever it was doing.  What is ready when, and how much time
passes, is the scheduler's: a `Scheduler` is asked whenever a process waits.
"""

from __future__ import annotations

import array
import errno
import select
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from protocol.kernel.port import SCM_MAX_FD, BrokenEvent, Bytes, Mapping, Poller, SharedEvent, StreamSocket
from simulator.kernel.fds import FD_LIMIT, FdTable
from simulator.kernel.files import (
    EVENT_MAX,
    Counter,
    Interest,
    Interests,
    Listening,
    Memory,
    Nothing,
    OpenFile,
    SocketNames,
    StreamEnd,
    oserror,
)
from simulator.kernel.mapping import SimMapping

BOOTED_NS = 1_700_000_000 * 10**9  # when virtual time was 0, since 1970
_HEADER_BYTES = socket.CMSG_LEN(0)
_FD_BYTES = array.array("i").itemsize
_ONE = (1).to_bytes(8, sys.byteorder)  # what a signal writes
_Rights = tuple[int, int, bytes]  # a control message: level, type, data


class Scheduler(Protocol):
    """What decides, and is told of everything that another process may notice."""

    def now_ns(self) -> int:
        """Virtual time."""

    def poll(self, poller: SimPoller, timeout_s: float, most: int) -> list[tuple[int, int]]:
        """What of `poller.ready()` its process is told; others run until there is, or time is up."""

    def portion(self, process: SimProcess, end: StreamEnd) -> int:
        """How many of the bytes that are there one receive gets."""

    def happened(self, process: SimProcess, what: str, file: OpenFile, data: Bytes = b"") -> None:
        """`process` did it, with an effect on what others see of `file`."""

    def looked(self, *files: OpenFile) -> None:
        """The running process goes by what they are like, and changes nothing."""

    def seen(self, process: SimProcess, memory: Memory, view: memoryview) -> memoryview:
        """What of `memory` the process is given, or something that behaves as that."""

    def discarded(self, memory: Memory, at: int, size: int) -> None:
        """Those bytes were given up: they are zeroes."""


class AtOnce:
    """No other process runs, and time stands still: what is not ready now never is."""

    def now_ns(self) -> int:
        return 0

    def poll(self, poller: SimPoller, timeout_s: float, most: int) -> list[tuple[int, int]]:
        return poller.ready()[:most]

    def portion(self, process: SimProcess, end: StreamEnd) -> int:
        return end.unread

    def happened(self, process: SimProcess, what: str, file: OpenFile, data: Bytes = b"") -> None: ...

    def looked(self, *files: OpenFile) -> None: ...

    def seen(self, process: SimProcess, memory: Memory, view: memoryview) -> memoryview:
        return view

    def discarded(self, memory: Memory, at: int, size: int) -> None: ...


class SimHost:
    """What all processes share: names of sockets, and who decides."""

    def __init__(self, scheduler: Scheduler | None = None) -> None:
        self.scheduler = scheduler or AtOnce()
        self.names = SocketNames()
        self.numbers = count(1)  # of sockets and memory, never given twice


class SimProcess(FdTable):
    """The port `Kernel`."""

    def __init__(self, host: SimHost, name: str = "", fd_limit: int = FD_LIMIT) -> None:
        super().__init__(name, fd_limit)
        self.host = host
        self.happened: Callable[..., None] = partial(host.scheduler.happened, self)
        """what, to which file, and the bytes that were sent or received."""
        self._made = count(1)
        self.parks: Callable[[SimPoller], bool] | None = None
        """What runs in it waits for that one, where it has nothing else to do: did something come of it?"""

    # -- fds -------------------------------------------------------------------------------------------

    def named(self, file: OpenFile, what: str) -> OpenFile:
        """One that this process makes."""
        file.name = f"{self.name}.{what}{next(self._made)}"
        return file

    def dup(self, fd: int) -> int:
        return self.install(self.file(fd))

    def close(self, fd: int) -> None:
        file = self.take_out(fd)
        self.happened("close", file)  # while it is known whose other end it is
        file.put()

    def close_received(self, fd: int) -> None:
        self.close(fd)

    def replace_received(self, fd: int, by: int) -> Callable[[], bool]:
        file = self.put_in(fd, self.file(by))
        self.happened("close", file)
        file.put()
        return lambda: True

    def reserve(self) -> int:
        return self.install(Nothing())

    def die(self) -> None:
        """SIGKILL: every fd is closed, in order."""
        for fd in sorted(self._files):
            self.close(fd)

    # -- sockets ---------------------------------------------------------------------------------------

    def socketpair(self) -> tuple[StreamSocket, StreamSocket]:
        one, other = StreamEnd.pair(self.host.numbers)
        self.named(one, "pair")
        other.name = f"{one.name}'"
        first = SimSocket(self, self.install(one))
        try:
            return first, SimSocket(self, self.install(other))
        except OSError:
            first.close()
            raise

    def socket_of(self, fd: int) -> StreamSocket:
        if not isinstance(self.file(fd), StreamEnd | Listening):
            raise oserror(errno.ENOTSOCK)
        return SimSocket(self, fd)

    def listen(self, path: Path, mode: int | None) -> StreamSocket:
        name = self.host.names[path]
        self.host.scheduler.looked(*name.bound)
        if name.is_taken:
            raise OSError(errno.EADDRINUSE, "a daemon listens there already", str(path))
        listening = Listening(self.host.numbers, path.name)
        fd = self.install(listening)
        name.listening = listening
        self.happened("listen", name)
        return SimSocket(self, fd)

    def unlisten(self, path: Path) -> None:
        name = self.host.names[path]
        name.listening = None
        self.happened("unlisten", name)

    def connect(self, path: Path) -> StreamSocket:
        """EMFILE comes before all else."""
        end = StreamEnd(next(self.host.numbers))
        fd, name = self.install(end), self.host.names[path]
        self.host.scheduler.looked(*name.bound)
        try:
            there, theirs = name.connect(end)
        except OSError:
            self.take_out(fd).put()
            raise
        self.named(end, f"{path.stem}#")
        theirs.name = f"{end.name}'"
        self.happened("connect", there)
        return SimSocket(self, fd)

    def cookie_of(self, fd: int) -> int:
        file = self.find(fd)
        return 0 if file is None else file.cookie

    # -- events ----------------------------------------------------------------------------------------

    def poller(self) -> Poller:
        return SimPoller(self)

    def event(self) -> SharedEvent:
        return SimEvent(self, self.install(self.named(Counter(), "event")))

    def event_of(self, fd: int) -> SharedEvent:
        return SimEvent(self, fd)

    # -- memory ----------------------------------------------------------------------------------------

    def memfd(self, name: str, size: int, *, peer_writes: bool) -> tuple[int, Mapping]:
        memory = Memory(next(self.host.numbers), size, sealed=True, made_as=name)
        self.named(memory, name)
        fd = self.install(memory)
        mapping = self._map(memory, size, writable=True)
        memory.writable, memory.only_writer = peer_writes, "" if peer_writes else self.name
        return fd, mapping

    def map_peer(self, fd: int, size: int, *, writable: bool) -> Mapping:
        memory = self.find(fd)
        if not isinstance(memory, Memory):
            raise ValueError("no memfd, so nothing keeps it from shrinking")
        if not memory.sealed:
            raise ValueError("it may shrink under us: seal it (F_SEAL_SHRINK)")
        if memory.size < size:
            raise ValueError("larger than its file")
        if writable and not memory.writable:
            raise oserror(errno.EPERM)
        return self._map(memory, size, writable=writable)

    def _map(self, memory: Memory, size: int, *, writable: bool) -> Mapping:
        scheduler = self.host.scheduler
        seen, of = partial(scheduler.seen, self), memory.mapped_by(self.name)
        return SimMapping(of, size, writable=writable, seen=seen, discarded=scheduler.discarded)

    def file_with(self, name: str, parts: Iterable[Bytes]) -> int:
        data = b"".join(parts)
        return self.install(Memory(next(self.host.numbers), len(data), sealed=False, data=data))

    def contents(self, fd: int) -> bytes:
        try:
            return self.file(fd).contents()
        finally:
            self.close(fd)

    def memory_of(self, fd: int) -> tuple[int, int]:
        file = self.file(fd)
        if isinstance(file, Memory):
            return 1, file.number
        return 2, file.cookie  # no memory: whoever maps it is told so

    # -- time ------------------------------------------------------------------------------------------

    def monotonic_ns(self) -> int:
        return self.host.scheduler.now_ns()

    def wall_ns(self) -> int:
        return BOOTED_NS + self.host.scheduler.now_ns()


class SimSocket:
    """The port `StreamSocket`; never waits, whatever `setblocking` was told."""

    def __init__(self, process: SimProcess, fd: int) -> None:
        self._process = process
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def setblocking(self, blocking: bool, /) -> None: ...

    @property
    def _end(self) -> StreamEnd:
        file = self._process.find(self._fd)
        if isinstance(file, StreamEnd):
            return file
        raise oserror(errno.EBADF if file is None else errno.ENOTCONN)

    def send(self, data: Bytes, flags: int = 0, /) -> int:
        return self._sent(self._end, bytes(data), [])

    def sendmsg(
        self, buffers: Sequence[Bytes], ancillary: Sequence[tuple[int, int, Any]] = (), flags: int = 0, /
    ) -> int:
        files = []
        for level, kind, fds in ancillary:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            files += [self._process.file(fd) for fd in array.array("i", bytes(fds))]
        if len(files) > SCM_MAX_FD:
            raise oserror(errno.EINVAL)
        return self._sent(self._end, b"".join(buffers), files)

    def _sent(self, end: StreamEnd, data: bytes, files: list[OpenFile]) -> int:
        try:
            sent = end.send(data, files)
        except OSError:
            self._process.host.scheduler.looked(*end.ends)
            raise
        assert end.peer is not None
        self._process.happened("send", end.peer, data[:sent])
        return sent

    def _receive(self, end: StreamEnd, into: memoryview) -> tuple[int, list[OpenFile]]:
        try:
            return end.receive(into)
        except OSError:
            self._process.host.scheduler.looked(end)
            raise

    def recv(self, size: int, /) -> bytes:
        end = self._end
        into = bytearray(size)
        count, files = self._receive(end, memoryview(into))
        for file in files:
            file.put()
        self._process.happened("recv", end, into[:count])
        return bytes(into[:count])

    def recvmsg_into(
        self, buffers: Sequence[memoryview], ancillary_bytes: int = 0, flags: int = 0, /
    ) -> tuple[int, list[_Rights], int, Any]:
        (into,) = buffers
        end = self._end
        portion = self._process.host.scheduler.portion(self._process, end)
        count, files = self._receive(end, into[:portion] if portion else into)
        rights, flags = self._received(files, ancillary_bytes) if files else ([], 0)
        self._process.happened("recv", end, into[:count])
        return count, rights, flags, None

    def _received(self, files: Sequence[OpenFile], ancillary_bytes: int) -> tuple[list[_Rights], int]:
        """As ancillary data, and what is to be said of it."""
        room = max(ancillary_bytes - _HEADER_BYTES, 0) // _FD_BYTES
        fds = array.array("i", self._process.install_first(files[:room]))
        for file in files:
            file.put()
        rights = [(int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS), fds.tobytes())] if fds else []
        return rights, int(socket.MSG_CTRUNC) if len(fds) < len(files) else 0

    def accept(self) -> tuple[StreamSocket, Any]:
        listening = self._process.file(self._fd)
        assert isinstance(listening, Listening), "accept on a socket that does not listen"
        if not listening.waiting:
            self._process.host.scheduler.looked(listening)
            raise oserror(errno.EAGAIN)
        fd = self._process.install(listening.waiting[0])
        listening.first().put()
        self._process.happened("accept", listening)
        return SimSocket(self._process, fd), ""

    def shutdown(self, how: int, /) -> None:
        end = self._end
        end.shutdown(read=how != socket.SHUT_WR, write=how != socket.SHUT_RD)
        self._process.happened("shutdown", end.peer or end)

    def detach(self) -> int:
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        if self._fd != -1:
            self._process.close(self.detach())


class SimPoller(OpenFile):
    """The port `Poller`, and its file, readable when it has something to report.  What is ready is listed in
    the order of registration; what of it is reported, and when, the scheduler decides.
    """

    def __init__(self, process: SimProcess) -> None:
        super().__init__()
        self.process = process
        self.stirs: Callable[[], None] | None = None  # of who sleeps on it: there may be something
        self._fd = process.install(self)
        self.wanted = Interests()
        self._registered = count(1)
        self._changed: set[Interest] = set()  # since somebody asked what is ready
        self._ready: list[Interest] = []

    def register(self, fd: int, events: int, /) -> None:
        file = self._watchable(fd)
        if (fd, file) in self.wanted:
            raise oserror(errno.EEXIST)
        wanted = self.wanted[fd, file] = Interest(next(self._registered), fd, file, events, self.told)
        file.watchers.append(wanted)
        self.told(wanted)
        self.process.happened("register", file)

    def modify(self, fd: int, events: int, /) -> None:
        wanted = self._known(fd)
        wanted.wants(events)
        self.process.happened("modify", wanted.file)

    def unregister(self, fd: int, /) -> None:
        wanted = self._known(fd)
        self._forget(wanted)
        self.process.happened("unregister", wanted.file)

    def _watchable(self, fd: int) -> OpenFile:
        """EBADF, EPERM."""
        file = self.process.file(fd)
        if not file.has_poll:
            raise oserror(errno.EPERM)
        return file

    def _known(self, fd: int) -> Interest:
        """What was registered under that number, if it is the same file by now.  EBADF, EPERM, ENOENT."""
        wanted = self.wanted.get((fd, self._watchable(fd)))
        if wanted is None:
            raise oserror(errno.ENOENT)
        return wanted

    def _forget(self, wanted: Interest) -> None:
        wanted.file.watchers.remove(wanted)
        self.told(wanted)
        self._drop(wanted)

    def _drop(self, wanted: Interest) -> None:
        del self.wanted[wanted.fd, wanted.file]
        self._changed.discard(wanted)
        if wanted in self._ready:
            self._ready.remove(wanted)

    def told(self, wanted: Interest) -> None:
        """Its file is another one than it was."""
        self._changed.add(wanted)
        if self.stirs is not None:
            self.stirs()
        if self.watchers:
            self.changed()

    def events(self) -> int:
        return select.EPOLLIN if self.found() else 0

    def ready(self) -> list[tuple[int, int]]:
        return [(wanted.fd, wanted.ready) for wanted in self.found()]

    def found(self) -> Sequence[Interest]:
        """The same, with their files: a list that changes when this is called again."""
        ready = self._ready
        while self._changed:
            wanted = self._changed.pop()
            if not wanted.file.users:  # the last fd of it was closed, and took it out of the set
                self._drop(wanted)
                continue
            wanted.look(ready)
        return ready

    def poll(self, timeout_s: float, most: int, /) -> list[tuple[int, int]]:
        """One event at a time, where somebody can be stopped: several are as if nobody came between."""
        return self.process.host.scheduler.poll(self, timeout_s, most)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        for wanted in list(self.wanted.values()):
            self._forget(wanted)
        self.process.close(self._fd)


class SimEvent:
    """The port `SharedEvent`.  A socket is written and read as an eventfd is: nobody asks what it is."""

    def __init__(self, process: SimProcess, fd: int) -> None:
        self._process = process
        self.fd = fd

    def signal(self) -> None:
        file = self._process.find(self.fd)
        if isinstance(file, Counter) and file.value < EVENT_MAX:
            file.put_value(file.value + 1)
            self._process.happened("signal", file)
        elif isinstance(file, StreamEnd) and file.events() & select.EPOLLOUT:
            try:
                SimSocket(self._process, self.fd).send(_ONE)
            except OSError as error:
                raise BrokenEvent(f"an eventfd cannot be written: {error.strerror}") from None
        else:
            raise BrokenEvent("no eventfd, or one that has no room for one signal more")

    def drain(self) -> None:
        file = self._process.find(self.fd)
        if isinstance(file, Counter):
            file.put_value(0)
            self._process.happened("drain", file)
        elif isinstance(file, StreamEnd):
            try:
                SimSocket(self._process, self.fd).recv(len(_ONE))
            except BlockingIOError:
                return  # nothing was signalled
            except OSError as error:
                raise BrokenEvent(f"an eventfd cannot be read: {error.strerror}") from None
        elif not isinstance(file, Nothing):
            raise BrokenEvent("no eventfd")

    def close(self) -> None:
        self._process.close(self.fd)
