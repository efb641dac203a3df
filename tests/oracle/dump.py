"""A reader of TABLES.json and TABLES.bin that shares nothing with the model: what another tool would do.

It walks the raw bytes by the second-stage rules, written here once more from the format table [VT-d 9.8], and
compares every probe with what the walk found.  Nothing of the product is imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESERVED_EVERYWHERE = 1 << 11 | 1 << 62
LEAF_SHIFT = {1: 12, 2: 21, 3: 30}


@dataclass
class Leaf:
    hpa: int
    readable: bool
    writable: bool
    size: int


class Broken(Exception):
    """The walk met a reserved bit, or a table that is not in the dump."""


class Dump:
    def __init__(self, directory: Path) -> None:
        self.document: dict[str, Any] = json.loads((directory / "TABLES.json").read_text())
        self.regions: list[tuple[int, bytearray]] = []
        for region in self.document["regions"]:
            with (directory / region["file"]).open("rb") as file:
                file.seek(region["offset"])
                data = bytearray(file.read(region["length"]))
            assert len(data) == region["length"], "the file is shorter than its regions"
            self.regions.append((region["base_hpa"], data))

    def slot_of(self, hpa: int) -> tuple[bytearray, int]:
        for base, data in self.regions:
            if base <= hpa < base + len(data):
                return data, hpa - base
        raise Broken(f"no table at {hpa:#x}")

    def walk(self, gpa: int) -> tuple[Leaf | None, int]:
        """The translation, and where the last entry lies."""
        table, rights = self.document["root_hpa"], 3
        for level in range(self.document["levels"], 0, -1):
            at = table + 8 * (gpa >> 12 + 9 * (level - 1) & 511)
            data, offset = self.slot_of(at)
            entry = int.from_bytes(data[offset : offset + 8], "little")
            if entry & 3 == 0:
                return None, at
            leaf = level == 1 or (level <= 3 and entry >> 7 & 1)
            if entry & RESERVED_EVERYWHERE or (level > 3 and entry >> 7 & 1):
                raise Broken(f"gpa {gpa:#x} level {level}: reserved bit in {entry:#x}")
            rights &= entry
            target = entry & 0x000F_FFFF_FFFF_F000
            if leaf:
                size = 1 << LEAF_SHIFT[level]
                if target % size:
                    raise Broken(f"gpa {gpa:#x} level {level}: misaligned {entry:#x}")
                return Leaf(target + gpa % size, bool(rights & 1), bool(rights & 2), size), at
            table = target
        raise AssertionError("an entry of level 1 is a leaf")

    def mismatches(self) -> list[str]:
        found = []
        for probe in self.document["probes"]:
            try:
                leaf, _ = self.walk(probe["gpa"])
            except Broken as error:
                found.append(str(error))
                continue
            if leaf is None:
                seen: tuple[Any, ...] = (None, False, False)
            else:
                seen = (leaf.hpa, leaf.readable, leaf.writable)
                if leaf.size > probe["page_size"]:
                    found.append(f"gpa {probe['gpa']:#x}: a leaf of {leaf.size:#x} for {probe}")
            if seen != (probe["expect_hpa"], probe["readable"], probe["writable"]):
                found.append(f"gpa {probe['gpa']:#x}: the walk finds {seen}, expected {probe}")
        return found
