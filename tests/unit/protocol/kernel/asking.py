"""What tests of a kernel ask of it, in few words."""

from __future__ import annotations

import array
import os
import re
import resource
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from protocol.kernel.port import Kernel, StreamSocket
from simulator.kernel.process import SimProcess

Pair = tuple[StreamSocket, StreamSocket]
PAGE = 4096
IN, OUT, HUP, RDHUP, ERR = (
    select.EPOLLIN,
    select.EPOLLOUT,
    select.EPOLLHUP,
    select.EPOLLRDHUP,
    select.EPOLLERR,
)
ALL = IN | OUT | RDHUP
CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)


def send_fds(sock: StreamSocket, data: bytes, fds: list[int]) -> int:
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def receive(sock: StreamSocket, size: int = PAGE, room: int = 16) -> tuple[bytes, list[int], bool]:
    """(bytes, fds, whether fds were lost)."""
    into = bytearray(size)
    fds = array.array("i")
    count, ancillary, flags, _ = sock.recvmsg_into(
        [memoryview(into)], socket.CMSG_SPACE(room * fds.itemsize), CLOEXEC
    )
    for level, kind, raw in ancillary:
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
    return bytes(into[:count]), list(fds), bool(flags & socket.MSG_CTRUNC)


def ready(kernel: Kernel, sock: StreamSocket, wanted: int = ALL) -> int:
    poller = kernel.poller()
    poller.register(sock.fileno(), wanted)
    found = poller.poll(0, 8)
    poller.close()
    return found[0][1] if found else 0


@contextmanager
def fails(number: int) -> Iterator[pytest.ExceptionInfo[OSError]]:
    with pytest.raises(OSError, match=re.escape(f"[Errno {number}]")) as found:
        yield found


def fill(kernel: Kernel) -> tuple[list[int], Callable[[], None]]:
    """All places that are left, taken; and what undoes the limit."""
    if isinstance(kernel, SimProcess):
        undo = partial(setattr, kernel, "fd_limit", kernel.fd_limit)
        kernel.fd_limit = 64
    else:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        undo = partial(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, limits[1]))
    places = []
    try:
        while True:
            places.append(kernel.reserve())
    except OSError:
        return places, undo
