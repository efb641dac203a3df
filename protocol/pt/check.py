"""Whole-table invariants, checked from the entries alone; run by tests, by kvmd on request.

I2  no entry a walker can reach has bit 11 set; an MMIO entry may, a walker never gets to look at it.
I3  bit 59 is set exactly in present entries and in access-tracked leaves; any other entry is empty, frozen or
    MMIO.  Access-tracked, empty, frozen and MMIO entries are absent for both walkers.
I17 every present entry obeys both walkers' rules, so neither sees a reserved bit the other would not.
I18 a table page is linked once, and lies in table memory.
"""

from __future__ import annotations

from protocol.pt import bits
from protocol.pt.cursor import RangeEntry, walk_range
from protocol.pt.entry import is_access_tracked, is_leaf, is_mmio, is_present, mmio_gfn, table_of
from protocol.pt.ept import EPT_AD
from protocol.pt.geometry import gfn_limit
from protocol.pt.mem import TableOutside, TableReader
from protocol.pt.walk import WalkRules
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Hpa, Level


def check_table(tables: TableReader, root: Hpa, levels: Level, rules: tuple[WalkRules, ...]) -> list[str]:
    """Every violation as a sentence with its invariant number; empty when all hold."""
    found: list[str] = []
    linked: set[Hpa] = {root}
    try:
        for met in walk_range(tables, EPT_AD, root, levels, GfnSpan(Gfn(0), gfn_limit(levels))):
            found += _check_entry(met, rules)
            if is_present(met.entry) and not is_leaf(met.entry, met.level):
                child = table_of(met.entry)
                if child in linked:
                    found.append(f"I18: {_where(met)}: table {child:#x} is linked twice")
                    return found  # going on could loop
                linked.add(child)
    except TableOutside as error:
        found.append(f"I18: {error}")
    return found


def _check_entry(met: RangeEntry, rules: tuple[WalkRules, ...]) -> list[str]:
    entry, level = met.entry, met.level
    found = []
    mmio = is_mmio(entry) and level == LEVEL_4K and mmio_gfn(entry) == met.gfn
    if entry & bits.SNOOP and not mmio:
        found.append(f"I2: {_where(met)}: bit 11 is set")
    if not is_present(entry):
        if entry != bits.FROZEN and not mmio:
            found.append(f"I3: {_where(met)}: neither present nor empty, frozen or MMIO of its gfn")
        for rule in rules:
            if entry & rule.present:
                found.append(f"I3: {_where(met)}: bit 59 clear but present by {rule.name} rules")
        return found
    leaf = is_leaf(entry, level)
    tracked = leaf and is_access_tracked(entry)
    for rule in rules:
        if bool(entry & rule.present) == tracked:
            found.append(f"I3: {_where(met)}: bit 59 set but absent by {rule.name} rules")
        reserved = rule.reserved_leaf[level] if leaf else rule.reserved_table[level]
        if entry & reserved or entry & 63 in rule.illegal:
            found.append(f"I17: {_where(met)}: reserved by {rule.name} rules")
    return found


def _where(met: RangeEntry) -> str:
    return f"gfn {met.gfn:#x} level {met.level} entry {met.entry:#018x}"
