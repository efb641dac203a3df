"""A second-dimension table as a dict, and a slow walker written straight from the tables of the manuals.

Models what `protocol/pt/walk.py` and `kvmd/core/tables/tdp_mmu.py` must agree with, in the plainest form:
no masks built by code, no fast path, one `if` per row of the format tables [SDM 29.3.2], [VT-d 9.8].
Nothing here imports the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from protocol.pt.geometry import index_of, level_shift
from protocol.units import Gfn, Level


class Outside(Exception):
    """The walk was led to an address where no table memory is."""


class Found(NamedTuple):
    """`kind` is mapped, absent or reserved; `hpa` and `rights` are 0 unless mapped."""

    kind: str
    level: int
    entry: int
    hpa: int = 0
    rights: int = 0


@dataclass(frozen=True)
class Machine:
    """What the rows of the tables depend on."""

    address_width: int = 46  # MAXPHYADDR of the CPU, HAW of the unit
    max_leaf_level: int = 3
    execute_only: bool = True
    snoop_control: bool = False


@dataclass
class RawTables:
    """Table memory as bytes: `base` is the host address of the first."""

    base: int
    memory: bytes | bytearray | memoryview

    def entry(self, table: int, index: int) -> int:
        at = table - self.base + 8 * index
        if at < 0 or at + 8 > len(self.memory):
            raise Outside(hex(table))
        return int.from_bytes(self.memory[at : at + 8], "little")


def ept_walk(tables: RawTables, machine: Machine, root: int, levels: int, gpa: int) -> Found:
    """The CPU's walk."""
    return _walk(tables, EPT, machine, root, levels, gpa)


def second_stage_walk(tables: RawTables, machine: Machine, root: int, levels: int, address: int) -> Found:
    """The remapping unit's walk."""
    return _walk(tables, SECOND_STAGE, machine, root, levels, address)


def _walk(tables: RawTables, rows: Rows, machine: Machine, root: int, levels: int, address: int) -> Found:
    table, rights = root, 0b111
    for level in range(levels, 0, -1):
        entry = tables.entry(table, index_of(Gfn(address >> 12), Level(level)))
        if not rows.present(entry):
            return Found("absent", level, entry)
        if rows.reserved(machine, entry, level):
            return Found("reserved", level, entry)
        rights &= entry & 7
        if _is_leaf(entry, level):
            return Found("mapped", level, entry, _leaf_hpa(entry, level, address), rights)
        table = entry & 0x000F_FFFF_FFFF_F000
    raise AssertionError("unreachable")


def _ept_present(entry: int) -> bool:
    r, w, x = entry & 1, entry >> 1 & 1, entry >> 2 & 1
    return bool(r or w or x)


def _ept_reserved(machine: Machine, entry: int, level: int) -> bool:
    r, w, x = entry & 1, entry >> 1 & 1, entry >> 2 & 1
    wrong = w == 1 and r == 0
    wrong |= (r, w, x) == (0, 0, 1) and not machine.execute_only
    wrong |= any(entry >> n & 1 for n in range(machine.address_width, 52))
    if _is_leaf(entry, level):
        wrong |= entry >> 3 & 7 in (2, 3, 7)
        wrong |= level == 2 and (entry >> 12 & 0x1FF != 0 or machine.max_leaf_level < 2)
        wrong |= level == 3 and (entry >> 12 & 0x3FFFF != 0 or machine.max_leaf_level < 3)
    elif level in (2, 3):
        wrong |= entry >> 3 & 0xF != 0
    else:
        wrong |= entry >> 3 & 0x1F != 0
    return wrong


def _second_stage_present(entry: int) -> bool:
    return not (entry & 1 == 0 and entry & 2 == 0)


def _second_stage_reserved(machine: Machine, entry: int, level: int) -> bool:
    wrong = any(entry >> n & 1 for n in range(machine.address_width, 52)) or entry >> 62 & 1 == 1
    if _is_leaf(entry, level):
        wrong |= entry >> 11 & 1 == 1 and not machine.snoop_control
        wrong |= level == 2 and (entry >> 12 & 0x1FF != 0 or machine.max_leaf_level < 2)
        wrong |= level == 3 and (entry >> 12 & 0x3FFFF != 0 or machine.max_leaf_level < 3)
    else:
        wrong |= entry >> 11 & 1 == 1
        wrong |= level in (4, 5) and entry >> 7 & 1 == 1
    return wrong


def _is_leaf(entry: int, level: int) -> bool:
    return level == 1 or (level in (2, 3) and entry >> 7 & 1 == 1)


class Rows(NamedTuple):
    """One kind of walker: which entries it takes for present, and which of those it does not accept."""

    present: Callable[[int], bool]
    reserved: Callable[[Machine, int, int], bool]


EPT = Rows(_ept_present, _ept_reserved)
SECOND_STAGE = Rows(_second_stage_present, _second_stage_reserved)


class Audit(NamedTuple):
    """`leaves`: the first gfn -> (level, entry); `wrong`: what the walker must not meet, a sentence each."""

    leaves: dict[int, tuple[int, int]]
    wrong: list[str]


def audit(tables: RawTables, rows: Rows, machine: Machine, root: int, levels: int) -> Audit:
    """All that a walker can reach, every entry of every table looked at."""
    found = Audit({}, [])
    seen = {root}
    pending = [(root, levels, 0)]
    while pending:
        table, level, start = pending.pop()
        at = table - tables.base
        if at < 0 or at + 4096 > len(tables.memory):
            found.wrong.append(f"no table at {table:#x}")
            continue
        page = memoryview(tables.memory)[at : at + 4096]
        for index, entry in enumerate(page.cast("Q")):
            if not rows.present(entry):
                continue
            gfn = start + (index << 9 * (level - 1))
            if rows.reserved(machine, entry, level):
                found.wrong.append(f"gfn {gfn:#x} level {level}: {entry:#x}")
                continue
            target = entry & 0x000F_FFFF_FFFF_F000
            if _is_leaf(entry, level):
                found.leaves[gfn] = level, entry
            elif target in seen:
                found.wrong.append(f"gfn {gfn:#x} level {level}: table {target:#x} is linked twice")
            else:
                seen.add(target)
                pending.append((target, level - 1, gfn))
    return found


def _leaf_hpa(entry: int, level: int, address: int) -> int:
    size = {1: 1 << 12, 2: 1 << 21, 3: 1 << 30}[level]
    return (entry & 0x000F_FFFF_FFFF_F000) // size * size + address % size


def leaves(tables: RawTables, root: int, levels: int) -> Iterator[tuple[int, int, int]]:
    """(gfn, level, entry) of every leaf of a sound table, found by looking at all entries."""
    pending = [(root, levels, 0)]
    while pending:
        table, level, start = pending.pop()
        at = table - tables.base
        page = memoryview(tables.memory)[at : at + 4096]
        for index, entry in enumerate(page.cast("Q")):
            if not entry & 7:
                continue
            gfn = start + (index << level_shift(Level(level)) - 12)
            if level == 1 or (level < 4 and entry & 0x80):
                yield gfn, level, entry
            else:
                pending.append((entry & 0x000F_FFFF_FFFF_F000, level - 1, gfn))


@dataclass
class TdpOracle:
    """The TDP itself: which frame each guest frame is, and whether it may be written."""

    pages: dict[int, tuple[int, bool]] = field(default_factory=dict)

    def map(self, gfn: int, pfn: int, npages: int, *, writable: bool) -> None:
        for i in range(npages):
            self.pages[gfn + i] = (pfn + i, writable)

    def zap(self, start: int, end: int) -> None:
        for gfn in range(start, end):
            self.pages.pop(gfn, None)

    def differences(self, seen: Mapping[int, tuple[int, bool]]) -> list[str]:
        """Where another idea of the same table differs."""
        return [
            f"gfn {gfn:#x}: oracle {self.pages.get(gfn)}, table {seen.get(gfn)}"
            for gfn in sorted(self.pages.keys() | seen.keys())
            if self.pages.get(gfn) != seen.get(gfn)
        ]


def flat(tables: RawTables, root: int, levels: int) -> dict[int, tuple[int, bool]]:
    """A table as the oracle would hold it."""
    pages = {}
    for gfn, level, entry in leaves(tables, root, levels):
        for i in range(1 << 9 * (level - 1)):
            pages[gfn + i] = ((entry >> 12 & 0xFF_FFFF_FFFF) + i, entry >> 1 & 1 == 1)
    return pages
