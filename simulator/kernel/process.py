"""A process of an in-memory kernel: its fds, and the port `Kernel` for whoever runs in it.

Fds are given as Linux gives them, the lowest that is free.  A process that dies loses all of them at once,
whatever it was doing.  What is ready when, and how much time passes, is the scheduler's: a `Scheduler` is
asked whenever a process waits.
"""

from __future__ import annotations

import array
import errno
import mmap
import select
import socket
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from protocol.kernel.port import BrokenEvent, Bytes, Mapping, Poller, SharedEvent, StreamSocket
from simulator.kernel.files import (
    EVENT_MAX,
    Counter,
    Interest,
    Listening,
    Memory,
    Nothing,
    OpenFile,
    StreamEnd,
    oserror,
)

FD_LIMIT = 1024
BOOTED_NS = 1_700_000_000 * 10**9  # when virtual time was 0, since 1970
_FD_BYTES = array.array("i").itemsize


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

    def seen(self, process: SimProcess, memory: Memory, view: memoryview) -> memoryview:
        return view

    def discarded(self, memory: Memory, at: int, size: int) -> None: ...


class SimHost:
    """What all processes share: names of sockets, and who decides."""

    def __init__(self, scheduler: Scheduler | None = None) -> None:
        self.scheduler = scheduler or AtOnce()
        self.names: dict[Path, Listening] = {}
        self.numbers = count(1)  # of sockets and memory, never given twice


class SimProcess:
    """The port `Kernel`."""

    def __init__(self, host: SimHost, name: str = "", fd_limit: int = FD_LIMIT) -> None:
        self.host = host
        self.name = name
        self.fd_limit = fd_limit
        self._files: dict[int, OpenFile] = {}
        self._free = 3  # no fd below is
        self._made = count(1)

    # -- fds -------------------------------------------------------------------------------------------

    def install(self, file: OpenFile) -> int:
        """A new fd for it.  EMFILE."""
        fd = self._free
        while fd in self._files:
            fd += 1
        if fd >= self.fd_limit:
            raise oserror(errno.EMFILE)
        self._files[fd] = file.get()
        self._free = fd + 1
        return fd

    def named(self, file: OpenFile, what: str) -> OpenFile:
        """One that this process makes."""
        file.name = f"{self.name}.{what}{next(self._made)}"
        return file

    def happened(self, what: str, file: OpenFile, data: Bytes = b"") -> None:
        self.host.scheduler.happened(self, what, file, data)

    def file(self, fd: int) -> OpenFile:
        """EBADF."""
        found = self._files.get(fd)
        if found is None:
            raise oserror(errno.EBADF)
        return found

    def find(self, fd: int) -> OpenFile | None:
        return self._files.get(fd)

    @property
    def fds(self) -> int:
        """How many are open."""
        return len(self._files)

    def dup(self, fd: int) -> int:
        return self.install(self.file(fd))

    def close(self, fd: int) -> None:
        file = self.file(fd)
        del self._files[fd]
        self._free = min(self._free, fd)
        self.happened("close", file)  # while it is known whose other end it is
        file.put()

    def close_received(self, fd: int) -> None:
        self.close(fd)

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
        there = self.host.names.get(path)
        if there is not None and not there.closed:
            raise FileExistsError(errno.EADDRINUSE, "a daemon listens there already", str(path))
        listening = Listening(self.host.numbers)
        listening.name = path.name
        fd = self.install(listening)
        self.host.names[path] = listening
        return SimSocket(self, fd)

    def unlisten(self, path: Path) -> None:
        self.host.names.pop(path, None)

    def connect(self, path: Path) -> StreamSocket:
        there = self.host.names.get(path)
        if there is None:
            raise oserror(errno.ENOENT)
        end = there.connect()
        assert end.peer is not None
        self.named(end, f"{path.stem}#")
        end.peer.name = f"{end.name}'"
        try:
            sock = SimSocket(self, self.install(end))
        except OSError:
            end.get().put()
            raise
        self.happened("connect", there)
        return sock

    def cookie_of(self, fd: int) -> int:
        file = self._files.get(fd)
        return file.cookie if isinstance(file, StreamEnd) else 0

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
        mapping = SimMapping(self, memory, size, writable=True)
        memory.writable = peer_writes
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
        return SimMapping(self, memory, size, writable=writable)

    def file_with(self, name: str, parts: Iterable[Bytes]) -> int:
        data = b"".join(parts)
        return self.install(Memory(next(self.host.numbers), len(data), sealed=False, data=data))

    def contents(self, fd: int) -> bytes:
        file = self.file(fd)
        if not isinstance(file, Memory):
            raise oserror(errno.EINVAL)
        data = file.bytes[: file.size]
        self.close(fd)
        return data

    def memory_of(self, fd: int) -> tuple[int, int]:
        file = self.file(fd)
        if isinstance(file, Memory):
            return 1, file.number
        return 2, self.cookie_of(fd)  # no memory: whoever maps it is told so

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
        file = self._process.file(self._fd)
        if not isinstance(file, StreamEnd):
            raise oserror(errno.ENOTCONN)
        return file

    def send(self, data: Bytes, flags: int = 0, /) -> int:
        return self._sent(self._end, bytes(data), [])

    def sendmsg(
        self, buffers: Sequence[Bytes], ancillary: Sequence[tuple[int, int, Any]] = (), flags: int = 0, /
    ) -> int:
        files = []
        for level, kind, fds in ancillary:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            files += [self._process.file(fd) for fd in array.array("i", bytes(fds))]
        return self._sent(self._end, b"".join(buffers), files)

    def _sent(self, end: StreamEnd, data: bytes, files: list[OpenFile]) -> int:
        sent = end.send(data, files)
        assert end.peer is not None
        self._process.happened("send", end.peer, data[:sent])
        return sent

    def recv(self, size: int, /) -> bytes:
        end = self._end
        into = bytearray(size)
        count, files = end.receive(memoryview(into))
        for file in files:
            file.put()
        self._process.happened("recv", end, into[:count])
        return bytes(into[:count])

    def recvmsg_into(
        self, buffers: Sequence[memoryview], ancillary_bytes: int = 0, flags: int = 0, /
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Any]:
        (into,) = buffers
        end = self._end
        portion = self._process.host.scheduler.portion(self._process, end)
        count, files = end.receive(into[:portion] if portion else into)
        fds = array.array("i")
        truncated = False
        for file in files:
            try:
                if len(fds) * _FD_BYTES >= ancillary_bytes:
                    truncated = True
                else:
                    fds.append(self._process.install(file))
            except OSError:
                truncated = True
            file.put()
        self._process.happened("recv", end, into[:count])
        rights = [(int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS), fds.tobytes())] if fds else []
        return count, rights, int(socket.MSG_CTRUNC) if truncated else 0, None

    def accept(self) -> tuple[StreamSocket, Any]:
        listening = self._process.file(self._fd)
        assert isinstance(listening, Listening), "accept on a socket that does not listen"
        if not listening.waiting:
            raise oserror(errno.EAGAIN)
        fd = self._process.install(listening.waiting[0])
        listening.first().put()
        self._process.happened("accept", listening)
        return SimSocket(self._process, fd), ""

    def shutdown(self, how: int, /) -> None:
        end = self._end
        if end.peer is None:
            raise oserror(errno.ENOTCONN)
        peer = end.peer
        end.shutdown(read=how != socket.SHUT_WR, write=how != socket.SHUT_RD)
        self._process.happened("shutdown", peer)

    def detach(self) -> int:
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        if self._fd != -1:
            self._process.close(self.detach())


class _EpollFile(OpenFile):
    """A poller's own: readable when it has something to report."""

    def __init__(self, poller: SimPoller) -> None:
        super().__init__()
        self.poller = poller

    def events(self) -> int:
        return select.EPOLLIN if self.poller.ready() else 0


class SimPoller:
    """The port `Poller`.  What is ready is listed in the order of registration; what of it is reported, and
    when, the scheduler decides.  `version` is another one whenever that may be another list.
    """

    def __init__(self, process: SimProcess) -> None:
        self.process = process
        self.version = 0
        self._file = _EpollFile(self)
        self._fd = process.install(self._file)
        self._wanted: dict[int, Interest] = {}
        self._changed: set[Interest] = set()  # since `_ready` was made
        self._ready: list[tuple[int, int]] = []

    def register(self, fd: int, events: int, /) -> None:
        file = self.process.file(fd)
        known = self._wanted.get(fd)
        if known is not None:
            if known.file is file and file.users:
                raise oserror(errno.EEXIST)
            self._forget(known)
        wanted = self._wanted[fd] = Interest(fd, file, events, self.changed)
        file.watchers.append(wanted)
        self.changed(wanted)
        self.process.happened("register", file)

    def modify(self, fd: int, events: int, /) -> None:
        if fd not in self._wanted:
            raise oserror(errno.ENOENT)
        wanted = self._wanted[fd]
        wanted.wants(events)
        self.process.happened("modify", wanted.file)

    def unregister(self, fd: int, /) -> None:
        if fd not in self._wanted:
            raise oserror(errno.ENOENT)
        self.process.happened("unregister", self._forget(self._wanted[fd]))

    def _forget(self, wanted: Interest) -> OpenFile:
        wanted.file.watchers.remove(wanted)
        self.changed(wanted)
        del self._wanted[wanted.fd]
        return wanted.file

    def changed(self, wanted: Interest) -> None:
        self._changed.add(wanted)
        self.version += 1
        self._file.changed()

    def file(self, fd: int) -> OpenFile:
        """What is watched under that number."""
        return self._wanted[fd].file

    def ready(self) -> list[tuple[int, int]]:
        if self._changed:
            for wanted in self._changed:
                if not wanted.file.users:  # the last fd of it was closed, and took it out of the set
                    if self._wanted.get(wanted.fd) is wanted:
                        del self._wanted[wanted.fd]
                    continue
                wanted.look()
            self._changed.clear()
            self._ready = [(fd, wanted.ready) for fd, wanted in self._wanted.items() if wanted.ready]
        return self._ready

    def poll(self, timeout_s: float, most: int, /) -> list[tuple[int, int]]:
        return self.process.host.scheduler.poll(self, timeout_s, most)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        for wanted in list(self._wanted.values()):
            self._forget(wanted)
        self.process.close(self._fd)


def poller_of(process: SimProcess, fd: int) -> SimPoller:
    file = process.file(fd)
    assert isinstance(file, _EpollFile), "it waits for one of its sockets beside its poller"
    return file.poller


class SimEvent:
    """The port `SharedEvent`."""

    def __init__(self, process: SimProcess, fd: int) -> None:
        self._process = process
        self.fd = fd

    def _counter(self) -> Counter:
        file = self._process.find(self.fd)
        if not isinstance(file, Counter):
            raise BrokenEvent("no eventfd")
        return file

    def signal(self) -> None:
        counter = self._counter()
        if counter.value >= EVENT_MAX:
            raise BrokenEvent("an eventfd has no room for one signal more")
        counter.put_value(counter.value + 1)
        self._process.happened("signal", counter)

    def drain(self) -> None:
        counter = self._counter()
        counter.put_value(0)
        self._process.happened("drain", counter)

    def close(self) -> None:
        self._process.close(self.fd)


class SimMapping:
    """The port `Mapping`."""

    def __init__(self, process: SimProcess, memory: Memory, size: int, *, writable: bool) -> None:
        self._host, self._memory = process.host, memory
        memory.mappers.add(process.name)
        view = memoryview(memory.bytes)[:size]
        self.view = process.host.scheduler.seen(process, memory, view if writable else view.toreadonly())

    def discard(self, offset: int, size: int) -> None:
        self._memory.bytes.madvise(mmap.MADV_DONTNEED, offset, size)
        self._host.scheduler.discarded(self._memory, offset, size)

    def close(self) -> None:
        self.view.release()
