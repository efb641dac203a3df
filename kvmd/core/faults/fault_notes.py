"""KVM's notes to whoever keeps a table of its own: "I have faulted in gfn A, you might want to do the same".

Models the notifier that the review of the series asked for [RFC review]: after a fault of a vCPU has stored
an entry of address space 0 every subscriber is told what it maps.  A note is fire and forget: nothing waits
for it, it promises nothing about the time it is read, and one that finds no room is lost, which costs the
subscriber a page fault of its own.  What a device faulted in, or what was there already, is no news.
"""

from __future__ import annotations

import errno
from typing import Protocol

from protocol.errors import UapiError
from protocol.pt.geometry import entry_start
from protocol.units import Gfn, Level, pages_of_level

MAX_SUBSCRIBERS = 16  # each costs every fault a message


class Subscriber(Protocol):
    def post(self, gfn: Gfn, npages: int, *, writable: bool) -> bool:
        """False: there is no room, the note is lost."""

    def close(self) -> None:
        """The VM is gone."""


class FaultNotes:
    """Of one VM."""

    def __init__(self) -> None:
        self.subscribers: list[Subscriber] = []
        self.posted = 0
        self.dropped = 0

    def subscribe(self, subscriber: Subscriber) -> None:
        """EBUSY: too many."""
        if len(self.subscribers) >= MAX_SUBSCRIBERS:
            raise UapiError(errno.EBUSY, f"the VM's faults are noted to {MAX_SUBSCRIBERS} channels already")
        self.subscribers.append(subscriber)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        if subscriber in self.subscribers:
            self.subscribers.remove(subscriber)

    def post(self, gfn: Gfn, level: Level, *, writable: bool) -> None:
        """The leaf of `level` that covers `gfn` was stored for a vCPU."""
        for subscriber in self.subscribers:
            taken = subscriber.post(entry_start(gfn, level), pages_of_level(level), writable=writable)
            self.posted += taken
            self.dropped += not taken

    def close(self) -> None:
        for subscriber in list(self.subscribers):
            subscriber.close()
