"""What was stored to a page, when it goes to another frame, to swap or back: it goes along (I6).

Who copies a page before everybody has let go of it loses what is stored meanwhile, and no entry shows that.
So the bytes are compared where the one takes the other's place; nobody is told that they were looked at.
"""

from __future__ import annotations

from typing import Any

from kvmd.core.mm.frames import Frames
from kvmd.core.mm.memory import PageAllocator
from kvmd.core.mm.page import Entry, Page, Pte, Swapped
from kvmd.core.mm.table import PageTable
from protocol.units import LEVEL_2M, LEVEL_4K, PAGE_SHIFT, Hva, Level, Pfn, size_of_level
from simulator.ghost.probes.watch import Seams, Watch

seams = Seams()


def bytes_of(frames: Frames, pfn: int, level: Level) -> memoryview:
    whole = getattr(frames.view, "_view", frames.view)  # a world watches it (simulator/world/memory.py)
    at = pfn - (frames.base >> PAGE_SHIFT) << PAGE_SHIFT
    found: memoryview = whole[at : at + size_of_level(level)]
    return found


def _lost(watch: Watch, table: PageTable, hva: Hva, to: str) -> None:
    what = f"page {hva >> PAGE_SHIFT:#x} of mm{table.owner} goes to {to}"
    watch.ghost.verdicts.say("I6", f"{what}, and what was stored to it does not")


@seams.around(PageAllocator, "move")
def _moves(watch: Watch, original: Any, memory: PageAllocator, page: Page, owner: int) -> Any:
    old, before = page.pfn, bytes(bytes_of(memory.frames, page.pfn, page.level))
    given = original(memory, page, owner)
    if bytes_of(memory.frames, page.pfn, page.level) != before:
        what = f"frame {old:#x} goes to {page.pfn:#x}"
        watch.ghost.verdicts.say("I6", f"{what}, and what was stored to it does not")
    return given


def taken(watch: Watch, frames: Frames, pfn: Pfn, level: Level) -> None:
    """Frames are taken, and nothing is in them that another has left there."""
    watch.huge.begin(pfn if level == LEVEL_2M else None)
    before = watch.ghost.frames.given_up(pfn)
    if level <= LEVEL_2M and before is not None and any(bytes_of(frames, pfn, level)):
        watch.ghost.verdicts.say("I6", f"frame {pfn:#x} is taken with what {before.name} stored there")


def replaced(watch: Watch, table: PageTable, entry: Entry) -> None:
    """`entry` is about to be set."""
    memory, old = table.memory, table.find(entry.hva)
    if isinstance(entry, Pte) and entry.pfn == watch.huge.fresh:
        for (of, hva), before in watch.huge.gone.items():
            at = hva - entry.hva
            inside = of == id(table) and 0 <= at < size_of_level(entry.level)
            if inside and bytes_of(memory.frames, entry.pfn, entry.level)[at : at + len(before)] != before:
                _lost(watch, table, hva, f"frame {entry.pfn:#x}")
        watch.huge.begin(None)
    if old is None or old.hva != entry.hva:
        return
    if isinstance(old, Pte) and isinstance(entry, Swapped):
        if bytes_of(memory.frames, old.pfn, old.level) != entry.swap.data:
            _lost(watch, table, entry.hva, "swap")
    elif isinstance(old, Swapped) and isinstance(entry, Pte):
        if bytes_of(memory.frames, entry.pfn, entry.level) != old.swap.data:
            _lost(watch, table, entry.hva, f"frame {entry.pfn:#x}")
    elif isinstance(old, Pte) and isinstance(entry, Pte) and old.pfn != entry.pfn:
        given_up = watch.ghost.frames.given_up(old.pfn) is not None  # it has moved, and was looked at there
        level = min(old.level, entry.level)
        if not given_up and bytes_of(memory.frames, old.pfn, level) != bytes_of(
            memory.frames, entry.pfn, level
        ):
            _lost(watch, table, entry.hva, f"frame {entry.pfn:#x}")


def cleared(watch: Watch, table: PageTable, entry: Entry) -> None:
    """`entry` is about to go; into a huge page, if there is one that waits for it."""
    if watch.huge.fresh is None:
        return
    if isinstance(entry, Pte) and entry.level == LEVEL_4K:
        watch.huge.gone[id(table), entry.hva] = bytes(bytes_of(table.memory.frames, entry.pfn, LEVEL_4K))
    elif isinstance(entry, Swapped):
        watch.huge.gone[id(table), entry.hva] = entry.swap.data
