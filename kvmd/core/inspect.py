"""Looking at a VM: its parts, one translation entry by entry, and a dump of its table with probes.

Models the files KVM has in debugfs, and for the dump nothing of the kernel's.  All of it is plain `def`:
what is told is one state.  A dump holds the pages of one root and probes, addresses with what a walk of
those pages must find.  Where the host has no page a walk must find nothing; where the root's record says
that a page was mapped, the frame is the one the host's page map has now.  No probe comes from a walk
(docs/decisions/0010).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from kvmd.core.invariants import walker_rules
from kvmd.core.slots.memslot import Memslot
from kvmd.core.stats import vm_stats
from kvmd.core.tables.map_record import MAPPED, WRITABLE, ZAPPED
from kvmd.core.tables.tdp_table import Root
from kvmd.core.vm import Kvm
from protocol.errors import UapiError
from protocol.pt.cursor import Cursor, seek
from protocol.pt.geometry import address_bits, gfn_limit
from protocol.pt.mem import TableReader
from protocol.pt.walk import walk
from protocol.units import LEVEL_2M, PAGE_SHIFT, PAGE_SIZE, Gfn, Gpa, Hpa, Level, size_of_level

MAX_DUMP_TABLES = 1 << 16  # copying that many, 256 MiB, takes about a second, and nothing else goes on


class TableRun(NamedTuple):
    """Table pages that lie side by side."""

    base: Hpa
    pages: int


class Probe(NamedTuple):
    """What a walk to `gpa` must find; `page_size` is the most its leaf may map."""

    gpa: Gpa
    expect_hpa: Hpa | None
    readable: bool
    writable: bool
    page_size: int


def root_of(vm: Kvm) -> Root:
    """The root to look at: the one lent out if there is one, else the VM's newest.  ENOENT: there is none."""
    exported = next(iter(vm.exports.tdps.values()), None)
    if exported is not None:
        return exported.root
    valid = [root for root in vm.mmu.roots if not root.invalid]
    if not valid:
        raise UapiError(errno.ENOENT, f"VM {vm.id} has no page table: no vCPU has run, no TDP is exported")
    return valid[-1]


# -- a VM ----------------------------------------------------------------------------------------------


def describe(vm: Kvm, max_slots: int) -> dict[str, Any]:
    slots = sorted(vm.slots, key=lambda slot: (slot.as_id, slot.base_gfn))
    return {
        "vm": vm.id,
        "slots_total": len(slots),
        "slots": [_describe_slot(slot) for slot in slots[:max_slots]],
        "roots": [_describe_root(root) for root in vm.mmu.roots],
        "exported": [
            {"as_id": tdp.as_id, "root_hpa": tdp.root.hpa, "importers": tdp.importer_names}
            for tdp in vm.exports.tdps.values()
        ],
        "stats": vm_stats(vm),
    }


def _describe_slot(slot: Memslot) -> dict[str, int]:
    return {
        "as_id": slot.as_id,
        "slot": slot.id,
        "gpa": slot.base_gfn << PAGE_SHIFT,
        "size": slot.npages << PAGE_SHIFT,
        "hva": slot.hva,
        "flags": int(slot.flags),
    }


def _describe_root(root: Root) -> dict[str, Any]:
    return {
        "hpa": root.hpa,
        "levels": root.role.level,
        "as_id": root.role.as_id,
        "ad_enabled": root.role.ad_enabled,
        "owner": root.owner,
        "refs": root.refs,
        "exported": root.exported,
        "invalid": root.invalid,
        "tables": root.tables,
        "leaves": root.leaves[1:],  # of 4 KiB, 2 MiB, 1 GiB
        "mapped_pages": root.record.count(MAPPED),
    }


# -- one address ---------------------------------------------------------------------------------------


def look_up(vm: Kvm, gpa: Gpa) -> dict[str, Any]:
    """The entries of all levels down to the one that ends the walk, and where each walker ends: a `Walk`."""
    root = root_of(vm)
    cpu, unit = walker_rules(vm)
    if gpa >> address_bits(root.role.level):
        raise UapiError(errno.EINVAL, f"gpa {gpa:#x} is beyond a root of {root.role.level} levels")
    return {
        "root_hpa": root.hpa,
        "levels": root.role.level,
        "path": [list(step) for step in _path(vm.host.writer, root, Gfn(gpa >> PAGE_SHIFT))],
        "cpu": list(walk(vm.host.writer, cpu, root.hpa, root.role.level, gpa)),
        "unit": list(walk(vm.host.writer, unit, root.hpa, root.role.level, gpa)),
    }


def _path(tables: TableReader, root: Root, gfn: Gfn) -> Iterator[tuple[int, int, int]]:
    """(level, where the entry lies, entry)."""
    for lowest in range(root.role.level, 0, -1):
        level, at, entry = seek(tables, root.format, root.hpa, root.role.level, gfn, Level(lowest))
        if level > lowest:
            return
        yield level, at, entry


# -- a dump --------------------------------------------------------------------------------------------


def table_runs(tables: TableReader, root: Root) -> list[TableRun]:
    """Every page of the root's table, in address order.  EFBIG."""
    if root.tables > MAX_DUMP_TABLES:
        raise UapiError(errno.EFBIG, f"the table has {root.tables} pages, a dump at most {MAX_DUMP_TABLES}")
    found = [root.hpa]
    cursor = Cursor(tables, root.format, root.hpa, root.role.level, with_tables=True)
    for run in cursor:
        if root.format.is_table(run.entries[0], run.level):
            found.append(root.format.table_of(run.entries[0]))
        if run.level == LEVEL_2M:
            cursor.step_over()
    runs: list[TableRun] = []
    for table in sorted(found):
        if runs and table == runs[-1].base + runs[-1].pages * PAGE_SIZE:
            runs[-1] = TableRun(runs[-1].base, runs[-1].pages + 1)
        else:
            runs.append(TableRun(table, 1))
    return runs


def make_probes(vm: Kvm, root: Root, count: int) -> list[Probe]:
    """At most `count`: edges of memslots, pages mapped and their neighbours, pages zapped, then the rest."""
    chosen: dict[Gfn, None] = {}
    limit = gfn_limit(root.role.level)
    for gfn in _candidates([s for s in vm.slots if s.as_id == root.role.as_id], root, count):
        if len(chosen) == count:
            break
        if 0 <= gfn < limit:
            chosen[Gfn(gfn)] = None
    return [_probe(vm, root, gfn) for gfn in sorted(chosen)]


def _candidates(slots: list[Memslot], root: Root, count: int) -> Iterable[int]:
    for slot in slots[: count // 8]:
        yield from (slot.span.start - 1, slot.span.start, slot.span.end - 1, slot.span.end)
    yield gfn_limit(root.role.level) - 1
    for gfn in root.record.spread(MAPPED, max(count // 8, 1)):
        yield from (gfn, gfn - 1, gfn + 1)
    yield from root.record.spread((ZAPPED,), max(count // 8, 1))
    share = -(-count // max(len(slots), 1))
    for slot in slots:
        yield from range(slot.span.start, slot.span.end, max(slot.npages // share, 1))


def _probe(vm: Kvm, root: Root, gfn: Gfn) -> Probe:
    gpa = Gpa(gfn << PAGE_SHIFT)
    slot = vm.slots.find(gfn, root.role.as_id)
    page = None
    if slot is not None:
        page = vm.pinning.pinned.page_of(slot, gfn) or vm.mm.present_page(slot.hva_of(gfn))
    granted = root.record.state(gfn)
    if slot is None or page is None or granted not in MAPPED:
        return Probe(gpa, None, readable=False, writable=False, page_size=PAGE_SIZE)
    level = vm.levels.level_of(slot, gfn, page, root.role.policy)
    writable = granted == WRITABLE and page.writable and not slot.readonly
    hpa = Hpa((page.pfn << PAGE_SHIFT) + slot.hva_of(gfn) - page.hva)
    return Probe(gpa, hpa, True, writable, size_of_level(level))
