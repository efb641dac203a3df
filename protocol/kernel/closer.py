"""Closing what others sent without waiting for it.

close() may sleep: a TCP socket with SO_LINGER and unsent data does for as long as its owner said, a file on
FUSE until its server answers, and a Unix socket that is closed with such files in its queue closes those
too [Linux inet_release, fuse_flush, unix_release_sock].  No kind of fd can be told to be harmless, and a
daemon has one thread for everybody.  So what was received is closed by threads that have nothing else to do;
one that sleeps holds up nobody.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue

import structlog

MAX_THREADS = 16  # with so many asleep the rest queues up, and costs places in our fd table

log = structlog.get_logger("rpc")


class Closer:
    """Threads are made when all there are may be asleep, and do not keep the process from ending."""

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._max_threads = max_threads
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._changed = threading.Condition()
        self._pending = 0  # handed over, not closed yet
        self._threads = 0

    def close(self, fd: int) -> None:
        """The fd is ours from now on.  Never waits."""
        self._begin(partial(os.close, fd))

    def replace(self, fd: int, by: int) -> Callable[[], bool]:
        """The same, and a copy of `by` takes its place; `by` stays open until then.  Has it?"""
        done = threading.Event()

        def dup() -> None:
            try:
                os.dup2(by, fd, inheritable=False)  # closes what was there [dup(2)]
            finally:
                done.set()

        self._begin(dup)
        return done.is_set

    def _begin(self, closing: Callable[[], None]) -> None:
        with self._changed:
            self._pending += 1
            wanted = self._pending > self._threads
            if wanted and self._threads < self._max_threads:
                self._threads += 1
                threading.Thread(target=self._work, name="closer", daemon=True).start()
            elif wanted and self._pending % self._max_threads == 0:
                log.warning("received files do not close", waiting=self._pending)
        self._queue.put(closing)

    def drain(self, patience_s: float) -> bool:
        """Wait until all is closed; False if it takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, patience_s)

    def _work(self) -> None:
        while True:
            closing = self._queue.get()
            with suppress(OSError):  # what the last write came to: it is closed all the same
                closing()
            with self._changed:
                self._pending -= 1
                self._changed.notify_all()
