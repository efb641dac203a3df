"""A lease ends when the last copy of its other end is closed, and by nothing else."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from protocol.kernel.linux import LINUX
from protocol.rpc.lease import LeaseSocket
from tests.unit.protocol.wires import Wires


@pytest.fixture
def wires() -> Iterator[Wires]:
    made = Wires()
    yield made
    made.close()


def test_an_event_of_a_file_that_is_closed_does_not_end_the_lease_that_got_its_number(wires: Wires) -> None:
    """Both were told of at once: the first one's callback closes the second, and makes a lease."""
    loop, leases = wires.loop, list[LeaseSocket]()
    with ExitStack() as stack:
        first, peer = (stack.enter_context(end) for end in socket.socketpair())
        second, its_peer = socket.socketpair()
        number = second.fileno()

        def replaces(_: int) -> None:
            first.recv(1)
            loop.unregister(number)
            second.close()
            while not leases or leases[-1]._ours.fileno() < number:
                leases.append(LeaseSocket(loop))

        loop.register(first.fileno(), replaces)
        loop.register(number, lambda _: pytest.fail("it is closed"))
        peer.send(b"1")
        its_peer.close()
        assert loop.turn(1.0)
        assert number in {lease._ours.fileno() for lease in leases}, "nothing was shown"
        for lease in leases:
            assert not lease.ended.done
            lease.withdraw()
        loop.unregister(first.fileno())


def test_the_last_copy_ends_it(wires: Wires) -> None:
    lease = LeaseSocket(wires.loop)
    copy = LINUX.dup(lease.theirs)
    LINUX.close(lease.theirs)
    assert not wires.loop.turn(0)
    assert not lease.ended.done
    LINUX.close(copy)
    assert wires.loop.turn(1.0)
    assert lease.ended.done
