"""System calls that fail: an errno for that request, and nothing left behind of it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmd import memory
from protocol.errors import UapiError
from protocol.kernel.linux import LINUX
from protocol.kernel.port import Poller
from protocol.rpc.channel import Body, Channel, Fds
from protocol.rpc.files import Files
from protocol.rpc.lease import LeaseSocket
from protocol.rpc.service import Service
from protocol.rpc.socket import Listener, connect_now
from tests.unit.protocol.wires import Wires, open_fds

NAMED: Service[str] = Service("named", {})


class FailingEpoll:
    """The loop's epoll set, in which these calls fail."""

    def __init__(self, real: Poller, *names: str) -> None:
        self._real = real
        self._names = names

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            return getattr(self._real, name)

        def fail(*_: Any) -> None:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

        return fail


def failing(wire: Wires, *names: str) -> None:
    wire.loop._epoll = FailingEpoll(wire.loop._epoll, *names)


def working(wire: Wires) -> None:
    assert isinstance(wire.loop._epoll, FailingEpoll)
    wire.loop._epoll = wire.loop._epoll._real


def errno_of(error: pytest.ExceptionInfo[UapiError]) -> int:
    return error.value.errno


def test_an_object_whose_file_cannot_be_watched_is_released_and_leaves_no_fd(wire: Wires) -> None:
    files, released = Files(wire.loop), list[str]()
    before = open_fds()
    failing(wire, "register")
    with pytest.raises(UapiError) as refused:
        files.open(NAMED, "vm", released.append)
    assert (errno_of(refused), released, len(files)) == (errno.ENOMEM, ["vm"], 0)
    assert open_fds() == before
    working(wire)
    fd, _, channel = files.open(NAMED, "vm", released.append)
    assert files.find(fd, str) == "vm"
    os.close(fd)
    wire.pump()
    assert (released, channel.closed) == (["vm", "vm"], True)


def test_a_connection_that_cannot_be_watched_is_hung_up_on_and_the_next_is_served(
    wire: Wires, tmp_path: Path
) -> None:
    came: list[Channel] = []
    listener = Listener(wire.loop, tmp_path / "door", lambda sock: came.append(wire.channel(sock, "door")))
    failing(wire, "register")
    turned_away = connect_now(LINUX, tmp_path / "door")
    wire.pump()
    assert (turned_away.recv(1), came, wire.crashes) == (b"", [], [])
    working(wire)
    served = connect_now(LINUX, tmp_path / "door")
    wire.pump()
    assert len(came) == 1
    for sock in (turned_away, served):
        sock.close()
    listener.close()


def test_a_door_that_cannot_be_watched_leaves_neither_name_nor_fd(wire: Wires, tmp_path: Path) -> None:
    """A name that stayed would pass for a daemon that is ready."""
    before = open_fds()
    failing(wire, "register")
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
        Listener(wire.loop, tmp_path / "door", lambda sock: None)
    assert (list(tmp_path.iterdir()), open_fds()) == ([], before)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOENT])
def test_a_listener_whose_name_cannot_be_removed_is_closed_all_the_same(
    wire: Wires, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It stays as that of one who was killed, and whoever listens there next takes it over."""
    before = open_fds()
    first = Listener(wire.loop, tmp_path / "door", lambda sock: None)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", failing_with(number))
        first.close()
    assert open_fds() == before
    second = Listener(wire.loop, tmp_path / "door", lambda sock: None)
    connect_now(LINUX, tmp_path / "door").close()
    second.close()
    assert not (tmp_path / "door").exists()


def failing_with(number: int) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_channel_that_cannot_wait_for_room_ends_alone(wire: Wires) -> None:
    channel, raw = wire.raw()
    other, peer = wire.pair()
    failing(wire, "modify")
    waits = channel.call("OP", {"data": bytes(1 << 20)})
    wire.pump()
    assert (channel.closed, waits.done, other.closed, peer.closed) == (True, True, False, False)
    assert wire.crashes == []
    assert raw.sock.fileno() >= 0


def test_a_channel_whose_fd_cannot_be_taken_out_of_the_set_is_closed_all_the_same(wire: Wires) -> None:
    channel, other = wire.pair()
    before = len(open_fds())
    failing(wire, "unregister")
    channel.close()
    wire.pump()
    assert (channel.closed, other.closed, wire.crashes) == (True, True, [])
    assert len(open_fds()) == before - 2


class Crowded:
    """A socket whose user has as many fds under way as he may, for so many calls."""

    def __init__(self, real: Any, times: int) -> None:
        self._real = real
        self._times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def sendmsg(self, *args: Any) -> int:
        self._times -= 1
        if self._times >= 0:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        return int(self._real.sendmsg(*args))


def test_too_many_fds_under_way_refuse_a_message_and_end_no_connection(wire: Wires) -> None:
    """They may be anybody's of this user's: a VM went with the connection that no reply could be sent on."""

    def give(channel: Channel, number: int, body: Body, fds: Fds) -> None:
        fds.close()
        channel.answer(number, {}, [LINUX.reserve()])

    left, right = wire.pair({}, {"on_request": give})
    before = open_fds()
    right._sock = Crowded(right._sock, 1)
    waits = [left.call("OP") for _ in range(2)]
    wire.pump()
    with pytest.raises(UapiError, match="too many fds") as refused:
        waits[0].result()
    assert errno_of(refused) == errno.ETOOMANYREFS
    waits[1].result().fds.close()
    left._sock = Crowded(left._sock, 2)
    left.notify("OP", fds=[LINUX.reserve()])
    asked = left.call("OP", fds=[LINUX.reserve()])
    again = left.call("OP")
    wire.pump()
    with pytest.raises(UapiError, match="too many fds"):
        asked.result()
    again.result().fds.close()
    assert (left.closed, right.closed, wire.crashes, open_fds()) == (False, False, [], before)


def test_what_no_message_can_say_leaves_neither_fd_nor_request(wire: Wires) -> None:
    left, _ = wire.pair()
    before = open_fds()
    for ask in (left.call, left.notify):
        with pytest.raises(OverflowError):
            ask("OP", {"iova": 1 << 64}, [LINUX.reserve()])
    assert (open_fds(), left._session.in_flight) == (before, 0)


@pytest.mark.parametrize("call", ["memfd_create", "ftruncate", "fcntl", "mmap"])
def test_a_dirty_ring_that_cannot_be_made_leaves_no_fd(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    before = open_fds()
    where: Any = {"fcntl": fcntl, "mmap": mmap}.get(call, os)
    with monkeypatch.context() as patched:
        patched.setattr(where, call, fail)
        with pytest.raises(UapiError) as refused:
            memory.dirty_ring_memory(LINUX, 1 << 16)
    assert errno_of(refused) == errno.ENOMEM
    assert open_fds() == before


@pytest.mark.parametrize("call", ["socketpair", "register"])
def test_a_lease_that_cannot_be_watched_leaves_no_fd(
    wire: Wires, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = open_fds()
    with monkeypatch.context() as patched:
        patched.setattr(*((socket, call, fail) if call == "socketpair" else (wire.loop, call, fail)))
        with pytest.raises(UapiError) as refused:
            LeaseSocket(wire.loop)
    assert errno_of(refused) == errno.EMFILE
    assert open_fds() == before
