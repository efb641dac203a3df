"""Random maps, unmaps, splits and merges of an IO page table, against a dict and a walker of raw bytes.

After each call, and between any two of its stores, each page is what it was or what it becomes; a unit that
caches all it may is right once it flushed what the call said; pages it may hold are not in the pool.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iommufdd.core.io_pagetable import IoPageTable, TableChange, _Edit
from protocol.errors import UapiError
from protocol.pt.bits import WRITE
from protocol.pt.entry import table_of
from protocol.units import Hpa, Iova, Level
from tests.unit.iommufdd.io_world import Io

LIMIT = {3: 1 << 27, 4: 1 << 36, 5: 1 << 45}


class TableCall(NamedTuple):
    """`near` and `offset` place it; level 0 takes away."""

    level: int
    near: int  # 0: the start, 1: the second GiB, 2: the end of the address space
    offset: int
    many: int
    frames: int  # which of several contiguous regions; 3: every other page of another frame
    writable: bool
    flushed: bool


calls = st.builds(
    TableCall,
    level=st.sampled_from((0, 0, 1, 1, 1, 2, 2, 3)),
    near=st.sampled_from((0, 0, 0, 1, 2)),
    offset=st.builds(lambda table, page: 512 * table + page, st.integers(-2, 2), st.integers(-3, 3)),
    many=st.sampled_from((1, 1, 1, 2, 3, 4, 5, 6, 7, 64, 509, 512, 515, 1024)),
    frames=st.integers(0, 3),
    writable=st.booleans(),
    flushed=st.booleans(),
)


class IoTableHistory:
    def __init__(self, levels: int = 4, pages: int = 64, table: type[IoPageTable] = IoPageTable) -> None:
        self.io = Io(levels, pages, table=table)
        self.limit = LIMIT[levels]
        self.unflushed: list[TableChange] = []
        self.refused = 0

    def play(self, call: TableCall) -> None:
        io, size = self.io, 1 << 9 * max(call.level - 1, 0)
        page = (0, 1 << 18, self.limit)[call.near] + call.offset
        page = min(max(page, 0), self.limit - 1) // size * size
        before = bytes(io.memory), list(io.table.tables), list(io.table.leaves), io.pool.in_use
        try:
            if call.level:
                count = min(call.many if call.level == 1 else min(call.many, 2), (self.limit - page) // size)
                pfns = [frame(page + n * size, n, call.frames) for n in range(count)]
                change = io.map(page, pfns, call.level, writable=call.writable)
            else:
                count = min(call.many << 9 * (call.frames // 3), self.limit - page)
                change = io.unmap(page, count)
        except UapiError:
            self.refused += 1
            after = bytes(io.memory), list(io.table.tables), list(io.table.leaves), io.pool.in_use
            assert before == after, "a call that fails changes nothing"
            return
        self.unflushed.append(change)
        if call.flushed:
            self.flush()
            io.check(io.probes(page, page + count * size))

    def flush(self) -> None:
        while self.unflushed:
            self.io.flush(self.unflushed.pop(0))

    def finish(self) -> None:
        self.flush()
        io = self.io
        for near in (0, 1 << 18, self.limit):
            pages = range(max(near - 1600, 0), min(near + 2600, self.limit))
            expected = {page: said for page in pages if (said := io.oracle.at(page)) is not None}
            assert io.all_of(pages) == expected
        assert io.pool.in_use == sum(io.table.tables)
        io.release()
        assert (io.pool.in_use, any(io.memory)) == (0, False)


def frame(page: int, n: int, frames: int) -> int:
    if frames == 3:
        return (1 << 24) + (n ^ 1 << 18) * (1 << 18) % (1 << 26)
    return (1 + frames << 20) + page % (1 << 20)


@settings(max_examples=60)
@given(levels=st.sampled_from((3, 4, 5)), history=st.lists(calls, max_size=12))
def test_every_page_is_what_the_last_call_about_it_said(levels: int, history: list[TableCall]) -> None:
    played = IoTableHistory(levels)
    for call in history:
        played.play(call)
    played.finish()


@settings(max_examples=40)
@given(pages=st.integers(4, 12), history=st.lists(calls, min_size=4, max_size=16))
def test_a_call_that_finds_no_page_for_a_table_changes_nothing(pages: int, history: list[TableCall]) -> None:
    played = IoTableHistory(4, pages)
    for call in history:
        played.play(call)
    played.finish()


# -- planted bugs --------------------------------------------------------------------------------------


class ClearsBeforeStoring(IoPageTable):
    """Break before make: between the two stores a device faults on what is mapped."""

    def _plan(self, edit: _Edit) -> None:
        super()._plan(edit)
        edit.stores = [store for at, entry in edit.stores for store in ((at, 0), (at, entry))]


class LinksBeforeFilling(IoPageTable):
    def _plan(self, edit: _Edit) -> None:
        super()._plan(edit)
        made = {page for page, _ in edit.made}
        for at, entry in edit.stores:
            if (page := table_of(entry)) in made:
                filling = self._writer.load_table(page)
                self._writer.clear_unlinked(page)
                self._writer.store64(at, entry)
                self._writer.fill_unlinked(page, filling)


class UnmapsInTwo(IoPageTable):
    """The first half is gone when no page is left for the second."""

    def unmap(self, iova: int, size: int) -> TableChange:
        first = super().unmap(Iova(iova), size // 2)
        second = super().unmap(Iova(iova + size // 2), size - size // 2)
        return TableChange(first.start, second.start + second.size - first.start, first.cut + second.cut)


class KeepsWhatItMade(IoPageTable):
    """A call that fails keeps the pages it got."""

    def _grown(self, edit: _Edit, entry: int, level: Level, iova: int) -> int:
        new = super()._grown(edit, entry, level, Iova(iova))
        edit.made.clear()
        return new


class FreesAtOnce(IoPageTable):
    def _apply(self, edit: _Edit) -> TableChange:
        change = super()._apply(edit)
        self.flushed(change)
        return change._replace(cut=())


class ForgetsTheTable(IoPageTable):
    """Merging where every page stays what it was: but the table is still in paging-structure caches."""

    def map(self, iova: int, hpa: Hpa, level: Level, *, writable: bool) -> TableChange:
        return super().map(Iova(iova), hpa, level, writable=writable)._replace(size=0)


class LeaksTheTable(IoPageTable):
    def _apply(self, edit: _Edit) -> TableChange:
        return super()._apply(edit)._replace(cut=())


class LosesRightsUnflushed(IoPageTable):
    def _replaced(self, edit: _Edit, entries: list[int], level: Level, iova: Iova) -> list[int]:
        stale = edit.stale_from, edit.stale_to
        new = super()._replaced(edit, entries, level, iova)
        if any(now and was ^ now == WRITE for was, now in zip(entries, new, strict=True)):
            edit.stale_from, edit.stale_to = stale
        return new


class FlushesTheFirstPage(IoPageTable):
    def _apply(self, edit: _Edit) -> TableChange:
        change = super()._apply(edit)
        return change._replace(size=min(change.size, 4096))


class UnmapsWholeLeaves(IoPageTable):
    def unmap(self, iova: int, size: int) -> TableChange:
        return super().unmap(*self.whole_leaves(Iova(iova), size))


class SplitsWritable(IoPageTable):
    def _grown(self, edit: _Edit, entry: int, level: Level, iova: int) -> int:
        return super()._grown(edit, entry | WRITE if entry else 0, level, Iova(iova))


class SplitsOneFrameShort(IoPageTable):
    def _grown(self, edit: _Edit, entry: int, level: Level, iova: int) -> int:
        return super()._grown(edit, entry + 4096 if entry and level == 2 else entry, level, Iova(iova))


class StoresOnlyTheLast(IoPageTable):
    def _plan(self, edit: _Edit) -> None:
        super()._plan(edit)
        del edit.stores[:-1]


def put(offset: int, count: int = 1, level: int = 1, *, frames: int = 0, writable: bool = True) -> TableCall:
    return TableCall(level, 0, offset, count, frames, writable, True)


def take(offset: int, count: int) -> TableCall:
    return TableCall(0, 0, offset, count, 0, False, True)


HUGE = put(0, level=2)
SPLIT = [HUGE, take(3, 2)]
MERGE = [put(0, 6), put(0, level=2)]
BUGS: list[tuple[type[IoPageTable], list[TableCall], str]] = [
    (ClearsBeforeStoring, SPLIT, "neither of"),
    (LinksBeforeFilling, SPLIT, "I4: table"),
    (LinksBeforeFilling, [put(0, level=3), put(5, frames=1)], "I4: table"),
    (FreesAtOnce, MERGE, "I7"),
    (FreesAtOnce, [put(0, 6), take(0, 512)], "I7"),
    (ForgetsTheTable, MERGE, "I7"),
    (LeaksTheTable, MERGE, "in_use"),
    (LosesRightsUnflushed, [put(4, 2), put(4, 2, writable=False)], "from the cache"),
    (FlushesTheFirstPage, [put(4, 2), take(4, 2)], "from the cache"),
    (UnmapsWholeLeaves, SPLIT, "neither of"),
    (SplitsWritable, [put(0, level=2, writable=False), take(3, 2)], "neither of"),
    (SplitsOneFrameShort, SPLIT, "neither of"),
    (StoresOnlyTheLast, [put(4, 1), put(4, 3)], "page 0x5"),
]
TWO_HUGE = [put(0, 1, level=2), put(512, 1, level=2, frames=1), take(509, 6)]


def played(history: list[TableCall], table: type[IoPageTable] = IoPageTable, pages: int = 64) -> None:
    history_of = IoTableHistory(4, pages, table)
    for call in history:
        history_of.play(call)
    history_of.finish()


@pytest.mark.parametrize(("table", "history", "seen"), BUGS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_bug_is_seen(table: type[IoPageTable], history: list[TableCall], seen: str) -> None:
    played(history)
    with pytest.raises(AssertionError, match=seen):
        played(history, table)


@pytest.mark.parametrize("table", [UnmapsInTwo, KeepsWhatItMade])
def test_a_failure_that_leaves_something_behind_is_seen(table: type[IoPageTable]) -> None:
    """Four pages: three tables down to two huge leaves, and one for the first of two splits."""
    played(TWO_HUGE, pages=4)
    with pytest.raises(AssertionError, match="a call that fails changes nothing"):
        played(TWO_HUGE, table, pages=4)
