"""Advice about memory: what madvise does to pages and to mappings.

Models [mm madvise.c]: dropping pages of a private mapping leaves zeroes or the file, of a shared one the
file's pages where they are; removing takes them from the file; freeing lets the host take them until they
are used again. The rest is remembered with the mapping, or done at once by who else can do it (`thp`,
`reclaim`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from kvmd.core.mm.page import LazyFree, Pte
from kvmd.core.mm.reclaim import swap_out
from kvmd.core.mm.space import AddressSpace
from kvmd.core.mm.thp import collapse
from kvmd.core.mm.vma import Vma
from protocol.errors import UapiError
from protocol.units import LEVEL_4K, Hva


async def dontneed(space: AddressSpace, start: Hva, size: int) -> int:
    """Drop the pages; the next touch finds zeroes, or the file's.  ENOMEM: part is not mapped."""
    return await space.change_pages("madvise", start, size, partial(_zap, space))


def _zap(space: AddressSpace, start: Hva, end: Hva) -> int:
    entries = space.table.within(start, end)
    for entry in entries:
        space.table.zap(entry)
    return len(entries)


async def free(space: AddressSpace, start: Hva, size: int) -> int:
    """The host may drop the pages until they are used again.  EINVAL: not private anonymous memory."""
    for vma in space.vmas.overlapping(start, Hva(start + size)):
        if vma.file is not None or vma.level > LEVEL_4K:
            raise UapiError(errno.EINVAL, f"MADV_FREE at {vma.start:#x}: not private anonymous memory")
    return await space.change_pages("madvise", start, size, partial(_make_lazy, space))


def _make_lazy(space: AddressSpace, start: Hva, end: Hva) -> int:
    lazy = 0
    for entry in space.table.within(start, end):
        if type(entry) is Pte and entry.page.exclusive and not entry.page.pins:
            space.table.set(entry.as_kind(LazyFree))
            lazy += 1
    return lazy


async def remove(space: AddressSpace, start: Hva, size: int) -> int:
    """Punch a hole into the files mapped there.  EINVAL: anonymous; EACCES: not shared and writable."""
    await space.mmap_lock.acquire(write=False)
    try:
        end = space.check_range("madvise", start, size)
        space.check_mapped("madvise", start, end)
        vmas = space.vmas.overlapping(start, end)
        holes = [_hole(vma, Hva(max(start, vma.start)), Hva(min(end, vma.end))) for vma in vmas]
    finally:
        space.mmap_lock.release()  # the file's lock comes before it
    for punch in holes:
        await punch()
    return len(holes)


def _hole(vma: Vma, start: Hva, end: Hva) -> Callable[[], Coroutine[Any, None, None]]:
    if vma.file is None:
        raise UapiError(errno.EINVAL, f"MADV_REMOVE at {vma.start:#x}: no file is mapped there")
    if not (vma.shared and vma.writable):
        raise UapiError(errno.EACCES, f"MADV_REMOVE at {vma.start:#x}: not a shared writable mapping")
    return partial(vma.file.punch_hole, vma.offset_of(start), end - start)


async def _remember(setting: Callable[[Vma], None], space: AddressSpace, start: Hva, size: int) -> int:
    """Advice for later: no page changes."""
    await space.mmap_lock.acquire(write=True)
    try:
        end = space.check_range("madvise", start, size)
        space.check_mapped("madvise", start, end)
        vmas = space.vmas.isolate(start, end)
        for vma in vmas:
            setting(vma)
        space.vmas.merge(start, end)
        return len(vmas)
    finally:
        space.mmap_lock.release()


def _set_huge(huge: bool, vma: Vma) -> None:
    vma.huge = huge


def _set_mergeable(vma: Vma) -> None:
    vma.mergeable = True


Advice = Callable[[AddressSpace, Hva, int], Coroutine[Any, None, int]]

ADVICE: dict[str, Advice] = {
    "dontneed": dontneed,
    "remove": remove,
    "free": free,
    "hugepage": partial(_remember, partial(_set_huge, True)),
    "nohugepage": partial(_remember, partial(_set_huge, False)),
    "mergeable": partial(_remember, _set_mergeable),
    "collapse": collapse,
    "pageout": swap_out,
}
