"""An IO page table under watch: an oracle, a walker that caches all it may, a look between any two stores.

The walks are those of `tests/oracle`, over the raw bytes; nothing here asks the table what it thinks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from iommufdd.core.io_pagetable import IoPageTable, TableChange
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.units import Hpa, Iova, Level
from tests.oracle.table import Machine, RawTables, leaves, second_stage_walk

BASE = 0x2000_0000_0000
MACHINE = Machine(snoop_control=False)  # bit 11 is reserved everywhere
Translation = tuple[int, bool]  # pfn, writable


class WatchedWriter(TableWriter):
    """Calls `after` when something was stored, and notes where entries were."""

    __slots__ = ("after", "stored")

    def __init__(self, base: Hpa, view: memoryview) -> None:
        super().__init__(base, view)
        self.after: Callable[[], None] = lambda: None
        self.stored: list[int] = []

    def store64(self, hpa: int, entry: int) -> None:
        super().store64(hpa, entry)
        self.stored.append(hpa)
        self.after()

    def fill_unlinked(self, table: Hpa, entries: Sequence[int]) -> None:
        super().fill_unlinked(table, entries)
        self.after()

    def clear_unlinked(self, table: Hpa) -> None:
        super().clear_unlinked(table)
        self.after()


class WatchedPool(TablePool):
    """Remembers which pages it gave out and which it has."""

    def __init__(self, writer: TableWriter, size: int) -> None:
        super().__init__(writer, size)
        self.out: set[int] = set()

    def allocate(self) -> Hpa:
        page = super().allocate()
        self.out.add(page)
        return page

    def free(self, pages: Iterable[Hpa]) -> None:
        pages = list(pages)
        self.out.difference_update(pages)  # before it is zeroed: whoever still walks it is seen
        super().free(pages)


class Said(NamedTuple):
    """What one call said about pages start..end: leaves of `size` pages each, or nothing."""

    start: int
    end: int
    pfns: Sequence[int] = ()
    size: int = 1
    writable: bool = False

    def about(self, page: int) -> Translation | None:
        n, rest = divmod(page - self.start, self.size)
        return (self.pfns[n] + rest, self.writable) if self.pfns else None


class CallOracle:
    """The calls as they were made: the last one about a page is right."""

    def __init__(self) -> None:
        self.calls: list[Said] = []

    def at(self, page: int) -> Translation | None:
        for call in reversed(self.calls):
            if call.start <= page < call.end:
                return call.about(page)
        return None


class CachingWalker:
    """A unit that keeps every translation and every table pointer it met until it is told to flush them.

    Translations are kept a page each, so that flushing a part of a huge leaf leaves the rest."""

    def __init__(self, tables: RawTables, root: int, levels: int) -> None:
        self.tables = tables
        self.root = root
        self.levels = levels
        self.pages: dict[int, Translation] = {}
        self.pointers: dict[tuple[int, int], int] = {}  # (level of the table, page >> its span) -> table

    def translate(self, page: int, *, write: bool = False) -> Translation | None:
        """An entry that is absent, or lacks the right asked for, is not served from the cache."""
        cached = self.pages.get(page)
        if cached is not None and (cached[1] or not write):
            return cached
        level, table = self._nearest(page)
        while level > 1:
            entry = self.tables.entry(table, page >> 9 * (level - 1) & 511)
            if entry & 3 == 0 or entry & 0x80:
                break
            level, table = level - 1, entry & 0xF_FFFF_FFFF_F000
            self.pointers[level, page >> 9 * level] = table
        found = second_stage_walk(self.tables, MACHINE, table, level, page << 12)
        assert found.kind != "reserved", f"page {page:#x} level {found.level}: {found.entry:#x}"
        if found.kind == "absent":
            return None
        self.pages[page] = found.hpa >> 12, found.rights & 2 != 0
        return self.pages[page]

    def _nearest(self, page: int) -> tuple[int, int]:
        for level in range(1, self.levels):
            if (level, page >> 9 * level) in self.pointers:
                return level, self.pointers[level, page >> 9 * level]
        return self.levels, self.root

    def flush(self, start: int, size: int) -> None:
        if not size:
            return
        first, last = start >> 12, (start + size - 1) >> 12
        self.pages = {page: kept for page, kept in self.pages.items() if not first <= page <= last}
        self.pointers = {
            (level, at): table
            for (level, at), table in self.pointers.items()
            if not first >> 9 * level <= at <= last >> 9 * level
        }


class Io:
    """A table; between any two stores of a call each page is old or new, and no walker holds a free page."""

    def __init__(
        self,
        levels: int = 4,
        pages: int = 64,
        max_leaf: int = 3,
        table: type[IoPageTable] = IoPageTable,
    ) -> None:
        self.memory = bytearray(pages * 4096)
        self.writer = WatchedWriter(Hpa(BASE), memoryview(self.memory))
        self.pool = WatchedPool(self.writer, len(self.memory))
        self.table = table(self.writer, self.pool, Level(levels), Level(max_leaf))
        self.raw = RawTables(BASE, self.memory)
        self.oracle = CallOracle()
        self.walker = CachingWalker(self.raw, self.table.root, levels)

    # -- changing --------------------------------------------------------------------------------------

    def map(self, page: int, pfns: Sequence[int], level: int = 1, *, writable: bool = True) -> TableChange:
        size = 1 << 9 * (level - 1)

        def call() -> TableChange:
            hpas = [Hpa(pfn << 12) for pfn in pfns]
            if len(hpas) == 1:
                return self.table.map(Iova(page << 12), hpas[0], Level(level), writable=writable)
            return self.table.map_pages(Iova(page << 12), hpas, Level(level), writable=writable)

        return self._watched(call, Said(page, page + len(pfns) * size, pfns, size, writable))

    def unmap(self, page: int, npages: int) -> TableChange:
        return self._watched(
            lambda: self.table.unmap(Iova(page << 12), npages << 12), Said(page, page + npages)
        )

    def flush(self, change: TableChange) -> None:
        """What the units do, then what iommufdd does."""
        self.walker.flush(change.start, change.size)
        self.table.flushed(change)

    def release(self) -> None:
        """Nobody walks it any more."""
        self.writer.after = lambda: None
        self.table.release()

    def _watched(self, call: Callable[[], TableChange], said: Said) -> TableChange:
        """Do it while a walker without a cache looks between any two stores."""
        probes = {page: {self.oracle.at(page)} for page in self.probes(said.start, said.end)}
        for page, allowed in probes.items():
            self.walker.translate(page)
            if said.start <= page < said.end:
                allowed.add(said.about(page))

        def look() -> None:
            for page, allowed in probes.items():
                seen = self.seen(page)
                assert seen in allowed, f"page {page:#x} is {seen}: neither of {allowed}"
            self.check_no_freed()

        self.writer.after = look
        try:
            change = call()
        finally:
            self.writer.after = self.check_no_freed
        self.oracle.calls.append(said)
        return change

    def probes(self, start: int, end: int) -> list[int]:
        """Pages in and around a range: at its ends, and at the boundaries of tables near them."""
        edges = {start, end, (start + end) // 2}
        edges |= {(at >> shift) + n << shift for at in (start, end) for shift in (9, 18) for n in (0, 1)}
        limit = self.table.limit >> 12
        return sorted({page for at in edges for page in (at - 1, at) if 0 <= page < limit})

    # -- looking ---------------------------------------------------------------------------------------

    def seen(self, page: int) -> Translation | None:
        """What a walker without a cache finds, and that it met no page that is free."""
        found = second_stage_walk(self.raw, MACHINE, self.table.root, self.table.level, page << 12)
        assert found.kind != "reserved", f"page {page:#x} level {found.level}: {found.entry:#x}"
        return (found.hpa >> 12, found.rights & 2 != 0) if found.kind == "mapped" else None

    def all_of(self, pages: range) -> dict[int, Translation]:
        """What the bytes translate `pages` to, by looking at every entry there is."""
        found = {}
        for first, level, entry in leaves(self.raw, self.table.root, self.table.level):
            for page in range(max(first, pages.start), min(first + (1 << 9 * (level - 1)), pages.stop)):
                found[page] = (entry >> 12 & 0xFF_FFFF_FFFF) + page - first, entry >> 1 & 1 == 1
        return found

    def check_no_freed(self) -> None:
        """I7: what a walker may still hold is not in the pool."""
        walked = {self.table.root, *self.walker.pointers.values()}
        assert walked <= self.pool.out, f"I7: {[hex(page) for page in walked - self.pool.out]} are free"

    def check(self, pages: Iterable[int]) -> None:
        """With nothing left to flush, every page is what the oracle says, with and without a cache."""
        for page in pages:
            expected = self.oracle.at(page)
            assert self.seen(page) == expected, f"page {page:#x}"
            cached = self.walker.translate(page, write=expected is not None and expected[1])
            assert cached == expected, f"page {page:#x}: {cached} from the cache, not {expected}"
