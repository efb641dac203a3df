"""One path through a table, in raw bytes, whose entries a test writes out: nothing here knows a rule."""

from __future__ import annotations

from protocol.pt.mem import TableReader
from protocol.pt.walk import Walk, WalkRules, walk
from protocol.units import Hpa, Level

BASE = 0x10_0000
INDEX = {5: 3, 4: 5, 3: 7, 2: 11, 1: 13}
OFFSET = 0xABC
FRAME = 0x1_4000_0000  # aligned for a leaf of any size


def table_at(level: int) -> int:
    """Where the table of `level` lies: the levels' tables are in descending order of address."""
    return BASE + 0x1000 * level


def address(levels: int) -> int:
    return OFFSET | sum(INDEX[level] << 12 + 9 * (level - 1) for level in range(1, levels + 1))


class Path:
    """Every table entry has R, W and X; `leaf` is the level that maps FRAME, write-back."""

    def __init__(self, levels: int, leaf: int = 1) -> None:
        self.levels = levels
        self.leaf = leaf
        self.memory = bytearray(0x6000 + 0x1000)
        for level in range(levels, leaf, -1):
            self.put(level, table_at(level - 1) | 7)
        self.put(leaf, FRAME | 0x37 | (0x80 if leaf > 1 else 0))

    def _offset(self, level: int) -> int:
        return table_at(level) - BASE + 8 * INDEX[level]

    def get(self, level: int) -> int:
        at = self._offset(level)
        return int.from_bytes(self.memory[at : at + 8], "little")

    def put(self, level: int, entry: int) -> None:
        at = self._offset(level)
        self.memory[at : at + 8] = entry.to_bytes(8, "little")

    def rights(self, level: int, xwr: int) -> None:
        self.put(level, self.get(level) & ~7 | xwr)

    def set(self, level: int, bit: int) -> None:
        self.put(level, self.get(level) | 1 << bit)

    def walk(self, rules: WalkRules) -> Walk:
        tables = TableReader(Hpa(BASE), memoryview(self.memory))
        return walk(tables, rules, Hpa(table_at(self.levels)), Level(self.levels), address(self.levels))


# (levels, leaf): every shape a path can have.
SHAPES = [(levels, leaf) for levels in (4, 5) for leaf in (1, 2, 3)]
