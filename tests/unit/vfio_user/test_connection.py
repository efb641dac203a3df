"""One client on a loop that the test turns: functions that take their time, clients that do not wait."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from protocol.flow import Flows, Wait
from protocol.kernel.linux import LINUX
from protocol.rpc.loop import Loop
from tests.kit.vfio_user import PlainFunction
from tests.vfio_user import messages
from tests.vfio_user.messages import Sent, dma_map, dma_unmap, get_info, version
from tests.vfio_user.socket_client import memory
from vfio_user.connection import FunctionDoor
from vfio_user.core.function import DmaWindow
from vfio_user.core.stream import MESSAGE_HEADER_BYTES


class PatientFunction(PlainFunction):
    """Resets and lets go of windows when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait[None]] = []

    async def _told(self) -> None:
        wait: Wait[None] = Wait()
        self.waits.append(wait)
        await wait

    async def reset(self) -> None:
        await self._told()
        await super().reset()

    async def unmap(self, window: DmaWindow) -> None:
        await self._told()
        await super().unmap(window)


class TurnedLoop:
    """A door on a loop, and the client's end of a connection to it."""

    def __init__(self) -> None:
        self.mistakes: list[BaseException] = []
        self.loop = Loop(LINUX, Flows(self.mistakes.append))
        self.function = PatientFunction()
        self.door = FunctionDoor(self.loop, self.function)
        self.client = self.connect()

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.door.open(theirs)
        ours.setblocking(False)
        return ours

    def turn(self) -> None:
        for _ in range(20):
            self.loop.turn(0)

    def send(self, *sent: Sent) -> None:
        """With new files for those that have fds; then everybody gets on as far as possible."""
        for each in sent:
            fds = [memory(4096) for _ in range(each.fds)]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            self.client.sendmsg([each.data], rights)
            for fd in fds:
                os.close(fd)
        self.turn()

    def tell(self) -> None:
        """What the function waits for has come."""
        waits, self.function.waits = self.function.waits, []
        assert waits, "the function waits for nothing"
        for wait in waits:
            wait.set(None)
        self.loop.settle()
        self.turn()

    def commands(self) -> list[int]:
        """Of the answers so far."""
        found = []
        raw = b""
        try:
            while part := self.client.recv(1 << 16):
                raw += part
        except BlockingIOError:
            pass
        while raw:
            _, command, size = struct.unpack_from("<HHI", raw)
            found.append(command)
            raw = raw[size:]
        return found


@pytest.fixture
def turned() -> Iterator[TurnedLoop]:
    each = TurnedLoop()
    each.send(version())
    assert each.commands() == [1]
    yield each
    each.client.close()
    each.turn()
    each.loop.close()
    assert each.mistakes == []


def files() -> int:
    """Memory of clients that this process has open."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += "memfd:ram" in os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return found


def test_what_comes_behind_a_slow_command_waits_for_it(turned: TurnedLoop) -> None:
    turned.send(messages.device_reset(), get_info(), get_info())
    assert turned.commands() == []
    turned.tell()
    assert turned.commands() == [13, 4, 4]


def test_a_client_that_goes_in_the_middle_is_over_when_the_function_is_done(turned: TurnedLoop) -> None:
    turned.send(dma_map(0, 4096), dma_unmap(0, 4096))
    turned.client.close()
    turned.turn()
    assert not turned.loop.turn(0), "a hang-up nobody can act on does not keep the loop awake"
    assert files() == 1, "the function may still reach it"
    assert len(turned.function.windows) == 1
    refused = turned.connect()
    assert refused.recv(1) == b"", "the function has a client until then"
    refused.close()
    turned.tell()
    assert LINUX.closer.drain(10)
    assert files() == 0
    turned.client = turned.connect()
    turned.send(version())
    assert turned.commands() == [1]


def test_a_client_that_is_turned_away_sees_it_before_anybody_closes_its_socket(
    turned: TurnedLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(LINUX, "close_received", left.append)
    refused = turned.connect()
    assert refused.recv(1) == b""
    refused.close()
    os.close(*left)


def test_fds_that_came_with_a_message_cut_short_are_closed(turned: TurnedLoop) -> None:
    """It had more than there is room for, and is whole with its header: nobody else would close them."""
    turned.send(Sent(messages.device_reset().data, 20))
    assert turned.client.recv(1) == b"", "it is hung up on"
    assert LINUX.closer.drain(10)
    assert files() == 0


def test_the_windows_of_one_that_goes_are_given_back_one_by_one(turned: TurnedLoop) -> None:
    turned.send(*(dma_map(n << 12, 4096) for n in range(3)))
    assert turned.commands() == [2, 2, 2]
    turned.client.close()
    turned.turn()
    for left in (2, 1, 0):
        turned.tell()
        assert len(turned.function.windows) == left
    assert LINUX.closer.drain(10)
    assert files() == 0
    turned.client = turned.connect()
    turned.send(version())
    assert turned.commands() == [1]


def test_a_stream_socket_gives_the_fds_of_a_message_out_with_the_bytes_before_it() -> None:
    """Why no more is received than is wanted: what Linux does, asked of Linux."""
    ours, theirs = socket.socketpair()
    first, second = get_info(), dma_map(0, 4096)
    fd = memory(4096)
    ours.sendmsg([first.data])
    ours.sendmsg([second.data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    data, fds, _, _ = socket.recv_fds(theirs, 1 << 16, 4)
    assert data == first.data + second.data
    assert len(fds) == 1, "whose it is cannot be told"
    for each in (fd, *fds):
        os.close(each)
    ours.close()
    theirs.close()


def test_a_server_that_reads_more_than_is_wanted_would_be_found(
    turned: TurnedLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [get_info(), dma_map(0, 4096), dma_map(4096, 4096, fds=0), dma_map(8192, 4096)]
    turned.send(*order)
    assert [window.fd is not None for window in windows(turned)] == [True, False, True]
    assert MESSAGE_HEADER_BYTES == 16
    turned.send(dma_unmap(0, 0, flags=2))
    for _ in range(3):
        turned.tell()
    monkeypatch.setattr("vfio_user.core.stream.MESSAGE_HEADER_BYTES", 16 + len(get_info().data))
    turned.send(*order)
    assert [window.fd is not None for window in windows(turned)] != [True, False, True]


def windows(turned: TurnedLoop) -> list[DmaWindow]:
    return sorted(turned.function.windows, key=lambda window: window.start)
