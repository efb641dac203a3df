"""An importer of kvmd's as an object of the test's: it acks late, in any order, its lease ends by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.flow import Wait


@dataclass
class Told:
    """One invalidation an importer was told and has not acked."""

    start: int
    size: int
    epoch: int
    acked: Wait[None]


@dataclass
class SlowImporter:
    """Acks when the test says so, in whatever order."""

    pending: list[Told] = field(default_factory=list)
    heard: list[tuple[int, int, int]] = field(default_factory=list)

    def invalidate(self, start: int, size: int, epoch: int) -> Wait[None]:
        told = Told(start, size, epoch, Wait())
        self.pending.append(told)
        self.heard.append((start, size, epoch))
        return told.acked

    def ack(self, index: int = 0) -> None:
        self.pending.pop(index).acked.set(None)


@dataclass(eq=False)
class HandLease:
    """Ended by hand, as if the last copy of it were closed."""

    ended: Wait[None] = field(default_factory=Wait)
