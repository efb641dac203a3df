"""What user space is told of stores, as it has it: bits in its memory, and entries that it gave back (I25).

A report counts as told by what the log says of it; here it is held to what user space can have read.
"""

from __future__ import annotations

from typing import Any

from kvmd.core.mm.page import Pte
from kvmd.core.slots.dirty_log import ClearDirtyLog, DirtyLog
from kvmd.core.slots.dirty_ring import F_RESET, DirtyGfn, DirtyRing
from protocol.units import Hva
from simulator.ghost.probes.contents import bytes_of
from simulator.ghost.probes.watch import Seams, Watch

seams = Seams()


def _bit(log: DirtyLog, bitmap: Hva, page: int) -> bool:
    """As it is in the process's memory; what is not there now was told."""
    at = bitmap + (page >> 3)
    entry = log._mm.table.find(Hva(at))
    if type(entry) is not Pte:
        return True
    there = bytes_of(log._mm.memory.frames, entry.pfn, entry.level)
    return bool(there[at - entry.hva] >> (page & 7) & 1)


@seams.around(DirtyLog, "get")
async def _get(watch: Watch, original: Any, log: DirtyLog, number: int, dirty_bitmap: Hva) -> None:
    watch.reported.pop(id(log.stores), None)
    await original(log, number, dirty_bitmap)
    for of, page in watch.reported.pop(id(log.stores), ()):
        if of == number and not _bit(log, dirty_bitmap, page):
            what = f"page {page:#x} of slot {number:#x} is reported"
            watch.ghost.verdicts.say("I25", f"{what}, and not in what user space has got")


@seams.around(DirtyLog, "clear")
async def _clear(watch: Watch, original: Any, log: DirtyLog, asked: ClearDirtyLog) -> None:
    watch.reported.pop(id(log.stores), None)
    await original(log, asked)
    for _, page in watch.reported.pop(id(log.stores), ()):
        at = page - asked.first_page
        if not 0 <= at < asked.num_pages or not _bit(log, asked.dirty_bitmap, at):
            what = f"page {page:#x} of slot {asked.slot:#x} is cleared"
            watch.ghost.verdicts.say("I25", f"{what}, which user space did not ask for")


class _Loaded:
    """Words of a ring, and the flags that were loaded last of each entry."""

    def __init__(self, words: Any) -> None:
        self._words = words
        self.flags: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._words, name)

    def __getitem__(self, where: Any) -> Any:
        found = self._words[where]
        self.flags.append(found[0])
        return found

    def __setitem__(self, where: Any, value: Any) -> None:
        self._words[where] = value


@seams.around(DirtyRing, "take_back")
def _take_back(watch: Watch, original: Any, ring: DirtyRing) -> list[DirtyGfn]:
    words = ring._words
    loaded: Any = _Loaded(words)
    ring._words = loaded
    try:
        taken: list[DirtyGfn] = original(ring)
    finally:
        ring._words = words
    for entry, flags in zip(taken, loaded.flags, strict=False):
        if not flags & F_RESET:
            what = f"page {entry.offset:#x} of slot {entry.slot:#x} is taken out of ring {ring._index}"
            watch.ghost.verdicts.say("I25", f"{what}, and user space has not given it back")
    return taken
