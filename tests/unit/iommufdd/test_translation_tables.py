"""What leads to a PASID entry, read as bytes: where each entry lies, and in which order it is stored."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from iommufdd.core.domain import Domain
from iommufdd.core.translation_tables import TranslationTables
from protocol.hw.pasid_entry import PasidEntry
from protocol.pt.mem import TableWriter
from protocol.units import LEVEL_1G, PAGE_SIZE, Hpa, Level, Pasid
from tests.kit.iommufdd import ECAP, RID

BASE = 0x2000_0000_0000
PASID = Pasid(3)
ENTRY = Domain(Hpa(0x1234_5000), Level(4), 7, LEVEL_1G).pasid_entry(ECAP)
WORDS = (0x1234_5000 | 2 << 2 | 2 << 6 | 1, 1 << 24 | 1 << 23 | 7)  # SSPTPTR, AW, PGTT, P; PGSNP, PWSNP, DID


class StructureMemory:
    """A few pages, and each store into them."""

    def __init__(self) -> None:
        self.raw = bytearray(16 * PAGE_SIZE)
        self.stores: list[tuple[int, int]] = []
        writer = TableWriter(Hpa(BASE), memoryview(self.raw))
        pages = iter(range(BASE, BASE + len(self.raw), PAGE_SIZE))
        recorded = RecordedWriter(Hpa(BASE), memoryview(self.raw), self.stores.append)
        assert writer.base == recorded.base
        self.tables = TranslationTables(recorded, lambda: Hpa(next(pages)))

    def word(self, at: int) -> int:
        word: int = struct.unpack_from("<Q", self.raw, at - BASE)[0]
        return word

    def context_at(self, rid: int) -> int:
        """As the unit finds it [VT-d 9.1]."""
        half = self.word((self.tables.rtaddr & ~0xFFF) + (rid >> 8) * 16 + (rid >> 7 & 1) * 8)
        assert half & 0xFFF == 1, f"root entry {half:#x}"
        return (half & ~0xFFF) + (rid & 0x7F) * 32

    def entry_at(self, rid: int, pasid: int) -> int:
        directory = self.word(self.context_at(rid)) & ~0xFFF
        table = self.word(directory + (pasid >> 6) * 8)
        assert table & 0xFFF == 1, f"directory entry {table:#x}"
        return (table & ~0xFFF) + (pasid & 63) * 64


class RecordedWriter(TableWriter):
    __slots__ = ("_tell",)

    def __init__(self, base: Hpa, view: memoryview, tell: Callable[[tuple[int, int]], None]) -> None:
        super().__init__(base, view)
        self._tell = tell

    def store64(self, hpa: int, entry: int) -> None:
        super().store64(hpa, entry)
        self._tell((hpa, entry))


@pytest.fixture
def memory() -> StructureMemory:
    made = StructureMemory()
    made.tables.add_function(RID, ats=True, pasid=True, pri=True)
    made.stores.clear()
    return made


def test_the_root_table_is_in_scalable_mode() -> None:
    assert StructureMemory().tables.rtaddr == BASE | 1 << 10


@pytest.mark.parametrize("rid", [0, 0x7F, 0x80, RID, 0xFFFF])
def test_a_function_is_found_through_root_context_and_directory(rid: int) -> None:
    memory = StructureMemory()
    memory.tables.add_function(rid, ats=True, pasid=True, pri=True)
    memory.tables.put_pasid_entry(rid, PASID, ENTRY)
    assert memory.word(memory.entry_at(rid, PASID)) == WORDS[0]


@pytest.mark.parametrize(
    ("ats", "pasid", "pri", "bits"),
    [(False, False, False, 0), (True, False, False, 4), (False, True, False, 8), (False, False, True, 16)],
)
def test_a_context_entry_says_what_its_function_may_ask(ats: bool, pasid: bool, pri: bool, bits: int) -> None:
    memory = StructureMemory()
    memory.tables.add_function(RID, ats=ats, pasid=pasid, pri=pri)
    at = memory.context_at(RID)
    assert memory.word(at) & 0xFFF == 1 | bits
    assert [memory.word(at + 8 * n) for n in (1, 2, 3)] == [0, 0, 0]


def test_functions_of_one_half_of_a_bus_share_a_context_table_and_nothing_else() -> None:
    memory = StructureMemory()
    for rid in (RID, RID + 8, RID ^ 0x80):
        memory.tables.add_function(rid, ats=True, pasid=True, pri=True)
    assert memory.context_at(RID + 8) - memory.context_at(RID) == 8 * 32
    assert memory.context_at(RID ^ 0x80) // PAGE_SIZE != memory.context_at(RID) // PAGE_SIZE
    memory.tables.put_pasid_entry(RID, PASID, ENTRY)
    assert memory.word(memory.entry_at(RID + 8, PASID)) == 0


def test_an_entry_goes_in_word_by_word_and_the_one_with_p_last(memory: StructureMemory) -> None:
    memory.tables.put_pasid_entry(RID, PASID, ENTRY)
    at = memory.entry_at(RID, PASID)
    assert memory.stores == [*((at + 8 * n, 0) for n in range(7, 1, -1)), (at + 8, WORDS[1]), (at, WORDS[0])]


def test_an_entry_goes_out_p_first_and_nothing_else_until_it_is_forgotten(memory: StructureMemory) -> None:
    memory.tables.put_pasid_entry(RID, PASID, ENTRY)
    at = memory.entry_at(RID, PASID)
    memory.stores.clear()
    memory.tables.retire_pasid_entry(RID, PASID)
    assert memory.stores == [(at, WORDS[0] & ~1)]
    memory.tables.clear_pasid_entry(RID, PASID)
    assert [memory.word(at + 8 * n) for n in range(8)] == [0] * 8


def test_an_entry_is_not_stored_over_a_present_one_nor_cleared_while_it_is(memory: StructureMemory) -> None:
    memory.tables.put_pasid_entry(RID, PASID, ENTRY)
    with pytest.raises(AssertionError, match="an entry is present"):
        memory.tables.put_pasid_entry(RID, PASID, PasidEntry())
    with pytest.raises(AssertionError, match="the entry is present"):
        memory.tables.clear_pasid_entry(RID, PASID)


def test_going_out_twice_is_going_out(memory: StructureMemory) -> None:
    """A device that never got onto its HWPT is taken off it all the same."""
    memory.tables.retire_pasid_entry(RID, PASID)
    memory.tables.clear_pasid_entry(RID, PASID)
    assert memory.word(memory.entry_at(RID, PASID)) == 0
