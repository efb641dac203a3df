"""The pages iommufdd builds its own second-stage tables of: allocated zeroed, given back zeroed.

Models the pages the VT-d driver takes from the host for a domain's tables [iommufd io_pagetable.c]; here they
lie in one window, handed out from its start, so that it is touched as far as it was ever needed.  A page
that was cut off from a table stays its table's until the units flushed it (I7, `io_pagetable.py`).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from protocol.errors import UapiError
from protocol.pt.mem import TableWriter
from protocol.units import PAGE_SIZE, Hpa


class TablePool:
    def __init__(self, writer: TableWriter, size: int) -> None:
        self.in_use = 0
        self._writer = writer
        self._next = writer.base
        self._end = writer.base + size
        self._free: list[Hpa] = []

    def allocate(self) -> Hpa:
        """A zeroed page.  Raises UapiError(ENOMEM) when the table window is full."""
        if self._free:
            page = self._free.pop()
        elif self._next < self._end:
            page = self._next
            self._next = Hpa(page + PAGE_SIZE)
        else:
            raise UapiError(errno.ENOMEM, f"no room for another IO page table ({self.in_use} in use)")
        self.in_use += 1
        return page

    def free(self, pages: Iterable[Hpa]) -> None:
        """Pages that no walker can reach."""
        for page in pages:
            self._writer.clear_unlinked(page)
            self._free.append(page)
            self.in_use -= 1
