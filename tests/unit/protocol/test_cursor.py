"""The cursor against a reading of the raw bytes, and what it promises while the table changes under it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.pt.cursor import Cursor, EntryAt, EntryRun, seek
from protocol.pt.mem import TableOutside, TableWriter
from protocol.pt.second_stage import SECOND_STAGE
from protocol.units import Hpa, Level, Pfn
from tests.oracle.table import RawTables, leaves

BASE = 0x10_0000
LEAF, TABLE, HUGE = 0x1, 0x3, 0x81


class CursorTables:
    """A table of 4 levels whose pages are handed out one after the other."""

    def __init__(self, pages: int = 64) -> None:
        self.memory = bytearray(pages * 4096)
        self.writer = TableWriter(Hpa(BASE), memoryview(self.memory))
        self.free = [Hpa(BASE + 4096 * n) for n in range(pages - 1, 0, -1)]

    def place(self, frame: int, level: int) -> EntryAt:
        """The entry of `level` over `frame`, with the tables it takes."""
        while (met := self.seek(frame, level)).level > level:
            self.writer.store64(met.at, self.free.pop() | TABLE)
        return met

    def seek(self, frame: int, level: int = 1) -> EntryAt:
        return seek(self.writer, SECOND_STAGE, Hpa(BASE), Level(4), frame, Level(level))

    def put(self, frame: int, level: int = 1, entry: int | None = None) -> EntryAt:
        made = frame << 12 | (HUGE if level > 1 else LEAF) if entry is None else entry
        met = self.place(frame, level)
        self.writer.store64(met.at, made)
        return met

    def cursor(self, start: int = 0, end: int = 1 << 36, lowest: int = 1, **how: bool) -> Cursor:
        return Cursor(self.writer, SECOND_STAGE, Hpa(BASE), Level(4), start, end, Level(lowest), **how)


def met(run: EntryRun | None) -> list[tuple[int, int]]:
    """(frame, level) of each entry of a run that is not empty."""
    if run is None:
        return []
    size = 1 << 9 * (run.level - 1)
    return [(run.frame + n * size, run.level) for n, entry in enumerate(run.entries) if entry]


def all_met(cursor: Cursor) -> list[tuple[int, int]]:
    return [one for run in cursor for one in met(run)]


# -- nothing changes -----------------------------------------------------------------------------------

places = st.lists(st.tuples(st.integers(0, 0x3_FFFF), st.sampled_from([1, 1, 1, 2, 3])), max_size=12)


@given(places, st.integers(0, 0x4_0010), st.integers(0, 0x4_0010))
def test_a_cursor_meets_exactly_the_leaves_that_overlap_in_order(
    put: list[tuple[int, int]], one: int, other: int
) -> None:
    tables = CursorTables()
    for frame, level in put:
        if tables.seek(frame, level).level == level and not tables.seek(frame, level).entry:
            tables.put(frame >> 9 * (level - 1) << 9 * (level - 1), level)
    start, end = sorted((one, other))
    raw = sorted(leaves(RawTables(BASE, tables.memory), BASE, 4))
    overlap = [(gfn, n) for gfn, n, _ in raw if gfn < end and start < gfn + (1 << 9 * (n - 1))]
    assert all_met(tables.cursor(start, end)) == (overlap if start < end else [])


@given(places)
def test_runs_touch_one_another_lie_where_they_say_and_lead_to_no_table(put: list[tuple[int, int]]) -> None:
    tables = CursorTables()
    for frame, level in put:
        if tables.seek(frame, level).level == level and not tables.seek(frame, level).entry:
            tables.put(frame >> 9 * (level - 1) << 9 * (level - 1), level)
    at = 0
    for run in tables.cursor():
        assert run.frame == at
        at += len(run.entries) << 9 * (run.level - 1)
        for n, entry in enumerate(run.entries):
            assert tables.writer.load64(run.at + 8 * n) == entry
            assert not SECOND_STAGE.is_table(entry, run.level)
    assert at == 1 << 36


def test_a_table_entry_is_met_before_what_it_leads_to_and_alone() -> None:
    tables = CursorTables()
    tables.put(0x205)
    tables.put(0x400, 2)
    cursor = tables.cursor(with_tables=True)
    runs = [run for run in cursor if any(run.entries)]
    assert [(met(run), len(run.entries)) for run in runs] == [
        ([(0, 4)], 1),
        ([(0, 3)], 1),
        ([(0x200, 2)], 1),
        ([(0x205, 1)], 512),
        ([(0x400, 2)], 510),
    ]


@pytest.mark.parametrize("lowest", [2, 3, 4])
def test_below_the_lowest_level_a_cursor_does_not_go(lowest: int) -> None:
    tables = CursorTables()
    tables.put(0x205)
    assert all_met(tables.cursor(lowest=lowest)) == [(0x200 if lowest == 2 else 0, lowest)]
    assert tables.seek(0x205, lowest).level == lowest


def test_a_span_of_nothing_and_one_beyond_the_table_meet_nothing() -> None:
    tables = CursorTables()
    tables.put(5)
    assert list(tables.cursor(5, 5)) == list(tables.cursor(1 << 36, 1 << 40)) == []
    assert tables.seek(6).entry == 0
    assert tables.seek(1 << 35).level == 4


def test_a_table_that_lies_outside_of_table_memory_is_told() -> None:
    tables = CursorTables()
    tables.put(0x205, 2, 0x9000_0000 | TABLE)
    for look in (lambda: tables.seek(0x205), lambda: list(tables.cursor())):
        with pytest.raises(TableOutside, match="0x90000"):
            look()


# -- the table changes ---------------------------------------------------------------------------------


def test_who_replaces_a_table_entry_is_not_led_into_the_table() -> None:
    tables = CursorTables()
    tables.put(0x205)
    tables.put(0x605)
    seen = []
    for run in tables.cursor(with_tables=True):
        seen += met(run)
        if met(run) == [(0x200, 2)]:
            tables.writer.store64(run.at, 0x200 << 12 | HUGE)
    assert seen == [(0, 4), (0, 3), (0x200, 2), (0x600, 2), (0x605, 1)]


def test_an_entry_that_became_a_table_is_met_again_only_by_who_resumes_there() -> None:
    def lives(resume: bool) -> list[tuple[int, int]]:
        tables = CursorTables()
        tables.put(0x200, 2)
        tables.put(0x605)
        seen, cursor = [], tables.cursor()
        for run in cursor:
            seen += met(run)
            if (0x200, 2) in met(run):
                table = tables.free.pop()
                tables.writer.fill_unlinked(table, SECOND_STAGE.split(0x20_0000 | HUGE, Level(2)))
                tables.writer.store64(tables.seek(0x200, 2).at, table | TABLE)
                if resume:
                    cursor.resume(0x3FE)
        return seen

    assert lives(resume=False) == [(0x200, 2), (0x605, 1)]
    assert lives(resume=True) == [(0x200, 2), (0x3FE, 1), (0x3FF, 1), (0x605, 1)]


def other_things_run(resume: Callable[[Cursor], None]) -> list[tuple[int, int]]:
    """In the middle of a walk others cut its table off, use the page for another one, and map anew."""
    tables = CursorTables()
    tables.put(0x205)
    tables.put(0x605)
    cursor = tables.cursor(0, 1 << 36)
    seen: list[tuple[int, int]] = []
    while (0x205, 1) not in seen:
        seen += met(cursor.next())
    old = SECOND_STAGE.table_of(tables.seek(0, 2).entry)
    at_1g = tables.seek(0, 3)
    middle = SECOND_STAGE.table_of(at_1g.entry)
    tables.writer.store64(at_1g.at, 0)
    tables.writer.clear_unlinked(middle)
    tables.free.append(middle)
    assert old is not None
    tables.put(0x9_0000_0205)  # takes the page of the table of level 2
    tables.put(0x606)
    resume(cursor)
    return seen + all_met(cursor)


def test_a_walk_that_resumes_sees_the_table_as_it_is_now() -> None:
    assert other_things_run(Cursor.resume) == [(0x205, 1), (0x606, 1), (0x9_0000_0205, 1)]


def test_a_walk_that_does_not_resume_goes_on_in_a_page_that_is_another_table_now() -> None:
    """Planted bug: why the third rule is one."""
    assert other_things_run(lambda cursor: None) != other_things_run(Cursor.resume)


def test_a_walk_that_resumes_after_each_run_meets_each_leaf_once() -> None:
    tables, random = CursorTables(), Random(3)
    frames = sorted({random.randrange(1 << 13) for _ in range(40)})
    for frame in frames:
        tables.put(frame)
    cursor, seen = tables.cursor(), []
    while (run := cursor.next()) is not None:
        seen += met(run)
        cursor.resume()
    assert [frame for frame, _ in seen] == frames


def test_a_leaf_of_each_level_is_found_from_the_root() -> None:
    tables = CursorTables()
    for frame, level in ((5, 1), (0x400, 2), (0x4_0000, 3)):
        put = tables.put(
            frame,
            level,
            SECOND_STAGE.make_leaf(Pfn(frame), Level(level), writable=False) if level > 1 else LEAF,
        )
        inside = frame + (1 << 9 * (level - 1)) - 1
        assert tables.seek(inside) == (level, put.at, tables.writer.load64(put.at))
