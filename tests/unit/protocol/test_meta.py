"""Metadata of an exported TDP against bytes worked by hand from the struct [RFC 02/42]."""

from __future__ import annotations

import pytest

from protocol.pt.meta import ExportedTdpMeta, promised_masks
from protocol.pt.walk import ept_rules
from protocol.units import Hpa, Level

# H is 51..46; every mask has bit 11; bit 7 clear: PTE, PDE, PDPTE, PML4E, PML5E.
TABLE_MASKS = (
    0x000F_C000_0000_0800,
    0x000F_C000_0000_0878,
    0x000F_C000_0000_0878,
    0x000F_C000_0000_08F8,
    0x000F_C000_0000_08F8,
)
LEAF_MASKS = (
    0x000F_C000_0000_0800,
    0x000F_C000_001F_F800,
    0x000F_C000_3FFF_F800,
    0x000F_C000_0000_08F8,
    0x000F_C000_0000_08F8,
)
META = ExportedTdpMeta(1, Level(4), Hpa(0x0012_3456_7000), Level(3), (TABLE_MASKS, LEAF_MASKS))
RAW = bytes.fromhex(
    "01000000 04000000"  # type, level
    "0070563412000000"  # root_hpa
    "03000000 00000000"  # max_huge_page_level, padding
    "0008000000c00f00"
    "7808000000c00f00"
    "7808000000c00f00"
    "f808000000c00f00"
    "f808000000c00f00"
    "0008000000c00f00"
    "00f81f0000c00f00"
    "00f8ff3f00c00f00"
    "f808000000c00f00"
    "f808000000c00f00"
)


@pytest.mark.rfc("RFC-25")
def test_the_struct_has_its_104_bytes_in_their_places() -> None:
    assert len(RAW) == 104
    assert META.to_bytes() == RAW
    assert ExportedTdpMeta.from_bytes(RAW) == META


@pytest.mark.parametrize("size", [0, 103, 105])
def test_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="104 bytes"):
        ExportedTdpMeta.from_bytes(bytes(size))


def test_values_are_the_readers_to_judge() -> None:
    read = ExportedTdpMeta.from_bytes(b"\xff" * 104)
    assert (read.type, read.level, read.max_huge_page_level) == (-1, -1, -1)
    assert read.root_hpa == (1 << 64) - 1


@pytest.mark.rfc("RFC-25")
def test_the_masks_of_a_46_bit_cpu_are_those_of_the_table() -> None:
    assert promised_masks(ept_rules(46, Level(3))) == (TABLE_MASKS, LEAF_MASKS)


@pytest.mark.rfc("RFC-26")
@pytest.mark.parametrize("width", [36, 46, 52])
@pytest.mark.parametrize("huge", [1, 2, 3])
def test_every_mask_promises_bit_11(width: int, huge: int) -> None:
    for masks in promised_masks(ept_rules(width, Level(huge))):
        assert len(masks) == 5
        assert all(mask >> 11 & 1 for mask in masks)


def test_a_leaf_size_the_cpu_lacks_is_reserved() -> None:
    _, leaf = promised_masks(ept_rules(46, Level(2)))
    assert leaf[1] >> 7 & 1 == 0
    assert leaf[2] >> 7 & 1 == 1
    _, leaf = promised_masks(ept_rules(46, Level(1)))
    assert leaf[1] >> 7 & 1 == 1
