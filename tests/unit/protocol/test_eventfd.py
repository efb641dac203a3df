"""An eventfd of two processes: signals add up, nobody waits, and who fills it is found out."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator

import pytest

from protocol.kernel.linux import LINUX
from protocol.kernel.port import BrokenEvent, SharedEvent
from protocol.rpc.fence import full_fence


@pytest.fixture
def event() -> Iterator[SharedEvent]:
    made = LINUX.event()
    yield made
    made.close()


def make_it_block(event: SharedEvent) -> None:
    """What the other end can do at any time: flags are not a descriptor's, but the file's."""
    fcntl.fcntl(event.fd, fcntl.F_SETFL, fcntl.fcntl(event.fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)


def test_several_signals_are_drained_at_once(event: SharedEvent) -> None:
    event.signal()
    event.signal()
    full_fence()
    assert os.eventfd_read(event.fd) == 2
    event.signal()
    event.drain()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(event.fd)


def test_draining_what_nobody_signalled_waits_not_even_if_the_peer_made_it_block(
    event: SharedEvent,
) -> None:
    make_it_block(event)
    event.drain()


def test_a_full_counter_is_found_out_before_anybody_waits(event: SharedEvent) -> None:
    make_it_block(event)
    os.eventfd_write(event.fd, 2**64 - 2)
    with pytest.raises(BrokenEvent, match="no room"):
        event.signal()


def test_what_is_no_eventfd_is_found_out() -> None:
    read, write = os.pipe()
    os.close(read)
    for misused in (LINUX.event_of(write),):
        with pytest.raises(BrokenEvent):
            misused.drain()
        with pytest.raises(BrokenEvent):
            misused.signal()
        misused.close()


def test_what_breaks_an_event_is_told_in_words_and_not_as_an_errno(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    event = LINUX.event()
    with monkeypatch.context() as patched:
        patched.setattr(os, "eventfd_write", full)
        with pytest.raises(BrokenEvent, match="an eventfd cannot be written: Resource"):
            event.signal()
    event.close()
    with pytest.raises(BrokenEvent, match="an eventfd cannot be read: Bad file descriptor"):
        event.drain()
