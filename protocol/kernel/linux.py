"""The kernel we run on, behind the port.

Memory is made so that it cannot shrink, and mapped from a peer only if it cannot: a load beyond the end of a
file is SIGBUS, which no process survives that did not mean to.  So what a peer gives is asked for its seals,
which cannot be taken off again [Linux mm/memfd.c], and then for its size; the answer holds for as long as it
is mapped.

Flags of an eventfd belong to all who have it, so a peer may make it a blocking one at any time: whoever
drains asks not to wait call by call, whoever signals asks first whether there is room.  What is left is a
peer that fills the counter between that answer and the write.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import socket
import stat
import struct
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from threading import Thread
from time import monotonic_ns, time_ns
from types import ModuleType
from typing import Final

import structlog

from protocol.kernel.asked import asked, told
from protocol.kernel.closer import Closer
from protocol.kernel.port import BACKLOG, BrokenEvent, Bytes, Mapping, Poller, SharedEvent, StreamSocket

log = structlog.get_logger("kernel")

SO_COOKIE: Final = 57  # not in the socket module
F_SEAL_FUTURE_WRITE: Final = 0x10  # not in the fcntl module before Python 3.13
_COOKIE = struct.Struct("=Q")
_NO_DIRECTORY = {errno.ENOENT: "make the directory it is to lie in"}
_ZEROES = bytes(2 << 20)  # the smallest piece that is given back at once


class MappedFile:
    """The port `Mapping`."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self.view = memoryview(mapping)

    def discard(self, offset: int, size: int) -> None:
        try:
            self._mapping.madvise(mmap.MADV_REMOVE, offset, size)
        except OSError:  # no memory to give memory back with: zeroed it must be in any case
            for at in range(offset, offset + size, len(_ZEROES)):
                self._mapping[at : at + len(_ZEROES)] = _ZEROES

    def compiled(self, module: str, ready: Callable[[ModuleType], None]) -> None:
        """The process does not end before it has come."""
        Thread(target=_load, args=(module, ready), name=f"import {module}").start()

    def close(self) -> None:
        self.view.release()
        self._mapping.close()


def _load(module: str, ready: Callable[[ModuleType], None]) -> None:
    try:
        loaded = import_module(module)
    except ImportError as error:
        log.info("goes on without compiled code", module=module, why=str(error))
    else:
        ready(loaded)
        log.info("compiled code has come", module=module)


class EventFd:
    """The port `SharedEvent`; owns `fd`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._count = [bytearray(8)]
        self._room = select.poll()
        self._room.register(fd, select.POLLOUT)

    def signal(self) -> None:
        try:
            ready = self._room.poll(0)
            if not ready or not ready[0][1] & select.POLLOUT:
                raise BrokenEvent("an eventfd has no room for one signal more")
            os.eventfd_write(self.fd, 1)
        except OSError as error:
            raise BrokenEvent(f"an eventfd cannot be written: {error.strerror}") from None

    def drain(self) -> None:
        try:
            os.preadv(self.fd, self._count, -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return  # nothing was signalled
        except OSError as error:
            raise BrokenEvent(f"an eventfd cannot be read: {error.strerror}") from None

    def close(self) -> None:
        os.close(self.fd)


class Linux:
    """The port `Kernel`."""

    def __init__(self) -> None:
        self.closer = Closer()
        self.close = os.close
        self.close_received = self.closer.close
        self.replace_received = self.closer.replace
        self.monotonic_ns = monotonic_ns
        self.wall_ns = time_ns

    # -- sockets ---------------------------------------------------------------------------------------

    def socketpair(self) -> tuple[StreamSocket, StreamSocket]:
        with asked("cannot make a pair of sockets"):
            return socket.socketpair()

    def socket_of(self, fd: int) -> StreamSocket:
        with asked(f"cannot use fd {fd} as a socket"):
            return socket.socket(fileno=fd)

    def listen(self, path: Path, mode: int | None) -> StreamSocket:
        """Bound under another name and renamed: a peer never meets a socket that does not listen yet."""
        with asked("cannot listen", str(path), _NO_DIRECTORY), ExitStack() as undo:
            _remove_stale(path)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(sock.close)
            sock.setblocking(False)
            hidden = path.with_name(f".{path.name[:60]}.{os.getpid()}")
            _remove_stale(hidden)  # of one of our number who was killed here
            sock.bind(str(hidden))
            undo.callback(hidden.unlink, missing_ok=True)
            if mode is not None:
                os.chmod(hidden, mode)  # before anybody can connect
            sock.listen(BACKLOG)
            os.rename(hidden, path)
            undo.pop_all()
        return sock

    def unlisten(self, path: Path) -> None:
        with suppress(OSError):
            os.unlink(path)

    def connect(self, path: Path) -> StreamSocket:
        with asked("cannot connect", str(path)), ExitStack() as undo:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(sock.close)
            sock.setblocking(False)
            sock.connect(str(path))
            undo.pop_all()
        return sock

    def cookie_of(self, fd: int) -> int:
        """64 bits, counted up from boot, where an inode of sockfs has 32 and comes again [Linux sock_diag.c
        __sock_gen_cookie, since 5.11].
        """
        try:
            asked = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
        except OSError:
            return 0
        try:
            cookie: int = _COOKIE.unpack(asked.getsockopt(socket.SOL_SOCKET, SO_COOKIE, _COOKIE.size))[0]
        except OSError:
            return 0
        finally:
            asked.detach()  # it stays the caller's
        return cookie

    # -- fds -------------------------------------------------------------------------------------------

    def dup(self, fd: int) -> int:
        try:
            return os.dup(fd)
        except OSError as error:
            raise told(error, "cannot copy an fd") from None

    def reserve(self) -> int:
        with asked("cannot keep a place in the fd table"):
            return os.open(os.devnull, os.O_RDONLY)

    # -- events ----------------------------------------------------------------------------------------

    def poller(self) -> Poller:
        with asked("cannot make an epoll set"):
            return select.epoll()

    def event(self) -> SharedEvent:
        with asked("cannot make an eventfd"):
            return EventFd(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    def event_of(self, fd: int) -> SharedEvent:
        return EventFd(fd)

    # -- memory ----------------------------------------------------------------------------------------

    def memfd(self, name: str, size: int, *, peer_writes: bool) -> tuple[int, Mapping]:
        with asked(f"cannot make {size} bytes of shared memory, {name!r}"), ExitStack() as undo:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            undo.callback(os.close, fd)
            os.ftruncate(fd, size)
            mapping = mmap.mmap(fd, size)
            undo.callback(mapping.close)  # it has a copy of the fd
            seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals if peer_writes else seals | F_SEAL_FUTURE_WRITE)
            if not peer_writes:
                os.fchmod(fd, 0o400)  # a re-open for writing fails as well, but for root
            undo.pop_all()
        return fd, MappedFile(mapping)

    def map_peer(self, fd: int, size: int, *, writable: bool) -> Mapping:
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            raise ValueError("no memfd, so nothing keeps it from shrinking") from None
        if not seals & fcntl.F_SEAL_SHRINK:
            raise ValueError("it may shrink under us: seal it (F_SEAL_SHRINK)")
        with asked(f"cannot map {size} bytes that a peer shares"):
            if os.fstat(fd).st_size < size:
                raise ValueError("larger than its file")
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            return MappedFile(mmap.mmap(fd, size, mmap.MAP_SHARED, access))

    def file_with(self, name: str, parts: Iterable[Bytes]) -> int:
        with asked(f"cannot make the file {name!r}"), ExitStack() as undo:
            fd = os.memfd_create(name, os.MFD_CLOEXEC)
            undo.callback(os.close, fd)
            with open(fd, "wb", closefd=False) as file:
                file.writelines(parts)
            os.lseek(fd, 0, os.SEEK_SET)
            undo.pop_all()
        return fd

    def contents(self, fd: int) -> bytes:
        with asked("cannot read a file that a peer made"), ExitStack() as done:
            done.callback(os.close, fd)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "no file, and who reads it may wait for ever")
            return done.enter_context(open(fd, "rb", closefd=False)).read()

    def memory_of(self, fd: int) -> tuple[int, int]:
        with asked("cannot tell which file a peer shares"):
            found = os.fstat(fd)
        return found.st_dev, found.st_ino


def _remove_stale(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_socket():
        raise OSError(errno.EEXIST, "what has this name is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # who listens may be stopped, with all its places taken
        try:
            probe.connect(str(path))
        except BlockingIOError:
            pass
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, "a daemon listens there already")


LINUX: Final = Linux()
