"""A table's format as one object: what an entry says, and how one is made.  All of it is data.

Models the format headers of the kernel's generic page tables [iommupt pt_common.h]: an algorithm over a
table asks its format, and names no bit itself.  A format is its *writer's*: it tells a table from a leaf, and
either from what is absent, by bits that the writer sets in each (for KVM bit 59).  What a walker makes of an
entry its `WalkRules` say (`protocol/pt/walk.py`); the bits they reserve are here too, so that none is made.

Everything a format says of one level is `entry & mask == value`; so page-size bits, "next level" fields and
descriptor types are told apart alike, and a right that a bit takes away (no-execute) is one as well.
Its instances: `protocol/pt/ept.py`, `protocol/pt/second_stage.py`; one suite runs for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from protocol.pt.geometry import ENTRIES, MAX_LEVEL
from protocol.pt.walk import WalkRules
from protocol.units import PAGE_SHIFT, Hpa, Level, Pfn, pages_of_level, size_of_level


class Match(NamedTuple):
    """An entry is one if `entry & mask == value`."""

    mask: int
    value: int


NEVER = Match(0, 1)
# By level, from 0, which is unused, to 5.
ByLevel = tuple[int, ...]
_NOTHING = (0,) * (MAX_LEVEL + 1)


class Right(NamedTuple):
    """One right of a leaf, which has it if `entry & mask == value`, and is made with `given` or `denied`."""

    mask: int
    value: int
    given: int
    denied: int = 0

    @classmethod
    def by_bit(cls, given: int) -> Right:
        """The right that one bit gives."""
        return cls(given, given, given)

    def __call__(self, entry: int) -> bool:
        return entry & self.mask == self.value


@dataclass(frozen=True, slots=True, eq=False)
class TableFormat:
    """`table` and `leaf` say of each level which entries are one; every other entry is absent.

    A table entry is the table's address and `table_bits`; a leaf that of its memory, the value of its
    `Match`, `leaf_bits` and its rights, and `accessed` if it counts as used.  `accessed` and `dirty` are what
    the walkers set by themselves; 0 where they set nothing.
    """

    name: str
    address: int
    table: tuple[Match, ...]
    leaf: tuple[Match, ...]
    table_bits: ByLevel
    leaf_bits: int
    read: Right
    write: Right
    execute: Right
    accessed: int = 0
    dirty: int = 0
    reserved_table: ByLevel = _NOTHING
    reserved_leaf: ByLevel = _NOTHING
    illegal: frozenset[int] = frozenset()  # values of bits 5:0 that no present entry may have

    def __post_init__(self) -> None:
        assert len(self.table) == len(self.leaf) == len(self.table_bits) == MAX_LEVEL + 1, self.name
        assert self.table[1] == NEVER != self.leaf[1], f"{self.name}: an entry of level 1 is a leaf"
        assert all(match.value for match in (*self.table, *self.leaf)), f"{self.name}: 0 is an absent entry"

    def under(self, *walkers: WalkRules, never: int = 0) -> TableFormat:
        """The same for a table that `walkers` read: no bit that one of them reserves, nor one of `never`."""
        table, leaf, illegal = [never] * (MAX_LEVEL + 1), [never] * (MAX_LEVEL + 1), frozenset[int]()
        for rules in walkers:
            table = [one | other for one, other in zip(table, rules.reserved_table, strict=True)]
            leaf = [one | other for one, other in zip(leaf, rules.reserved_leaf, strict=True)]
            illegal |= rules.illegal
        return replace(self, reserved_table=tuple(table), reserved_leaf=tuple(leaf), illegal=illegal)

    # -- reading ---------------------------------------------------------------------------------------

    def is_table(self, entry: int, level: Level) -> bool:
        mask, value = self.table[level]
        return entry & mask == value

    def is_leaf(self, entry: int, level: Level) -> bool:
        mask, value = self.leaf[level]
        return entry & mask == value

    def is_present(self, entry: int, level: Level) -> bool:
        return self.is_leaf(entry, level) or self.is_table(entry, level)

    def table_of(self, entry: int) -> Hpa:
        """Where the table a table entry points to lies."""
        return Hpa(entry & self.address)

    def pfn_of(self, entry: int) -> Pfn:
        """The frame a leaf maps (the first one, for a huge leaf)."""
        return Pfn((entry & self.address) >> PAGE_SHIFT)

    # -- making ----------------------------------------------------------------------------------------

    def make_table(self, table: Hpa, level: Level) -> int:
        """The entry of `level` that points to the table page at `table`."""
        return table | self.table_bits[level]

    def make_leaf(
        self, pfn: Pfn, level: Level, *, writable: bool, executable: bool = True, accessed: bool = True
    ) -> int:
        """The entry of `level` that maps `pfn`, the first frame of its size."""
        assert pfn % pages_of_level(level) == 0, f"pfn {pfn:#x} is not aligned for level {level}"
        return pfn << PAGE_SHIFT | _leaf_bits(self, level, writable, executable, accessed)

    def split(self, leaf: int, level: Level) -> list[int]:
        """The entries of the table that translates as the huge `leaf` of `level` does."""
        below = Level(level - 1)
        first = leaf & ~self.leaf[level].mask | self.leaf[below].value
        step = size_of_level(below)
        return list(range(first, first + ENTRIES * step, step))

    def check(self, entry: int, level: Level) -> None:
        """Assert that a present entry has nothing that a walker of the table reserves (I2, I17)."""
        mask, value = self.leaf[level]
        if entry & mask == value:
            reserved = self.reserved_leaf[level]
        else:
            assert self.is_table(entry, level), f"{self.name}: {entry:#018x} of level {level} is neither"
            reserved = self.reserved_table[level]
        assert not entry & reserved, f"entry {entry:#018x} at level {level} sets reserved bits"
        assert entry & 63 not in self.illegal, f"entry {entry:#018x}: illegal combination"


@lru_cache(maxsize=1024)
def _leaf_bits(fmt: TableFormat, level: Level, writable: bool, executable: bool, accessed: bool) -> int:
    """All of a leaf but its address: what making one would work out again and again."""
    entry = fmt.leaf[level].value | fmt.leaf_bits | fmt.read.given
    entry |= fmt.write.given if writable else fmt.write.denied
    entry |= fmt.execute.given if executable else fmt.execute.denied
    return entry | fmt.accessed if accessed else entry
