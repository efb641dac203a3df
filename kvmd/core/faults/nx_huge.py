"""No execution from huge pages: the switch, the tables it makes, and how they are given up again.

Models KVM's answer to the page-size-change erratum [KVM mmu.c], as its module parameter nx_huge_pages: while
it is on a huge leaf has no X; a fetch through one makes small leaves, which keep their X, and the table is
remembered, so that no other fault makes the leaf huge again.  Recovery zaps such tables and flushes
everything; a slot that logs keeps them.  Switching zaps everything mapped, fast.

A device never executes: none of this changes what it may do, only what it must ask for again.
"""

from __future__ import annotations

from kvmd.core.faults.page_fault import PageFault
from kvmd.core.slots.memslot import Memslots
from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.tdp import VmTdp
from kvmd.core.tables.tdp_table import Root
from protocol.pt.geometry import entry_start
from protocol.units import LEVEL_4K, Gfn, Level

RECOVERY_BATCH = 64  # tables zapped before the flush that gives others a turn


class NxHugePages:
    """Of one VM."""

    def __init__(self, slots: Memslots, tdp: VmTdp) -> None:
        self._slots = slots
        self._tdp = tdp
        self._mmu = tdp.mmu

    async def switch(self, *, on: bool) -> None:
        """Whatever was set before, all that is mapped goes [KVM set_nx_huge_pages]."""
        async with self._slots.lock:
            self._mmu.nx_huge_pages = on
            await self._tdp.zapper.zap_all_fast()

    def level(self, root: Root, fault: PageFault, level: Level) -> Level:
        """The size of leaf a fault gets that could have one of `level`."""
        if level == LEVEL_4K or not self._mmu.nx_huge_pages:
            return level
        if fault.fetch:
            return LEVEL_4K
        while level > LEVEL_4K and self._is_split(root, fault.gfn, level):
            level = Level(level - 1)
        return level

    def mapped(self, root: Root, fault: PageFault, wanted: Level) -> None:
        """A fetch was mapped: remember the tables that are there although a leaf of `wanted` would do."""
        if fault.fetch and self._mmu.nx_huge_pages:
            for number in range(LEVEL_4K + 1, wanted + 1):
                level = Level(number)
                table = self._mmu.table_at(root, fault.gfn, level)
                if table is not None:
                    root.nx_split[level, entry_start(fault.gfn, level)] = table

    # awaits: each first, regions: cannot change: a list of its own; `_zap` looks at each table again | each
    # root, root: cannot change: a copy; a valid root is taken apart under the slots_lock; one that was goes
    # with its last vCPU, and is not among them
    async def recover(self) -> int:
        """Give small leaves up that only a fetch asked for.  How many tables."""
        zapped = 0
        async with self._slots.lock:
            for root in [root for root in self._mmu.roots if not root.invalid]:
                regions = self._recoverable(root)
                for first in range(0, len(regions), RECOVERY_BATCH):
                    for level, gfn in regions[first : first + RECOVERY_BATCH]:
                        zapped += self._zap(root, gfn, level)
                    await self._tdp.flusher.flush(None)
        return zapped

    def _recoverable(self, root: Root) -> list[tuple[Level, Gfn]]:
        found = []
        for level, gfn in root.nx_split:
            slot = self._slots.find(gfn, root.role.as_id)
            if slot is None or not slot.logs:
                found.append((level, gfn))
        return found

    def _zap(self, root: Root, gfn: Gfn, level: Level) -> bool:
        stays = not self._is_split(root, gfn, level)
        del root.nx_split[level, entry_start(gfn, level)]
        if not stays:
            tdp_mmu.zap_table(self._mmu, root, gfn, level)
        return not stays

    def _is_split(self, root: Root, gfn: Gfn, level: Level) -> bool:
        table = root.nx_split.get((level, entry_start(gfn, level)))
        return table is not None and table == self._mmu.table_at(root, gfn, level)
