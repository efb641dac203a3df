"""A place in a table, moved through it in the order of its addresses: what every change of a range stands on.

Models the kernel's tdp_iter [KVM tdp_iter.c], with its verbs: next, a step down, a step up, a step over, and
resume after something else ran.  Where the kernel's iterator stands on one entry, this one hands out runs:
entries side by side in one table page, loaded at once.  A run has no entry that leads to a table; or, for who
asks `with_tables`, it is one such entry, of a table that lies in the span whole, before what that translates.

What the cursor relies on, and what it does not:
 1. it goes down by what is stored when it goes on, not by what it handed out: who handles a table entry and
    puts something else there is not led into the table that was cut off;
 2. an entry that was handed out is not handed out again, not even if it has become a table meanwhile (who
    splits a leaf and wants to see its parts asks to `resume` there);
 3. while it stands, only its user changes tables on its path.  Whoever lets others run must `resume`: tables
    may have been cut off, and their pages may be other tables by then.  It goes down again from the root.

Frames are page numbers of the address space that the table translates: gfns, or pages of an iova.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import compress
from typing import NamedTuple

from protocol.pt.format import TableFormat
from protocol.pt.geometry import ENTRIES, ENTRY_BYTES, INDEX_BITS, MAX_LEVEL
from protocol.pt.mem import TableReader
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Hpa, Level

_INDEX_MASK = ENTRIES - 1


class RangeEntry(NamedTuple):
    """One entry of a range: the first gfn it translates, and where it lies."""

    gfn: Gfn
    level: Level
    at: Hpa
    entry: int


class EntryRun(NamedTuple):
    """Entries side by side: the first frame that the first one translates, and where it lies."""

    frame: int
    level: Level
    at: Hpa
    entries: list[int]


class EntryAt(NamedTuple):
    """One entry, and where it lies."""

    level: Level
    at: Hpa
    entry: int


def seek(
    tables: TableReader, fmt: TableFormat, root: Hpa, levels: Level, frame: int, lowest: Level = LEVEL_4K
) -> EntryAt:
    """The entry over `frame` where a way down from the root ends: no table entry, or that of `lowest`."""
    table: int = root
    is_table, address = fmt.table, fmt.address
    for level, shift in _STEPS[levels]:
        at = table + (frame >> shift & _INDEX_MASK) * ENTRY_BYTES
        entry = tables.load64(at)
        mask, value = is_table[level]
        if level == lowest or entry & mask != value:
            return _new(EntryAt, (level, at, entry))
        table = entry & address
    raise AssertionError("an entry of level 1 is no table")


class Cursor:
    """Over frames start..end (cut to the table's width) of the table at `root`, no lower than `lowest`."""

    __slots__ = (
        "_entered",
        "_format",
        "_in_table_entry",
        "_levels",
        "_lowest",
        "_path",
        "_start",
        "_tables",
        "_with_tables",
        "end",
        "frame",
        "level",
    )

    def __init__(
        self,
        tables: TableReader,
        fmt: TableFormat,
        root: Hpa,
        levels: Level,
        start: int = 0,
        end: int | None = None,
        lowest: Level = LEVEL_4K,
        with_tables: bool = False,
    ) -> None:
        limit = 1 << INDEX_BITS * levels
        self._tables = tables
        self._format = fmt
        self._levels = levels
        self._lowest = lowest
        self._with_tables = with_tables
        self._start = start
        self.end = limit if end is None or end > limit else end
        self._path: list[int] = [root] * (levels + 1)  # the table page of each level
        self.frame = start  # the first that no run covered yet
        self.level: int = levels
        self._entered = 0  # which table of `level` we are in, counted in the order of their addresses
        self._in_table_entry = False  # the entry over `frame` was handed out, and led to a table

    def resume(self, frame: int | None = None) -> None:
        """After something else ran: go on at the first frame no run covered yet, or at `frame`.  The table
        entries over it are met once more."""
        if frame is not None:
            self.frame = frame
        self.level = self._levels
        self._entered = 0
        self._in_table_entry = False

    def step_over(self) -> None:
        """Past the table entry that was handed out last, if it was one, and all that it leads to."""
        if self._in_table_entry:
            self._in_table_entry = False
            shift = INDEX_BITS * (self.level - 1)
            self.frame = (self.frame >> shift) + 1 << shift

    def next(self) -> EntryRun | None:
        """The entries that follow, as far as they make one run.  None: there are no more."""
        frame, end, level = self.frame, self.end, self.level
        tables, path, lowest = self._tables, self._path, self._lowest
        while frame < end:
            while frame >> INDEX_BITS * level != self._entered:  # step up
                level += 1
                self._entered >>= INDEX_BITS
            shift = INDEX_BITS * (level - 1)
            first = frame >> shift
            at = path[level] + (first & _INDEX_MASK) * ENTRY_BYTES
            if level > lowest:
                entry = tables.load64(at)
                mask, value = self._format.table[level]
                if entry & mask == value:
                    covered = first + 1 << shift <= end and first << shift >= self._start
                    if covered and self._with_tables and not self._in_table_entry:
                        self._in_table_entry, self.level = True, level
                        return _new(EntryRun, (first << shift, level, at, [entry]))
                    level -= 1  # step down
                    path[level] = entry & self._format.address
                    self._entered = frame >> INDEX_BITS * level
                    self._in_table_entry = False
                    continue
                if self._in_table_entry:  # it leads to no table any more
                    self.step_over()
                    frame = self.frame
                    continue
            count = min(ENTRIES - (first & _INDEX_MASK), (end - 1 >> shift) - first + 1)
            entries = tables.load_run(at, count)
            if level > lowest:
                _cut_at_table(entries, mask, value)
            self.frame, self.level = first + len(entries) << shift, level
            return _new(EntryRun, (first << shift, level, at, entries))
        return None

    def __iter__(self) -> Iterator[EntryRun]:
        return iter(self.next, None)


def leaves_of(fmt: TableFormat, cursor: Cursor) -> Iterator[RangeEntry]:
    """The leaves that a cursor meets, one by one."""
    for frame, level, at, entries in cursor:
        mask, value = fmt.leaf[level]
        shift = INDEX_BITS * (level - 1)
        for index, entry in filled(entries):
            if entry & mask == value:
                yield _new(RangeEntry, (frame + (index << shift), level, at + index * ENTRY_BYTES, entry))


def walk_range(
    tables: TableReader, fmt: TableFormat, root: Hpa, levels: Level, span: GfnSpan
) -> Iterator[RangeEntry]:
    """Every non-zero entry in `span`, one by one, absent ones (frozen, say) too, and a table entry before
    those of its table: for who looks."""
    cursor = Cursor(tables, fmt, root, levels, span.start, span.end, with_tables=True)
    for frame, level, at, entries in cursor:
        shift = INDEX_BITS * (level - 1)
        for index, entry in filled(entries):
            yield _new(RangeEntry, (frame + (index << shift), level, at + index * ENTRY_BYTES, entry))


def filled(entries: list[int]) -> Iterable[tuple[int, int]]:
    """Those that are not 0, with their places: most are, and no leaf nor table entry of any format is.  Most
    tables have none, which costs a tenth to see.
    """
    if entries.count(0) == len(entries):
        return ()
    return compress(enumerate(entries), entries)


def _cut_at_table(entries: list[int], mask: int, value: int) -> None:
    """Drop the first entry that leads to a table, and all after it."""
    for index, entry in filled(entries):
        if entry & mask == value:
            del entries[index:]
            return


_new = tuple.__new__  # a NamedTuple's own constructor costs twice as much
_STEPS = tuple(
    tuple((Level(level), INDEX_BITS * (level - 1)) for level in range(levels, 0, -1))
    for levels in range(MAX_LEVEL + 1)
)
