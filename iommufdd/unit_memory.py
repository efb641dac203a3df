"""The two windows of a link that its units' structures lie in: tables that only we store into, and queues.

A link has memory of its own: what an earlier one left behind cannot be reached, and nothing has to be taken
back from a unit that may not have let go of it yet (I13); that it has, its lease says.  The windows lie above
those of IOASes' tables, where no host has memory (`memory.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from iommufdd.core.intel_iommu import QUEUE_BYTES, UnitMemory
from iommufdd.core.translation_tables import TranslationTables
from iommufdd.lent import LentWindows
from iommufdd.memory import TABLES_START
from protocol.errors import UapiError
from protocol.hostmem import WindowKind
from protocol.kernel.port import Kernel
from protocol.pt.mem import TableWriter
from protocol.rpc.channel import Fds
from protocol.rpc.lease import LeaseSocket
from protocol.rpc.loop import Loop
from protocol.units import PAGE_SIZE, TIB, Hpa, align_up

STRUCTURES_START = Hpa(TABLES_START + 2 * TIB)
QUEUES_START = Hpa(STRUCTURES_START + TIB)
# A context table at most, a PASID directory and a PASID table.
PAGES_OF_FUNCTION = 3
# A root table and an invalidation queue.
PAGES_OF_UNIT = 2


class LinkMemory:
    """Made for so many units and functions.  Raises OSError."""

    def __init__(self, kernel: Kernel, units: int, functions: int) -> None:
        self._kernel = kernel
        size = (units * PAGES_OF_UNIT + functions * PAGES_OF_FUNCTION) * PAGE_SIZE
        queues_size = align_up(units * QUEUE_BYTES, PAGE_SIZE)
        self._tables_fd, tables = kernel.memfd("dmar-tables", size, peer_writes=False)
        try:
            self._queues_fd, queues = kernel.memfd("dmar-queues", queues_size, peer_writes=True)
        except OSError:
            kernel.close(self._tables_fd)
            raise
        self._view = tables.view
        self._writer = TableWriter(STRUCTURES_START, self._view)
        self._queues = queues.view.toreadonly()
        self._pages = iter(range(STRUCTURES_START, STRUCTURES_START + size, PAGE_SIZE))
        self._windows = [
            (str(WindowKind.TABLES), STRUCTURES_START, size),
            (str(WindowKind.QUEUES), QUEUES_START, queues_size),
        ]

    def lend(self, loop: Loop) -> tuple[LentWindows, LeaseSocket]:
        """The windows, and a lease; once.  EMFILE, and nothing is kept."""
        fds = [self._tables_fd, self._queues_fd]
        try:
            lease = LeaseSocket(loop)
        except UapiError:
            Fds(self._kernel, fds).close()
            raise
        return LentWindows(self._windows, Fds(self._kernel, [*fds, lease.theirs])), lease

    def of_units(self) -> Iterator[UnitMemory]:
        """Of each unit what is its."""
        for start in range(0, len(self._queues), QUEUE_BYTES):
            ring_at = self._page()
            offset = ring_at - STRUCTURES_START
            yield UnitMemory(
                TranslationTables(self._writer, self._page),
                ring_at,
                self._view[offset : offset + PAGE_SIZE],
                Hpa(QUEUES_START + start),
                self._queues[start : start + QUEUE_BYTES],
            )

    def _page(self) -> Hpa:
        return Hpa(next(self._pages))
