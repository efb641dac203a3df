"""Entries kvmd stores against values worked by hand from the bit tables [RFC 24/42]."""

from __future__ import annotations

import pytest

from kvmd.core.tables.spte import split_children
from protocol.pt.ept import ept_format
from protocol.pt.walk import ept_rules
from protocol.units import Hpa, Level, Pfn

RULES = ept_rules(46, Level(3))
FORMATS = [ept_format(RULES, ad_enabled=enabled) for enabled in (False, True)]


@pytest.mark.rfc("RFC-28")
@pytest.mark.parametrize(
    ("pfn", "level", "writable", "ad", "expected"),
    [
        (0x12345, 1, True, True, 0x0E00_0000_1234_5377),
        (0x12345, 1, False, True, 0x0800_0000_1234_5175),
        (0x12200, 2, True, True, 0x0E00_0000_1220_03F7),
        (0x12200, 2, False, True, 0x0800_0000_1220_01F5),
        (0x80000, 3, True, True, 0x0E00_0000_8000_03F7),
        (0x12345, 1, True, False, 0x0E10_0000_1234_5077),
        (0x12345, 1, False, False, 0x0810_0000_1234_5075),
        (0x3_FFFF_FFFF, 1, True, True, 0x0E00_3FFF_FFFF_F377),
    ],
)
def test_a_leaf_has_the_bits_of_the_table(
    pfn: int, level: int, writable: bool, ad: bool, expected: int
) -> None:
    leaf = FORMATS[ad].make_leaf(Pfn(pfn), Level(level), writable=writable)
    assert f"{leaf:#x}" == f"{expected:#x}"
    FORMATS[ad].check(leaf, Level(level))


@pytest.mark.rfc("RFC-28")
def test_a_table_entry_has_the_bits_of_the_table() -> None:
    assert FORMATS[True].make_table(Hpa(0x10_2000), Level(2)) == 0x0800_0000_0010_2107
    assert FORMATS[False].make_table(Hpa(0x10_2000), Level(5)) == 0x0810_0000_0010_2007


@pytest.mark.parametrize(("pfn", "level"), [(0x12201, 2), (0x40001, 3), (0x200, 3)])
def test_a_huge_leaf_of_an_unaligned_frame_is_a_bug(pfn: int, level: int) -> None:
    with pytest.raises(AssertionError, match="aligned"):
        FORMATS[True].make_leaf(Pfn(pfn), Level(level), writable=True)


@pytest.mark.parametrize(
    ("leaf", "level", "index", "expected"),
    [
        (0x0E00_0000_1220_03F7, 2, 0, 0x0E00_0000_1220_0377),
        (0x0E00_0000_1220_03F7, 2, 511, 0x0E00_0000_123F_F377),
        (0x0800_0000_1220_01F5, 2, 1, 0x0800_0000_1220_1175),
        (0x0E00_0000_8000_03F7, 3, 0, 0x0E00_0000_8000_03F7),
        (0x0E00_0000_8000_03F7, 3, 511, 0x0E00_0000_BFE0_03F7),
    ],
)
def test_a_child_maps_its_part_of_the_leaf_with_the_same_rights(
    leaf: int, level: int, index: int, expected: int
) -> None:
    assert f"{split_children(FORMATS[True], leaf, Level(level))[index]:#x}" == f"{expected:#x}"


@pytest.mark.rfc("RFC-27")
@pytest.mark.parametrize(
    ("entry", "level", "leaf"),
    [
        (0x0E00_0000_1234_5B77, 1, True),  # bit 11
        (0x0800_0000_0010_2907, 2, False),
        (0x0E00_4000_1234_5377, 1, True),  # bit 46
        (0x0E00_0000_1220_13F7, 2, True),  # 2 MiB, not aligned
        (0x0800_0000_0010_2147, 3, False),  # bit 6 of a table entry
        (0x0E00_0000_1234_5376, 1, True),  # W and X without R
    ],
)
def test_an_entry_that_breaks_the_promise_is_a_bug(entry: int, level: int, leaf: bool) -> None:
    with pytest.raises(AssertionError, match=r"sets reserved bits|illegal combination"):
        FORMATS[True].check(entry, Level(level))
    assert FORMATS[True].is_leaf(entry, Level(level)) == leaf
