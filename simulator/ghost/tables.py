"""Tables as their words have them: what each root translates, worked out anew from each store.

Entries are read by what the manuals have in common [SDM 29.3], [VT-d 9.8]: one is present if R, W or X is set
(frozen, MMIO and access-tracked ones are not), a leaf at level 1 or with bit 7, and the rights of a way are
those that all its entries give.  Nothing here knows who stores, or why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from protocol.pt.bits import DIRTY, RWX
from protocol.pt.geometry import ENTRIES, ENTRY_BYTES
from protocol.units import PAGE_SIZE
from simulator.ghost.spans import Run, Spans, Translation, merged, side_by_side

_ADDRESS = (1 << 52) - PAGE_SIZE
_LARGE = 1 << 7


class Place(NamedTuple):
    """Where a table page is linked: its first entry translates page `first` of `root`."""

    root: int
    level: int
    first: int
    rights: int


class Retranslated(NamedTuple):
    """Pages start..end of a root translate differently now."""

    root: int
    start: int
    end: int
    before: Translation | None
    after: Translation | None

    @property
    def lost(self) -> bool:
        return self.before is not None and (self.after is None or not self.after.gives(self.before))

    @property
    def gained(self) -> bool:
        """More than D, which a CPU sets."""
        if self.after is None:
            return False
        rights = self.after.rights & ~DIRTY
        return self.before is None or not self.before.gives(Translation(self.after.frame, rights))


class Stored(NamedTuple):
    changes: list[Retranslated]
    cut: list[int]  # table pages that no root leads to any more
    linked: list[int]  # table pages that a root leads to from now on
    linked_twice: list[int]


class ShadowTables:
    def __init__(self) -> None:
        self.roots: dict[int, Spans[Translation]] = {}  # by the hpa of their first table
        self._words: dict[int, dict[int, int]] = {}  # of each table those that are not 0, by their index
        self._linked: dict[int, Place] = {}

    def is_linked(self, table: int) -> bool:
        return table in self._linked

    def place_of(self, table: int) -> Place | None:
        return self._linked.get(table)

    def level_of(self, root: int) -> int:
        return self._linked[root].level

    def leads(self, root: int, first: int, table: int) -> bool:
        """Is it the table that translates page `first` of `root` and those behind?"""
        place = self._linked.get(table)
        return place is not None and (place.root, place.first) == (root, first)

    def add_root(self, root: int, level: int) -> None:
        """From now on `root`, of `level` levels, is walked."""
        self._linked[root] = Place(root, level, 0, RWX)
        self.roots[root] = Spans()
        for start, end, value in self._below(root, self._linked[root]):
            self.roots[root].put(start, end, value)

    def drop_root(self, root: int) -> list[int]:
        """It is walked no more; its pages."""
        del self.roots[root]
        cut = [table for table, place in self._linked.items() if place.root == root]
        for table in cut:
            del self._linked[table]
        return cut

    def store(self, at: int, entry: int) -> Stored:
        """One word.  What it changes in the root it is part of."""
        table, index = at & -PAGE_SIZE, (at & PAGE_SIZE - 1) // ENTRY_BYTES
        place = self._linked.get(table)
        old = self.load(at)
        if place is None or old == entry:
            self._put(at, entry)
            return Stored([], [], [], [])
        size = 1 << 9 * (place.level - 1)
        start = place.first + index * size
        spans = self.roots[place.root]
        before = spans.clear(start, start + size)
        gone = self._unlink(old, place.level)
        self._put(at, entry)
        linked = list(self._link(entry, Place(place.root, place.level, start, place.rights)))
        after = merged(self._of(entry, place.level, start, place.rights))
        for run in after:
            spans.put(*run)
        changes = [
            Retranslated(place.root, *piece)
            for piece in side_by_side(merged(before), after, start, start + size)
            if piece[2] != piece[3]
        ]
        cut = [table for table in gone if table not in self._linked]
        twice = [table for table, is_second in linked if is_second]
        return Stored(changes, cut, [table for table, _ in linked], twice)

    def forget(self, tables: Iterable[int]) -> None:
        """These pages are no memory any more."""
        for table in tables:
            self._words.pop(table, None)

    def load(self, at: int) -> int:
        words = self._words.get(at & -PAGE_SIZE)
        return 0 if words is None else words.get((at & PAGE_SIZE - 1) // ENTRY_BYTES, 0)

    def _put(self, at: int, entry: int) -> None:
        table, index = at & -PAGE_SIZE, (at & PAGE_SIZE - 1) // ENTRY_BYTES
        if entry:
            self._words.setdefault(table, {})[index] = entry
        elif table in self._words:
            self._words[table].pop(index, None)

    def fill_table(self, table: int, entries: Sequence[int]) -> list[Stored]:
        """Of a whole page."""
        assert len(entries) == ENTRIES, f"{len(entries)} entries fill a table page"
        filled = enumerate(entries) if any(entries) else ()
        places = {index for index, entry in filled if entry}.union(self._words.get(table, ()))
        return [
            self.store(at, entries[index])
            for index in sorted(places)
            if self.load(at := table + ENTRY_BYTES * index) != entries[index]
        ]

    def entries(self, table: int) -> list[tuple[int, int]]:
        """Those that are not 0, by their index."""
        return sorted(self._words.get(table, {}).items())

    # -- entries ---------------------------------------------------------------------------------------

    def _of(self, entry: int, level: int, first: int, rights: int) -> Iterator[Run[Translation]]:
        """What one entry translates."""
        rights &= entry & RWX
        if not rights:
            return
        if level == 1 or entry & _LARGE:
            frame = (entry & _ADDRESS) >> 12
            yield first, first + (1 << 9 * (level - 1)), Translation(frame, rights | entry & DIRTY)
        else:
            table = entry & _ADDRESS
            yield from self._below(table, Place(0, level - 1, first, rights))

    def _below(self, table: int, place: Place) -> Iterator[Run[Translation]]:
        size = 1 << 9 * (place.level - 1)
        for index, entry in self.entries(table):
            yield from self._of(entry, place.level, place.first + index * size, place.rights)

    def _table_of(self, entry: int, level: int) -> int | None:
        leads = level > 1 and entry & RWX and not entry & _LARGE
        return entry & _ADDRESS if leads else None

    def _unlink(self, entry: int, level: int) -> list[int]:
        table = self._table_of(entry, level)
        if table is None:
            return []
        self._linked.pop(table, None)
        gone = [table]
        for _, below in self.entries(table):
            gone += self._unlink(below, level - 1)
        return gone

    def _link(self, entry: int, at: Place) -> Iterator[tuple[int, bool]]:
        """`at`: of the entry itself.  Each table, and whether it was linked already."""
        table = self._table_of(entry, at.level)
        if table is None:
            return
        yield table, table in self._linked
        place = Place(at.root, at.level - 1, at.first, at.rights & entry & RWX)
        self._linked[table] = place
        if place.level > 1:
            size = 1 << 9 * (place.level - 1)
            for index, below in self.entries(table):
                yield from self._link(below, place._replace(first=place.first + index * size))
