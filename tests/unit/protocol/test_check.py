"""Each whole-table invariant, broken on purpose in raw bytes, is found and named."""

from __future__ import annotations

import struct

import pytest

from protocol.pt.check import check_second_stage, check_table, frozen_or_mmio
from protocol.pt.ept import EPT_AD
from protocol.pt.mem import TableReader
from protocol.pt.walk import ept_rules, second_stage_rules
from protocol.units import Hpa, Level

BASE = 0x10_0000
RULES = (ept_rules(46, Level(3)), second_stage_rules(46, Level(3), snoop_control=True))
TABLE = 0x0800_0000_0000_0107
LEAF = 0x0E00_0001_2345_6377
IO_TABLE, IO_LEAF = 3, 0x0000_0001_2345_6003


class CheckedTables:
    """Root in page 0, one table a level below it, two leaves in page 3."""

    def __init__(self, table: int = TABLE, leaf: int = LEAF) -> None:
        self.memory = bytearray(6 * 4096)
        for page in range(3):
            self.put(page, 0, BASE + (page + 1) * 4096 | table)
        self.put(3, 0, leaf)
        self.put(3, 1, leaf + 0x1000)

    def put(self, page: int, index: int, entry: int) -> None:
        struct.pack_into("<Q", self.memory, page * 4096 + 8 * index, entry)

    def complaints(self) -> list[str]:
        tables = TableReader(Hpa(BASE), memoryview(self.memory))
        return check_table(tables, EPT_AD, Hpa(BASE), Level(4), RULES, frozen_or_mmio)


class IoTables(CheckedTables):
    """The same of iommufdd's, which no CPU walks."""

    def __init__(self) -> None:
        super().__init__(IO_TABLE, IO_LEAF)

    def complaints(self) -> list[str]:
        tables = TableReader(Hpa(BASE), memoryview(self.memory))
        return check_second_stage(tables, Hpa(BASE), Level(4), Level(3))


def test_a_sound_table_has_no_complaint() -> None:
    tables = CheckedTables()
    tables.put(2, 5, 0x0E00_0001_2340_03F7)
    tables.put(1, 5, 0x0E00_0001_4000_03F7)
    tables.put(3, 2, 0x0800_0001_2345_6175)
    tables.put(3, 3, 0x5A0)
    assert tables.complaints() == []


@pytest.mark.parametrize(
    ("page", "entry", "number"),
    [
        (3, LEAF | 1 << 11, "I2"),  # SNP in a leaf
        (2, BASE + 0x4000 | TABLE | 1 << 11, "I2"),
        (0, 1 << 11, "I2"),  # even in an absent entry
        (3, LEAF & ~(1 << 59), "I3"),  # mapped, and the writer does not know
        (2, BASE + 0x4000 | TABLE & ~(1 << 59), "I3"),
        (3, 0x8000_0000_0000_0000, "I3"),  # absent for both walkers, but neither empty nor frozen
        (3, 0x5A1, "I3"),
        (3, LEAF & ~7, "I3"),  # marked present, absent for both
        (3, LEAF & ~3, "I3"),  # X only: present for the CPU, absent for the unit
        (3, LEAF | 1 << 62, "I17"),
        (3, LEAF | 1 << 46, "I17"),
        (3, LEAF & ~1, "I17"),  # W without R
        (3, LEAF & ~0x38 | 7 << 3, "I17"),
        (2, 0x0E00_0001_2340_13F7, "I17"),  # 2 MiB leaf, not aligned
        (1, 0x0E00_0001_4020_03F7, "I17"),  # 1 GiB leaf, not aligned
        (2, BASE + 0x4000 | TABLE | 1 << 6, "I17"),
        (0, BASE + 0x4000 | TABLE | 1 << 7, "I17"),
        (2, BASE + 0x3000 | TABLE, "I18"),  # linked twice
        (2, BASE | TABLE, "I18"),  # the root, from below
        (2, BASE + 6 * 4096 | TABLE, "I18"),  # beyond table memory
        (2, BASE - 4096 | TABLE, "I18"),
    ],
)
def test_a_broken_entry_is_found(page: int, entry: int, number: str) -> None:
    tables = CheckedTables()
    tables.put(page, 7, entry)
    found = tables.complaints()
    assert number in {sentence.split(":")[0] for sentence in found}, found


def test_a_sound_table_of_iommufdds_has_no_complaint() -> None:
    tables = IoTables()
    tables.put(2, 5, 0x0000_0001_2340_0083)
    tables.put(1, 5, 0x0000_0001_4000_0081)
    tables.put(3, 2, 0x0000_0001_2345_6001)
    assert tables.complaints() == []


@pytest.mark.parametrize(
    ("page", "entry", "number"),
    [
        (3, IO_LEAF | 1 << 11, "I2"),
        (2, BASE + 0x4000 | IO_TABLE | 1 << 11, "I2"),
        (3, 0x5A0, "I3"),  # KVM's frozen entry, which is none of its words
        (3, 1 << 63 | 0x3000, "I3"),  # nor an MMIO entry of KVM's
        (3, IO_LEAF & ~1, "I3"),  # write-only: a leaf to the unit, absent to its writer
        (3, IO_LEAF & ~3, "I3"),
        (3, IO_LEAF | 1 << 62, "I17"),
        (2, 0x0000_0001_2340_1083, "I17"),  # 2 MiB leaf, not aligned
        (1, 0x0000_0001_4020_0083, "I17"),  # 1 GiB leaf, not aligned
        (0, BASE + 0x4000 | IO_TABLE | 1 << 7, "I17"),
        (2, BASE + 0x3000 | IO_TABLE, "I18"),
        (2, BASE | IO_TABLE, "I18"),
        (2, BASE + 6 * 4096 | IO_TABLE, "I18"),
        (2, BASE - 4096 | IO_TABLE, "I18"),
    ],
)
def test_a_broken_entry_of_iommufdds_is_found(page: int, entry: int, number: str) -> None:
    tables = IoTables()
    tables.put(page, 7, entry)
    found = tables.complaints()
    assert number in {sentence.split(":")[0] for sentence in found}, found


def test_a_complaint_says_where() -> None:
    tables = CheckedTables()
    tables.put(3, 7, LEAF | 1 << 62)
    assert tables.complaints() == [
        "I17: gfn 0x7 level 1 entry 0x4e00000123456377: reserved by second stage rules"
    ]
