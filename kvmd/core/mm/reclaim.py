"""What the host does to a process's pages on its own: move, swap out, age, hint, merge.

Models migration, reclaim, page idle tracking, NUMA hinting and same-page merging [mm migrate.c], [mm
vmscan.c], [mm mempolicy.c], [mm ksm.c]. A page is taken from everybody who maps it: the notifiers of all
of them are told first, and a page that somebody else came to map meanwhile is left alone, as one that is
pinned is.

A merged page is read-only everywhere and for good; whoever writes gets a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.memory import SHARED_OWNER
from kvmd.core.mm.notifier import Range, ToldRanges, edit_notified, joined
from kvmd.core.mm.page import LazyFree, Page, PageKind, ProtNone, Pte, Swapped
from kvmd.core.mm.space import AddressSpace
from kvmd.core.mm.table import entries_of, users_of
from kvmd.core.mm.thp import split_page
from kvmd.core.mm.vma import Vma
from protocol.errors import UapiError
from protocol.units import LEVEL_4K, Hva, Pfn, pages_of_level

Act = Callable[[Vma, Page], int]  # changes a page, whose users were all told; how many that were


async def migrate(space: AddressSpace, start: Hva, size: int) -> int:
    """Move each present page to another frame, contents and all.  How many moved.  ENOMEM."""
    return await _on_pages(space, "migrate", start, size, _move)


async def swap_out(space: AddressSpace, start: Hva, size: int) -> int:
    """To the swap area; what was freed lazily is just dropped.  How many pages of 4 KiB."""
    return await _on_pages(space, "swap", start, size, _swap)


async def page_out(space: AddressSpace, start: Hva, end: Hva) -> int:
    """The same on a process's own advice, of a range that is mapped, for who holds the mmap_lock: what others
    have too is passed by, and what there is no room for stays [madvise_cold_or_pageout_pte_range]."""
    act = partial(_swap, part_of=_swap_if_room)
    return await _on_range(space, start, end, act, lambda page: not _is_shared(page))


async def merge(space: AddressSpace, start: Hva, size: int) -> int:
    """Same-page merging of what MADV_MERGEABLE allows; how many pages are gone."""
    unstable: dict[bytes, Page] = {}
    return await _on_pages(space, "merge", start, size, partial(_merge, unstable))


async def numa_hint(space: AddressSpace, start: Hva, size: int) -> int:
    """Make the next access fault [change_prot_numa]; how many pages."""
    return await space.change_pages("hint", start, size, partial(_hint, space))


async def age(space: AddressSpace, start: Hva, size: int) -> int:
    """How many secondary MMUs used the range since the last time."""
    end = space.check_range("age", start, size)
    young = 0
    for notifier in list(space.notifiers):
        if notifier in space.notifiers:
            # await: each notifier: it may unregister; asked again: before each is asked
            # (tests/unit/kvmd/mm/test_sleeps.py::test_a_notifier_that_went_is_not_asked_what_it_used) |
            # end, space: cannot change: the caller's own
            young += await notifier.clear_flush_young(start, end)
    return young


# awaits: space, act: cannot change: the caller's own
async def _on_pages(space: AddressSpace, what: str, start: Hva, size: int, act: Act) -> int:
    await space.mmap_lock.acquire(write=False)
    try:
        end = space.check_range(what, start, size)
        space.check_mapped(what, start, end)
        return await _on_range(space, start, end, act)
    finally:
        space.mmap_lock.release()


async def _on_range(
    space: AddressSpace, start: Hva, end: Hva, act: Act, wanted: Callable[[Page], bool] = lambda page: True
) -> int:
    users = [user for _, page in _pages(space, start, end) if wanted(page) for user in users_of(page)]
    ranges = joined([Range(space, *space.table.whole(start, end)), *users])

    def edit() -> int:
        told = ToldRanges(ranges)
        return sum(
            act(vma, page)
            for vma, page in _pages(space, start, end)
            if wanted(page) and all(told.covers(user) for user in users_of(page))
        )

    return await edit_notified(ranges, edit)


def _pages(space: AddressSpace, start: Hva, end: Hva) -> list[tuple[Vma, Page]]:
    """The pages mapped in start..end that may be moved, each once."""
    found: dict[Page, Vma] = {}
    for vma in space.vmas.overlapping(start, end):
        if vma.file is not None and not isinstance(vma.file, MemoryFile):
            continue  # guest_memfd: unevictable, and nothing migrates it
        for entry in space.table.within(Hva(max(start, vma.start)), Hva(min(end, vma.end))):
            if isinstance(entry, Pte) and not entry.page.pins and entry.page.kind is not PageKind.ZERO:
                found.setdefault(entry.page, vma)
    return [(vma, page) for page, vma in found.items()]


# -- one page each ------------------------------------------------------------------------------------------


def _move(vma: Vma, page: Page) -> int:
    entries = entries_of(page)
    table = entries[0][0]
    memory = table.memory
    old = memory.move(page, SHARED_OWNER if page.kind is PageKind.FILE else table.owner)
    for table, entry in entries:
        table.replace(entry, page, Pfn(page.pfn + entry.pfn - old), writable=entry.writable)
    memory.frames.release(old, page.level)
    return 1


def _is_shared(page: Page) -> bool:
    """Does more than one process map it, or one of them twice?  [folio_maybe_mapped_shared]"""
    entries = entries_of(page)
    mapped = sum(pages_of_level(entry.level) for _, entry in entries)
    return mapped > pages_of_level(page.level) or len({table for table, _ in entries}) > 1


def _swap_small(vma: Vma, page: Page) -> int:
    entries = entries_of(page)
    if not entries:
        return 0  # a part of a huge page nobody mapped
    if page.kind is PageKind.FILE:
        assert isinstance(vma.file, MemoryFile)
        vma.file.swap_out(page)
        for table, entry in entries:
            table.zap(entry)
    elif all(type(entry) is LazyFree for _, entry in entries):
        for table, entry in entries:
            table.clear(entry)
    else:
        swap = entries[0][0].memory.swap_out(page, len(entries))
        for table, entry in entries:
            table.set(Swapped(entry.hva, swap, entry.uffd_wp))
    return 1


def _swap_if_room(vma: Vma, page: Page) -> int:
    with suppress(UapiError):  # ENOMEM
        return _swap_small(vma, page)
    return 0


def _swap(vma: Vma, page: Page, part_of: Act = _swap_small) -> int:
    if vma.level > LEVEL_4K:
        return 0  # hugetlb stays
    return sum(part_of(vma, part) for part in (split_page(page) if page.level > LEVEL_4K else [page]))


def _merge(unstable: dict[bytes, Page], vma: Vma, page: Page) -> int:
    entries = entries_of(page)
    if not vma.mergeable or page.kind is not PageKind.ANON or page.level > LEVEL_4K:
        return 0
    if not all(type(entry) is Pte and not entry.uffd_wp for _, entry in entries):
        return 0
    memory = entries[0][0].memory
    contents = memory.contents(page)
    stable = memory.merged.get(contents)
    if stable is None:
        stable = unstable.pop(contents, None)
        if stable is None:
            unstable[contents] = page
            return 0
        _make_stable(stable, contents)
    for table, entry in entries:
        table.replace(entry, stable, stable.pfn, writable=False)
    return 1


def _make_stable(page: Page, contents: bytes) -> None:
    page.kind, page.exclusive = PageKind.KSM, False
    for table, entry in entries_of(page):
        table.memory.merged[contents] = page
        table.replace(entry, page, entry.pfn, writable=False)


def _hint(space: AddressSpace, start: Hva, end: Hva) -> int:
    hinted = 0
    for entry in space.table.within(start, end):
        if type(entry) is not Pte or entry.page.pins or entry.page.kind in (PageKind.ZERO, PageKind.KSM):
            continue
        space.table.set(entry.as_kind(ProtNone))
        hinted += 1
    return hinted
