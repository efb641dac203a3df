"""One suite over both kernels: what Linux answers is what the one in memory answers."""

from __future__ import annotations

import array
import errno
import os
import re
import resource
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from protocol.kernel.linux import Linux
from protocol.kernel.port import BrokenEvent, Kernel, StreamSocket
from simulator.kernel.process import SimHost, SimProcess

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


@pytest.fixture(params=["linux", "memory"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return Linux() if request.param == "linux" else SimProcess(SimHost())


@pytest.fixture
def pair(kernel: Kernel) -> Iterator[Pair]:
    one, other = kernel.socketpair()
    one.setblocking(False)
    other.setblocking(False)
    yield one, other
    one.close()
    other.close()


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
def fails(number: int) -> Iterator[None]:
    with pytest.raises(OSError, match=re.escape(f"[Errno {number}]")):
        yield


# -- streams -----------------------------------------------------------------------------------------------


def test_bytes_come_in_order_and_one_read_takes_several_sends(
    pair: Pair,
) -> None:
    one, other = pair
    assert one.send(b"abc") == 3
    assert one.send(b"defg") == 4
    assert receive(other, 5)[0] == b"abcde"
    assert receive(other)[0] == b"fg"


def test_nothing_there_is_eagain(pair: Pair) -> None:
    with pytest.raises(BlockingIOError):
        receive(pair[0])


def test_a_full_buffer_takes_part_of_it_then_nothing(kernel: Kernel, pair: Pair) -> None:
    one, other = pair
    data, sent = b"x" * (4 << 20), 0
    while True:
        try:
            more = one.send(data)
        except BlockingIOError:
            break
        assert more, "0 is no answer"
        sent += more
    assert 64 << 10 < sent < len(data)
    assert not ready(kernel, one, OUT)
    left = sent
    while left:
        left -= len(receive(other, 1 << 16)[0])
    assert ready(kernel, one, OUT) == OUT
    assert one.send(b"x") == 1


def test_who_hangs_up_is_read_to_the_end_and_then_is_0_bytes(kernel: Kernel, pair: Pair) -> None:
    one, other = pair
    one.send(b"last")
    one.close()
    assert ready(kernel, other) & (IN | HUP | RDHUP) == IN | HUP | RDHUP
    assert receive(other)[0] == b"last"
    assert receive(other)[0] == b""
    with pytest.raises(BrokenPipeError):
        other.send(b"too late")


def test_who_hangs_up_on_what_it_did_not_read_resets(kernel: Kernel, pair: Pair) -> None:
    one, other = pair
    other.send(b"unread")
    one.close()
    assert ready(kernel, other) & (HUP | ERR) == HUP | ERR
    with pytest.raises(ConnectionResetError):
        receive(other)
    assert receive(other)[0] == b"", "it is told once"


def test_half_a_hang_up(kernel: Kernel, pair: Pair) -> None:
    one, other = pair
    one.shutdown(socket.SHUT_WR)
    assert receive(other)[0] == b""
    assert ready(kernel, other) & (IN | RDHUP | HUP) == IN | RDHUP
    assert other.send(b"still") == 5
    assert receive(one)[0] == b"still"
    with pytest.raises(BrokenPipeError):
        one.send(b"no")


def test_who_does_not_read_any_more_is_epipe(pair: Pair) -> None:
    one, other = pair
    one.shutdown(socket.SHUT_RD)
    with pytest.raises(BrokenPipeError):
        other.send(b"x")
    assert one.send(b"y") == 1


def test_readiness_is_level_triggered_and_what_is_wanted(kernel: Kernel, pair: Pair) -> None:
    one, other = pair
    poller = kernel.poller()
    poller.register(other.fileno(), IN)
    assert poller.poll(0, 8) == []
    one.send(b"x")
    assert poller.poll(0, 8) == poller.poll(0, 8) == [(other.fileno(), IN)]
    poller.modify(other.fileno(), OUT)
    assert poller.poll(0, 8) == [(other.fileno(), OUT)]
    poller.unregister(other.fileno())
    assert poller.poll(0, 8) == []
    with fails(errno.ENOENT):
        poller.modify(other.fileno(), IN)
    poller.close()


# -- fds under way -----------------------------------------------------------------------------------------


def test_fds_come_with_their_bytes_and_a_read_ends_behind_them(kernel: Kernel, pair: Pair) -> None:
    one, other = pair
    passed = [kernel.reserve() for _ in range(3)]
    one.send(b"before ")
    send_fds(one, b"two", passed[:2])
    send_fds(one, b"one", passed[2:])
    one.send(b" after")
    data, first, _ = receive(other)
    assert data == b"before two"
    assert len(first) == 2
    data, second, _ = receive(other)
    assert data == b"one"
    assert len(second) == 1
    assert receive(other) == (b" after", [], False)
    assert len({*passed, *first, *second}) == 6, "each copy has a number of its own"
    for fd in (*passed, *first, *second):
        kernel.close(fd)


def test_fds_go_with_the_first_byte_that_is_read(kernel: Kernel, pair: Pair) -> None:
    one, other = pair
    passed = kernel.reserve()
    send_fds(one, b"long", [passed])
    data, fds, _ = receive(other, 1)
    assert (data, len(fds)) == (b"l", 1)
    assert receive(other) == (b"ong", [], False)
    kernel.close(passed)
    kernel.close(fds[0])


def test_a_copy_is_the_same_socket_and_keeps_it_open(kernel: Kernel, pair: Pair) -> None:
    ours, theirs = kernel.socketpair()
    ours.setblocking(False)
    send_fds(pair[0], b"x", [theirs.fileno()])
    cookie = kernel.cookie_of(theirs.fileno())
    theirs.close()
    assert not ready(kernel, ours, IN), "a copy in flight keeps it"
    _, (copy,), _ = receive(pair[1])
    assert kernel.cookie_of(copy) == cookie != 0
    again = kernel.dup(copy)
    kernel.close(copy)
    assert not ready(kernel, ours, IN)
    kernel.close(again)
    assert ready(kernel, ours) & HUP
    ours.close()


def test_a_copy_in_flight_goes_with_who_would_have_read_it(kernel: Kernel, pair: Pair) -> None:
    ours, theirs = kernel.socketpair()
    send_fds(pair[0], b"x", [theirs.fileno()])
    theirs.close()
    assert not ready(kernel, ours) & HUP
    pair[1].close()
    assert ready(kernel, ours) & HUP
    ours.close()


def test_no_two_sockets_have_one_cookie_and_other_files_have_none(kernel: Kernel) -> None:
    socks = [sock for _ in range(4) for sock in kernel.socketpair()]
    assert len({kernel.cookie_of(sock.fileno()) for sock in socks} - {0}) == 8
    nothing = kernel.reserve()
    assert kernel.cookie_of(nothing) == 0
    kernel.close(nothing)
    assert kernel.cookie_of(nothing) == 0, "a number that is not open"
    for sock in socks:
        sock.close()


def test_fds_that_find_no_place_are_lost_and_it_is_said(kernel: Kernel, pair: Pair) -> None:
    ours, theirs = kernel.socketpair()
    passed = kernel.reserve()
    send_fds(pair[0], b"x", [theirs.fileno(), passed])
    theirs.close()
    places, full = fill(kernel)
    data, fds, lost = receive(pair[1])
    full()
    assert (data, fds, lost) == (b"x", [], True)
    assert ready(kernel, ours) & HUP, "it is closed"
    for fd in (*places, passed):
        kernel.close(fd)
    ours.close()


def test_a_full_table_is_emfile_for_every_new_fd(kernel: Kernel, pair: Pair) -> None:
    places, undo = fill(kernel)
    try:
        for new in (
            kernel.reserve,
            kernel.socketpair,
            kernel.event,
            lambda: kernel.dup(pair[0].fileno()),
            lambda: kernel.memfd("none", PAGE, peer_writes=False),
        ):
            with fails(errno.EMFILE):
                new()
        kernel.close(places.pop())
        with fails(errno.EMFILE):  # of two ends one finds a place, and gives it back
            kernel.socketpair()
        places.append(kernel.reserve())
    finally:
        undo()
        for fd in places:
            kernel.close(fd)


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


# -- names -------------------------------------------------------------------------------------------------


def test_who_listens_is_found_under_its_name(kernel: Kernel, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with pytest.raises(FileNotFoundError):
        kernel.connect(path)
    listening = kernel.listen(path, 0o600)
    with pytest.raises(BlockingIOError):
        listening.accept()
    client = kernel.connect(path)
    assert ready(kernel, listening, IN) == IN
    server, _ = listening.accept()
    server.setblocking(False)
    client.send(b"hello")
    assert receive(server)[0] == b"hello"
    for sock in (client, server, listening):
        sock.close()
    kernel.unlisten(path)
    with pytest.raises(FileNotFoundError):
        kernel.connect(path)


def test_who_connects_may_send_before_it_is_accepted_and_is_reset_if_it_never_is(
    kernel: Kernel, tmp_path: Path
) -> None:
    listening = kernel.listen(tmp_path / "socket", None)
    client, hasty = kernel.connect(tmp_path / "socket"), kernel.connect(tmp_path / "socket")
    client.setblocking(False)
    hasty.send(b"early")
    listening.close()
    assert ready(kernel, client) & HUP
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        client.send(b"x")
    client.close()
    hasty.close()


def test_a_name_that_is_taken_is_not_taken_over_and_one_left_behind_is(
    kernel: Kernel, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    first = kernel.listen(path, None)
    with fails(errno.EADDRINUSE):
        kernel.listen(path, None)
    first.close()  # and the name stays
    with pytest.raises(ConnectionRefusedError):
        kernel.connect(path)
    kernel.listen(path, None).close()


# -- events ------------------------------------------------------------------------------------------------


def test_an_event_is_seen_by_every_holder_until_it_is_drained(kernel: Kernel) -> None:
    ours = kernel.event()
    theirs = kernel.event_of(kernel.dup(ours.fd))
    poller = kernel.poller()
    poller.register(theirs.fd, IN)
    assert poller.poll(0, 1) == []
    ours.signal()
    ours.signal()
    assert poller.poll(0, 1) == [(theirs.fd, IN)]
    theirs.drain()
    assert poller.poll(0, 1) == []
    theirs.drain()  # nothing there: never waits
    poller.close()
    ours.close()
    theirs.signal()
    theirs.close()


def test_what_is_no_event_is_broken(kernel: Kernel) -> None:
    sock, peer = kernel.socketpair()
    peer.shutdown(socket.SHUT_RD)  # nothing can be written, as it would be to a full counter
    event = kernel.event_of(sock.detach())
    with pytest.raises(BrokenEvent):
        event.signal()
    event.close()
    peer.close()


# -- memory ------------------------------------------------------------------------------------------------


def test_memory_is_shared_zeroes_and_survives_its_fd(kernel: Kernel) -> None:
    fd, ours = kernel.memfd("memory", 2 * PAGE, peer_writes=True)
    theirs = kernel.map_peer(fd, 2 * PAGE, writable=True)
    kernel.close(fd)
    assert bytes(ours.view) == bytes(2 * PAGE)
    theirs.view[PAGE] = 7
    assert ours.view[PAGE] == 7
    ours.discard(PAGE, PAGE)
    assert theirs.view[PAGE] == 0
    ours.close()
    theirs.view[0] = 1
    theirs.close()


def test_only_the_first_mapping_stores_unless_the_peer_may(kernel: Kernel) -> None:
    fd, ours = kernel.memfd("memory", PAGE, peer_writes=False)
    with pytest.raises(PermissionError):
        kernel.map_peer(fd, PAGE, writable=True)
    theirs = kernel.map_peer(fd, PAGE, writable=False)
    ours.view[0] = 3
    assert theirs.view[0] == 3
    with pytest.raises(TypeError):
        theirs.view[0] = 4
    theirs.close()
    ours.close()
    kernel.close(fd)


def test_what_might_shrink_is_not_mapped(kernel: Kernel) -> None:
    fd, ours = kernel.memfd("memory", PAGE, peer_writes=True)
    with pytest.raises(ValueError, match="larger than its file"):
        kernel.map_peer(fd, PAGE + 1, writable=False)
    unsealed, nothing = kernel.file_with("file", [b"abc", b"def"]), kernel.reserve()
    for wrong in (unsealed, nothing):
        with pytest.raises(ValueError, match="shrink"):
            kernel.map_peer(wrong, 1, writable=False)
    for number in (fd, unsealed, nothing):
        kernel.close(number)
    ours.close()


def test_copies_of_an_fd_name_the_same_memory(kernel: Kernel) -> None:
    fd, ours = kernel.memfd("memory", PAGE, peer_writes=True)
    other, theirs = kernel.memfd("memory", PAGE, peer_writes=True)
    copy = kernel.dup(fd)
    assert kernel.memory_of(copy) == kernel.memory_of(fd) != kernel.memory_of(other)
    for number in (fd, other, copy):
        kernel.close(number)
    ours.close()
    theirs.close()


def test_the_clock_does_not_go_back(kernel: Kernel) -> None:
    before = kernel.monotonic_ns()
    assert kernel.monotonic_ns() >= before


def test_numbers_of_sockets_and_memory_are_the_hosts_and_begin_anew_with_it() -> None:
    """One seed in one interpreter twice: the same numbers."""

    def numbers() -> list[object]:
        kernel = SimProcess(SimHost())
        one, other = kernel.socketpair()
        fd, _ = kernel.memfd("memory", PAGE, peer_writes=True)
        return [kernel.cookie_of(one.fileno()), kernel.cookie_of(other.fileno()), kernel.memory_of(fd)]

    assert numbers() == numbers()


def test_a_poller_takes_an_fd_which_is_readable_when_it_has_something_to_report(kernel: Kernel) -> None:
    free = kernel.reserve()
    kernel.close(free)
    poller = kernel.poller()
    assert poller.fileno() == free
    event = kernel.event()
    poller.register(event.fd, select.EPOLLIN)
    outer = kernel.poller()
    outer.register(poller.fileno(), select.EPOLLIN)
    assert outer.poll(0, 8) == []
    event.signal()
    assert outer.poll(0, 8) == [(poller.fileno(), select.EPOLLIN)]
    event.drain()
    assert outer.poll(0, 8) == []
    poller.close()
    assert kernel.reserve() == free


def test_a_file_is_read_whole_by_whoever_has_its_fd_which_is_closed(kernel: Kernel) -> None:
    fd = kernel.file_with("file", [b"abc", b"def"])
    assert kernel.contents(fd) == b"abcdef"
    assert kernel.reserve() == fd
