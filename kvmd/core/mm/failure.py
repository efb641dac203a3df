"""Memory that fails: the page is taken from everybody, and its frame used by nobody who could tell.

Models memory_failure [mm memory-failure.c]: a transparent huge page is split first, so that only 4 KiB
are lost, hugetlb's is lost whole; every process that mapped it finds a poisoned entry, a file keeps the
bad page so that its contents are not silently replaced by zeroes. Whoever touches it gets EHWPOISON, who
has it pinned keeps it. Departure: with the last entry, file and pin that names it the frame goes back.
"""

from __future__ import annotations

import errno
from functools import partial

from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.notifier import ToldRanges, edit_notified, joined
from kvmd.core.mm.page import Page, PageKind, Poisoned, Pte
from kvmd.core.mm.table import entries_of, users_of
from kvmd.core.mm.thp import split_page
from protocol.errors import UapiError
from protocol.units import LEVEL_4K, PAGE_SIZE, Hva, size_of_level


# awaits: mm, end, hva: cannot change: the caller's own, and where we are
async def poison(mm: Mm, start: Hva, size: int) -> int:
    """MADV_HWPOISON: the memory of every page of the range failed; how many.  EBUSY: zero page; EFAULT."""
    end = mm.check_range("poison", start, size)
    hva, lost = start, 0
    while hva < end:
        await _fail(mm, hva)
        entry = mm.table.find(hva)
        hva = Hva(hva + (PAGE_SIZE if entry is None else size_of_level(entry.level)))
        lost += 1
    return lost


# awaits: mm: cannot change: the caller's own
async def _fail(mm: Mm, hva: Hva) -> None:
    while True:
        page = (await mm.fault_in(hva, write=False)).page
        vma = mm.vmas.find(hva)
        if vma is not None and not isinstance(vma.file, MemoryFile | None):
            raise UapiError(errno.EOPNOTSUPP, f"hva {hva:#x}: {vma.file.name} does not lose memory")
        if page.kind is PageKind.ZERO:
            raise UapiError(errno.EBUSY, f"hva {hva:#x}: the zero page is not given up")
        ranges = joined(users_of(page))
        if await edit_notified(ranges, partial(_poison, mm, hva, page, ToldRanges(ranges))):
            return


def _poison(mm: Mm, hva: Hva, page: Page, told: ToldRanges) -> bool:
    entry = mm.table.find(hva)
    if not isinstance(entry, Pte) or entry.page is not page:
        return False
    if not all(told.covers(user) for user in users_of(page)):
        return False
    vma = mm.vmas.find(hva)
    if vma is not None and vma.level == LEVEL_4K and page.level > LEVEL_4K:
        split_page(page)
        entry = mm.table.find(hva)
        assert isinstance(entry, Pte)
        page = entry.page  # itself, if it is pinned: then all of it is lost
    mm.memory.poison(page)
    for table, lost in entries_of(page):
        table.set(Poisoned(lost.hva, lost.level, page))
    return True
