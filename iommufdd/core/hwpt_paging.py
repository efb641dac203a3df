"""An HWPT on an IOAS: a table of its own, filled from the IOAS's areas.

Models IOMMUFD_OBJ_HWPT_PAGING [iommufd hw_pagetable.c] and iopt_fill_domain [iommufd pages.c].  Here pages
are pinned when they are mapped and stay (`ioas.py`), so nothing is absent that an area has.

Whoever takes entries out may not give up what they led to before `give_up` returned (I6).  What is stale is
kept here from the turn in which it became so, not by who made it: whoever flushes next flushes all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from iommufdd.core.area import Area
from iommufdd.core.counts import Counts
from iommufdd.core.domain import Domain
from iommufdd.core.hardware import MemoryBus
from iommufdd.core.hmm import HmmPage
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.io_pagetable import IoPageTable, TableChange
from protocol.errors import UapiError
from protocol.flow import RwLock, Wait
from protocol.units import LEVEL_4K, Hpa, Iova, Level, size_of_level

Run = tuple[Iova, list[Hpa], Level, bool]  # first iova, hpas of leaves of that level, writable


class MappedIoas(Protocol):
    """What an HWPT asks of the IOAS it is on."""

    counts: Counts
    hwpts: list[HwptPaging]
    large_pages: bool
    lock: RwLock
    users: int

    async def remove_hwpt(self, hwpt: HwptPaging) -> None: ...


class HwptPaging(Hwpt):
    def __init__(self, domain: Domain, memory: MemoryBus, ioas: MappedIoas, table: IoPageTable) -> None:
        super().__init__(domain, memory)
        self.ioas = ioas
        self.table = table
        self.iotlb_syncs = 0
        self.acked = 0
        self._stale: list[TableChange] = []  # no flush of it has begun, or a unit did not forget it
        self._flushes: dict[Wait[None], None] = {}  # under way
        ioas.users += 1

    async def destroy(self) -> None:
        """The units let go of the tables, the IOAS of the HWPT, and then nobody reaches a page of it."""
        await super().destroy()
        await self.ioas.remove_hwpt(self)
        self.table.release()
        self.ioas.users -= 1

    @property
    def max_huge_page_level(self) -> Level:
        return self.table.max_huge_page_level if self.ioas.large_pages else LEVEL_4K

    # -- entries ---------------------------------------------------------------------------------------

    def put(self, area: Area, pages: Sequence[HmmPage], start: Iova, end: Iova) -> None:
        """Map start..end as far as `pages` have it.  ENOMEM, with the first of it mapped."""
        for iova, hpas, level, writable in _runs(area, pages, start, end, self.max_huge_page_level):
            self.put_run(iova, hpas, level, writable=writable)

    def put_run(self, iova: Iova, hpas: Sequence[Hpa], level: Level, *, writable: bool) -> None:
        small = sum(self.table.leaves[:level])
        self._made_stale(self.table.map_pages(iova, hpas, level, writable=writable))
        self.ioas.counts.collapses += sum(self.table.leaves[:level]) < small

    def take(self, start: Iova, end: Iova) -> None:
        """Unmap start..end; a huge leaf at an edge is split, or goes whole if there is no page for that."""
        edges = {leaf for leaf in (self.table.leaf_at(start), self.table.leaf_at(Iova(end - 1))) if leaf}
        try:
            self._made_stale(self.table.unmap(start, end - start))
        except UapiError:
            self._made_stale(self.table.unmap(*self.table.whole_leaves(start, end - start)))
            return
        self.ioas.counts.splits += sum(leaf.iova < start or end < leaf.end for leaf in edges)

    def copy(self, other: HwptPaging, area: Area) -> None:
        """Map an area as `other` has it [iopt_fill_domain].  ENOMEM."""
        pages = [
            HmmPage(area.hva_of(leaf.iova), leaf.hpa, size_of_level(leaf.level), leaf.writable)
            for leaf in other.table.leaves_in(area.iova, area.size)
        ]
        self.put(area, pages, area.iova, area.end)

    def _made_stale(self, change: TableChange) -> None:
        if change.size:
            self._stale.append(change)

    # -- flushing --------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Nobody uses what was stale, as far as no other flush of it is under way, when this returns.
        UapiError: a unit refused to forget it, and so it must not be given up.
        """
        stale, self._stale = self._stale, []
        if not stale:
            return
        over: Wait[None] = Wait()
        self._flushes[over] = None
        try:
            for change in stale:
                # await: stale, each change, over, asked: cannot change: our own list; what becomes stale from
                # now on is in another
                await self.forget(change.start, change.size)
        except UapiError as error:
            self._stale += stale
            over.fail(error)
            raise
        else:
            over.set(None)
        finally:
            del self._flushes[over]
        for change in stale:
            self.table.flushed(change)

    async def give_up(self) -> None:
        """Nobody uses anything that was taken out so far, by whomever, when this returns."""
        self.iotlb_syncs += 1
        again = True
        while again:
            again = False
            others = list(self._flushes)
            # await: others: cannot change: our own list, of what is set once
            await self.flush()
            for other in others:
                try:
                    # await: each other: cannot change: the same
                    await other
                except UapiError:  # what it was to have forgotten is stale again, or another flushes it
                    again = True
        self.acked += 1


def _run_end(run: Run) -> int:
    return run[0] + len(run[1]) * size_of_level(run[2])


def _runs(
    area: Area, pages: Sequence[HmmPage], start: Iova, end: Iova, max_huge_page_level: Level
) -> Iterator[Run]:
    """Leaves that follow each other and are alike, together."""
    run: Run | None = None
    for page in pages:
        writable = page.writable and area.writable
        for iova, hpa, level in area.leaves(page, start, end, max_huge_page_level):
            if run is not None and (_run_end(run), *run[2:]) == (iova, level, writable):
                run[1].append(hpa)
                continue
            if run is not None:
                yield run
            run = iova, [hpa], level, writable
    if run is not None:
        yield run
