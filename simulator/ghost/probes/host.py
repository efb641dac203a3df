"""What the host has behind each page: slots, the process's page table, notifiers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from kvmd.core.mm.page import Entry, PageKind, Poisoned, Pte
from kvmd.core.mm.space import AddressSpace
from kvmd.core.mm.table import PageTable
from kvmd.core.slots.host_changes import HostChanges
from kvmd.core.slots.memslot import Memslot, Memslots
from kvmd.core.vm import Kvm
from protocol.pt import bits
from protocol.units import (
    LEVEL_4K,
    PAGE_SHIFT,
    Hva,
    Level,
    pages_of_level,
)
from simulator.ghost.backing import Shown
from simulator.ghost.probes import contents
from simulator.ghost.probes.watch import Seams, Watch
from simulator.ghost.probes.windows import tell_private, windows
from simulator.ghost.spans import Translation

seams = Seams()


@seams.around(Kvm, "__init__")
def _kvm(watch: Watch, original: Any, vm: Kvm, *args: Any, **named: Any) -> None:
    original(vm, *args, **named)
    watch.kept += [vm.slots, vm.frames.pinned]
    watch.vm_of[id(vm.slots)] = watch.vm_of[id(vm.frames.pinned)] = vm.id
    watch.mm_of[id(vm.frames.pinned)] = vm.mm
    watch.names[id(vm.slots)] = f"mm{vm.mm.id}"
    watch.ghost.mmus.registers(f"vm{vm.id}")


@seams.around(Memslots, "replace")
def _replace(watch: Watch, original: Any, slots: Memslots, old: Memslot | None, new: Memslot | None) -> None:
    original(slots, old, new)
    was, now = (None if slot is None else windows(watch, slots, slot) for slot in (old, new))
    for slot, comes in ((old, False), (new, True)):
        if slot is None:
            continue
        view, start, end = watch.view(slots, slot.as_id), slot.span.start, slot.span.end
        if was != now and not comes:
            watch.ghost.hides(view, start, end)
        elif was != now:
            for low, high, shown in now or ():
                watch.ghost.shows(view, low, high, shown)
        address = Shown(watch.names[id(slots)], slot.hva >> PAGE_SHIFT, 0)
        watch.ghost.own.lies_at(view, start, end, address if comes else None)
        tell_private(watch, slots, slot, start, end, there=comes)
        if old is None or new is None or not (old.logs and new.logs):
            watch.ghost.logs(view, start, end, comes and slot.logs)
        elif comes:
            watch.ghost.moves_logged(view, old.span.start, old.span.end, start)


def _space(table: PageTable) -> str:
    return f"mm{table.owner}"


def _there(entry: Entry) -> Translation | None:
    """What other MMUs may have of it: only a present entry is one (kvmd/core/mm/page.py)."""
    if type(entry) is not Pte:
        return None
    return Translation(entry.pfn, bits.READ | bits.WRITE if entry.writable else bits.READ)


def _backs(watch: Watch, table: PageTable, hva: Hva, level: Level, entry: Entry | None) -> None:
    first, there = hva >> PAGE_SHIFT, None if entry is None else _there(entry)
    of_file = isinstance(entry, Pte) and entry.page.kind is PageKind.FILE
    watch.ghost.backs(_space(table), first, first + pages_of_level(level), there, of_file=of_file)


def _judge_shared(watch: Watch, table: PageTable, entry: Entry) -> None:
    """A pinned page stays its process's alone: the next store of either would part the pin from it."""
    if not isinstance(entry, Pte) or entry.page.kind is not PageKind.ANON:
        return
    if all(mapper is table for mapper, _ in entry.page.entries):
        return
    for name, page, frame in watch.ghost.backing.pinned_frames():
        if entry.pfn <= frame < entry.pfn + pages_of_level(entry.level):
            shared = f"frame {frame:#x}, pinned as page {page:#x} of {name}, is shared with {_space(table)}"
            watch.ghost.verdicts.say("I22", shared)


def _judge_writable(watch: Watch, table: PageTable, entry: Entry) -> None:
    """What is everybody's nobody stores to: a private mapping has its own copy of what a file has."""
    there = _there(entry)
    if there is None or not there.rights & bits.WRITE or not isinstance(entry, Pte):
        return
    kind, space = entry.page.kind, table.space
    vma = space.vmas.find(entry.hva) if isinstance(space, AddressSpace) else None
    private = kind is PageKind.FILE and vma is not None and not vma.shared
    if private or kind in (PageKind.KSM, PageKind.ZERO):
        what = f"frame {entry.pfn:#x}, a {kind.name} page, is writable to {_space(table)}"
        watch.ghost.verdicts.say("I21", what)


@seams.around(PageTable, "set")
def _set(watch: Watch, original: Any, table: PageTable, entry: Entry) -> None:
    _judge_shared(watch, table, entry)
    _judge_writable(watch, table, entry)
    contents.replaced(watch, table, entry)
    _backs(watch, table, entry.hva, getattr(entry, "level", LEVEL_4K), entry)
    for named, change in ((table.find(entry.hva), -1), (entry, 1)):
        if type(named) is Poisoned:
            watch.ghost.backing.failed(named.page.pfn, change)
    original(table, entry)


@seams.around(PageTable, "clear")
def _clear_entry(watch: Watch, original: Any, table: PageTable, entry: Entry) -> None:
    contents.cleared(watch, table, entry)
    _backs(watch, table, entry.hva, getattr(entry, "level", LEVEL_4K), None)
    if type(entry) is Poisoned:
        watch.ghost.backing.failed(entry.page.pfn, -1)
    original(table, entry)


@seams.around(PageTable, "move")
def _move(watch: Watch, original: Any, table: PageTable, entry: Entry, hva: Hva) -> None:
    level = getattr(entry, "level", LEVEL_4K)
    _backs(watch, table, entry.hva, level, None)
    original(table, entry, hva)
    _backs(watch, table, hva, level, entry)


@seams.around(HostChanges, "invalidate_range_start")
async def _range_start(watch: Watch, original: Any, changes: HostChanges, start: Hva, end: Hva) -> None:
    if id(changes._slots) in watch.vm_of:  # it knows at once, in the same process
        watch.ghost.lets_go(*_range(watch, changes, start, end))
    with nullcontext() if watch.trying is None else watch.trying.changing():
        await original(changes, start, end)


@seams.around(HostChanges, "invalidate_range_end")
def _range_end(watch: Watch, original: Any, changes: HostChanges, start: Hva, end: Hva) -> None:
    if id(changes._slots) in watch.vm_of:  # or it is of another world, and its flow is only now cleared away
        watch.ghost.told_changed(*_range(watch, changes, start, end))
    original(changes, start, end)


def _range(watch: Watch, changes: HostChanges, start: Hva, end: Hva) -> tuple[str, str, int, int]:
    slots = changes._slots
    filler = f"vm{watch.vm_of[id(slots)]}"
    return filler, watch.names[id(slots)], start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)
