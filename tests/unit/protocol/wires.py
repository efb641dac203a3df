"""Channels of one process joined by real socketpairs, turned by hand until nothing moves."""

from __future__ import annotations

import array
import gc
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import pytest

from protocol.flow import Flows, Wait
from protocol.kernel.linux import LINUX
from protocol.kernel.port import StreamSocket
from protocol.rpc.channel import Body, Channel, Fds
from protocol.rpc.loop import Loop
from protocol.uapi.message import Message
from tests.patience import PATIENCE_S


def open_fds() -> set[int]:
    """The fds of this process, all that was received closed; what lists them is not counted."""
    assert LINUX.closer.drain(PATIENCE_S)
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


class Nothing(Message):
    """A request without arguments."""


class Wires:
    """A loop, what crashed in it, and everything that must be closed at the end."""

    def __init__(self) -> None:
        self.crashes: list[BaseException] = []
        self.loop = Loop(LINUX, Flows(self.crashes.append))
        self._close: list[Callable[[], None]] = []

    def pair(
        self, one: dict[str, Any] | None = None, other: dict[str, Any] | None = None
    ) -> tuple[Channel, Channel]:
        """Two channels that talk to each other; the dicts are their keyword arguments."""
        left, right = socket.socketpair()
        return self.channel(left, "left", one), self.channel(right, "right", other)

    def raw(self, **kwargs: Any) -> tuple[Channel, Raw]:
        """A channel, and a bare socket at its other end."""
        left, right = socket.socketpair()
        self._close.append(right.close)
        return self.channel(left, "left", kwargs), Raw(right)

    def channel(self, sock: StreamSocket, name: str, kwargs: dict[str, Any] | None = None) -> Channel:
        made = Channel(self.loop, sock, name, **(kwargs or {}))
        self._close.append(made.close)
        return made

    def pump(self) -> None:
        """Serve until nothing is ready, and nothing comes of what was closed any more."""
        assert LINUX.closer.drain(PATIENCE_S)
        self.loop.settle()
        while self.loop.turn(0):
            assert LINUX.closer.drain(PATIENCE_S)

    def close(self) -> None:
        for close in self._close:
            close()
        self.loop.close()


class Raw:
    """A peer that says what it likes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        assert self.sock.sendmsg([data], rights) == len(data)

    def frames(self) -> list[tuple[int, int, int, Any]]:
        """(kind, nfds, id, body) of every whole frame that is there."""
        data = b""
        try:
            while chunk := self.sock.recv(1 << 20):
                data += chunk
        except BlockingIOError:
            pass
        found, at = [], 0
        while at < len(data):
            size, nfds, kind = struct.unpack_from("<IHH", data, at)
            number, body = msgpack.unpackb(data[at + 8 : at + 8 + size])
            found.append((kind, nfds, number, body))
            at += 8 + size
        return found

    @property
    def hung_up(self) -> bool:
        try:
            while self.sock.recv(1 << 20):
                pass
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True
        return True


def frame(kind: int, number: object, body: object, nfds: int = 0) -> bytes:
    """A frame as the format says: length, fds, kind, then (id, body)."""
    payload: bytes = msgpack.packb((number, body))
    return struct.pack("<IHH", len(payload), nfds, kind) + payload


REQUEST, REPLY, ERROR, NOTIFY = range(4)


def echo(channel: Channel, number: int, body: Body, fds: Fds) -> None:
    channel.answer(number, body)
    fds.close()


def failed(wait: Wait[Any]) -> BaseException:
    assert wait.done
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the caller looks at it)
        wait.result()
    return caught.value


@contextmanager
def wires() -> Iterator[Wires]:
    """Fails when an fd stays open that was not open before."""
    gc.collect()  # what earlier tests left in cycles must not close its fds during this one
    before = open_fds()
    made = Wires()
    try:
        yield made
    finally:
        made.close()
    leaked = open_fds() - before
    assert not leaked, f"file descriptors leaked: {leaked}"
