"""Pages for tables: allocate, hold in quarantine, reclaim once every walker has acked the flush.

Models the life of a page of the TDP [RFC 35/42]: cut off from the table it may still sit in a
paging-structure cache, so it keeps its contents until the flush that follows its unlinking is acked by
every importer and vCPU (invariant I7), and only then is it zeroed and reused.  Pages come back zeroed,
in the order they were freed last, and the window is only touched as far as it was ever needed.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import NamedTuple

from protocol.errors import UapiError
from protocol.pt.mem import TableWriter
from protocol.units import PAGE_SIZE, Hpa


class _Held(NamedTuple):
    table: Hpa
    epoch: int


class TablePool:
    """All table pages of the host; quarantines are kept apart by VM, as epochs are a VM's."""

    def __init__(self, writer: TableWriter, base: Hpa, size: int) -> None:
        self._writer = writer
        self._next = base
        self._end = base + size
        self._free: list[Hpa] = []
        self._held: dict[int, deque[_Held]] = {}
        self.in_use = 0  # linked into some table

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

    def quarantine(self, vm_id: int, table: Hpa, epoch: int) -> None:
        """Hold an unlinked page until the flush of `epoch` is acked by all."""
        held = self._held.setdefault(vm_id, deque())
        assert not held or held[-1].epoch <= epoch, "epochs only grow"
        held.append(_Held(table, epoch))
        self.in_use -= 1

    def reclaim(self, vm_id: int, acked: int) -> int:
        """Free what every walker has let go of: pages held for epochs up to `acked`.  How many."""
        held = self._held.get(vm_id)
        count = 0
        while held and held[0].epoch <= acked:
            table = held.popleft().table
            self._writer.clear_unlinked(table)
            self._free.append(table)
            count += 1
        return count

    def held(self, vm_id: int) -> int:
        return len(self._held.get(vm_id, ()))

    def forget(self, vm_id: int) -> None:
        """The VM is gone and nothing of it is held any more."""
        held = self._held.pop(vm_id, None)
        assert not held, f"VM {vm_id} still holds {len(held or ())} table pages"
