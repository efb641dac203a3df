"""Closing what was received: one close() that sleeps holds up neither who asked for it nor the others."""

from __future__ import annotations

import os
import threading

import pytest

from protocol.kernel import closer
from protocol.kernel.closer import Closer
from tests.patience import PATIENCE_S


class Sleepers:
    """os.close, that sleeps on some fds until they are woken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asleep: set[int] = set()
        self.closed: list[int] = []
        self.wake = threading.Event()
        self._real = os.close
        monkeypatch.setattr(closer.os, "close", self._close)  # type: ignore[attr-defined]

    def _close(self, fd: int) -> None:
        if fd in self.asleep:
            assert self.wake.wait(PATIENCE_S)
        self._real(fd)
        self.closed.append(fd)


@pytest.fixture
def sleepers(monkeypatch: pytest.MonkeyPatch) -> Sleepers:
    return Sleepers(monkeypatch)


def test_a_close_that_sleeps_holds_up_nobody(sleepers: Sleepers) -> None:
    made = Closer(max_threads=4)
    slow, quick = [os.memfd_create("x") for _ in range(3)], [os.memfd_create("x") for _ in range(20)]
    sleepers.asleep = set(slow)
    for fd in (*slow, *quick):
        made.close(fd)
    while len(sleepers.closed) < len(quick):
        assert not made.drain(0.01)
    assert set(sleepers.closed) == set(quick)
    sleepers.wake.set()
    assert made.drain(PATIENCE_S)
    assert set(sleepers.closed) == {*slow, *quick}


def test_with_all_threads_asleep_the_rest_waits_and_is_not_lost(sleepers: Sleepers) -> None:
    made = Closer(max_threads=2)
    fds = [os.memfd_create("x") for _ in range(10)]
    sleepers.asleep = set(fds[:2])
    for fd in fds:
        made.close(fd)
    assert not made.drain(0.05)
    assert sleepers.closed == []
    sleepers.wake.set()
    assert made.drain(PATIENCE_S)
    assert set(sleepers.closed) == set(fds)


def test_an_fd_whose_close_fails_is_done_with() -> None:
    made = Closer()
    fd = os.memfd_create("x")
    os.close(fd)
    made.close(fd)
    assert made.drain(PATIENCE_S)
