"""Kernel objects as fds: the last copy closed, wherever it is, is what releases the object."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.errors import UapiError
from protocol.kernel.linux import LINUX
from protocol.rpc.channel import Body, Fds
from protocol.rpc.files import Files
from protocol.rpc.service import Method, Service
from tests.unit.protocol.wires import Nothing, Raw, Wires, frame, wires


class Vm(str):
    pass


class Mm(str):
    pass


def name(obj: str, message: Nothing, fds: Fds) -> Body:
    return {"name": str(obj)}


NAMED: Service[Vm] = Service("named", {"NAME": Method(Nothing, name)})
OTHER: Service[Mm] = Service("other", {})


class Held:
    def __init__(self, wire: Wires) -> None:
        self.wire = wire
        self.files = Files(wire.loop)
        self.released: list[str] = []

    def open(self, obj: str = "vm0") -> int:
        fd, inode, _ = self.files.open(NAMED, Vm(obj), self.released.append)
        assert inode == LINUX.cookie_of(fd)
        return fd


@pytest.fixture
def held() -> Iterator[Held]:
    with wires() as wire:
        made = Held(wire)
        yield made
        made.files.close()


def test_an_fd_answers_for_its_object(held: Held) -> None:
    fds = [held.open(f"vm{i}") for i in range(3)]
    for i, fd in enumerate(fds):
        with socket.socket(fileno=fd) as sock:
            raw = Raw(sock)
            raw.send(frame(0, 1, {"op": "NAME"}))
            held.wire.pump()
            assert [body for *_, body in raw.frames()] == [{"name": f"vm{i}"}]


def test_only_the_last_copy_releases(held: Held) -> None:
    fd = held.open()
    copies = [os.dup(fd) for _ in range(3)]
    for copy in (fd, *copies[:-1]):
        os.close(copy)
        held.wire.pump()
        assert held.released == []
    os.close(copies[-1])
    held.wire.pump()
    assert held.released == ["vm0"]
    assert len(held.files) == 0


def test_a_copy_in_flight_to_nobody_in_particular_keeps_the_object(held: Held) -> None:
    """A reference may be inside a socket's queue; it ends when the queue does."""
    fd = held.open()
    one, two = socket.socketpair()
    socket.send_fds(one, [b"x"], [fd])
    os.close(fd)
    held.wire.pump()
    assert held.released == []
    one.close()
    two.close()
    held.wire.pump()
    assert held.released == ["vm0"]


def test_a_holder_that_is_killed_releases(held: Held) -> None:
    fd = held.open()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[fd])
    os.close(fd)
    held.wire.pump()
    assert held.released == []
    child.kill()
    child.wait()
    held.wire.pump()
    assert held.released == ["vm0"]


def test_a_copy_is_known_by_its_inode_whatever_its_number(held: Held) -> None:
    fds = [held.open(f"vm{i}") for i in range(3)]
    copies = [os.dup(fd) for fd in fds]
    assert [held.files.find(copy, Vm) for copy in copies] == ["vm0", "vm1", "vm2"]
    for fd in (*fds, *copies):
        os.close(fd)


def test_what_is_not_ours_or_of_another_kind_is_einval(held: Held) -> None:
    fd = held.open()
    other, _, _ = held.files.open(OTHER, Mm("mm"))
    pipe = os.pipe()
    one, two = socket.socketpair()
    for wrong in (other, *pipe, one.fileno()):
        with pytest.raises(UapiError) as caught:
            held.files.find(wrong, Vm)
        assert caught.value.errno == errno.EINVAL
    assert held.files.find(other, Mm) == "mm"
    for mine in (fd, other, *pipe):
        os.close(mine)
    one.close()
    two.close()


def test_an_object_released_is_no_longer_found(held: Held) -> None:
    fd = held.open()
    with socket.socket(fileno=fd) as sock:
        sock.shutdown(socket.SHUT_RDWR)
        held.wire.pump()
        assert held.released == ["vm0"]
        with pytest.raises(UapiError):
            held.files.find(sock.fileno(), Vm)


def test_a_holder_that_breaks_the_protocol_loses_its_object_only(held: Held) -> None:
    bad, good = held.open("bad"), held.open("good")
    with socket.socket(fileno=bad) as sock:
        sock.send(b"\xff" * 8)
        held.wire.pump()
    assert held.released == ["bad"]
    os.close(good)
    held.wire.pump()
    assert held.released == ["bad", "good"]


def test_closing_all_hangs_up_on_every_holder(held: Held) -> None:
    fds = [held.open(f"vm{i}") for i in range(3)]
    held.files.close()
    assert held.released == ["vm0", "vm1", "vm2"]
    for fd in fds:
        with socket.socket(fileno=fd) as sock:
            assert sock.recv(1) == b""


def test_a_file_whose_inode_happens_to_be_an_objects_is_none(
    held: Held, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Numbers are a filesystem's own: whoever may make files can find one that fits."""
    fd = held.open()
    real = os.fstat(fd)
    with (tmp_path / "forged").open("wb") as file, monkeypatch.context() as patched:
        forged, device = file.fileno(), os.fstat(file.fileno()).st_dev
        same = os.stat_result((real.st_mode, real.st_ino, device, *real[3:]))
        patched.setattr(os, "fstat", lambda number: same if number == forged else real)
        assert LINUX.cookie_of(forged) == 0
        with pytest.raises(UapiError) as caught:
            held.files.find(forged, Vm)
        assert caught.value.errno == errno.EINVAL
        assert held.files.find(fd, Vm) == "vm0"
    os.close(fd)
