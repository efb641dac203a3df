"""Transparent huge pages: putting 2 MiB together, and taking them apart.

Models collapse and split of huge pages [mm khugepaged.c], [mm huge_memory.c]. A collapse copies what a
mapping has in 2 MiB into one new page, holes as zeroes; a split of an entry (`PageTable.split`) changes
no frame, but is told to the notifiers because what they mapped as one may not be one any more; a split of
the page itself gives back the parts nobody maps.
"""

from __future__ import annotations

import errno
from functools import partial

from kvmd.core.mm.fault import SIZE_2M
from kvmd.core.mm.notifier import ToldRanges, edit_notified, joined
from kvmd.core.mm.page import Entry, Page, PageKind, ProtNone, Pte, Swapped
from kvmd.core.mm.space import AddressSpace
from kvmd.core.mm.table import entries_of, users_of
from kvmd.core.mm.vma import Vma
from protocol.errors import UapiError
from protocol.units import LEVEL_2M, LEVEL_4K, PAGE_SIZE, Hva, align_down, align_up


async def collapse_part(space: AddressSpace, vma: Vma, start: Hva, end: Hva) -> int:
    """MADV_COLLAPSE of a part of one mapping, the mmap_lock held for writing: each whole 2 MiB becomes one
    page; how many there are now.  What may be better later is passed by, anything else ends it
    [madvise_collapse].  EINVAL: memory that cannot be huge, or nothing there; EBUSY: pages that a userfaultfd
    waits for; EAGAIN: pinned; ENOMEM.
    """
    if not _may_be_huge(vma):
        raise UapiError(errno.EINVAL, f"collapse at {start:#x}: not 2 MiB of private anonymous memory")
    failed: UapiError | None = None
    heads = range(align_up(start, SIZE_2M), align_down(end, SIZE_2M), SIZE_2M)
    for head in heads:
        try:
            # await: space, failed, asked: cannot change: our own; the mmap_lock is held for writing
            await space.change(Hva(head), Hva(head + SIZE_2M), partial(_collapse, space, Hva(head)))
        except _PassBy as passed:
            failed = passed
    if failed is not None:
        raise failed
    return len(heads)


class _PassBy(UapiError):
    """One that cannot be huge now; the next may."""


def _may_be_huge(vma: Vma) -> bool:
    """[thp_vma_allowable_order]: whatever part of it is asked for, it must have room for a huge page."""
    room = align_down(vma.end, SIZE_2M) - SIZE_2M >= vma.start
    return room and vma.file is None and vma.level == LEVEL_4K and vma.huge is not False


def _collapse(space: AddressSpace, head: Hva) -> None:
    end = Hva(head + SIZE_2M)
    vma = space.vmas.find(head)
    assert vma is not None, "the mmap_lock is held"
    entries = space.table.within(head, end)
    if len(entries) == 1 and isinstance(entries[0], Pte) and entries[0].level == LEVEL_2M:
        return  # [SCAN_PMD_MAPPED]: nothing to do, pinned or not
    _check_collapsible(vma, head, entries)
    page = space.memory.allocate(LEVEL_2M, space.id)
    view = space.memory.view(page.pfn, SIZE_2M)
    for entry in entries:
        at = entry.hva - head
        if isinstance(entry, Pte):
            view[at : at + PAGE_SIZE] = space.memory.view(entry.pfn, PAGE_SIZE)
        elif isinstance(entry, Swapped):
            view[at : at + PAGE_SIZE] = entry.swap.data
        space.table.clear(entry)
    made = Pte(head, page.pfn, LEVEL_2M, vma.writable, page)
    space.table.set(made if vma.prot else made.as_kind(ProtNone))


def _check_collapsible(vma: Vma, head: Hva, entries: list[Entry]) -> None:
    """EINVAL, EBUSY, EAGAIN."""
    if not entries:
        raise UapiError(errno.EINVAL, f"collapse at {head:#x}: nothing there")
    filled = sum(not (isinstance(entry, Pte) and entry.page.kind is PageKind.ZERO) for entry in entries)
    if vma.uffd is not None and filled < SIZE_2M // PAGE_SIZE:  # [SCAN_EXCEED_NONE_PTE]
        raise UapiError(errno.EBUSY, f"collapse at {head:#x}: a userfaultfd watches pages that nobody filled")
    if any(isinstance(entry, Pte | Swapped) and entry.uffd_wp for entry in entries):
        raise _PassBy(errno.EINVAL, f"collapse at {head:#x}: write-protected pages")
    if any(not isinstance(entry, Pte | Swapped) for entry in entries):
        raise UapiError(errno.EINVAL, f"collapse at {head:#x}: poisoned pages")
    if any(isinstance(entry, Pte) and entry.page.pins for entry in entries):
        raise _PassBy(errno.EAGAIN, f"collapse at {head:#x}: a page is pinned")


async def split(space: AddressSpace, start: Hva, size: int) -> int:
    """Take the transparent huge pages of the range apart, entries and pages; how many.  One that is pinned
    keeps its frames together."""
    end = space.check_range("split", start, size)
    pages = {
        entry.page: None
        for entry in space.table.within(start, end)
        if isinstance(entry, Pte) and is_transparent(space, entry)
    }
    done = 0
    for page in pages:
        ranges = joined(users_of(page))
        # await: each page: it may go, or be split by another; asked again: `_split_told`
        # (tests/unit/kvmd/mm/test_sleeps.py::test_a_huge_page_that_went_is_not_split) | done: cannot
        # change: our own
        done += await edit_notified(ranges, partial(_split_told, page, ToldRanges(ranges)))
    return done


def is_transparent(space: AddressSpace, entry: Pte) -> bool:
    """Whether the entry's page is huge though its mapping does not ask for it."""
    vma = space.vmas.find(entry.hva)
    return (
        entry.page.level == LEVEL_2M
        and entry.page.kind is PageKind.ANON
        and vma is not None
        and vma.level == LEVEL_4K
    )


def _split_told(page: Page, told: ToldRanges) -> bool:
    users = users_of(page)
    if not users or page.level != LEVEL_2M or not all(told.covers(user) for user in users):
        return False
    split_page(page)
    return True


def split_page(page: Page) -> list[Page]:
    """The pages a transparent huge page becomes: 512, or itself if it is pinned; no entry is huge any more.
    The notifiers of its users were told."""
    for table, entry in entries_of(page):
        if entry.level == LEVEL_2M:
            table.split(entry)
    if page.pins or page.kind is PageKind.ZERO:
        return [page]
    entries = entries_of(page)
    memory, first = entries[0][0].memory, page.pfn
    page.pins += 1  # until every entry names its own page
    pages = memory.split(page)
    for table, entry in entries:
        table.replace(entry, pages[entry.pfn - first], entry.pfn, writable=entry.writable)
    page.pins -= 1
    for part in pages:
        memory.put(part)
    return pages
