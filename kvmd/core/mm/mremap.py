"""mremap(2): resize a mapping where it is, or move it, several at once if nothing is resized.

Models [mm mremap.c] of 6.18: with MREMAP_FIXED and one size for old and new, every mapping of the range
moves, and the gaps between them stay gaps; everything else is about one mapping. What lies at the
destination goes first, then what a smaller size cuts off; only then the mapping moves. A move that fails on
the way keeps what was done.
"""

from __future__ import annotations

import errno

from kvmd.core.mm.page import Pte
from kvmd.core.mm.space import MAX_MAP_COUNT, MMAP_BASE, TASK_SIZE, AddressSpace, page_align
from kvmd.core.mm.vma import Vma
from protocol.errors import UapiError
from protocol.units import LEVEL_4K, PAGE_SIZE, Hva, align_up, size_of_level


# awaits: space, old_size, new_size, asked: cannot change: the caller's own; what was asked is about them
# alone
async def mremap(
    space: AddressSpace, start: Hva, old_size: int, new_size: int, new: Hva | None = None
) -> Hva:
    """MREMAP_MAYMOVE, to `new` with MREMAP_FIXED; sizes are rounded up to whole pages, of hugetlb to its own.
    EINVAL: not aligned, no new size, ranges that overlap, a private mapping of size 0, hugetlb that grows;
    EFAULT: nothing mapped there, or not in one mapping where it must be; EBUSY; ENOMEM.
    """
    old_size, new_size = page_align(old_size), page_align(new_size)
    _check(start, old_size, new_size, new)
    await space.mmap_lock.acquire(write=True)
    try:
        if new is not None:
            _check_room(space, start)
        if new is not None and old_size == new_size:
            return await _move_all(space, start, old_size, new)
        vma, old_size, new_size = _prepare(space, start, old_size, new_size, new)
        if new is not None:
            return await _move_to(space, start, old_size, new_size, new)
        return await _resize(space, vma, start, old_size, new_size)
    finally:
        space.mmap_lock.release()


def _check(start: Hva, old_size: int, new_size: int, new: Hva | None) -> None:
    """What does not depend on what is mapped [check_mremap_params]."""
    asked = f"mremap {start:#x}+{old_size:#x} to {new_size:#x} bytes"
    if start % PAGE_SIZE or not 0 < new_size <= TASK_SIZE:
        raise UapiError(errno.EINVAL, f"{asked}: not aligned, or no such size")
    if new is not None and (new % PAGE_SIZE or new > TASK_SIZE - new_size):
        raise UapiError(errno.EINVAL, f"{asked} at {new:#x}: not aligned, or beyond user space")
    if new is not None and new < start + old_size and start < new + new_size:
        raise UapiError(errno.EINVAL, f"{asked} at {new:#x}: overlaps itself")


def _check_room(space: AddressSpace, start: Hva) -> None:
    """ENOMEM, before anything is unmapped, also of a move that could just do: both ends may be cut in three,
    and then `_move` wants its own room [check_mremap_params]."""
    if len(space.vmas) + 2 >= MAX_MAP_COUNT - 3:
        raise UapiError(errno.ENOMEM, f"mremap {start:#x}: the process has {len(space.vmas)} mappings")


def _prepare(
    space: AddressSpace, start: Hva, old_size: int, new_size: int, new: Hva | None
) -> tuple[Vma, int, int]:
    """The mapping at `start`, and the sizes in its pages [check_prep_vma].  EFAULT, EINVAL."""
    vma = space.vmas.find(start)
    if vma is None:
        raise UapiError(errno.EFAULT, f"mremap {start:#x}: nothing is mapped there")
    if vma.level > LEVEL_4K:
        page = size_of_level(vma.level)
        old_size, new_size = align_up(old_size, page), align_up(new_size, page)
        if start % page or (new or 0) % page or new_size > old_size:
            raise UapiError(errno.EINVAL, f"mremap {start:#x}: pages of {page:#x} bytes, which do not grow")
    if new is None and new_size <= old_size:
        return vma, old_size, new_size  # whatever lies behind what is kept
    if not old_size and not vma.shared:
        raise UapiError(errno.EINVAL, f"mremap {start:#x}: a private mapping cannot be had twice")
    if min(old_size, new_size) > vma.end - start:
        raise UapiError(errno.EFAULT, f"mremap {start:#x}+{old_size:#x}: not in one mapping")
    return vma, old_size, new_size


# awaits: space, at, last_end, part, vma: cannot change: the mmap_lock is held for writing
async def _move_all(space: AddressSpace, start: Hva, size: int, new: Hva) -> Hva:
    """Every mapping of the range, the gaps kept [remap_move].  One that a userfaultfd watches moves alone.
    EFAULT: it does not begin with a mapping.
    """
    end, at, target = start + size, start, new
    last_end: Hva | None = None
    while (vma := space.vmas.next(at)) is not None and vma.start < end:
        if last_end is None and start < vma.start:
            break
        alone = vma.uffd is not None
        if alone and (last_end is not None or vma.end < end):
            raise UapiError(errno.EFAULT, f"mremap {start:#x}: a userfaultfd watches {vma.start:#x}")
        first = Hva(max(vma.start, start))
        part = min(end, vma.end) - first
        to = Hva(target + (0 if last_end is None else vma.start - last_end))
        last_end, at = vma.end, Hva(first + part)
        _, part, _ = _prepare(space, first, part, part, to)
        target = Hva(await _move_to(space, first, part, part, to) + part)
    if last_end is None:
        raise UapiError(errno.EFAULT, f"mremap {start:#x}: nothing is mapped there")
    return new


# awaits: space, asked: cannot change: the mmap_lock is held for writing
async def _move_to(space: AddressSpace, start: Hva, old_size: int, new_size: int, new: Hva) -> Hva:
    """[mremap_to].  EFAULT: what was to move went with the destination: of size 0 it may lie there."""
    await space.unmap("mremap", new, Hva(new + new_size))
    if space.vmas.find(start) is None:
        raise UapiError(errno.EFAULT, f"mremap {start:#x}: it lay at its destination {new:#x}, and is gone")
    if new_size < old_size:
        await space.unmap("mremap", Hva(start + new_size), Hva(start + old_size))
    return await _move(space, start, min(old_size, new_size), new_size, new)


async def _resize(space: AddressSpace, vma: Vma, start: Hva, old_size: int, new_size: int) -> Hva:
    """In place if it can be; the same size changes nothing [mremap_at]."""
    old_end, new_end = Hva(start + old_size), Hva(start + new_size)
    if new_end == old_end:
        return start
    if new_end < old_end:
        await space.unmap("mremap", new_end, old_end)
        return start
    if vma.end == old_end and new_end <= TASK_SIZE and not space.vmas.overlapping(old_end, new_end):
        space.check_showing(vma.part(old_end, new_end))
        vma.end = new_end
        space.vmas.merge(start, new_end)
        return start
    new = space.vmas.gap(MMAP_BASE, TASK_SIZE, new_size, size_of_level(vma.level))
    if new + new_size > TASK_SIZE:
        raise UapiError(errno.ENOMEM, f"mremap {start:#x}: no room for {new_size:#x} bytes")
    return await _move(space, start, old_size, new_size, new)


async def _move(space: AddressSpace, start: Hva, size: int, new_size: int, new: Hva) -> Hva:
    """`size` bytes of one mapping become a mapping of `new_size` at `new`, where nothing is.  Of size 0 it is
    a second mapping of the same file."""
    end, new_end = Hva(start + size), Hva(new + new_size)
    if len(space.vmas) >= MAX_MAP_COUNT - 3:
        raise UapiError(errno.ENOMEM, f"mremap {start:#x}: the process has {len(space.vmas)} mappings")

    def edit() -> None:
        old = space.vmas.find(start)
        assert old is not None
        moved = old.part(start, old.end)
        moved.start, moved.end = new, new_end
        moved.forget_uffd()  # no EVENT_REMAP was asked for
        space.check_showing(moved)
        if size:
            (old,) = space.vmas.isolate(start, end)
        space.vmas.insert(moved)
        if not size:
            return
        _move_entries(space, start, end, new)
        if old.uffd is not None:
            old.uffd.wake(start, end)
        space.vmas.remove(old)

    if size:
        # await: space, asked: cannot change: the mmap_lock is held for writing
        await space.change(start, end, edit)
    else:
        edit()
    space.vmas.merge(new, new_end)
    return new


def _move_entries(space: AddressSpace, start: Hva, end: Hva, new: Hva) -> None:
    by = new - start
    for entry in space.table.within(start, end):
        if entry.level > LEVEL_4K and by % size_of_level(entry.level):
            assert isinstance(entry, Pte)
            space.table.split(entry)
    for entry in space.table.within(start, end):
        space.table.move(entry, Hva(entry.hva + by))
