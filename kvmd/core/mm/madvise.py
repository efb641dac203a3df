"""Advice about memory: what madvise does to pages and to mappings.

Models [mm madvise.c]: the length is rounded up, and the range gone through mapping by mapping: what one
mapping refuses ends it there, what is not mapped is passed by and told at the end. Dropping pages of a
private mapping leaves zeroes or the file, of a shared one the file's pages where they are; removing takes
them from the file; freeing lets the host take them until they are used again. The rest is remembered with
the mapping, or done at once by who else can do it (`thp`, `reclaim`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from kvmd.core.mm.page import Entry, LazyFree, Pte
from kvmd.core.mm.reclaim import page_out
from kvmd.core.mm.space import AddressSpace, page_align
from kvmd.core.mm.thp import collapse_part
from kvmd.core.mm.vma import Vma
from protocol.errors import UapiError
from protocol.units import LEVEL_4K, PAGE_SIZE, Hva, align_down, size_of_level

Visit = Callable[[AddressSpace, Vma, Hva, Hva], Coroutine[Any, Any, int]]
Advice = Callable[[AddressSpace, Hva, int], Coroutine[Any, Any, int]]


# awaits: space, visit: cannot change: the caller's own
async def _walk(visit: Visit, space: AddressSpace, start: Hva, size: int, *, write: bool = False) -> int:
    """`visit` each mapping's part of the range, with the mmap_lock held, which it may drop; the sum of what
    it did [madvise_walk_vmas].  EINVAL: not aligned, or it wraps; ENOMEM: part is not mapped.
    """
    end = Hva(start + page_align(size))
    if start % PAGE_SIZE or size < 0 or end >= 1 << 64 or (size and end == start):
        raise UapiError(errno.EINVAL, f"madvise {start:#x}+{size:#x}: not aligned, or no such size")
    await space.mmap_lock.acquire(write=write)
    try:
        at, hole, done = start, False, 0
        while at < end:
            vma = space.vmas.next(at)
            hole |= vma is None or vma.start > at
            if vma is None or vma.start >= end:
                break
            first, at = Hva(max(at, vma.start)), Hva(min(end, vma.end))
            # await: at, hole, done: the mappings, if it drops the lock; asked again: which mapping comes
            # next
            # (tests/unit/kvmd/mm/test_sleeps.py::test_a_mapping_that_went_takes_no_advice)
            done += await visit(space, vma, first, at)
        if hole:
            raise UapiError(errno.ENOMEM, f"madvise {start:#x}..{end:#x}: part of it is not mapped")
        return done
    finally:
        if write:
            space.vmas.merge(start, end)
        space.mmap_lock.release()


async def _dontneed(space: AddressSpace, vma: Vma, start: Hva, end: Hva) -> int:
    """Of hugetlb only whole pages: the end is rounded down, for whoever knows nothing of its pages' size."""
    page = size_of_level(vma.level)
    if start % page:
        raise UapiError(errno.EINVAL, f"MADV_DONTNEED at {start:#x}: within a page of {page:#x} bytes")
    end = Hva(align_down(end, page))
    drop = space.table.clear if vma.file is None else space.table.zap
    # await: end: cannot change: a value of our own
    return await space.change(start, end, partial(_drop, space, start, end, drop)) if start < end else 0


def _drop(space: AddressSpace, start: Hva, end: Hva, drop: Callable[[Entry], None]) -> int:
    entries = space.table.within(start, end)
    for entry in entries:
        drop(entry)
    return len(entries)


async def _free(space: AddressSpace, vma: Vma, start: Hva, end: Hva) -> int:
    if vma.file is not None or vma.level > LEVEL_4K:
        raise UapiError(errno.EINVAL, f"MADV_FREE at {start:#x}: not private anonymous memory")
    return await space.change(start, end, partial(_make_lazy, space, start, end))


def _make_lazy(space: AddressSpace, start: Hva, end: Hva) -> int:
    lazy = 0
    for entry in space.table.within(start, end):
        if type(entry) is Pte and entry.page.exclusive and not entry.page.pins:
            space.table.set(entry.as_kind(LazyFree))
            lazy += 1
    return lazy


async def _remove(space: AddressSpace, vma: Vma, start: Hva, end: Hva) -> int:
    """Punch a hole into the file mapped there.  A mapping asks for VM_MAYWRITE, which every shared mapping of
    memory has, whatever its protection is now; hugetlb has a file even where nobody named one.
    """
    file = vma.file
    if file is None and vma.level == LEVEL_4K:
        raise UapiError(errno.EINVAL, f"MADV_REMOVE at {start:#x}: no file is mapped there")
    if file is None or not vma.shared:
        raise UapiError(errno.EACCES, f"MADV_REMOVE at {start:#x}: not a shared mapping")
    offset = vma.offset_of(start)
    space.mmap_lock.release()  # the file's lock comes before it
    try:
        # await: space, asked: cannot change: the file's hole is wanted, whoever maps it now, and its change
        # keeps the file
        await file.punch_hole(offset, end - start)
    finally:
        # await: asked: cannot change: the hole is made
        await space.mmap_lock.acquire(write=False)
    return 1


async def _collapse(space: AddressSpace, vma: Vma, start: Hva, end: Hva) -> int:
    return await collapse_part(space, vma, start, end)


async def _page_out(space: AddressSpace, vma: Vma, start: Hva, end: Hva) -> int:
    if vma.level > LEVEL_4K:
        raise UapiError(errno.EINVAL, f"MADV_PAGEOUT at {start:#x}: hugetlb stays")
    return await page_out(space, start, end)


async def _remember(
    setting: Callable[[Vma], None], space: AddressSpace, vma: Vma, start: Hva, end: Hva
) -> int:
    """Advice for later: no page changes.  EINVAL: it cuts a huge page of hugetlb; EAGAIN: too many mappings,
    which is ENOMEM elsewhere [madvise_vma_behavior]."""
    space.check_split("madvise", start, end)
    try:
        # await: setting: cannot change: the caller's own
        parts = await space.isolate(start, end)
    except UapiError as error:
        raise UapiError(errno.EAGAIN, error.why) from None
    for part in parts:
        setting(part)
    return len(parts)


def _set_huge(huge: bool, vma: Vma) -> None:
    vma.huge = huge


def _set_mergeable(vma: Vma) -> None:
    """What cannot be merged ignores it [vma_ksm_compatible]."""
    vma.mergeable = not vma.shared and vma.level == LEVEL_4K


dontneed: Advice = partial(_walk, _dontneed)
collapse: Advice = partial(_walk, _collapse, write=True)

ADVICE: dict[str, Advice] = {
    "dontneed": dontneed,
    "remove": partial(_walk, _remove),
    "free": partial(_walk, _free),
    "hugepage": partial(_walk, partial(_remember, partial(_set_huge, True)), write=True),
    "nohugepage": partial(_walk, partial(_remember, partial(_set_huge, False)), write=True),
    "mergeable": partial(_walk, partial(_remember, _set_mergeable), write=True),
    "collapse": collapse,
    "pageout": partial(_walk, _page_out),
}
