"""Shape of a radix table: 512 entries of 8 bytes a page, 9 address bits a level, 4 or 5 levels.

Models the index math that EPT and VT-d second stage share [SDM 29.3.2], [VT-d 3.6].  A table of L
levels translates 12 + 9 * L address bits; entries above level 3 are never leaves.
"""

from __future__ import annotations

from protocol.units import LEVEL_1G, PAGE_SHIFT, Gfn, GfnSpan, Level, align_down, pages_of_level

ENTRIES = 512
ENTRY_BYTES = 8
INDEX_BITS = 9
ROOT_LEVELS = (Level(4), Level(5))
MAX_LEVEL = Level(5)
MAX_LEAF_LEVEL = LEVEL_1G


def level_shift(level: Level) -> int:
    """The lowest address bit that indexes a table of `level`."""
    return PAGE_SHIFT + INDEX_BITS * (level - 1)


def index_of(gfn: Gfn, level: Level) -> int:
    """Which of the 512 entries of a table of `level` translates `gfn`."""
    return (gfn >> (INDEX_BITS * (level - 1))) & (ENTRIES - 1)


def entry_start(gfn: Gfn, level: Level) -> Gfn:
    """First gfn of the entry of `level` that translates `gfn`."""
    return Gfn(align_down(gfn, pages_of_level(level)))


def entry_span(gfn: Gfn, level: Level) -> GfnSpan:
    """All gfns of the entry of `level` that translates `gfn`."""
    return GfnSpan.of_pages(entry_start(gfn, level), pages_of_level(level))


def address_bits(levels: Level) -> int:
    """Width of the address a root of `levels` levels translates: 48 or 57."""
    return PAGE_SHIFT + INDEX_BITS * levels


def gfn_limit(levels: Level) -> Gfn:
    """First gfn beyond a root of `levels` levels."""
    return Gfn(1 << (INDEX_BITS * levels))
