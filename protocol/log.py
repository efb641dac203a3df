"""Where a daemon's log goes: never waits for a reader, never fails, and nobody can flood it.

A pipe nobody reads is full after 64 KiB, a terminal may be stopped, a disk be full, a reader gone.  What is
written to anything but a file on disk is therefore written by a thread, from a queue with a bound; what
finds no place is counted and left out.  O_NONBLOCK would not do: it belongs to everybody who has that open
file, a shell for one.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import deque
from collections.abc import Callable, MutableMapping
from time import monotonic
from typing import Any

import structlog

MAX_LINES = 1000  # in the queue
INTERVAL_S = 5.0
BURST = 100  # lines of one event in an interval


class LogFile:
    """A text file over `fd` as far as a logger, print() and a traceback need one; nothing is kept without
    an fd.
    """

    encoding = "utf-8"

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._direct = fd is not None and stat.S_ISREG(os.fstat(fd).st_mode)
        self._lines: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._lost = 0
        self._thread: threading.Thread | None = None

    def write(self, text: str) -> int:
        data = text.encode(errors="backslashreplace")
        if self._direct:
            self._store(data)
        elif self._fd is not None:
            self._queue(data)
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back that could be written now."""

    def drain(self, patience_s: float) -> bool:
        """Wait until what was written is out; False if it takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._lines or self._busy), patience_s)

    def _queue(self, data: bytes) -> None:
        with self._changed:
            if len(self._lines) >= MAX_LINES:
                self._lost += 1
                return
            self._lines.append(data)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._lines))
                self._busy = True
                data, lost, self._lost = b"".join(self._lines), self._lost, 0
                self._lines.clear()
            self._store(data)
            if lost:
                self._store(f"{lost} lines of the log were left out: nobody took them\n".encode())

    def _store(self, data: bytes) -> None:
        assert self._fd is not None
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            pass  # nobody is left to be told


class RateLimit:
    """A processor: of one event BURST lines an interval, and with the next how many were left out, as
    printk's ratelimit does for each place that prints.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._events: dict[str, list[float]] = {}  # since when, how many shown, how many not

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        now = self._clock()
        state = self._events.setdefault(event["event"], [now, 0, 0])
        if now - state[0] >= INTERVAL_S:
            if state[2]:
                event["left_out"] = int(state[2])
            state[:] = [now, 0, 0]
        if state[1] >= BURST:
            state[2] += 1
            raise structlog.DropEvent
        state[1] += 1
        return event
