"""What may be watched, and under which names: a set of both kernels goes by an fd and its file."""

from __future__ import annotations

import errno
import select

import pytest

from protocol.kernel.port import Kernel
from tests.unit.protocol.kernel.asking import IN, OUT, PAGE, Pair, fails


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


def test_what_is_always_ready_is_not_watched(kernel: Kernel) -> None:
    poller = kernel.poller()
    memory, mapping = kernel.memfd("memory", PAGE, peer_writes=True)
    for fd in (memory, kernel.file_with("file", []), kernel.reserve()):
        for asked in (poller.register, poller.modify):
            with pytest.raises(PermissionError):
                asked(fd, IN)
        with pytest.raises(PermissionError):
            poller.unregister(fd)
        kernel.close(fd)
    mapping.close()
    poller.close()


def test_a_number_that_is_not_open_is_ebadf(kernel: Kernel) -> None:
    poller, event = kernel.poller(), kernel.event()
    poller.register(event.fd, IN)
    event.close()
    for asked in (poller.register, poller.modify):
        with fails(errno.EBADF):
            asked(event.fd, IN)
    with fails(errno.EBADF):
        poller.unregister(event.fd)
    assert poller.poll(0, 8) == []
    poller.close()


def test_a_number_of_another_file_by_now_is_not_there(kernel: Kernel) -> None:
    poller, event = kernel.poller(), kernel.event()
    poller.register(event.fd, IN)
    event.close()
    other = kernel.event()
    assert other.fd == event.fd
    with fails(errno.ENOENT):
        poller.modify(other.fd, IN)
    with fails(errno.ENOENT):
        poller.unregister(other.fd)
    poller.register(other.fd, IN)
    with fails(errno.EEXIST):
        poller.register(other.fd, IN)
    other.signal()
    assert poller.poll(0, 8) == [(other.fd, IN)]
    other.close()
    poller.close()


def test_what_lives_on_in_a_copy_is_watched_on_under_the_number_it_had(kernel: Kernel) -> None:
    """Whoever closes an fd that others have takes it out first."""
    poller, event = kernel.poller(), kernel.event()
    copy = kernel.event_of(kernel.dup(event.fd))
    poller.register(event.fd, IN)
    event.close()
    copy.signal()
    assert poller.poll(0, 8) == [(event.fd, IN)]
    other = kernel.event()
    assert other.fd == event.fd
    poller.register(other.fd, IN)
    other.signal()
    assert poller.poll(0, 8) == [(event.fd, IN)] * 2
    poller.unregister(other.fd)
    assert poller.poll(0, 8) == [(event.fd, IN)]
    copy.close()
    assert poller.poll(0, 8) == []
    other.close()
    poller.close()
