"""A second-stage table of iommufdd's own: what an HWPT on an IOAS translates by.

Models the kernel's radix tables [iommupt iommu_pt.h]; what their entries are `protocol/pt/second_stage.py`
says.

What a call changes is worked out first: new tables are filled where no walker can reach them, every store
into the live table is put off to the end.  So a call that fails (ENOMEM) changed nothing, and each live
entry changes once, by one store (I4), from all of the old to all of the new:
  - a leaf under a huge one: the store puts a table in its place that differs in that leaf only (split);
  - a huge leaf over a table of smaller ones: the store cuts the table off (merge).
A table that was cut off may still sit in a paging-structure cache: it keeps its contents, and is not used
again, until the units flushed the range it translated (I7, R23).  Absent entries are not cached (CM = 0), and
an entry that lacks a right is walked again, so becoming present, or writable, takes no flush.

What would break it, and what stands against it, each planted
(tests/unit/iommufdd/test_io_pagetable_history.py::test_a_planted_bug_is_seen):
  - the unit walks while a huge leaf is split, and finds a hole or another frame: the new table is filled
    whole, in `_plan`, and one store of `_apply` links it (`SplitsOneFrameShort`, `SplitsWritable`);
  - a table that was cut off is filled anew while a paging-structure cache still leads into it: `_apply` holds
    the page, only `flushed` gives it back (`FreesAtOnce`, `ForgetsTheTable`);
  - a leaf changes and its old translation stays in an IOTLB: `_Edit.stale` widens the range to flush with
    every store that takes something away, and with no other (`FlushesTheFirstPage`, `LosesRightsUnflushed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

from protocol.errors import UapiError
from protocol.pt.check import check_second_stage
from protocol.pt.cursor import Cursor, seek
from protocol.pt.format import TableFormat
from protocol.pt.geometry import ENTRIES, ENTRY_BYTES, address_bits, level_shift
from protocol.pt.mem import TableWriter
from protocol.pt.second_stage import SECOND_STAGE
from protocol.pt.table_pool import TablePool
from protocol.units import (
    LEVEL_4K,
    PAGE_SHIFT,
    Hpa,
    Iova,
    Level,
    Pfn,
    align_down,
    pages_of_level,
    size_of_level,
)

_ABSENT = [0] * ENTRIES


class TableChange(NamedTuple):
    """What the units must flush: start..start+size (0: nothing).  `cut`: table pages cut off; they go back to
    the pool by `IoPageTable.flushed`.
    """

    start: Iova
    size: int
    cut: tuple[Hpa, ...]


class IoLeaf(NamedTuple):
    iova: Iova
    level: Level
    hpa: Hpa
    writable: bool

    @property
    def end(self) -> Iova:
        return Iova(self.iova + size_of_level(self.level))


class _Edit:
    """One call in the making: leaves of `level` put at start..end, or what is there taken away.

    Built by looking at the live table, in the order of its addresses; `IoPageTable` then does it.
    """

    __slots__ = ("cut", "end", "leaves", "level", "made", "puts", "stale_from", "stale_to", "start", "stores")

    def __init__(self, start: Iova, end: Iova, level: Level | None = None, puts: Sequence[int] = ()) -> None:
        self.start = start
        self.end = end
        self.level = level  # None: take away, whatever its level
        self.puts = puts
        self.stores: list[tuple[Hpa, int]] = []
        self.made: list[tuple[Hpa, Level]] = []
        self.cut: list[tuple[Hpa, Level]] = []
        self.leaves = [0, 0, 0, 0]  # how many more, by level
        self.stale_from = self.stale_to = start

    def stale(self, start: Iova, end: Iova) -> None:
        """A walker may have cached what translates start..end."""
        if self.stale_to == self.start:
            self.stale_from = start
        self.stale_to = end

    def replaces(self, level: Level, iova: Iova, size: int) -> bool:
        """Does each whole entry of `level` in iova..iova+size change?"""
        if self.level is not None:
            return level == self.level
        return self.start <= iova and iova + size <= self.end

    @property
    def change(self) -> TableChange:
        cut = tuple(table for table, _ in self.cut)
        return TableChange(self.stale_from, self.stale_to - self.stale_from, cut)


class IoPageTable:
    def __init__(
        self,
        writer: TableWriter,
        pool: TablePool,
        level: Level,
        max_huge_page_level: Level,
        fmt: TableFormat = SECOND_STAGE,
    ) -> None:
        """An empty table of `level` levels; leaves go up to `max_huge_page_level` (CAP.SSLPS).  ENOMEM."""
        self.level = level
        self.max_huge_page_level = max_huge_page_level
        self.root = pool.allocate()
        self.limit = Iova(1 << address_bits(level))  # first iova beyond
        self.leaves = [0, 0, 0, 0]  # by level
        self.tables = [0] * (level + 1)  # by level
        self.tables[level] = 1
        self._writer = writer
        self._pool = pool
        self._format = fmt
        self._makes_writable = fmt.write.given
        self._flags = {
            (Level(n), writable): fmt.make_leaf(Pfn(0), Level(n), writable=writable)
            for n in range(LEVEL_4K, max_huge_page_level + 1)
            for writable in (False, True)
        }
        self._held: set[Hpa] = set()  # cut off, the flush not told of yet

    # -- changing --------------------------------------------------------------------------------------

    def map(self, iova: Iova, hpa: Hpa, level: Level, *, writable: bool) -> TableChange:
        """One leaf of `level`, in place of whatever was there.  ENOMEM."""
        return self.map_pages(iova, (hpa,), level, writable=writable)

    def map_pages(self, iova: Iova, hpas: Sequence[Hpa], level: Level, *, writable: bool) -> TableChange:
        """Leaves of `level` at `iova` and what follows it, one for each of `hpas`.  ENOMEM."""
        assert LEVEL_4K <= level <= self.max_huge_page_level, f"leaf of level {level}"
        size = size_of_level(level)
        flags = self._flags[level, writable]
        assert reduce(or_, hpas, iova) % size == 0, f"iova {iova:#x} or an hpa: misaligned for level {level}"
        puts = [hpa | flags for hpa in hpas]
        return self._apply(_Edit(iova, Iova(iova + len(puts) * size), level, puts))

    def unmap(self, iova: Iova, size: int) -> TableChange:
        """Whatever lies in iova..iova+size; of a huge leaf at an edge only that part.  ENOMEM, which
        `whole_leaves` avoids.
        """
        return self._apply(_Edit(iova, Iova(iova + size)))

    def flushed(self, change: TableChange) -> None:
        """The units hold nothing of what `change` made stale: the tables it cut off are free."""
        if self.released:
            return  # and all its pages went back then
        assert self._held.issuperset(change.cut), "I7: flushed twice, or of another table"
        self._held.difference_update(change.cut)
        self._pool.free(change.cut)

    def release(self) -> None:
        """Nobody walks it any more: every page of it is free."""
        edit = _Edit(Iova(0), self.limit)
        self._cut(edit, self.root, self.level)
        self._count(edit)
        self._pool.free(table for table, _ in edit.cut)
        self._pool.free(self._held)
        self._held.clear()

    @property
    def released(self) -> bool:
        return not self.tables[self.level]

    def whole_leaves(self, iova: Iova, size: int) -> tuple[Iova, int]:
        """(start, size) of the range rounded out to whole leaves: unmapping that needs no new table."""
        first, last = self.leaf_at(iova), self.leaf_at(Iova(iova + size - 1))
        start = iova if first is None else min(iova, first.iova)
        end = iova + size if last is None else max(iova + size, last.end)
        return start, end - start

    # -- looking ---------------------------------------------------------------------------------------

    def leaf_at(self, iova: Iova) -> IoLeaf | None:
        level, _, entry = seek(self._writer, self._format, self.root, self.level, iova >> PAGE_SHIFT)
        return self._leaf(align_down(iova, size_of_level(level)), level, entry) if entry else None

    def leaves_in(self, iova: Iova, size: int) -> Iterator[IoLeaf]:
        """Every leaf that overlaps iova..iova+size, in order; nothing may change meanwhile."""
        start, end = iova >> PAGE_SHIFT, (iova + size - 1 >> PAGE_SHIFT) + 1
        cursor = Cursor(self._writer, self._format, self.root, self.level, start, end)
        for frame, level, _, entries in cursor:
            first, step = frame << PAGE_SHIFT, size_of_level(level)
            for index, entry in enumerate(entries):
                if entry:
                    yield self._leaf(Iova(first + index * step), level, entry)

    def check(self) -> list[str]:
        """What of the whole table does not hold, a sentence each."""
        return check_second_stage(self._writer, self.root, self.level, self.max_huge_page_level)

    def _leaf(self, iova: Iova, level: Level, entry: int) -> IoLeaf:
        fmt = self._format
        return IoLeaf(iova, level, Hpa(entry & fmt.address), fmt.write(entry))

    # -- working a change out --------------------------------------------------------------------------

    def _apply(self, edit: _Edit) -> TableChange:
        assert 0 <= edit.start < edit.end <= self.limit, f"{edit.start:#x}..{edit.end:#x}"
        try:
            self._plan(edit)
        except UapiError:
            self._pool.free(made for made, _ in edit.made)
            raise
        for at, entry in edit.stores:
            self._writer.store64(at, entry)
        self._count(edit)
        self._held.update(cut for cut, _ in edit.cut)
        return edit.change

    def _count(self, edit: _Edit) -> None:
        for level, more in enumerate(edit.leaves):
            self.leaves[level] += more
        for _, made in edit.made:
            self.tables[made] += 1
        for _, cut in edit.cut:
            self.tables[cut] -= 1

    def _plan(self, edit: _Edit) -> None:
        """What becomes of the live entries.  Tables above leaves to be put stay; one that translates nothing
        but what is to be cleared is cut off."""
        start, end = edit.start >> PAGE_SHIFT, edit.end >> PAGE_SHIFT
        lowest, with_tables = edit.level or LEVEL_4K, edit.level is None
        if end - start == pages_of_level(lowest):  # one entry of that level, or of one above it
            level, at, entry = seek(self._writer, self._format, self.root, self.level, start, lowest)
            self._plan_run(edit, at, [entry], level, align_down(edit.start, size_of_level(level)))
            return
        cursor = Cursor(
            self._writer, self._format, self.root, self.level, start, end, lowest, with_tables=with_tables
        )
        for frame, level, at, old in cursor:
            if self._plan_run(edit, at, old, level, Iova(frame << PAGE_SHIFT)):
                cursor.step_over()

    def _plan_run(self, edit: _Edit, at: Hpa, old: list[int], level: Level, iova: Iova) -> bool:
        """Of entries side by side at `at`, the first of which translates `iova` on.  Does one change?"""
        new = self._edited_run(edit, old, level, iova)
        if new == old:
            return False
        for index, (was, now) in enumerate(zip(old, new, strict=True)):
            if now != was:
                edit.stores.append((Hpa(at + index * ENTRY_BYTES), now))
        return True

    def _edited_run(self, edit: _Edit, entries: list[int], level: Level, iova: Iova) -> list[int]:
        """What becomes of entries side by side, the first of which translates `iova` on."""
        size = size_of_level(level)
        if edit.replaces(level, iova, len(entries) * size):
            return self._replaced(edit, entries, level, iova)
        return [
            self._edited(edit, entry, level, Iova(iova + n * size)) if entry or edit.puts else entry
            for n, entry in enumerate(entries)
        ]

    def _edited(self, edit: _Edit, entry: int, level: Level, iova: Iova) -> int:
        """What becomes of `entry`, which translates `iova` on."""
        if edit.replaces(level, iova, size_of_level(level)):
            return self._replaced(edit, [entry], level, iova)[0]
        return self._grown(edit, entry, level, iova)

    def _replaced(self, edit: _Edit, entries: list[int], level: Level, iova: Iova) -> list[int]:
        """What is put in place of whole entries side by side; tables they lead to are cut off."""
        if edit.puts:
            first = (iova - edit.start) >> level_shift(level)
            new = list(edit.puts[first : first + len(entries)])
            edit.leaves[level] += len(new)
        else:
            new = [0] * len(entries)
        if not any(entries):  # nothing to look at: what pinning spends its time on
            return new
        mask, value = self._format.leaf[level]
        stale = []
        for index, (was, now) in enumerate(zip(entries, new, strict=True)):
            if not was:
                continue
            if was & mask == value:
                edit.leaves[level] -= 1
            else:
                self._cut(edit, self._format.table_of(was), Level(level - 1))
            if now != was and now != was | self._makes_writable:
                stale.append(index)
        if stale:
            size = size_of_level(level)
            edit.stale(Iova(iova + stale[0] * size), Iova(iova + (stale[-1] + 1) * size))
        return new

    def _grown(self, edit: _Edit, entry: int, level: Level, iova: Iova) -> int:
        """A new table in place of an absent entry or a huge leaf, unless it would translate as that does."""
        child = Level(level - 1)
        before = self._format.split(entry, level) if entry else _ABSENT
        touched = _indices(child, iova, edit.start, edit.end)
        first, end = touched.start, touched.stop
        at = Iova(iova + (first << level_shift(child)))
        entries = [*before[:first], *self._edited_run(edit, before[first:end], child, at), *before[end:]]
        if entries == before:
            return entry
        if entry:
            edit.leaves[level] -= 1
            edit.leaves[child] += ENTRIES
        table = self._pool.allocate()
        edit.made.append((table, child))
        self._writer.fill_unlinked(table, entries)
        return self._format.make_table(table, level)

    def _cut(self, edit: _Edit, table: Hpa, level: Level) -> None:
        """`table` and all below it will be reached no more."""
        edit.cut.append((table, level))
        fmt = self._format
        for _, at_level, _, entries in Cursor(self._writer, fmt, table, level, with_tables=True):
            if fmt.is_table(entries[0], at_level):
                edit.cut.append((fmt.table_of(entries[0]), Level(at_level - 1)))
            elif any(entries):
                edit.leaves[at_level] -= len(entries) - entries.count(0)


def _indices(level: Level, base: int, start: Iova, end: Iova) -> range:
    """Which entries of a table of `level`, whose first translates `base`, start..end touches."""
    shift = level_shift(level)
    return range(max(start - base, 0) >> shift, min((end - 1 - base >> shift) + 1, ENTRIES))
