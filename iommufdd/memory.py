"""The window iommufdd's own tables lie in: a memfd that nobody else can store into.

It is mapped writable first and sealed against future writable mappings second: from then on iommufdd's
mapping is the only one there can be that stores (I1), whatever happens to the copies of the fd that units
get.  It is sparse, sealed against resizing, and costs what is touched of it.  It lies above the largest
host that kvmd can be told to have, so that it is in nobody's way.
"""

from __future__ import annotations

from iommufdd.lent import LentWindows
from protocol.hostmem import HIGH_RAM_START, WindowKind
from protocol.kernel.asked import refusal
from protocol.kernel.port import Kernel
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.rpc.channel import Fds
from protocol.units import TIB, Hpa

TABLES_START = Hpa(HIGH_RAM_START + 32 * TIB)


class TableMemory:
    """The window, and the pool of its pages."""

    def __init__(self, kernel: Kernel, size: int) -> None:
        self._kernel = kernel
        self._fd, mapping = kernel.memfd("iommu-tables", size, peer_writes=False)
        self.window = (str(WindowKind.TABLES), TABLES_START, size)
        self.writer = TableWriter(TABLES_START, mapping.view)
        self.pool = TablePool(self.writer, size)

    def fds(self, count: int) -> list[int]:
        """Copies of the window's fd: one goes with the window, a second is the lease if nobody else lends
        anything.  EMFILE.
        """
        copies: list[int] = []
        try:
            for _ in range(count):
                copies.append(self._kernel.dup(self._fd))
        except OSError as error:
            for fd in copies:
                self._kernel.close(fd)
            raise refusal(error, "no copy of the table window") from None
        return copies

    def lend(self) -> LentWindows:
        """The window, and a lease.  EMFILE."""
        return LentWindows([self.window], Fds(self._kernel, self.fds(2)))

    def close(self) -> None:
        self._kernel.close(self._fd)
