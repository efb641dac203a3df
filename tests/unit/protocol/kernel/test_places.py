"""A place in the fd table that is kept while what was there is closed."""

from __future__ import annotations

import pytest

from protocol.kernel.linux import Linux
from protocol.kernel.port import Kernel
from tests.patience import PATIENCE_S
from tests.unit.protocol.kernel.asking import IN, Pair, ready


def drained(kernel: Kernel) -> None:
    if isinstance(kernel, Linux):
        assert kernel.closer.drain(PATIENCE_S)


def test_what_was_received_is_closed_and_its_place_kept(kernel: Kernel, pair: Pair) -> None:
    one, other = pair
    nothing, place = kernel.reserve(), other.detach()
    is_kept = kernel.replace_received(place, nothing)
    drained(kernel)
    assert is_kept()
    assert ready(kernel, one, IN) & IN
    assert one.recv(1) == b"", "the other end was closed"
    next_place = kernel.reserve()
    assert next_place not in (place, nothing)
    for fd in (place, nothing, next_place):
        kernel.close(fd)


def test_the_copy_outlives_what_it_was_made_of(kernel: Kernel, pair: Pair) -> None:
    one, other = pair
    copied, place = other.detach(), kernel.reserve()
    is_kept = kernel.replace_received(place, copied)
    drained(kernel)
    assert is_kept()
    kernel.close(copied)
    with pytest.raises(BlockingIOError):
        one.recv(1)
    kernel.close(place)
    assert one.recv(1) == b""
