"""An eventfd that two processes share: one signals, the other is woken and drains it.

Flags of an eventfd belong to both ends, so the other end may make it a blocking one at any time: whoever
drains asks not to wait call by call, whoever signals asks first whether there is room.  What is left is a
peer that fills the counter between that answer and the write.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress


class BrokenEvent(Exception):
    """Its counter is full, or it is no eventfd: whoever holds the other end is not to be trusted."""


class EventFd:
    """Owns `fd`; EventFd.make() makes one."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._count = bytearray(8)
        self._room = select.poll()
        self._room.register(fd, select.POLLOUT)

    @classmethod
    def make(cls) -> EventFd:
        """OSError: EMFILE, ENOMEM."""
        return cls(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    def signal(self) -> None:
        """Raises BrokenEvent."""
        try:
            ready = self._room.poll(0)
            if not ready or not ready[0][1] & select.POLLOUT:
                raise BrokenEvent("an eventfd has no room for one signal more")
            os.eventfd_write(self.fd, 1)
        except OSError as error:
            raise BrokenEvent(f"an eventfd cannot be written: {error}") from None

    def drain(self) -> None:
        """Whatever was signalled until now.  Raises BrokenEvent."""
        try:
            with suppress(BlockingIOError):
                os.preadv(self.fd, [self._count], -1, os.RWF_NOWAIT)
        except OSError as error:
            raise BrokenEvent(f"an eventfd cannot be read: {error}") from None

    def close(self) -> None:
        os.close(self.fd)
