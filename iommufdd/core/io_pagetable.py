"""A second-stage table of iommufdd's own: what an HWPT on an IOAS translates by.

Models the kernel's radix tables in the VT-d second-stage format [VT-d 9.8]: R always, W as asked, the
page-size bit, nothing else.  Bit 11 stays 0 (the PASID entry's PGSNP enforces snooping), and so do A and D
(no SSADS).

What a call changes is worked out first: new tables are filled where no walker can reach them, every store
into the live table is put off to the end.  So a call that fails (ENOMEM) changed nothing, and each live
entry changes once, by one store (I4), from all of the old to all of the new:
  - a leaf under a huge one: the store puts a table in its place that differs in that leaf only (split);
  - a huge leaf over a table of smaller ones: the store cuts the table off (merge).
A table that was cut off may still sit in a paging-structure cache: it keeps its contents, and is not used
again, until the units flushed the range it translated (I7).  Absent entries are not cached (CM = 0), and
an entry that lacks a right is walked again, so becoming present, or writable, takes no flush.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

from iommufdd.core.table_pool import TablePool
from protocol.errors import UapiError
from protocol.pt import bits
from protocol.pt.entry import is_leaf, is_writable, table_of
from protocol.pt.geometry import ENTRIES, ENTRY_BYTES, address_bits, level_shift
from protocol.pt.mem import TableWriter
from protocol.units import LEVEL_4K, Hpa, Iova, Level, align_down, size_of_level

_TABLE = bits.READ | bits.WRITE  # in an entry that points to a table: the leaf alone decides
_ABSENT = [0] * ENTRIES


class Change(NamedTuple):
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


def leaf_entry(hpa: Hpa, level: Level, *, writable: bool) -> int:
    huge = bits.PAGE_SIZE_BIT if level > LEVEL_4K else 0
    return hpa | bits.READ | (bits.WRITE if writable else 0) | huge


def split(leaf: int, level: Level) -> list[int]:
    """The entries of the table that translates as the huge `leaf` of `level` does."""
    if level - 1 == LEVEL_4K:
        leaf &= ~bits.PAGE_SIZE_BIT
    step = size_of_level(Level(level - 1))
    return list(range(leaf, leaf + ENTRIES * step, step))


class _Edit:
    """One call in the making: leaves of `level` put at start..end, or what is there taken away.

    Built by looking at the live table, in the order of its addresses; `IoPageTable` then does it.
    """

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

    def replaces(self, level: Level, iova: Iova) -> bool:
        """Does the whole entry of `level` at `iova` change?"""
        if self.level is not None:
            return level == self.level
        return self.start <= iova and iova + size_of_level(level) <= self.end

    @property
    def change(self) -> Change:
        cut = tuple(table for table, _ in self.cut)
        return Change(self.stale_from, self.stale_to - self.stale_from, cut)


class IoPageTable:
    def __init__(
        self, writer: TableWriter, pool: TablePool, level: Level, max_huge_page_level: Level
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
        self._held: set[Hpa] = set()  # cut off, the flush not told of yet

    # -- changing --------------------------------------------------------------------------------------

    def map(self, iova: Iova, hpa: Hpa, level: Level, *, writable: bool) -> Change:
        """One leaf of `level`, in place of whatever was there.  ENOMEM."""
        return self.map_pages(iova, (hpa,), level, writable=writable)

    def map_pages(self, iova: Iova, hpas: Sequence[Hpa], level: Level, *, writable: bool) -> Change:
        """Leaves of `level` at `iova` and what follows it, one for each of `hpas`.  ENOMEM."""
        assert LEVEL_4K <= level <= self.max_huge_page_level, f"leaf of level {level}"
        size = size_of_level(level)
        flags = leaf_entry(Hpa(0), level, writable=writable)
        assert reduce(or_, hpas, iova) % size == 0, f"iova {iova:#x} or an hpa: misaligned for level {level}"
        puts = [hpa | flags for hpa in hpas]
        return self._apply(_Edit(iova, Iova(iova + len(puts) * size), level, puts))

    def unmap(self, iova: Iova, size: int) -> Change:
        """Whatever lies in iova..iova+size; of a huge leaf at an edge only that part.  ENOMEM, which
        `whole_leaves` avoids.
        """
        return self._apply(_Edit(iova, Iova(iova + size)))

    def flushed(self, change: Change) -> None:
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
        table, level = self._lowest_table(iova, iova)
        entry = self._writer.load64(table + (iova >> level_shift(level)) % ENTRIES * ENTRY_BYTES)
        return _leaf(align_down(iova, size_of_level(level)), level, entry) if entry else None

    def leaves_in(self, iova: Iova, size: int) -> Iterator[IoLeaf]:
        """Every leaf that overlaps iova..iova+size, in order; nothing may change meanwhile."""
        return self._leaves_of(self.root, self.level, Iova(0), iova, Iova(iova + size))

    def _leaves_of(self, table: Hpa, level: Level, base: Iova, start: Iova, end: Iova) -> Iterator[IoLeaf]:
        touched = _indices(level, base, start, end)
        for index, entry in zip(touched, self._entries(table, touched), strict=True):
            iova = Iova(base + (index << level_shift(level)))
            if entry and is_leaf(entry, level):
                yield _leaf(iova, level, entry)
            elif entry:
                yield from self._leaves_of(table_of(entry), Level(level - 1), iova, start, end)

    def _lowest_table(self, start: Iova, last: Iova, stop: Level = LEVEL_4K) -> tuple[Hpa, Level]:
        """The lowest table, of `stop` at least, whose entries start..last changes or is translated by."""
        table, level = self.root, self.level
        while level > stop:
            shift = level_shift(level)
            if (start ^ last) >> shift or last - start == (1 << shift) - 1:
                break
            entry = self._writer.load64(table + (start >> shift) % ENTRIES * ENTRY_BYTES)
            if not entry or is_leaf(entry, level):
                break
            table, level = table_of(entry), Level(level - 1)
        return table, level

    def _entries(self, table: Hpa, which: range) -> list[int]:
        return self._writer.load_run(table + which.start * ENTRY_BYTES, len(which))

    # -- working a change out --------------------------------------------------------------------------

    def _apply(self, edit: _Edit) -> Change:
        assert 0 <= edit.start < edit.end <= self.limit, f"{edit.start:#x}..{edit.end:#x}"
        table, level = self._lowest_table(edit.start, Iova(edit.end - 1), edit.level or LEVEL_4K)
        try:
            self._edit_table(edit, table, level, align_down(edit.start, size_of_level(level) * ENTRIES))
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

    def _edit_table(self, edit: _Edit, table: Hpa, level: Level, base: Iova) -> None:
        """A live table, whose first entry translates `base`."""
        touched = _indices(level, base, edit.start, edit.end)
        old = self._entries(table, touched)
        new = self._edited_run(edit, old, level, Iova(base + (touched.start << level_shift(level))))
        for index, was, now in zip(touched, old, new, strict=True):
            if now != was:
                edit.stores.append((Hpa(table + index * ENTRY_BYTES), now))

    def _edited_run(self, edit: _Edit, entries: list[int], level: Level, iova: Iova) -> list[int]:
        """What becomes of entries side by side, the first of which translates `iova` on."""
        if level == edit.level and not any(entries):  # nothing to look at: what pinning spends its time on
            edit.leaves[level] += len(entries)
            first = (iova - edit.start) >> level_shift(level)
            return list(edit.puts[first : first + len(entries)])
        size = size_of_level(level)
        return [self._edited(edit, entry, level, Iova(iova + n * size)) for n, entry in enumerate(entries)]

    def _edited(self, edit: _Edit, entry: int, level: Level, iova: Iova) -> int:
        """What becomes of `entry`, which translates `iova` on; what it points to is edited in place."""
        if edit.replaces(level, iova):
            return self._replaced(edit, entry, level, iova)
        if not entry and edit.level is None:
            return entry
        if entry and not is_leaf(entry, level):
            self._edit_table(edit, table_of(entry), Level(level - 1), iova)
            return entry
        return self._grown(edit, entry, level, iova)

    def _replaced(self, edit: _Edit, entry: int, level: Level, iova: Iova) -> int:
        new = edit.puts[(iova - edit.start) >> level_shift(level)] if edit.puts else 0
        if new == entry:
            return entry
        if new:
            edit.leaves[level] += 1
        if not entry:
            return new
        if is_leaf(entry, level):
            edit.leaves[level] -= 1
        else:
            self._cut(edit, table_of(entry), Level(level - 1))
        if new != entry | bits.WRITE:
            edit.stale(iova, Iova(iova + size_of_level(level)))
        return new

    def _grown(self, edit: _Edit, entry: int, level: Level, iova: Iova) -> int:
        """A new table in place of an absent entry or a huge leaf, unless it would translate as that does."""
        child = Level(level - 1)
        before = split(entry, level) if entry else _ABSENT
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
        return table | _TABLE

    def _cut(self, edit: _Edit, table: Hpa, level: Level) -> None:
        """`table` and all below it will be reached no more."""
        edit.cut.append((table, level))
        for entry in filter(None, self._writer.load_table(table)):
            if is_leaf(entry, level):
                edit.leaves[level] -= 1
            else:
                self._cut(edit, table_of(entry), Level(level - 1))


def _indices(level: Level, base: Iova, start: Iova, end: Iova) -> range:
    """Which entries of a table of `level`, whose first translates `base`, start..end touches."""
    shift = level_shift(level)
    return range(max(start - base, 0) >> shift, min((end - 1 - base >> shift) + 1, ENTRIES))


def _leaf(iova: Iova, level: Level, entry: int) -> IoLeaf:
    return IoLeaf(iova, level, Hpa(entry & bits.ADDRESS_MASK), is_writable(entry))
