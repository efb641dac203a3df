"""Pages for tables: allocated zeroed, held while a walker may still sit in them, given back zeroed.

Models the pages KVM takes for its TDP [RFC 35/42] and the VT-d driver for a domain's tables [iommufd
io_pagetable.c].  They lie in one window, handed out from its start, those freed last first, so that it is
touched only as far as it was ever needed.

A page that was cut off from its table may still sit in a paging-structure cache: it keeps its contents, and
is not used again, until every walker has acked the flush that follows (I7).  When that is, its holder says:
by epochs that grow (`quarantine`, `reclaim`: kvmd's flushes, kept apart by VM), or page by page (`free`:
iommufdd, whose changes are flushed in any order).
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from protocol.errors import UapiError
from protocol.pt.mem import TableWriter
from protocol.units import PAGE_SIZE, Hpa


class _Held(NamedTuple):
    table: Hpa
    epoch: int


class TablePool:
    """All table pages of a window of `size` bytes."""

    def __init__(self, writer: TableWriter, size: int) -> None:
        self._writer = writer
        self._next = writer.base
        self._end = writer.base + size
        self._free: list[Hpa] = []
        self._held: dict[int, deque[_Held]] = {}
        self.in_use = 0  # given out, and not held for an epoch

    def allocate(self) -> Hpa:
        """A zeroed page.  Raises UapiError(ENOMEM) when the table window is full."""
        if self._free:
            table = self._free.pop()
        elif self._next < self._end:
            table = self._next
            self._next = Hpa(table + PAGE_SIZE)
        else:
            raise UapiError(errno.ENOMEM, f"no room for another page table ({self.in_use} in use)")
        self.in_use += 1
        return table

    def free(self, tables: Iterable[Hpa]) -> None:
        """Pages in use that no walker can reach, nor sits in."""
        for table in tables:
            self._clear(table)
            self.in_use -= 1

    # -- holding by epochs -----------------------------------------------------------------------------

    def quarantine(self, holder: int, table: Hpa, epoch: int) -> None:
        """Hold an unlinked page until the flush of `epoch` is acked by all."""
        held = self._held.setdefault(holder, deque())
        assert not held or held[-1].epoch <= epoch, "epochs only grow"
        held.append(_Held(table, epoch))
        self.in_use -= 1

    def reclaim(self, holder: int, acked: int) -> int:
        """Free what every walker has let go of: pages held for epochs up to `acked`.  How many."""
        held = self._held.get(holder)
        count = 0
        while held and held[0].epoch <= acked:
            self._clear(held.popleft().table)
            count += 1
        return count

    def held(self, holder: int) -> int:
        return len(self._held.get(holder, ()))

    def forget(self, holder: int) -> None:
        """The holder is gone and nothing of it is held any more."""
        held = self._held.pop(holder, None)
        assert not held, f"VM {holder} still holds {len(held or ())} table pages"

    def _clear(self, table: Hpa) -> None:
        self._writer.clear_unlinked(table)
        self._free.append(table)
