"""One suite over both kernels: what Linux answers is what the one in memory answers."""

from __future__ import annotations

import errno
import socket
import sys
from pathlib import Path

import pytest

from protocol.kernel.port import SCM_MAX_FD, BrokenEvent, Kernel
from simulator.kernel.process import SimHost, SimProcess
from tests.unit.protocol.kernel.asking import (
    ERR,
    HUP,
    IN,
    PAGE,
    RDHUP,
    Pair,
    fails,
    fill,
    ready,
    receive,
    send_fds,
)

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


def test_what_hung_up_already_may_be_shut(pair: Pair) -> None:
    one, other = pair
    one.close()
    other.shutdown(socket.SHUT_RDWR)
    other.shutdown(socket.SHUT_RDWR)


def test_who_does_not_read_any_more_is_epipe(pair: Pair) -> None:
    one, other = pair
    one.shutdown(socket.SHUT_RD)
    with pytest.raises(BrokenPipeError):
        other.send(b"x")
    assert one.send(b"y") == 1


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


def test_no_two_sockets_have_one_cookie_and_other_files_have_none(kernel: Kernel, tmp_path: Path) -> None:
    socks = [sock for _ in range(4) for sock in kernel.socketpair()]
    listening = kernel.listen(tmp_path / "socket", None)
    cookies = {kernel.cookie_of(sock.fileno()) for sock in (*socks, listening)}
    assert len(cookies - {0}) == 9
    listening.close()
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


def test_fds_that_there_is_no_room_for_are_lost_and_those_before_them_come(
    kernel: Kernel, pair: Pair
) -> None:
    ours, theirs = kernel.socketpair()
    passed = [kernel.reserve() for _ in range(19)]
    send_fds(pair[0], b"x", [*passed, theirs.fileno()])
    theirs.close()
    data, fds, lost = receive(pair[1], room=16)
    assert (data, len(fds), lost) == (b"x", 16, True)
    assert ready(kernel, ours) & HUP, "it is closed"
    send_fds(pair[0], b"y", passed[:1])
    assert receive(pair[1], room=0) == (b"y", [], True)
    for fd in (*passed, *fds):
        kernel.close(fd)
    ours.close()


def test_no_more_than_so_many_fds_go_at_once(kernel: Kernel, pair: Pair) -> None:
    passed = kernel.reserve()
    with fails(errno.EINVAL):
        send_fds(pair[0], b"x", [passed] * (SCM_MAX_FD + 1))
    with pytest.raises(BlockingIOError):
        receive(pair[1])
    assert send_fds(pair[0], b"x", [passed] * SCM_MAX_FD) == 1
    _, fds, lost = receive(pair[1], room=SCM_MAX_FD)
    assert (len(fds), lost) == (SCM_MAX_FD, False)
    for fd in (passed, *fds):
        kernel.close(fd)


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
    hasty.setblocking(False)
    hasty.send(b"early")
    listening.close()
    for reset in (client, hasty):
        assert ready(kernel, reset) & (HUP | ERR) == HUP | ERR
        with pytest.raises(BrokenPipeError):
            reset.send(b"x")
        with pytest.raises(ConnectionResetError):
            receive(reset)
        assert receive(reset)[0] == b"", "it is told once"
        reset.close()


def test_who_was_accepted_is_not_reset(kernel: Kernel, tmp_path: Path) -> None:
    listening = kernel.listen(tmp_path / "socket", None)
    client = kernel.connect(tmp_path / "socket")
    server, _ = listening.accept()
    listening.close()
    server.close()
    assert ready(kernel, client) & (HUP | ERR) == HUP
    assert receive(client)[0] == b""
    client.close()


def test_who_has_no_fd_for_it_does_not_connect(kernel: Kernel, tmp_path: Path) -> None:
    listening = kernel.listen(tmp_path / "socket", None)
    places, undo = fill(kernel)
    for name in ("socket", "nobody"):
        with fails(errno.EMFILE):
            kernel.connect(tmp_path / name)
    undo()
    with pytest.raises(BlockingIOError):
        listening.accept()
    for fd in places:
        kernel.close(fd)
    nobody = kernel.reserve()
    kernel.close(nobody)
    with pytest.raises(FileNotFoundError):
        kernel.connect(tmp_path / "nobody")
    assert kernel.reserve() == nobody, "its fd is given back"
    kernel.close(nobody)
    listening.close()


def test_a_name_that_is_taken_is_not_taken_over_and_one_left_behind_is(
    kernel: Kernel, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    first = kernel.listen(path, None)
    with fails(errno.EADDRINUSE) as taken:
        kernel.listen(path, None)
    assert taken.type is OSError
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


def test_an_event_that_is_a_socket_is_written_and_read(kernel: Kernel, pair: Pair) -> None:
    """What a peer sends may be anything, and the kernel does not ask."""
    one, other = pair
    event = kernel.event_of(kernel.dup(one.fileno()))
    event.signal()
    assert receive(other)[0] == (1).to_bytes(8, sys.byteorder)
    event.drain()  # nothing there: never waits
    other.send(b"0123456789")
    event.drain()
    assert receive(one)[0] == b"89"
    other.close()
    event.drain()
    with pytest.raises(BrokenEvent, match="an eventfd cannot be written: Broken pipe"):
        event.signal()
    event.close()


def test_nothing_is_an_event_that_is_never_signalled(kernel: Kernel) -> None:
    event = kernel.event_of(kernel.reserve())
    event.drain()
    with pytest.raises(BrokenEvent):
        event.signal()
    event.close()


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


def test_what_somebody_still_has_a_part_of_is_not_unmapped(kernel: Kernel) -> None:
    fd, ours = kernel.memfd("memory", 2 * PAGE, peer_writes=True)
    theirs = kernel.map_peer(fd, 2 * PAGE, writable=False)
    kernel.close(fd)
    parts = [ours.view[:8], ours.view.cast("Q"), ours.view.toreadonly()]
    while parts:
        with pytest.raises(BufferError):
            ours.close()
        parts.pop(0).release()
    ours.close()
    ours.close()
    with pytest.raises(ValueError, match="released"):
        ours.view[0]
    assert theirs.view[0] == 0, "of another mapping"
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


def test_a_file_is_read_whole_by_whoever_has_its_fd_which_is_closed(kernel: Kernel) -> None:
    fd = kernel.file_with("file", [b"abc", b"def"])
    assert kernel.contents(fd) == b"abcdef"
    assert kernel.reserve() == fd


def test_copies_of_an_fd_have_one_place_in_its_file(kernel: Kernel) -> None:
    fd = kernel.file_with("file", [b"abc"])
    copies = kernel.dup(fd), kernel.dup(fd)
    assert kernel.contents(fd) == b"abc"
    for copy in copies:
        assert kernel.contents(copy) == b""
    fd, memory = kernel.memfd("memory", PAGE, peer_writes=True)
    copy = kernel.dup(fd)
    assert kernel.contents(copy) == bytes(PAGE)
    assert kernel.contents(fd) == b""
    memory.close()


def test_what_is_no_file_is_not_read_and_closed(kernel: Kernel, pair: Pair) -> None:
    """A peer may send anything, and a read of a socket ends when its other end wants."""
    pair[0].send(b"abc")
    poller = kernel.poller()
    copies = kernel.dup(pair[1].fileno()), kernel.reserve(), kernel.dup(poller.fileno())
    for fd in copies:
        with fails(errno.EINVAL):
            kernel.contents(fd)
    assert sorted(kernel.reserve() for _ in copies) == sorted(copies), "they were free"
    for fd in copies:
        kernel.close(fd)
    poller.close()
