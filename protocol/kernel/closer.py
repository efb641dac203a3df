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
from contextlib import suppress
from queue import SimpleQueue

import structlog

MAX_THREADS = 16  # with so many asleep the rest queues up, and costs places in our fd table

log = structlog.get_logger("rpc")


class Closer:
    """Threads are made when all there are may be asleep, and do not keep the process from ending."""

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._max_threads = max_threads
        self._queue: SimpleQueue[int] = SimpleQueue()
        self._changed = threading.Condition()
        self._pending = 0  # handed over, not closed yet
        self._threads = 0

    def close(self, fd: int) -> None:
        """The fd is ours from now on.  Never waits."""
        with self._changed:
            self._pending += 1
            wanted = self._pending > self._threads
            if wanted and self._threads < self._max_threads:
                self._threads += 1
                threading.Thread(target=self._work, name="closer", daemon=True).start()
            elif wanted and self._pending % self._max_threads == 0:
                log.warning("received files do not close", waiting=self._pending)
        self._queue.put(fd)

    def drain(self, patience_s: float) -> bool:
        """Wait until all is closed; False if it takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, patience_s)

    def _work(self) -> None:
        while True:
            fd = self._queue.get()
            with suppress(OSError):  # what the last write came to: it is closed all the same
                os.close(fd)
            with self._changed:
                self._pending -= 1
                self._changed.notify_all()
