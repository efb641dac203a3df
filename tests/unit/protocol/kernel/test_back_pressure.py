"""How much a socket takes before somebody reads: both kernels take about as much, in pieces of one size."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.kernel.linux import Linux
from protocol.kernel.port import BACKLOG, Kernel, StreamSocket
from protocol.rpc.channel import FD_TAIL_BYTES
from simulator.kernel.process import SimHost, SimProcess
from tests.unit.protocol.kernel.asking import OUT, Pair, ready, receive, send_fds


def taken(sock: StreamSocket, size: int) -> list[int]:
    """Of messages of that size, one after the other: how much of each."""
    found = list[int]()
    while True:
        try:
            found.append(sock.send(bytes(size)))
        except BlockingIOError:
            return found


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


@pytest.mark.parametrize("size", [1, 100, 1000, FD_TAIL_BYTES, 32_768])
def test_a_message_of_one_buffer_goes_whole_or_not_at_all(pair: Pair, size: int) -> None:
    assert set(taken(pair[0], size)) == {size}


def test_fds_go_with_all_of_their_bytes_or_not_at_all(kernel: Kernel, pair: Pair) -> None:
    """Wherever the room ends: `Channel` sends the end of a frame with them."""
    one, other = pair
    passed = kernel.reserve()
    before = len(taken(one, 1000))
    for _ in range(before):
        with pytest.raises(BlockingIOError):
            send_fds(one, bytes(FD_TAIL_BYTES), [passed])
        receive(other, 1000)
        try:
            assert send_fds(one, bytes(FD_TAIL_BYTES), [passed]) == FD_TAIL_BYTES
            break
        except BlockingIOError:
            continue
    else:
        pytest.fail("it never has room")
    kernel.close(passed)


@pytest.mark.parametrize("size", [1, 100, 1000, 3000, 4096, 10_000, 32_768])
def test_as_many_messages_as_of_linux_find_room(size: int) -> None:
    """What another version of it keeps beside the bytes may be half or twice as much."""
    pairs = [kernel.socketpair() for kernel in (Linux(), SimProcess(SimHost()))]
    for sock in pairs[0]:
        sock.setblocking(False)
    linux, memory = (len(taken(one, size)) for one, _ in pairs)
    assert linux / 2 <= memory <= linux * 2
    for sock in (*pairs[0], *pairs[1]):
        sock.close()


def test_a_byte_costs_as_much_as_some_and_a_buffer_more_than_its_bytes(kernel: Kernel) -> None:
    def count(size: int) -> int:
        one, other = kernel.socketpair()
        one.setblocking(False)
        found = len(taken(one, size))
        one.close()
        other.close()
        return found

    assert count(1) == count(100) < 1000
    assert 1.5 < count(100) / count(1000) < 6
    assert 2 < count(1000) / count(4096) < 5
    assert 4 * 100 * count(100) < 32_768 * count(32_768)


@pytest.mark.parametrize("size", [100, 4096])
def test_who_may_send_again_is_told_so_when_most_of_it_is_read(kernel: Kernel, pair: Pair, size: int) -> None:
    """A quarter is left, in what it costs; before that there is room for who asks."""
    one, other = pair
    full = len(taken(one, size))
    left = full
    receive(other, size)
    assert not ready(kernel, one, OUT)
    assert one.send(bytes(size)) == size
    while not ready(kernel, one, OUT):
        assert receive(other, size)[0]
        left -= 1
    assert full / 6 < left < full / 2
    assert ready(kernel, one, OUT) == OUT


def test_what_is_not_read_to_its_end_has_its_room(kernel: Kernel, pair: Pair) -> None:
    one, other = pair
    messages = len(taken(one, 4096))
    for _ in range(messages - 1):
        receive(other, 4096)
    assert ready(kernel, one, OUT)
    taken(one, 30_000)
    receive(other, 4096)
    while ready(kernel, one, OUT) != OUT:
        assert receive(other, 29_999)[0]
    assert len(receive(other, 30_000)[0]) > 1


def test_only_so_many_wait_to_be_accepted(kernel: Kernel, tmp_path: Path) -> None:
    listening = kernel.listen(tmp_path / "socket", None)
    waiting = [kernel.connect(tmp_path / "socket") for _ in range(BACKLOG + 1)]
    with pytest.raises(BlockingIOError):
        kernel.connect(tmp_path / "socket")
    waiting.append(listening.accept()[0])
    waiting.append(kernel.connect(tmp_path / "socket"))
    with pytest.raises(BlockingIOError):
        kernel.connect(tmp_path / "socket")
    for sock in (*waiting, listening):
        sock.close()
