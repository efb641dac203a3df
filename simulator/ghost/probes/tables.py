"""Frames, table pages, entries and roots; flushes, and when they are over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from iommufdd.core.hwpt import Hwpt
from iommufdd.core.hwpt_kvm import HwptKvm
from iommufdd.core.intel_iommu import IntelIommu
from iommufdd.core.io_pagetable import IoPageTable
from kvmd.core.mm.frames import Frames
from kvmd.core.tables.flush import Flusher
from kvmd.core.tables.tdp_table import Role, Root, RootEvent, TdpMmu
from protocol.hw.qi import Descriptor, IotlbGranularity, IotlbInv
from protocol.pt.geometry import ENTRIES
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.units import (
    PAGE_SHIFT,
    WHOLE_SIZE,
    Gfn,
    GfnSpan,
    Gpa,
    Hpa,
    Iova,
    Level,
    Pfn,
    pages_of_level,
)
from simulator.ghost.probes import contents, own
from simulator.ghost.probes.watch import Seams, Watch, block_of

seams = Seams()
EVERYTHING = 1 << 52  # pages: more than any address has


@seams.around(Frames, "allocate")
def _frames_allocate(watch: Watch, original: Any, frames: Frames, level: Level, owner: int) -> Pfn:
    pfn: Pfn = original(frames, level, owner)
    contents.taken(watch, frames, pfn, level)
    watch.ghost.frames_taken(pfn, pages_of_level(level), f"mm{owner}")
    return pfn


@seams.around(Frames, "release")
def _frames_release(watch: Watch, original: Any, frames: Frames, pfn: Pfn, level: Level) -> None:
    watch.ghost.frames_given_up(pfn, pages_of_level(level))
    original(frames, pfn, level)


@seams.around(TablePool, "allocate")
def _pool_allocate(watch: Watch, original: Any, pool: TablePool) -> Hpa:
    table: Hpa = original(pool)
    watch.ghost.table_taken(table, watch.pool_of.get(id(pool), "kvmd"))
    return table


@seams.around(TablePool, "_clear")
def _pool_clear(watch: Watch, original: Any, pool: TablePool, table: Hpa) -> None:
    watch.ghost.table_given_up(table)
    original(pool, table)


class _Counted:
    """Words of a table, and how often one was stored to."""

    def __init__(self, words: Any) -> None:
        self._words = words
        self.stores = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._words, name)

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, where: Any) -> Any:
        return self._words[where]

    def __setitem__(self, where: Any, value: Any) -> None:
        self.stores += 1
        self._words[where] = value


@seams.around(TableWriter, "store64")
def _store64(watch: Watch, original: Any, writer: TableWriter, hpa: int, entry: int) -> None:
    words = writer.words
    counted: Any = _Counted(words)
    writer.words = counted
    try:
        original(writer, hpa, entry)
    finally:
        writer.words = words
    leading = watch.leading.get(hpa)
    if leading is not None:
        watch.ghost.functions.leading.stored(*leading, entry)
    watch.ghost.entry_stored(hpa, entry, counted.stores)


@seams.around(TableWriter, "fill_unlinked")
def _fill(watch: Watch, original: Any, writer: TableWriter, table: Hpa, entries: Sequence[int]) -> None:
    original(writer, table, entries)
    watch.ghost.table_filled(table, entries)


@seams.around(TableWriter, "clear_unlinked")
def _clear(watch: Watch, original: Any, writer: TableWriter, table: Hpa) -> None:
    original(writer, table)
    watch.ghost.table_filled(table, [0] * ENTRIES)


@seams.around(TdpMmu, "get_root")
def _get_root(watch: Watch, original: Any, mmu: TdpMmu, role: Role) -> Root:
    root: Root = original(mmu, role)
    made = watch.roots.setdefault(f"vm{mmu._vm_id}", {})
    if root.hpa not in made:
        made[root.hpa] = root.everything.end
        view = "vm", mmu._vm_id, role.as_id
        watch.ghost.root_made(root.hpa, role.level, view, f"vm{mmu._vm_id}")
    watch.ghost.faults.given(root.hpa)
    return root


@seams.around(TdpMmu, "drop_root")
def _drop_root(watch: Watch, original: Any, mmu: TdpMmu, root: Root) -> None:
    del watch.roots[f"vm{mmu._vm_id}"][root.hpa]
    watch.ghost.root_gone(root.hpa)
    original(mmu, root)


@seams.around(TdpMmu, "split_leaf")
def _split_leaf(
    watch: Watch, original: Any, mmu: TdpMmu, root: Root, gfn: Gfn, level: Level, at: Hpa, leaf: int
) -> None:
    """Whoever has the leaf cached with D stores on, and sets it nowhere (R19)."""
    before = watch.ghost.tables.roots[root.hpa].within(*block_of(gfn, level))
    original(mmu, root, gfn, level, at, leaf)
    for run in before:
        if not watch.ghost.history.holds(root.hpa, *run):
            what = f"root {root.hpa:#x} splits the leaf of page {gfn:#x}"
            watch.ghost.verdicts.say("R19", f"{what}, and translates less than before")


@seams.around(Root, "happens")
def _root_happens(watch: Watch, original: Any, root: Root, event: RootEvent) -> None:
    if event is RootEvent.EXPORT:
        watch.ghost.root_lent(root.hpa)
        own.lent(watch, root)
    original(root, event)
    if event is RootEvent.RELEASE:
        watch.ghost.root_taken_back(root.hpa)
        watch.ghost.own.takes_back(root.hpa)
    if event is RootEvent.INVALIDATE:
        watch.ghost.root_obsolete(root.hpa)


@seams.around(IoPageTable, "__init__")
def _io_page_table(watch: Watch, original: Any, table: IoPageTable, *args: Any, **named: Any) -> None:
    pool = named["pool"] if "pool" in named else args[1]
    watch.kept.append(pool)
    watch.pool_of[id(pool)] = "iommufdd"
    original(table, *args, **named)
    watch.ghost.root_made(table.root, table.level, None, watch.name(table, "hwpt"))


@seams.around(IoPageTable, "release")
def _io_release(watch: Watch, original: Any, table: IoPageTable) -> None:
    watch.ghost.root_gone(table.root)
    original(table)


@seams.around(Flusher, "flush")
async def _flush(watch: Watch, original: Any, flusher: Flusher, span: GfnSpan | None) -> None:
    issued, vm = watch.ghost.issues(), f"vm{flusher._vm_id}"
    watch.flushing[flusher._vm_id] += 1
    with watch.must_end("invalidation"):
        await original(flusher, span)
    watch.flushing[flusher._vm_id] -= 1
    for root, pages in list(watch.roots.get(vm, {}).items()):
        start, end = (0, pages) if span is None else (span.start, span.end)
        watch.ghost.flushed(root, start, end, issued)


@seams.around(Hwpt, "forget")
async def _forget(watch: Watch, original: Any, hwpt: Hwpt, start: Iova, size: int) -> None:
    issued, units = watch.ghost.issues(), list(hwpt.attached.values())
    await original(hwpt, start, size)
    for unit in units:
        told = [span for at, span in watch.to_forget(unit, hwpt.domain.did) if at >= issued]
        if told and not any(
            first <= start >> PAGE_SHIFT and _end(start, size) <= last for first, last in told
        ):
            what = f"{start:#x}+{size:#x} of domain {hwpt.domain.did} is forgotten, a unit was told of"
            first, last = told[-1]
            watch.ghost.verdicts.say("R17", f"{what} pages {first:#x}..{last:#x}")
    _acked(watch, hwpt, start, size, issued)


@seams.around(IntelIommu, "submit")
async def _submit(watch: Watch, original: Any, unit: IntelIommu, descriptors: Sequence[Descriptor]) -> None:
    for each in descriptors:
        if isinstance(each, IotlbInv):
            first, pages = each.addr >> PAGE_SHIFT, 1 << each.am
            of_pages = each.granularity is IotlbGranularity.PAGE
            span = (first, first + pages) if of_pages else (0, EVERYTHING)
            watch.to_forget(unit, each.did).append((watch.ghost.heard.now, span))
    await original(unit, descriptors)


@seams.around(HwptKvm, "invalidate")
async def _invalidate(watch: Watch, original: Any, hwpt: HwptKvm, start: Gpa, size: int, epoch: int) -> None:
    """Its end is the ack, however it came about."""
    issued = watch.ghost.issues()
    await original(hwpt, start, size, epoch)
    _acked(watch, hwpt, start, size, issued)


def _acked(watch: Watch, hwpt: Hwpt, start: int, size: int, issued: int) -> None:
    root = watch.root(hwpt.domain.did, hwpt.domain.root)
    watch.ghost.acked(root, start >> PAGE_SHIFT, _end(start, size), issued)


def _end(start: int, size: int) -> int:
    """The page behind the last."""
    return EVERYTHING if size == WHOLE_SIZE else -(-(start + size) >> PAGE_SHIFT)
