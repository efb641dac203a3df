"""A kernel whose calls are counted, and at one of which something befalls the process.

`protocol/kernel/linux.py` stays as it is: what is replaced are the modules that it calls the kernel through,
so each system call of it is one, and the n-th can fail whichever part of an operation it is.  Waiting
(epoll_wait, poll) is not counted: how often a process does is the machine's affair, not the story's.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from kvmd.core.mm.frames import Frames
from protocol.errors import UapiError
from protocol.kernel import linux
from protocol.pt.table_pool import TablePool
from tests.torture.calls import DEATHS, Fault
from tests.torture.order import Order

PIECE_BYTES = 3  # of a read that is cut short: less than a header
LEAKED_BYTES = 1 << 20


class SwappedModule:
    """A module of Python's, in which some names are others."""

    def __init__(self, real: object, **others: object) -> None:
        self._real = real
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class CountedCalls:
    """All that a process asks its kernel, in the order in which it does."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._leaked: list[object] = []

    def counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            fault = self.before(name)
            result = real(*args, **named)
            self.after(fault)
            return result

        return call

    def before(self, name: str) -> Fault:
        fault = self._order.at_call(name)
        if fault is Fault.NOTHING:
            return fault
        if fault is Fault.KILL:
            self.die()
        elif fault is Fault.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault is Fault.FAIL:
            number = self._order.errno_of(name)
            raise OSError(number, os.strerror(number))
        elif fault is Fault.NO_FDS:
            shut_fd_table()
            self._order.is_done()
        elif fault is Fault.LEAK_FD:
            self._leaked.append(os.open(os.devnull, os.O_RDONLY))
        elif fault is Fault.LEAK_MEMORY:
            fd = os.memfd_create("leaked")
            os.ftruncate(fd, LEAKED_BYTES)
            self._leaked.append(mmap.mmap(fd, LEAKED_BYTES))
            os.close(fd)
        elif fault is Fault.HANG:
            while True:
                time.sleep(1)
        return fault

    def after(self, fault: Fault) -> None:
        if fault in DEATHS:
            self.die()

    @staticmethod
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def shut_fd_table() -> None:
    """No fd above those that are open, nor between them."""
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))


def sockets(calls: CountedCalls) -> SwappedModule:
    class Socket(socket.socket):
        def _struck(self, name: str) -> Fault:
            fault = calls.before(name)
            if fault in (Fault.HALF_READ, Fault.HALF_WRITE):
                self.shutdown(socket.SHUT_RD if fault is Fault.HALF_READ else socket.SHUT_WR)
            return fault

        def send(self, data: Any, flags: int = 0) -> int:
            fault = self._struck("send")
            if fault is Fault.SILENT:
                return len(data)
            if fault in (Fault.SHORT, Fault.KILL_WITHIN):
                data = memoryview(data)[: (len(data) + 1) // 2]
            sent = super().send(data, flags)
            calls.after(fault)
            return sent

        def sendmsg(self, buffers: Any, ancillary: Any = (), flags: int = 0, *_: Any) -> int:
            fault = self._struck("sendmsg")
            if fault is Fault.SILENT:
                return sum(len(buffer) for buffer in buffers)
            sent = super().sendmsg(buffers, ancillary, flags)
            calls.after(fault)
            return sent

        def recvmsg_into(self, buffers: Any, size: int = 0, flags: int = 0) -> Any:
            if self._struck("recvmsg") is Fault.SHORT and not self._has_fds():
                buffers = [buffer[:PIECE_BYTES] for buffer in buffers]
            return super().recvmsg_into(buffers, size, flags)

        def _has_fds(self) -> bool:
            """A part that has some is never cut short [af_unix.c unix_stream_read_generic]."""
            try:
                _, _, flags, _ = super().recvmsg(1, 0, socket.MSG_PEEK)
            except OSError:
                return False
            return bool(flags & socket.MSG_CTRUNC)

        def accept(self) -> Any:
            calls.before("accept")
            sock, address = super().accept()
            return Socket(fileno=sock.detach()), address

        def connect(self, address: Any) -> None:
            calls.before("connect")
            super().connect(address)

        def bind(self, address: Any) -> None:
            calls.before("bind")
            super().bind(address)

        def listen(self, backlog: int = 0) -> None:
            calls.before("listen")
            super().listen(backlog)

    def new(*args: Any, fileno: int | None = None) -> Socket:
        if fileno is None:
            calls.before("socket")
            return Socket(*args)
        return Socket(fileno=fileno)

    def socketpair() -> tuple[Socket, Socket]:
        calls.before("socketpair")
        one, other = socket.socketpair()
        return Socket(fileno=one.detach()), Socket(fileno=other.detach())

    return SwappedModule(socket, socket=new, socketpair=socketpair)


def memory(calls: CountedCalls) -> SwappedModule:
    class MappedMemory(mmap.mmap):
        def madvise(self, *args: int) -> None:
            calls.before("madvise")
            super().madvise(*args)

    return SwappedModule(mmap, mmap=calls.counted("mmap", MappedMemory))


def readiness(calls: CountedCalls) -> SwappedModule:
    def epoll() -> SwappedModule:
        real = calls.counted("epoll_create", select.epoll)()
        return SwappedModule(
            real,
            register=calls.counted("epoll_ctl add", real.register),
            modify=calls.counted("epoll_ctl mod", real.modify),
            unregister=calls.counted("epoll_ctl del", real.unregister),
        )

    return SwappedModule(select, epoll=epoll)


def plain(calls: CountedCalls) -> SwappedModule:
    named = ("chmod", "rename", "unlink", "open", "fstat", "memfd_create", "ftruncate", "fchmod")
    return SwappedModule(
        os,
        **{name: calls.counted(name, getattr(os, name)) for name in named},
        **eventfds(calls),
    )


def eventfds(calls: CountedCalls) -> dict[str, Callable[..., Any]]:
    """And what makes copies of one, or ends it."""
    own = set[int]()  # nobody else has a copy of these
    eventfd, dup, close = (calls.counted(name, getattr(os, name)) for name in ("eventfd", "dup", "close"))
    write_own = calls.counted("own eventfd write", os.eventfd_write)
    write = calls.counted("eventfd write", os.eventfd_write)

    def made(initial: int, flags: int) -> int:
        fd: int = eventfd(initial, flags)
        own.add(fd)
        return fd

    def no_longer_own(call: Callable[[int], Any]) -> Callable[[int], Any]:
        def called(fd: int) -> Any:
            own.discard(fd)
            return call(fd)

        return called

    return {
        "eventfd": made,
        "dup": no_longer_own(dup),
        "close": no_longer_own(close),
        "eventfd_write": lambda fd, value: (write_own if fd in own else write)(fd, value),
        "preadv": calls.counted("eventfd read", os.preadv),
    }


def pools(calls: CountedCalls) -> None:
    """What the model allocates of its own memory."""
    modelled: dict[str, Any] = {"frame": Frames, "table page": TablePool}
    for name, pool in modelled.items():
        pool.allocate = refusable(calls, name, pool.allocate)


def refusable(calls: CountedCalls, name: str, allocate: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        try:
            calls.before(name)
        except OSError as error:
            raise UapiError(error.errno or 0, f"no {name} for you this time") from None
        return allocate(*args)

    return call


def struck_kernel(order: Order) -> linux.Linux:
    """The kernel that this process is to run on; from now on there is no other one in it."""
    calls = CountedCalls(order)
    others = {
        "os": plain(calls),
        "socket": sockets(calls),
        "mmap": memory(calls),
        "select": readiness(calls),
        "fcntl": SwappedModule(fcntl, fcntl=calls.counted("fcntl", fcntl.fcntl)),
    }
    for name, module in others.items():
        setattr(linux, name, module)
    pools(calls)
    return linux.Linux()
