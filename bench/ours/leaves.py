"""Ours: a change of many leaves in kvmd's core, once with all that follows from it.

The table is a root that a VM of that much memory has, every page mapped by a leaf of its own.

    python -m bench.ours.leaves COUNT
"""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from statistics import median
from time import perf_counter_ns

from bench.ours.ranges import pages_of
from bench.timing import require_one_core
from kvmd.core.tables import ranges, tdp_mmu
from kvmd.core.tables.compiled import Compiled
from kvmd.core.tables.tdp_table import Role, Root, TdpMmu
from protocol.pt import kernels
from protocol.pt.leaf_edit import LeafEdit
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.pt.walk import ept_rules
from protocol.units import LEVEL_1G, LEVEL_4K, PAGE_SIZE, Gfn, Hpa, Level, Pfn

BASE = Hpa(1 << 30)
TURNS = 9
EDITS = {"zap": ranges.ZAP, "write-protect": ranges.WRITE_PROTECT, "age": ranges.CLEAR_ACCESSED}


def main(count: int) -> None:
    require_one_core()
    pages = pages_of(count)
    mmu, root = table_of(pages)
    parts = {name: median(timed(mmu, root, pages, edit)) for name, edit in EDITS.items()}
    sys.stdout.write(json.dumps({"p50": parts["zap"], "p99": parts["zap"], "parts": parts}) + "\n")


def table_of(pages: int) -> tuple[TdpMmu, Root]:
    size = (pages // 512 + 8) * PAGE_SIZE
    writer = TableWriter(BASE, memoryview(bytearray(size)))
    mmu = TdpMmu(1, writer, TablePool(writer, size), ept_rules(46, LEVEL_1G), lambda: 1)
    mmu.compiled = Compiled(writer, lambda _, ready: ready(kernels))
    mmu.compiled.is_wanted()
    root = mmu.get_root(Role(Level(4), 0, ad_enabled=True))
    fill(mmu, root, pages)
    return mmu, root


def fill(mmu: TdpMmu, root: Root, pages: int) -> None:
    for gfn in range(pages):
        tdp_mmu.map_page(mmu, root, Gfn(gfn), Pfn(gfn), LEVEL_4K, writable=True)


def timed(mmu: TdpMmu, root: Root, pages: int, edit: LeafEdit) -> list[int]:
    """Nanoseconds of each change of all leaves."""
    tables = mmu.writer.pages(BASE, pages // 512 + 4)
    before, took = bytes(tables), list[int]()
    states, leaves = deepcopy(root.record), list(root.leaves)
    for _ in range(TURNS):
        began = perf_counter_ns()
        changed = ranges.edit_leaves(mmu, root, mmu.cursor(root, root.everything), edit)
        took.append(perf_counter_ns() - began)
        assert changed == pages, f"{changed} of {pages} leaves changed"
        tables.cast("B")[:] = before
        root.record, root.leaves = deepcopy(states), list(leaves)
    return took


if __name__ == "__main__":
    main(int(sys.argv[1]))
