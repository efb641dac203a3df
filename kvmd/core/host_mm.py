"""The host's memory management of one process: mappings, page map, and notifiers before every change.

Models an mm_struct as a secondary MMU sees it [KVM mmu_notifier]: host virtual pages are backed by
frames on first touch; before a page is unmapped, moved or dropped every notifier is told, and the
change, and the giving up of the frame, wait until the notifier says that nobody uses the old
translation any more.

Invariant I6 has its home in `_change`: notify and wait, then edit, then release, then end.  The mmap_lock is
taken as Linux does: for writing by what changes mappings, for reading by what changes or looks up pages.
Departures: no zero page and no copy-on-write yet; a page is backed by a frame of its mapping's size at once.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Protocol

from kvmd.core.frames import Frames
from protocol.errors import UapiError
from protocol.flow import RwLock
from protocol.units import PAGE_SIZE, TIB, Hva, Level, Pfn, align_down, align_up, size_of_level

MMAP_BASE = Hva(0x1000_0000_0000)
TASK_SIZE = Hva(1 << 47)
MAX_MAPPING_BYTES = 64 * TIB


class Prot(Flag):
    NONE = 0
    READ = auto()
    WRITE = auto()


@dataclass(slots=True)
class Mapping:
    """A VMA: `start..end` with one protection, backed by pages of one size."""

    start: Hva
    end: Hva
    prot: Prot
    level: Level
    readable: bool = field(init=False)  # what `prot` says, for every fault to see at once
    writable: bool = field(init=False)

    def __post_init__(self) -> None:
        self.readable, self.writable = Prot.READ in self.prot, Prot.WRITE in self.prot


@dataclass(slots=True)
class HostPage:
    """One present host page: `level` says its size, `hva` its first byte."""

    hva: Hva
    pfn: Pfn
    level: Level
    writable: bool


Edit = Callable[[Hva, Hva], int]  # changes start..end, says how many pages that were


class MmuNotifier(Protocol):
    """A secondary MMU that maps pages of this mm [KVM mmu_notifier]."""

    async def invalidate_range_start(self, start: Hva, end: Hva) -> None:
        """Stop using translations of start..end; returns when nobody can use them any more."""

    def invalidate_range_end(self, start: Hva, end: Hva) -> None:
        """The change is made; new translations may be looked up."""


class Mm:
    """The address space of one process."""

    def __init__(self, mm_id: int, frames: Frames) -> None:
        self.id = mm_id  # owner of its frames
        self.token = 0  # how other processes name it: a bare number, no reference, as domain->mm [RFC 15/42]
        self.alive = True
        self.exited = False  # and everything it had is given back
        self.notifiers: list[MmuNotifier] = []
        self._frames = frames
        self._mappings: list[Mapping] = []
        self._pages: dict[Hva, HostPage] = {}  # by first hva
        self._mmap_lock = RwLock()

    # -- what a process does to its address space ------------------------------------------------------

    async def mmap(self, hva: Hva | None, size: int, prot: Prot, level: Level) -> Hva:
        """Map anonymous memory.  EINVAL: size or address not whole pages of `level`; EEXIST: overlap;
        ENOMEM.
        """
        page = size_of_level(level)
        if size <= 0 or size % page or size > MAX_MAPPING_BYTES:
            raise UapiError(
                errno.EINVAL, f"mmap of {size:#x} bytes: not a multiple of {page:#x} up to 64 TiB"
            )
        if hva is not None and (hva % page or hva < 0):
            raise UapiError(errno.EINVAL, f"mmap at {hva:#x}: not aligned to {page:#x}")
        await self._mmap_lock.acquire(write=True)
        try:
            return self._insert_mapping(self._gap(size, page) if hva is None else hva, size, prot, level)
        finally:
            self._mmap_lock.release()

    def _insert_mapping(self, hva: Hva, size: int, prot: Prot, level: Level) -> Hva:
        end = Hva(hva + size)
        if end > TASK_SIZE:
            raise UapiError(errno.ENOMEM, f"mmap {hva:#x}..{end:#x} is beyond user space")
        if next(self._overlapping(hva, end), None) is not None:
            raise UapiError(errno.EEXIST, f"mmap {hva:#x}..{end:#x}: something is mapped there")
        at = bisect_right(self._mappings, hva, key=lambda m: m.start)
        self._mappings.insert(at, Mapping(hva, end, prot, level))
        return hva

    def _gap(self, size: int, page: int) -> Hva:
        """The lowest place above MMAP_BASE where `size` bytes fit."""
        hva = MMAP_BASE
        for mapping in self._overlapping(MMAP_BASE, TASK_SIZE):
            if hva + size <= mapping.start:
                break
            hva = Hva(align_up(max(hva, mapping.end), page))
        return hva

    async def munmap(self, start: Hva, size: int) -> None:
        """Unmap a range; mappings it cuts keep the rest.  EINVAL: not whole pages."""
        await self._mmap_lock.acquire(write=True)
        try:
            end = self._check_range("munmap", start, size)
            await self._change(start, end, self._unmap_range)
        finally:
            self._mmap_lock.release()

    async def madvise_dontneed(self, start: Hva, size: int) -> None:
        """Drop the pages; the next touch finds zeroes.  ENOMEM: part of the range is not mapped."""
        await self._change_pages("madvise", start, size, self._drop_pages)

    async def migrate(self, start: Hva, size: int) -> int:
        """Move each present page to another frame, contents and all.  How many moved."""
        return await self._change_pages("migrate", start, size, self._move_pages)

    async def exit(self) -> None:
        """The process is gone: unmap everything, and only then free it [RFC defect B-19]."""
        if self.alive:
            self.alive = False
            await self._mmap_lock.acquire(write=True)
            await self._change(Hva(0), TASK_SIZE, self._unmap_range)
            self._mmap_lock.release()
            self.exited = True

    # -- what others see of it -------------------------------------------------------------------------

    async def get_user_page(self, hva: Hva, *, write: bool) -> HostPage:
        """GUP: `fault_in`, but it may sleep, and what its caller knew before need not hold after it."""
        await self._mmap_lock.acquire(write=False)
        try:
            return self.fault_in(hva, write=write)
        finally:
            self._mmap_lock.release()

    def fault_in(self, hva: Hva, *, write: bool) -> HostPage:
        """The page at `hva`, backed by a frame now.  EFAULT: not mapped, or not with that right."""
        mapping = self._mapping_at(hva)
        if not self.alive or mapping is None or not (mapping.writable if write else mapping.readable):
            what = "write to" if write else "read of"
            raise UapiError(
                errno.EFAULT, f"{what} hva {hva:#x}: " + ("no mapping" if mapping is None else "protection")
            )
        head = Hva(align_down(hva, size_of_level(mapping.level)))
        page = self._pages.get(head)
        if page is None:
            pfn = self._frames.allocate(mapping.level, self.id)
            page = HostPage(head, pfn, mapping.level, mapping.writable)
            self._pages[head] = page
        return page

    def present_page(self, hva: Hva) -> HostPage | None:
        """The page at `hva` if it is backed already; touches nothing."""
        mapping = self._mapping_at(hva)
        return (
            None if mapping is None else self._pages.get(Hva(align_down(hva, size_of_level(mapping.level))))
        )

    def read(self, hva: Hva, size: int) -> bytes:
        """What the process itself reads.  EFAULT."""
        return b"".join(bytes(part) for part in self._bytes_at(hva, size, write=False))

    def write(self, hva: Hva, data: bytes) -> None:
        """What the process itself writes.  EFAULT, after the pages before it were written."""
        at = 0
        for part in self._bytes_at(hva, len(data), write=True):
            part[:] = data[at : at + len(part)]
            at += len(part)

    # -- changes ---------------------------------------------------------------------------------------

    async def _change_pages(self, what: str, start: Hva, size: int, edit: Edit) -> int:
        """A change of pages but of no mapping: faults and other such changes go on meanwhile."""
        await self._mmap_lock.acquire(write=False)
        try:
            end = self._check_range(what, start, size)
            self._check_mapped(what, start, end)
            return await self._change(start, end, edit)
        finally:
            self._mmap_lock.release()

    async def _change(self, start: Hva, end: Hva, edit: Edit) -> int:
        """Notify, wait until nobody uses the range, edit and release, notify the end.  Pages changed."""
        notifiers = list(self.notifiers)
        for notifier in notifiers:
            await notifier.invalidate_range_start(start, end)
        try:
            return edit(start, end)
        finally:
            for notifier in notifiers:
                notifier.invalidate_range_end(start, end)

    def _unmap_range(self, start: Hva, end: Hva) -> int:
        dropped = self._drop_pages(start, end)
        for mapping in list(self._overlapping(start, end)):
            self._mappings.remove(mapping)
            for left, right in ((mapping.start, start), (end, mapping.end)):
                if left < right:
                    at = bisect_right(self._mappings, left, key=lambda m: m.start)
                    self._mappings.insert(at, Mapping(left, right, mapping.prot, mapping.level))
        return dropped

    def _drop_pages(self, start: Hva, end: Hva) -> int:
        pages = list(self._pages_in(start, end))
        for page in pages:
            del self._pages[page.hva]
            self._frames.release(page.pfn, page.level)
        return len(pages)

    def _move_pages(self, start: Hva, end: Hva) -> int:
        view = self._frames.view
        pages = list(self._pages_in(start, end))
        for page in pages:
            new = self._frames.allocate(page.level, self.id)
            size = size_of_level(page.level)
            old_at, new_at = self._frames.offset_of(page.pfn), self._frames.offset_of(new)
            view[new_at : new_at + size] = view[old_at : old_at + size]
            self._frames.release(page.pfn, page.level)
            page.pfn = new
        return len(pages)

    # -- lookups ---------------------------------------------------------------------------------------

    def _mapping_at(self, hva: Hva) -> Mapping | None:
        at = bisect_right(self._mappings, hva, key=lambda m: m.start) - 1
        return self._mappings[at] if at >= 0 and hva < self._mappings[at].end else None

    def _overlapping(self, start: Hva, end: Hva) -> Iterator[Mapping]:
        at = max(bisect_right(self._mappings, start, key=lambda m: m.start) - 1, 0)
        for mapping in self._mappings[at:]:
            if mapping.start >= end:
                return
            if mapping.end > start:
                yield mapping

    def _pages_in(self, start: Hva, end: Hva) -> Iterator[HostPage]:
        """Present pages that begin in start..end; looks at pages or at the range, whichever is fewer."""
        if (end - start) // PAGE_SIZE > len(self._pages):
            yield from (page for hva, page in self._pages.items() if start <= hva < end)
            return
        for mapping in self._overlapping(start, end):
            first, last = max(mapping.start, start), min(mapping.end, end)
            for hva in range(first, last, size_of_level(mapping.level)):
                page = self._pages.get(Hva(hva))
                if page is not None:
                    yield page

    def _bytes_at(self, hva: Hva, size: int, *, write: bool) -> Iterator[memoryview]:
        end = hva + size
        while hva < end:
            page = self.fault_in(hva, write=write)
            offset = hva - page.hva
            count = min(end - hva, size_of_level(page.level) - offset)
            at = self._frames.offset_of(page.pfn) + offset
            yield self._frames.view[at : at + count]
            hva = Hva(hva + count)

    def _check_range(self, what: str, start: Hva, size: int) -> Hva:
        end = Hva(start + size)
        if size <= 0 or start < 0 or end > TASK_SIZE:
            raise UapiError(errno.EINVAL, f"{what} {start:#x}+{size:#x}: not a range of user space")
        for mapping in (self._mapping_at(start), self._mapping_at(Hva(end - 1))):
            page = PAGE_SIZE if mapping is None else size_of_level(mapping.level)
            if (
                start % PAGE_SIZE
                or size % PAGE_SIZE
                or (mapping and (max(start, mapping.start) % page or min(end, mapping.end) % page))
            ):
                raise UapiError(errno.EINVAL, f"{what} {start:#x}+{size:#x}: not whole pages of {page:#x}")
        return end

    def _check_mapped(self, what: str, start: Hva, end: Hva) -> None:
        at = start
        for mapping in self._overlapping(start, end):
            if mapping.start > at:
                break
            at = mapping.end
        if at < end:
            raise UapiError(errno.ENOMEM, f"{what} {start:#x}..{end:#x}: nothing is mapped at {at:#x}")
