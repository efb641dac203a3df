"""Listening sockets: what may lie in their place, and when a peer can connect."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio

from protocol.kernel.linux import LINUX
from protocol.kernel.port import StreamSocket
from protocol.rpc.socket import MAX_PATH_BYTES, Listener, check_path, connect, connect_now
from tests.patience import PATIENCE_S
from tests.unit.protocol.wires import Wires, open_fds


class Came(list[StreamSocket]):
    def close(self) -> None:
        for sock in self:
            sock.close()


def test_a_peer_connects_and_the_file_goes_with_the_listener(wire: Wires, tmp_path: Path) -> None:
    path, came = tmp_path / "kvmd", Came()
    listener = Listener(wire.loop, path, came.append)
    peers = [connect_now(LINUX, path) for _ in range(3)]
    wire.pump()
    assert len(came) == 3
    came[0].send(b"hello")
    assert peers[0].recv(10) == b"hello"
    assert os.listdir(tmp_path) == ["kvmd"]
    listener.close()
    assert os.listdir(tmp_path) == []
    came.close()
    for peer in peers:
        peer.close()


def test_whoever_sees_the_name_sees_all_the_fds_that_listening_takes(
    wire: Wires, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its existence means readiness; two fds that were opened behind it passed for a leak, once."""
    rename, seen = os.rename, list[set[int]]()

    def looked(old: Path, new: Path) -> None:
        seen.append(open_fds())
        rename(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", looked)
        listener = Listener(wire.loop, tmp_path / "kvmd", Came().append)
    assert seen == [open_fds()]
    listener.close()


def test_the_file_of_a_daemon_that_was_killed_is_replaced(wire: Wires, tmp_path: Path) -> None:
    path = tmp_path / "kvmd"
    bind = "import socket, os, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); os._exit(9)"
    subprocess.run([sys.executable, "-c", bind, str(path)], check=False)
    assert path.is_socket()
    came = Came()
    listener = Listener(wire.loop, path, came.append)
    peer = connect_now(LINUX, path)
    wire.pump()
    assert len(came) == 1
    listener.close()
    came.close()
    peer.close()


def test_what_one_of_our_number_left_is_taken_away(wire: Wires, tmp_path: Path) -> None:
    """Killed between its bind and its rename; in a container numbers come again."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / f".kvmd.{os.getpid()}"))
    listener = Listener(wire.loop, tmp_path / "kvmd", Came().append)
    assert os.listdir(tmp_path) == ["kvmd"]
    listener.close()


def test_a_name_that_cannot_be_given_leaves_no_other(
    wire: Wires, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "no")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refuse)
        with pytest.raises(PermissionError):
            Listener(wire.loop, tmp_path / "kvmd", Came().append)
    assert os.listdir(tmp_path) == []


def test_the_socket_of_a_daemon_that_lives_is_not_taken(wire: Wires, tmp_path: Path) -> None:
    path = tmp_path / "kvmd"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as living:
        living.bind(str(path))
        living.listen()
        before = open_fds()
        with pytest.raises(OSError, match="listens there already; choose another path"):
            Listener(wire.loop, path, Came().append)
        assert open_fds() == before
    assert path.is_socket()


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_is_no_socket_is_left_alone(wire: Wires, tmp_path: Path, what: str) -> None:
    path = tmp_path / "kvmd"
    path.write_text("precious") if what == "file" else path.mkdir()
    with pytest.raises(FileExistsError, match="is no socket; choose another path"):
        Listener(wire.loop, path, Came().append)
    assert path.exists()


def test_a_path_no_socket_can_have_is_said_so(tmp_path: Path) -> None:
    check_path(Path("/" + "x" * (MAX_PATH_BYTES - 17)))
    with pytest.raises(ValueError, match="shorter directory"):
        check_path(Path("/" + "x" * (MAX_PATH_BYTES - 16)))
    with pytest.raises(ValueError, match="shorter directory"):
        check_path(Path("/" + "é" * (MAX_PATH_BYTES // 2)))


def test_the_longest_path_still_works(wire: Wires, tmp_path: Path) -> None:
    directory = tmp_path
    name = "x" * (MAX_PATH_BYTES - 17 - len(os.fsencode(directory)))
    assert len(name) > 1
    came = Came()
    listener = Listener(wire.loop, directory / name, came.append)
    connect_now(LINUX, directory / name).close()
    listener.close()
    came.close()


async def test_a_peer_waits_for_a_daemon_that_starts_later(wire: Wires, tmp_path: Path) -> None:
    path, ready = tmp_path / "kvmd", threading.Event()

    def start_late() -> None:
        time.sleep(0.03)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as late:
            late.bind(str(path))
            late.listen()
            ready.wait(PATIENCE_S)

    thread = threading.Thread(target=start_late)
    thread.start()
    (await connect(LINUX, path, patience_s=PATIENCE_S)).close()
    ready.set()
    thread.join()


async def test_patience_ends(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await connect(LINUX, tmp_path / "nobody", patience_s=0.02)


async def test_a_daemon_that_lets_nobody_in_holds_nobody(tmp_path: Path) -> None:
    """Stopped, say, with all its places taken: Linux has who connects wait, behind the back of our loop."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stopped:
        stopped.bind(str(tmp_path / "kvmd"))
        stopped.listen(0)
        first = connect_now(LINUX, tmp_path / "kvmd")
        with pytest.raises(BlockingIOError, match="too many wait to be let in"):
            await connect(LINUX, tmp_path / "kvmd", patience_s=0.02)
        with pytest.raises(OSError, match="a daemon listens there already"):
            LINUX.listen(tmp_path / "kvmd", None)
        first.close()


@contextmanager
def full_fd_table() -> Iterator[list[int]]:
    """No place is free; the fds that fill it, to be closed by whoever makes room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_fds()) + 2, hard))  # one to fill, at least
    filler = list[int]()
    try:
        fill(filler)
        yield filler
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in filler:
            os.close(fd)


def fill(filler: list[int]) -> None:
    with suppress(OSError):
        while True:
            filler.append(os.dup(0))


def test_with_a_full_fd_table_peers_are_turned_away_and_later_ones_served(
    wire: Wires, tmp_path: Path
) -> None:
    path, came = tmp_path / "kvmd", Came()
    listener = Listener(wire.loop, path, came.append)
    peers = [connect_now(LINUX, path) for _ in range(2)]
    with full_fd_table():
        wire.pump()
    assert not came
    assert [peer.recv(1) for peer in peers] == [b"", b""]
    later = connect_now(LINUX, path)
    wire.pump()
    assert len(came) == 1
    listener.close()
    came.close()
    for peer in [*peers, later]:
        peer.close()


def test_the_place_that_peers_are_turned_away_in_is_nobody_elses_meanwhile(
    wire: Wires, tmp_path: Path
) -> None:
    """Whoever had taken it would have left the next peer waiting for ever."""
    path, came, before = tmp_path / "kvmd", Came(), open_fds()
    listener = Listener(wire.loop, path, came.append)
    peers, hung_up_on = [connect_now(LINUX, path) for _ in range(2)], 0
    with full_fd_table() as filler:
        for peer in peers:
            wire.loop.turn(0)
            assert LINUX.closer.drain(PATIENCE_S)
            fill(filler)
            peer.setblocking(False)
            with suppress(BlockingIOError):
                hung_up_on += peer.recv(1) == b""
    listener.close()
    for peer in peers:
        peer.close()
    assert hung_up_on == len(peers)
    assert open_fds() == before


def connect_without_a_place(listener: Listener, path: Path, filler: list[int]) -> StreamSocket:
    """The place to turn peers away in is somebody else's, who took it while it was free."""
    assert listener._spare is not None
    filler.append(listener._spare)
    listener._spare = None
    os.close(filler.pop(0))
    return connect_now(LINUX, path)


async def test_without_a_place_to_turn_peers_away_in_they_wait_and_nobody_turns_in_circles(
    wire: Wires, tmp_path: Path
) -> None:
    path, came, served = tmp_path / "kvmd", Came(), trio.Event()

    def serve(sock: StreamSocket) -> None:
        came.append(sock)
        served.set()

    listener = Listener(wire.loop, path, serve)
    with full_fd_table() as filler:
        peer = connect_without_a_place(listener, path, filler)
        assert wire.loop.turn(0)
        assert not wire.loop.turn(0), "nobody looks at who waits"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.loop.serve)
        with trio.fail_after(PATIENCE_S):
            await served.wait()
        nursery.cancel_scope.cancel()
    listener.close()
    came.close()
    peer.close()


def test_a_door_without_those_places_does_not_open(wire: Wires, tmp_path: Path) -> None:
    before = open_fds()
    with full_fd_table() as filler:
        os.close(filler.pop(0))
        with pytest.raises(OSError, match="cannot keep a place in the fd table"):
            Listener(wire.loop, tmp_path / "kvmd", Came().append)
        assert list(tmp_path.iterdir()) == []
        fill(filler)
    assert open_fds() == before


def test_a_listener_that_rests_can_be_closed(wire: Wires, tmp_path: Path) -> None:
    path, before = tmp_path / "kvmd", open_fds()
    listener = Listener(wire.loop, path, Came().append)
    with full_fd_table() as filler:
        peer = connect_without_a_place(listener, path, filler)
        assert wire.loop.turn(0)
        listener.close()
    peer.close()
    assert open_fds() == before
