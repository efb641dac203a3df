"""The formats that the suite runs for: the product's, and two made-up ones that prove the place is open.

`AMD_V2` has the entries of a CPU's own page table, as AMD's IOMMU reads them [AMD 2.2.6]: present is
readable, and a bit forbids execution.  `NEXT_LEVEL` is AMD's first format cut to three levels [AMD IOMMU
2.2.3]: no page-size bit, each entry says of which level the table is that it leads to, 0 for a leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from protocol.pt.ept import ept_format
from protocol.pt.format import NEVER, Match, Right, TableFormat
from protocol.pt.second_stage import SECOND_STAGE
from protocol.pt.walk import WalkRules, ept_rules, second_stage_rules
from protocol.units import Level

ADDRESS = 0x000F_FFFF_FFFF_F000
P, RW, US, A, D, PS, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 63
AMD_V2 = TableFormat(
    name="AMD v2",
    address=ADDRESS,
    table=(NEVER, NEVER, Match(P | PS, P), Match(P | PS, P), Match(P, P), Match(P, P)),
    leaf=(NEVER, Match(P, P), Match(P | PS, P | PS), Match(P | PS, P | PS), NEVER, NEVER),
    table_bits=(0, 0, *[P | RW | US] * 4),
    leaf_bits=US,
    read=Right.by_bit(P),
    write=Right(P | RW, P | RW, RW | D),
    execute=Right(P | NX, P, 0, NX),
    accessed=A,
    dirty=D,
    reserved_table=(0, 0, 0, 0, PS, PS),
    reserved_leaf=(0, 0, 0x1F_E000, 0x3FFF_E000, 0, 0),
)

PR, NEXT, IR, IW = 1, 7 << 9, 1 << 61, 1 << 62
NEXT_LEVEL = TableFormat(
    name="next level",
    address=ADDRESS,
    table=(NEVER, NEVER, Match(PR | NEXT, PR | 1 << 9), Match(PR | NEXT, PR | 2 << 9), NEVER, NEVER),
    leaf=(NEVER, *[Match(PR | NEXT, PR)] * 3, NEVER, NEVER),
    table_bits=(0, 0, PR | IR | IW | 1 << 9, PR | IR | IW | 2 << 9, 0, 0),
    leaf_bits=0,
    read=Right.by_bit(IR),
    write=Right.by_bit(IW),
    execute=Right(0, 0, 0),
    reserved_table=(0x1FE,) * 6,
    reserved_leaf=(0x1FE, 0x1FE, 0x1F_F1FE, 0x3FFF_F1FE, 0, 0),
)

CPU = ept_rules(46, Level(3))
UNIT = second_stage_rules(46, Level(3), snoop_control=True)


class FoundLeaf(NamedTuple):
    pfn: int
    level: int
    write: bool
    execute: bool


Entry = Callable[[int, int], int]  # (table, index)


class Kind(NamedTuple):
    """A format, the root it is tried with, entries of it worked out by hand, and who else can read it: a
    plain walk of a page number, and the rules of the product's walkers."""

    fmt: TableFormat
    levels: Level
    table: int  # the entry of level 2 that points to the table at 0x1234000
    leaf: int  # of level 1, writable, executable: frame 0x12345
    huge: int  # of level 2, read-only, not executable: frame 0x12400
    walk: Callable[[Entry, int, int, int], FoundLeaf | None]
    rules: tuple[WalkRules, ...] = ()

    def __str__(self) -> str:
        return self.fmt.name


def _ept(entry: Entry, root: int, levels: int, page: int) -> FoundLeaf | None:
    table = root
    for level in range(levels, 0, -1):
        raw = entry(table, page >> 9 * (level - 1) & 511)
        if raw & 7 == 0:
            return None
        if level == 1 or (level < 4 and raw & 0x80):
            return FoundLeaf(_frame(raw, level, page), level, raw & 2 != 0, raw & 4 != 0)
        table = raw & ADDRESS
    raise AssertionError


def _second_stage(entry: Entry, root: int, levels: int, page: int) -> FoundLeaf | None:
    table = root
    for level in range(levels, 0, -1):
        raw = entry(table, page >> 9 * (level - 1) & 511)
        if raw & 3 == 0:
            return None
        if level == 1 or (level < 4 and raw & 0x80):
            return FoundLeaf(_frame(raw, level, page), level, raw & 2 != 0, True)
        table = raw & ADDRESS
    raise AssertionError


def _amd_v2(entry: Entry, root: int, levels: int, page: int) -> FoundLeaf | None:
    table = root
    for level in range(levels, 0, -1):
        raw = entry(table, page >> 9 * (level - 1) & 511)
        if raw & 1 == 0:
            return None
        if level == 1 or (level < 4 and raw & 0x80):
            return FoundLeaf(_frame(raw, level, page), level, raw & 2 != 0, raw >> 63 == 0)
        table = raw & ADDRESS
    raise AssertionError


def _next_level(entry: Entry, root: int, levels: int, page: int) -> FoundLeaf | None:
    table, level = root, levels
    while True:
        raw = entry(table, page >> 9 * (level - 1) & 511)
        if raw & 1 == 0:
            return None
        if raw >> 9 & 7 == 0:
            return FoundLeaf(_frame(raw, level, page), level, raw >> 62 & 1 == 1, True)
        table, level = raw & ADDRESS, raw >> 9 & 7


def _frame(raw: int, level: int, page: int) -> int:
    return ((raw & ADDRESS) >> 12) + page % (1 << 9 * (level - 1))


_EPT_AD = ept_format(CPU, ad_enabled=True)
_EPT_NO_AD = ept_format(CPU, ad_enabled=False)
_IO = SECOND_STAGE.under(UNIT, never=1 << 11)
KINDS = [
    Kind(
        _EPT_AD,
        Level(4),
        0x0800_0000_0123_4107,
        0x0E00_0000_1234_5377,
        0x0800_0000_1240_01F1,
        _ept,
        (CPU, UNIT),
    ),
    Kind(
        _EPT_NO_AD,
        Level(5),
        0x0810_0000_0123_4007,
        0x0E10_0000_1234_5077,
        0x0810_0000_1240_00F1,
        _ept,
        (CPU, UNIT),
    ),
    Kind(_IO, Level(4), 0x0123_4003, 0x1234_5003, 0x1240_0081, _second_stage, (UNIT,)),
    Kind(AMD_V2, Level(5), 0x0123_4007, 0x1234_5067, 0x8000_0000_1240_00A5, _amd_v2),
    Kind(
        NEXT_LEVEL,
        Level(3),
        0x6000_0000_0123_4201,
        0x6000_0000_1234_5001,
        0x2000_0000_1240_0001,
        _next_level,
    ),
]
