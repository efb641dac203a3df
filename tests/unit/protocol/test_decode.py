"""Entries in words: literal entries, and what each reader makes of them."""

from __future__ import annotations

import pytest

from protocol.pt.decode import Decoded, decode
from protocol.units import Level

TYPICAL = ("present", "host-writable", "mmu-writable", "ad-enabled")


@pytest.mark.parametrize(
    ("entry", "level", "expected"),
    [
        (0, 1, Decoded("absent", 0, (), (), ())),
        (0x5A0, 2, Decoded("frozen", 0, (), (), ())),
        (
            0x0E00_0001_2345_6377,
            1,
            Decoded("page", 0x1_2345_6000, ("R", "W", "X", "WB", "IPAT", "A", "D"), ("R", "W"), TYPICAL),
        ),
        (
            0x0E00_0001_2340_03F7,
            2,
            Decoded("page", 0x1_2340_0000, ("R", "W", "X", "WB", "IPAT", "A", "D"), ("R", "W"), TYPICAL),
        ),
        (
            0x0800_0000_0000_0107 | 0x5000,
            3,
            Decoded("table", 0x5000, ("R", "W", "X", "A"), ("R", "W"), ("present", "ad-enabled")),
        ),
        (0x0000_0000_0000_6004, 1, Decoded("page", 0x6000, ("X", "UC"), (), ("ad-enabled",))),
        (
            0x0810_0000_0000_6813,
            1,
            Decoded(
                "page", 0x6000, ("R", "W", "bad memory type 2"), ("R", "W", "SNP"), ("present", "ad-disabled")
            ),
        ),
        (0x0140_0000_0000_6000, 1, Decoded("absent", 0, (), (), ("saved-R", "saved-X"))),
        (
            0x4030_0000_0000_6001,
            4,
            Decoded("table", 0x6000, ("R",), ("R", "TM"), ("ad-type 3",)),
        ),
    ],
)
def test_an_entry_is_told_as_its_readers_see_it(entry: int, level: int, expected: Decoded) -> None:
    assert decode(entry, Level(level)) == expected
