"""Whole-table invariants, checked from the entries alone; run by tests, by kvmd and iommufdd on request.

I2  no entry a walker can reach has bit 11 set; an MMIO entry may, a walker never gets to look at it.
I3  an entry is present to its writer (in KVM's formats: has bit 59) exactly if it is to every walker, but for
    access-tracked leaves; any other entry is empty or, in a table of KVM's, frozen or MMIO.
I17 every present entry obeys the rules of all walkers, so none sees a reserved bit another would not.
I18 a table page is linked once, and lies in table memory.

What is checked is the table as it lies in memory at one moment: all of it holds between any two stores.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.pt import bits
from protocol.pt.cursor import RangeEntry, walk_range
from protocol.pt.entry import is_access_tracked, is_frozen, is_mmio, mmio_gfn
from protocol.pt.format import TableFormat
from protocol.pt.geometry import gfn_limit
from protocol.pt.mem import TableOutside, TableReader
from protocol.pt.second_stage import SECOND_STAGE
from protocol.pt.walk import WalkRules, second_stage_rules
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Hpa, Level

_WIDEST = 52  # bits of a host address: no register says how many a unit has [VT-d 8.1]

Special = Callable[[RangeEntry], bool]  # is it an absent entry that its writer reads something from?


def only_empty(met: RangeEntry) -> bool:
    """No absent entry but the empty one."""
    return False


def frozen_or_mmio(met: RangeEntry) -> bool:
    """Those of KVM's tables; an MMIO entry is about its own gfn."""
    return is_frozen(met.entry) or (
        is_mmio(met.entry) and met.level == LEVEL_4K and mmio_gfn(met.entry) == met.gfn
    )


def check_table(
    tables: TableReader,
    fmt: TableFormat,
    root: Hpa,
    levels: Level,
    rules: tuple[WalkRules, ...],
    special: Special = only_empty,
) -> list[str]:
    """Every violation as a sentence with its invariant number; empty when all hold."""
    found: list[str] = []
    linked: set[Hpa] = {root}
    try:
        for met in walk_range(tables, fmt, root, levels, GfnSpan(Gfn(0), gfn_limit(levels))):
            found += _check_entry(met, fmt, rules, special)
            if fmt.is_table(met.entry, met.level):
                child = fmt.table_of(met.entry)
                if child in linked:
                    found.append(f"I18: {_where(met)}: table {child:#x} is linked twice")
                    return found  # going on could loop
                linked.add(child)
    except TableOutside as error:
        found.append(f"I18: {error}")
    return found


def check_second_stage(
    tables: TableReader, root: Hpa, levels: Level, max_huge_page_level: Level
) -> list[str]:
    """The same of a table that no CPU walks: legal for any unit with such leaves, one without SC included."""
    rules = second_stage_rules(_WIDEST, max_huge_page_level, snoop_control=False)
    return check_table(tables, SECOND_STAGE, root, levels, (rules,))


def _check_entry(
    met: RangeEntry, fmt: TableFormat, rules: tuple[WalkRules, ...], special: Special
) -> list[str]:
    entry, level = met.entry, met.level
    found = []
    is_special = special(met)
    if entry & bits.SNOOP and not is_special:
        found.append(f"I2: {_where(met)}: bit 11 is set")
    if not fmt.is_present(entry, level):
        if not is_special:
            found.append(f"I3: {_where(met)}: neither present nor an absent entry of its writer")
        for rule in rules:
            if entry & rule.present:
                found.append(f"I3: {_where(met)}: absent to its writer but present by {rule.name} rules")
        return found
    leaf = fmt.is_leaf(entry, level)
    tracked = leaf and is_access_tracked(entry)
    for rule in rules:
        if bool(entry & rule.present) == tracked:
            found.append(f"I3: {_where(met)}: present to its writer but absent by {rule.name} rules")
        reserved = rule.reserved_leaf[level] if leaf else rule.reserved_table[level]
        if entry & reserved or entry & 63 in rule.illegal:
            found.append(f"I17: {_where(met)}: reserved by {rule.name} rules")
    return found


def _where(met: RangeEntry) -> str:
    return f"gfn {met.gfn:#x} level {met.level} entry {met.entry:#018x}"
