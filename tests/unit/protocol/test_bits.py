"""Masks and predicates of one entry against numbers from the format tables [SDM 29.3.2], [RFC 24/42]."""

from __future__ import annotations

import pytest

from protocol.pt import bits, entry
from protocol.units import Level

LEAF_4K = 0x0E00_0001_2345_6377
LEAF_2M = 0x0E00_0001_2340_03F7
TABLE = 0x0800_0000_0010_2107


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (bits.RWX, 0x7),
        (bits.MEMTYPE_MASK, 0x38),
        (bits.MEMTYPE_WB, 0x30),
        (bits.IGNORE_PAT, 0x40),
        (bits.PAGE_SIZE_BIT, 0x80),
        (bits.ACCESSED, 0x100),
        (bits.DIRTY, 0x200),
        (bits.SNOOP, 0x800),
        (bits.ADDRESS_MASK, 0x000F_FFFF_FFFF_F000),
        (bits.AD_DISABLED, 0x0010_0000_0000_0000),
        (bits.AD_WRPROT_ONLY, 0x0020_0000_0000_0000),
        (bits.SAVED_MASK, 0x0140_0000_0000_0000),
        (bits.HOST_WRITABLE, 0x0200_0000_0000_0000),
        (bits.MMU_WRITABLE, 0x0400_0000_0000_0000),
        (bits.MMU_PRESENT, 0x0800_0000_0000_0000),
        (bits.TRANSIENT, 0x4000_0000_0000_0000),
        (bits.FROZEN, 0x5A0),
    ],
)
def test_a_mask_has_the_bits_of_the_table(mask: int, expected: int) -> None:
    assert mask == expected


def test_no_software_bit_is_one_a_walker_interprets() -> None:
    both_ignore = set(range(52, 62)) | {63}
    used = {n for n in range(64) if bits.SOFTWARE_BITS >> n & 1}
    assert used == {52, 53, 54, 56, 57, 58, 59}
    assert used <= both_ignore


@pytest.mark.parametrize(
    ("value", "level", "present", "frozen", "leaf", "table"),
    [
        (LEAF_4K, 1, True, False, True, False),
        (LEAF_2M, 2, True, False, True, False),
        (LEAF_2M, 3, True, False, True, False),
        (LEAF_2M, 4, True, False, False, True),  # bit 7 makes no leaf above 1 GiB
        (TABLE, 2, True, False, False, True),
        (TABLE, 5, True, False, False, True),
        (0, 2, False, False, False, False),
        (0x5A0, 2, False, True, False, False),
        (0x5A0, 1, False, True, False, False),
        (LEAF_4K & ~(1 << 59) | 1 << 11, 1, False, False, False, False),  # the marker's old place
    ],
)
def test_an_entry_is_one_of_four_things(
    value: int, level: int, present: bool, frozen: bool, leaf: bool, table: bool
) -> None:
    assert entry.is_present(value) == present
    assert entry.is_frozen(value) == frozen
    assert entry.is_present_leaf(value, Level(level)) == leaf
    assert entry.is_table(value, Level(level)) == table


def test_the_address_is_bits_51_to_12() -> None:
    assert entry.pfn_of(LEAF_4K) == 0x1_2345_6
    assert entry.table_of(TABLE) == 0x10_2000
    assert entry.pfn_of(0xFFFF_FFFF_FFFF_FFFF) == 0xFF_FFFF_FFFF


def test_writable_is_bit_1_alone() -> None:
    assert entry.is_writable(LEAF_4K)
    assert not entry.is_writable(LEAF_4K & ~2)
