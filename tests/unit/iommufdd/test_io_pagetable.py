"""One call on an IO page table at a time: what is stored, what must be flushed, what it costs in pages."""

from __future__ import annotations

import errno
import struct

import pytest

from iommufdd.core.io_pagetable import IoLeaf, IoPageTable, TableChange
from protocol.errors import UapiError
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.units import Hpa, Iova, Level
from tests.unit.iommufdd.io_world import BASE, Io
from tests.unit.protocol.formats import KINDS, Kind

PFN = 0x10_0000
PAGE = 4096
MIB2 = 2 << 20
GIB = 1 << 30
NOTHING = (0, ())


def need(change: TableChange) -> tuple[int, tuple[int, ...]]:
    """How much a change wants flushed, and what it cut off."""
    return change.size, change.cut


def words(io: Io, page: int) -> dict[int, str]:
    """The entries of the n-th page of the window that are not 0."""
    entries = struct.unpack_from("<512Q", io.memory, page * PAGE)
    return {index: hex(entry) for index, entry in enumerate(entries) if entry}


def stores(io: Io) -> list[int]:
    """Where every store from now on goes, in order."""
    io.writer.stored.clear()
    return io.writer.stored


# -- format --------------------------------------------------------------------------------------------


def test_the_bytes_of_a_small_table_are_those_worked_by_hand() -> None:
    io = Io()
    io.map(0x1_2345, [PFN])
    io.map(0x1_2346, [PFN + 7], writable=False)
    io.map(0x4_0000, [0x14_0000], level=3)
    io.map(0x1_2400, [0x10_0200], level=2, writable=False)
    assert [words(io, n) for n in range(5)] == [
        {0: "0x200000003003"},
        {0x145: "0x100000003", 0x146: "0x100007001"},
        {0x91: "0x200000001003", 0x92: "0x100200081"},
        {0: "0x200000002003", 1: "0x140000083"},
        {},
    ]


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_the_last_page_of_the_address_space_can_be_mapped(levels: int) -> None:
    io = Io(levels)
    last = (io.table.limit >> 12) - 1
    assert last + 1 == 1 << 9 * levels
    io.map(last, [PFN])
    io.check([0, last - 1, last])
    with pytest.raises(AssertionError, match=f"{last << 12:#x}"):
        io.table.map_pages(Iova(last << 12), [Hpa(0), Hpa(PAGE)], Level(1), writable=True)


def test_a_leaf_is_found_with_its_start_and_size() -> None:
    io = Io()
    io.map(5, [PFN], writable=False)
    io.map(0x400, [0x10_0400], level=2)
    leaves = [
        IoLeaf(Iova(5 * PAGE), Level(1), Hpa(PFN << 12), False),
        IoLeaf(Iova(0x400 * PAGE), Level(2), Hpa(0x10_0400 << 12), True),
    ]
    assert io.table.leaf_at(Iova(5 * PAGE + 0xABC)) == leaves[0]
    assert io.table.leaf_at(Iova(0x5FF * PAGE)) == leaves[1]
    assert io.table.leaf_at(Iova(6 * PAGE)) is io.table.leaf_at(Iova(7 * GIB)) is None
    assert list(io.table.leaves_in(Iova(0), io.table.limit)) == leaves
    assert list(io.table.leaves_in(Iova(0x5FF * PAGE), PAGE)) == leaves[1:]
    assert list(io.table.leaves_in(Iova(6 * PAGE), 0x3FA * PAGE)) == []


# -- sizes ---------------------------------------------------------------------------------------------


def test_a_gib_in_small_leaves_takes_2_01_mib_of_tables() -> None:
    """512 tables of leaves, the table of those, and what every table has: one a level above, and the root."""
    io = Io(pages=600)
    io.table.map_pages(Iova(0), [*map(Hpa, range(GIB, 2 * GIB, PAGE))], Level(1), writable=True)
    assert (io.table.tables, io.table.leaves) == ([0, 512, 1, 1, 1], [0, 512 * 512, 0, 0])
    assert sum(io.table.tables[1:3]) * PAGE == 513 * PAGE
    assert round(sum(io.table.tables) * PAGE / (1 << 20), 2) == 2.01


@pytest.mark.parametrize("gibs", [1, 4])
def test_a_gib_in_leaves_of_2_mib_takes_one_page_of_tables(gibs: int) -> None:
    io = Io()
    io.table.map_pages(Iova(0), [*map(Hpa, range(0, gibs * GIB, MIB2))], Level(2), writable=True)
    assert (io.table.tables, io.table.leaves) == ([0, 0, gibs, 1, 1], [0, 0, 512 * gibs, 0])


def test_an_empty_table_is_a_root_of_absent_entries() -> None:
    io = Io()
    assert (io.table.root, io.table.tables, any(io.memory)) == (BASE, [0, 0, 0, 0, 1], False)


# -- mapping -------------------------------------------------------------------------------------------


def test_what_becomes_present_needs_no_flush() -> None:
    """Absent entries are not cached (CM = 0)."""
    io = Io()
    assert need(io.map(5, [PFN])) == NOTHING
    assert need(io.map(0x1F0, range(PFN, PFN + 32))) == NOTHING
    assert need(io.map(0x4_0000, [0x14_0000], level=3)) == NOTHING


def test_the_same_leaf_again_stores_nothing() -> None:
    io = Io()
    io.map(0x200, [0x10_0200], level=2)
    io.map(5, [PFN])
    seen = stores(io)
    assert need(io.map(5, [PFN])) == NOTHING
    assert need(io.map(0x200, [0x10_0200], level=2)) == NOTHING
    assert (seen, io.table.leaves) == ([], [0, 1, 1, 0])


def test_a_page_that_a_huge_leaf_maps_as_asked_stays_under_it() -> None:
    io = Io()
    io.map(0, [0x14_0000], level=3)
    seen = stores(io)
    assert need(io.map(0x12345, range(0x14_0000 + 0x12345, 0x14_0000 + 0x12355))) == NOTHING
    assert (seen, io.table.leaves, io.pool.in_use) == ([], [0, 0, 0, 1], 2)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_rights_are_raised_without_a_flush_and_lowered_with_one(level: int) -> None:
    io = Io()
    io.map(0, [0x14_0000], level, writable=False)
    assert need(io.map(0, [0x14_0000], level)) == NOTHING
    lowered = io.map(0, [0x14_0000], level, writable=False)
    assert lowered == TableChange(Iova(0), PAGE << 9 * (level - 1), ())
    io.flush(lowered)
    io.check([0])


def test_another_frame_is_flushed_and_no_other_page() -> None:
    io = Io()
    io.map(0, range(PFN, PFN + 8))
    assert io.map(3, [PFN + 100]) == (3 * PAGE, PAGE, ())
    assert io.map(2, [PFN + 2, PFN + 3, PFN + 200, PFN + 5]) == (3 * PAGE, 2 * PAGE, ())


def test_a_table_is_replaced_by_a_huge_leaf_in_one_store_and_cut_off() -> None:
    io = Io()
    io.map(0x200, range(PFN + 0x200, PFN + 0x400))
    table = Hpa(BASE + PAGE)
    seen = stores(io)
    change = io.map(0x200, [PFN + 0x200], level=2)
    assert change == TableChange(Iova(MIB2), MIB2, (table,))
    assert len(seen) == 1
    assert (io.table.tables, io.table.leaves) == ([0, 0, 1, 1, 1], [0, 0, 1, 0])
    io.flush(change)
    io.check(range(0x1FF, 0x401))


def test_a_gib_over_tables_of_both_sizes_cuts_all_of_them_off() -> None:
    io = Io()
    io.map(0, range(PFN, PFN + 1025))
    io.map(0x800, [0x10_0800], level=2)
    change = io.map(0, [0x14_0000], level=3)
    assert (change.start, change.size, len(change.cut)) == (0, GIB, 4)
    assert (io.table.tables, io.table.leaves) == ([0, 0, 0, 1, 1], [0, 0, 0, 1])
    io.flush(change)
    io.check(io.probes(0, 1 << 18))


def test_a_leaf_of_another_frame_splits_the_huge_one_in_one_store() -> None:
    """Two levels at once: the store puts both new tables in place of the leaf of 1 GiB."""
    io = Io()
    io.map(0, [0x14_0000], level=3)
    seen = stores(io)
    change = io.map(0x12345, [PFN])
    assert change == TableChange(Iova(0x12345 * PAGE), PAGE, ())
    assert len(seen) == 1
    assert (io.table.tables, io.table.leaves) == ([0, 1, 1, 1, 1], [0, 512, 511, 0])
    io.flush(change)
    io.check(io.probes(0x12345, 0x12346))


# -- unmapping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "npages", "tables", "leaves"),
    [
        (0x12345, 1, [0, 1, 1, 1, 1], [0, 511, 511, 0]),
        (0x12345, 0x10, [0, 1, 1, 1, 1], [0, 496, 511, 0]),
        (0x12200, 0x200, [0, 0, 1, 1, 1], [0, 0, 511, 0]),
        (0x121FF, 0x202, [0, 2, 1, 1, 1], [0, 2 * 511, 509, 0]),
        (0, 0x3_FFFF, [0, 1, 1, 1, 1], [0, 1, 0, 0]),
    ],
)
def test_of_a_huge_leaf_only_the_part_asked_for_goes(
    start: int, npages: int, tables: list[int], leaves: list[int]
) -> None:
    io = Io()
    io.map(0, [0x14_0000], level=3)
    seen = stores(io)
    change = io.unmap(start, npages)
    assert change == TableChange(Iova(start * PAGE), npages * PAGE, ())
    assert len(seen) == 1
    assert (io.table.tables, io.table.leaves) == (tables, leaves)
    io.flush(change)
    io.check(io.probes(start, start + npages))


def test_a_table_that_is_wholly_covered_is_cut_off_and_the_others_stay() -> None:
    io = Io()
    io.map(0, range(PFN, PFN + 1536))
    change = io.unmap(0x100, 0x400)
    assert (change.start, change.size, len(change.cut)) == (0x100 * PAGE, 0x400 * PAGE, 1)
    assert (io.table.tables, io.table.leaves) == ([0, 2, 1, 1, 1], [0, 0x200, 0, 0])
    io.flush(change)
    io.check(range(1537))


def test_unmapping_what_is_not_mapped_stores_nothing() -> None:
    io = Io()
    io.map(5, [PFN])
    seen = stores(io)
    assert need(io.unmap(6, 100)) == NOTHING
    assert need(io.unmap(1 << 30, 1 << 20)) == NOTHING
    assert seen == []


def test_only_what_was_there_is_flushed() -> None:
    io = Io()
    io.map(5, [PFN])
    io.map(9, [PFN])
    assert io.unmap(0, 512 - 1) == (5 * PAGE, 5 * PAGE, ())


def test_everything_goes_with_one_call() -> None:
    io = Io(5)
    io.map(5, [PFN])
    io.map(1 << 40, [0x14_0000], level=3)
    change = io.unmap(0, io.table.limit >> 12)
    assert (len(change.cut), io.table.tables, io.table.leaves) == (6, [0, 0, 0, 0, 0, 1], [0, 0, 0, 0])
    io.flush(change)
    assert io.pool.in_use == 1


# -- pages of tables -----------------------------------------------------------------------------------


def test_a_table_cut_off_is_not_used_again_before_the_flush() -> None:
    """The window has no page but those four."""
    io = Io(pages=4)
    io.map(5, [PFN])
    change = io.unmap(0, 512)
    for _ in range(2):
        with pytest.raises(UapiError) as refused:
            io.map(0x400, [PFN])
        assert refused.value.errno == errno.ENOMEM
    held = bytes(io.memory[change.cut[0] - BASE :][:PAGE])
    assert held[40:48] == (PFN << 12 | 3).to_bytes(8, "little")
    io.flush(change)
    assert need(io.map(0x400, [PFN])) == NOTHING
    assert io.pool.in_use == 4


def test_no_page_for_a_split_leaves_the_huge_leaf_which_can_go_whole() -> None:
    io = Io(pages=3)
    io.map(0x200, [0x10_0200], level=2)
    io.map(0x400, [0x10_0400], level=2)
    before = bytes(io.memory)
    with pytest.raises(UapiError) as refused:
        io.unmap(0x3FF, 2)
    assert (refused.value.errno, bytes(io.memory), io.pool.in_use) == (errno.ENOMEM, before, 3)
    start, size = io.table.whole_leaves(Iova(0x3FF * PAGE), 2 * PAGE)
    assert (start, size) == (MIB2, 2 * MIB2)
    io.flush(io.unmap(start // PAGE, size // PAGE))
    assert io.table.leaves == [0, 0, 0, 0]


def test_whole_leaves_of_a_range_between_leaves_is_that_range() -> None:
    io = Io()
    io.map(5, [PFN])
    for start, npages in ((5, 1), (4, 3), (6, 1)):
        assert io.table.whole_leaves(Iova(start * PAGE), npages * PAGE) == (start * PAGE, npages * PAGE)


def test_no_page_for_a_root_is_enomem() -> None:
    io = Io(pages=1)
    with pytest.raises(UapiError) as refused:
        IoPageTable(io.writer, io.pool, Level(4), Level(3))
    assert refused.value.errno == errno.ENOMEM


def test_a_change_is_flushed_once() -> None:
    io = Io()
    io.map(5, [PFN])
    change = io.unmap(0, 512)
    io.flush(change)
    with pytest.raises(AssertionError, match="I7"):
        io.table.flushed(change)


def test_a_released_table_gives_every_page_back_also_those_it_held() -> None:
    io = Io()
    io.map(5, [PFN])
    io.map(0x400, [0x10_0400], level=2)
    change = io.unmap(0, 512)
    assert io.pool.in_use == 4
    io.release()
    assert (io.pool.in_use, any(io.memory), io.table.tables) == (0, False, [0, 0, 0, 0, 0])
    io.table.flushed(change)
    assert io.pool.in_use == 0


def test_two_tables_of_one_pool_do_not_meet() -> None:
    io = Io()
    other = IoPageTable(io.writer, io.pool, Level(4), Level(3))
    io.map(5, [PFN])
    other.map(Iova(5 * PAGE), Hpa(0x20_0000 << 12), Level(1), writable=False)
    io.check([5])
    io.release()
    assert list(other.leaves_in(Iova(0), GIB)) == [
        IoLeaf(Iova(5 * PAGE), Level(1), Hpa(0x20_0000 << 12), False)
    ]
    assert io.pool.in_use == sum(other.tables) == 4


# -- what is a bug of the caller -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iova", "hpa", "level"),
    [(0x1000, 0x1_0000_0800, 1), (0x800, GIB, 1), (0x1000, 0x20_0000, 2), (0x20_0000, 0x1000, 2), (0, 0, 3)],
)
def test_a_leaf_that_is_misaligned_or_too_large_is_a_bug(iova: int, hpa: int, level: int) -> None:
    io = Io(max_leaf=2)
    with pytest.raises(AssertionError, match=r"leaf of|misaligned"):
        io.table.map(Iova(iova), Hpa(hpa), Level(level), writable=True)
    assert not any(io.memory)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_table_can_be_of_any_format(kind: Kind) -> None:
    """Put, split, merged and cut off; read by a plain walk of the format, not by what wrote it."""
    memory = bytearray(64 * PAGE)
    writer = TableWriter(Hpa(BASE), memoryview(memory))
    table = IoPageTable(writer, TablePool(writer, len(memory)), kind.levels, Level(3), kind.fmt)

    def entry(page: int, index: int) -> int:
        at = page - BASE + 8 * index
        return int.from_bytes(memory[at : at + 8], "little")

    def seen(page: int) -> tuple[int, int, bool] | None:
        found = kind.walk(entry, table.root, kind.levels, page)
        return found and found[:3]

    table.map(Iova(0x200 * PAGE), Hpa(0x600 * PAGE), Level(2), writable=True)
    table.map_pages(Iova(5 * PAGE), [Hpa(9 * PAGE), Hpa(7 * PAGE)], Level(1), writable=False)
    assert (seen(5), seen(6), seen(7), seen(0x2AB)) == ((9, 1, False), (7, 1, False), None, (0x6AB, 2, True))
    table.flushed(table.unmap(Iova(0x203 * PAGE), PAGE))
    assert (seen(0x202), seen(0x203), seen(0x3FF)) == ((0x602, 1, True), None, (0x7FF, 1, True))
    table.flushed(table.map(Iova(0x200 * PAGE), Hpa(0x800 * PAGE), Level(2), writable=True))
    assert (seen(0x203), table.leaves) == ((0x803, 2, True), [0, 2, 1, 0])
    table.flushed(table.unmap(Iova(0), table.limit))
    assert (seen(5), seen(0x203), table.leaves) == (None, None, [0, 0, 0, 0])
