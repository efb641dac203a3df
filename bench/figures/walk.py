"""One walk by the remapping unit's rules, root to 4 KiB leaf, random addresses in a 1 GiB guest.

Every leaf table is there, 2 MiB of entries, so that the entries loaded are rarely those of the walk
before.  No iotlb and no cache of table pointers: this is what a miss costs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import cycle

from bench.contenders import Given, Loop
from bench.harness import SEED, AtMost, Figure, Row
from protocol.pt import bits
from protocol.pt.geometry import ENTRIES
from protocol.pt.mem import TableWriter
from protocol.pt.walk import Outcome, second_stage_rules, walk
from protocol.units import GIB, LEVEL_2M, MIB, PAGE_SHIFT, PAGE_SIZE, Hpa, Level

ROOT_LEVELS = Level(4)
TABLES_BASE = Hpa(16 * MIB)
FRAMES_BASE = Hpa(4 * GIB)
ADDRESSES = 4096
BATCH = 64


def table_of_1g() -> TableWriter:
    """A root, a level-3 and a level-2 table, then 512 leaf tables, in that order."""
    tables = TableWriter(TABLES_BASE, memoryview(bytearray((3 + ENTRIES) * PAGE_SIZE)))
    root, level3, level2, leaves = (TABLES_BASE + page * PAGE_SIZE for page in range(4))
    link = bits.RWX | bits.MMU_PRESENT
    for index in range(ENTRIES):
        frames = FRAMES_BASE + index * ENTRIES * PAGE_SIZE
        entries = [frames + page * PAGE_SIZE | link | bits.MEMTYPE_WB for page in range(ENTRIES)]
        tables.fill_unlinked(Hpa(leaves + index * PAGE_SIZE), entries)
    tables.fill_unlinked(Hpa(level2), [leaves + index * PAGE_SIZE | link for index in range(ENTRIES)])
    tables.store64(level3, level2 | link)
    tables.store64(root, level3 | link)
    return tables


def random_walks() -> Callable[[], object]:
    tables = table_of_1g()
    rules = second_stage_rules(46, LEVEL_2M, snoop_control=True)
    chance = random.Random(SEED)
    addresses = [chance.randrange(GIB >> PAGE_SHIFT) << PAGE_SHIFT for _ in range(ADDRESSES)]
    for address in addresses:
        found = walk(tables, rules, TABLES_BASE, ROOT_LEVELS, address)
        assert found.outcome is Outcome.MAPPED, f"{address:#x}: {found}"
        assert found.entry & bits.ADDRESS_MASK == FRAMES_BASE + address, f"{address:#x}: {found}"
    some = cycle([addresses[at : at + BATCH] for at in range(0, ADDRESSES, BATCH)]).__next__

    def walk_some() -> None:
        for address in some():
            walk(tables, rules, TABLES_BASE, ROOT_LEVELS, address)

    return walk_some


OURS = Loop("single walk", random_walks, count=lambda bench: 10 * bench.samples, each=BATCH)

WALK = Figure("walk", "one walk, root to leaf", (Row(OURS, Given("limit: 1.2 us", 1_200), AtMost(1)),))
