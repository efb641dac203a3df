"""Read-only walks of the table: one code, and the CPU's and the remapping unit's rules as data.

Models the EPT walk [SDM 29.3.2] and the VT-d second-stage walk [VT-d 9.8].  They read the same bits and
differ in what they call present (X counts for the CPU only), in the reserved bits (bit 11 and 62 for
the unit), in the combinations that are illegal (W without R is a misconfiguration for the CPU, a
write-only leaf for the unit) and in nothing else.  What kvmd stores is legal by both (I17).  Rights are
the AND over the entries used; judging them is the caller's, because the two report a lack of them
differently.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from typing import NamedTuple

from protocol.pt import bits
from protocol.pt.geometry import ENTRY_BYTES, MAX_LEAF_LEVEL, MAX_LEVEL, level_shift
from protocol.pt.mem import TableOutside, TableReader
from protocol.units import LEVEL_4K, PAGE_SIZE, Hpa, Level
from protocol.units import bits as bit_range


class Outcome(IntEnum):
    MAPPED = 0
    ABSENT = 1  # an entry on the path is not present by these rules
    RESERVED = 2  # a present entry has a reserved bit or an illegal combination


class Walk(NamedTuple):
    """Where a walk ended: the entry, its level and table page, the rights of the whole path and above it."""

    outcome: Outcome
    level: Level
    entry: int
    rights: int
    rights_above: int  # AND over the table entries only: what a paging-structure cache keeps with `table`
    table: Hpa

    def hpa(self, address: int) -> Hpa:
        """Host address of `address`; only for MAPPED."""
        assert self.outcome is Outcome.MAPPED, f"{self.outcome.name} has no hpa"
        offset = address & ((1 << level_shift(self.level)) - 1)
        return Hpa((self.entry & bits.ADDRESS_MASK) | offset)


@dataclass(frozen=True, slots=True)
class WalkRules:
    """How one kind of walker reads an entry.  Masks are indexed by level; index 0 is unused."""

    name: str
    present: int  # any of these bits: the entry is present
    reserved_table: tuple[int, ...]
    reserved_leaf: tuple[int, ...]
    illegal: frozenset[int]  # values of bits 5:0 (EMT and XWR) that no entry may have
    # What lets `walk` take a step without looking closer: the bits any rule asks about, and their values in
    # a table entry with every right, and in a legal 4 KiB leaf.
    asked: int = field(init=False, repr=False)
    plain_table: frozenset[int] = field(init=False, repr=False)
    plain_leaf: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        reserved = 0
        for mask in (*self.reserved_table, *self.reserved_leaf[: LEVEL_4K + 1]):
            reserved |= mask
        unused_by_tables = reserved | bits.PAGE_SIZE_BIT
        low = range(PAGE_SIZE)
        present = [v for v in low if v & self.present and v & 63 not in self.illegal]
        tables = [v for v in present if v & bits.RWX == bits.RWX and not v & unused_by_tables]
        leaves = [v for v in present if not v & self.reserved_leaf[LEVEL_4K]]
        object.__setattr__(self, "asked", reserved | PAGE_SIZE - 1)
        object.__setattr__(self, "plain_table", frozenset(tables))
        object.__setattr__(self, "plain_leaf", frozenset(leaves))


def walk(tables: TableReader, rules: WalkRules, root: Hpa, levels: Level, address: int) -> Walk:
    """Translate one address within the root's width (the caller's check).  Raises TableOutside when a
    table lies where no table memory is.

    The hottest loop of the model: it follows plain entries to a 4 KiB leaf; anything else walks again,
    closely.
    """
    words, base, asked, plain = tables.words, tables.base, rules.asked, rules.plain_table
    offset = root - base
    if offset < 0:  # it would index from the window's end
        raise TableOutside(f"no table memory at hpa {root:#x}")
    try:
        for shift in _TABLE_SHIFTS[levels]:
            entry = words[(offset >> 3) + (address >> shift & 511)]
            offset = (entry & 0xF_FFFF_FFFF_F000) - base
            if entry & asked not in plain or offset < 0:
                return _walk_closely(tables, rules, root, levels, address)
        entry = words[(offset >> 3) + (address >> 12 & 511)]
    except IndexError:
        raise TableOutside(f"no table memory at hpa {offset + base:#x}") from None
    if entry & asked not in rules.plain_leaf:
        return _walk_closely(tables, rules, root, levels, address)
    return _new(Walk, (_MAPPED, 1, entry, entry & 7, 7, offset + base))


def _walk_closely(tables: TableReader, rules: WalkRules, root: Hpa, levels: Level, address: int) -> Walk:
    """The rules as they are written, entry by entry: what `walk` must agree with."""
    table, rights = root, bits.RWX
    for level in range(levels, 0, -1):
        entry = tables.load64(table + (address >> level_shift(Level(level)) & 511) * ENTRY_BYTES)
        if not entry & rules.present:
            return Walk(Outcome.ABSENT, Level(level), entry, 0, rights, table)
        leaf = level == LEVEL_4K or (level <= MAX_LEAF_LEVEL and entry & bits.PAGE_SIZE_BIT != 0)
        reserved = rules.reserved_leaf[level] if leaf else rules.reserved_table[level]
        if entry & reserved or entry & 63 in rules.illegal:
            return Walk(Outcome.RESERVED, Level(level), entry, 0, rights, table)
        if leaf:
            return Walk(Outcome.MAPPED, Level(level), entry, rights & entry, rights, table)
        rights &= entry
        table = Hpa(entry & bits.ADDRESS_MASK)
    raise AssertionError("an entry of level 1 is a leaf")


assert bits.ADDRESS_MASK == 0xF_FFFF_FFFF_F000
assert bits.RWX == 7
_TABLE_SHIFTS = tuple(
    tuple(level_shift(Level(level)) for level in range(levels, 1, -1)) for levels in range(MAX_LEVEL + 1)
)
_MAPPED = Outcome.MAPPED
_new = tuple.__new__  # a NamedTuple's own constructor costs twice as much


def _by_level(masks: dict[int, int], common: int) -> tuple[int, ...]:
    return tuple(masks.get(level, 0) | common for level in range(MAX_LEVEL + 1))


def _leaf_low_bits(max_leaf_level: Level) -> dict[int, int]:
    """Address bits below a huge leaf's alignment; a size the walker lacks makes bit 7 itself reserved."""
    masks = {2: bit_range(20, 12), 3: bit_range(29, 12)}
    return {k: m | (bits.PAGE_SIZE_BIT if k > max_leaf_level else 0) for k, m in masks.items()}


@cache
def ept_rules(maxphyaddr: int, max_leaf_level: Level, *, execute_only: bool = True) -> WalkRules:
    """The CPU's rules [SDM 29.3.2], reserved masks as in KVM's rsvds_bits_mask_ept [KVM mmu.c]."""
    high = bit_range(51, maxphyaddr) if maxphyaddr < 52 else 0
    huge = {level: 0 if level <= max_leaf_level else bits.PAGE_SIZE_BIT for level in (2, 3)}
    tables = {
        5: bit_range(7, 3),
        4: bit_range(7, 3),
        3: bit_range(6, 3) | huge[3],
        2: bit_range(6, 3) | huge[2],
    }
    bad_rights = {0b010, 0b110} | (set() if execute_only else {0b100})
    illegal = {low6 for low6 in range(64) if low6 & 7 in bad_rights or low6 >> 3 in (2, 3, 7)}
    return WalkRules(
        name="EPT",
        present=bits.RWX,
        reserved_table=_by_level(tables, high),
        reserved_leaf=_by_level(_leaf_low_bits(max_leaf_level), high),
        illegal=frozenset(illegal),
    )


@cache
def second_stage_rules(haw: int, max_leaf_level: Level, *, snoop_control: bool) -> WalkRules:
    """The remapping unit's rules [VT-d 9.8]: X and EMT are ignored, bit 11 and bit 62 are reserved.

    With snoop control the leaf's bit 11 is SNP, legal; in a table entry it is reserved all the same.
    """
    high = (bit_range(51, haw) if haw < 52 else 0) | bits.TRANSIENT
    tables = {5: bits.PAGE_SIZE_BIT, 4: bits.PAGE_SIZE_BIT}
    return WalkRules(
        name="second stage",
        present=bits.READ | bits.WRITE,
        reserved_table=_by_level(tables, high | bits.SNOOP),
        reserved_leaf=_by_level(_leaf_low_bits(max_leaf_level), high | (0 if snoop_control else bits.SNOOP)),
        illegal=frozenset(),
    )
