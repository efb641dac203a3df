"""What a process does to its address space: map, protect, read, write, exit.

Models the system calls of [mm mmap.c] and [mm mprotect.c], and get_user_pages as KVM uses it: a fault on
its behalf, which may sleep; the others are functions of an address space: `mremap`, `madvise`, `fork`. Each
call takes the mmap_lock, tells the notifiers what it is about to change, changes it, and says so.

A protection that is there already is a no-op. One that comes back makes the pages nobody else ever had
writable at once; the others wait for a write.
"""

from __future__ import annotations

import errno
from functools import partial

from kvmd.core.mm.fault import CopyOnWrite, FaultCounts, attempt, copy_on_write, unshare, writable_now
from kvmd.core.mm.file import MAX_FILE_BYTES, MemoryFile
from kvmd.core.mm.locked import LockedVm
from kvmd.core.mm.mappable import Mappable
from kvmd.core.mm.memory import PageAllocator
from kvmd.core.mm.page import LazyFree, MappedPage, Page, ProtNone, Pte, with_rights
from kvmd.core.mm.space import MAX_MAP_COUNT, MMAP_BASE, TASK_SIZE, AddressSpace, FaultOrigin, MmEvent
from kvmd.core.mm.vma import Prot, Vma
from protocol.errors import UapiError
from protocol.units import LEVEL_4K, PAGE_SIZE, TIB, Hva, Level, align_up, size_of_level

MAX_MAPPING_BYTES = 64 * TIB


class Mm(AddressSpace):
    """The address space of one process."""

    def __init__(self, mm_id: int, memory: PageAllocator) -> None:
        super().__init__(mm_id, memory)
        self.cookie = 0  # how other processes name it: a bare number, no reference, as domain->mm [RFC 15/42]
        self.pinned_pages = 0  # for long, by whoever, whoever pays [mm->pinned_vm]
        self.locked = LockedVm("the process", memory.memlock_pages)

    # -- mappings --------------------------------------------------------------------------------------

    async def mmap(
        self,
        hva: Hva | None,
        size: int,
        prot: Prot,
        level: Level = LEVEL_4K,
        *,
        shared: bool = False,
        file: Mappable | None = None,
        offset: int = 0,
        fixed: bool = False,
    ) -> Hva:
        """Map anonymous memory or `file`, in whole pages of `level`: a size is rounded up.  EINVAL: no size,
        address or offset not aligned, or not the file's size of page; EEXIST: overlap, unless `fixed`;
        EOVERFLOW: beyond what a file can have; ENODEV: a file that is not mapped; EBUSY; ENOMEM.
        """
        page = size_of_level(level)
        if size <= 0:
            raise UapiError(errno.EINVAL, f"mmap of {size:#x} bytes")
        size = align_up(size, page)
        if hva is not None and (hva % page or hva < 0):
            raise UapiError(errno.EINVAL, f"mmap at {hva:#x}: not aligned to {page:#x}")
        if file is not None and (file.level != level or offset < 0 or offset % page):
            raise UapiError(errno.EINVAL, f"mmap of {file.name} at {offset:#x}: not whole pages of its size")
        if file is not None and offset + size > MAX_FILE_BYTES:
            raise UapiError(errno.EOVERFLOW, f"mmap of {file.name} at {offset:#x}: {size:#x} bytes more")
        if size > MAX_MAPPING_BYTES:
            raise UapiError(errno.ENOMEM, f"mmap of {size:#x} bytes: at most 64 TiB")
        if file is not None:
            file.check_mmap(shared=shared)
        if file is None and shared:
            file = MemoryFile(self.memory, "anonymous", size, level)
            file.put()  # the mapping is its only reference
        # await: file, asked: cannot change: the caller keeps the file, whose kind of page is fixed
        await self.mmap_lock.acquire(write=True)
        try:
            start = self.vmas.gap(MMAP_BASE, TASK_SIZE, size, page) if hva is None else hva
            new = Vma(start, Hva(start + size), prot, level, file, offset, shared)
            self.check_showing(new)
            # await: new, start: cannot change: the mmap_lock is held for writing; the caller keeps the
            # file
            await self._make_room(start, Hva(start + size), fixed=fixed)
            self.check_showing(new)  # who pins, or is made private, may have come meanwhile
            self.vmas.insert(new)
            self.vmas.merge(start, Hva(start + size))
            return start
        finally:
            self.mmap_lock.release()

    async def _make_room(self, start: Hva, end: Hva, *, fixed: bool) -> None:
        if end > TASK_SIZE or not self.alive or len(self.vmas) >= MAX_MAP_COUNT:
            raise UapiError(
                errno.ENOMEM, f"mmap {start:#x}..{end:#x}: beyond user space, or too many mappings"
            )
        if self.vmas.overlapping(start, end):
            if not fixed:
                raise UapiError(errno.EEXIST, f"mmap {start:#x}..{end:#x}: something is mapped there")
            await self.unmap("mmap", start, end)

    async def munmap(self, start: Hva, size: int) -> None:
        """Unmap a range, its size rounded up; mappings it cuts keep the rest.  EINVAL: not aligned, empty."""
        if start % PAGE_SIZE or size <= 0:
            raise UapiError(errno.EINVAL, f"munmap {start:#x}+{size:#x}: not aligned, or no size")
        await self.mmap_lock.acquire(write=True)
        try:
            await self.unmap("munmap", start, Hva(start + align_up(size, PAGE_SIZE)))
        finally:
            self.mmap_lock.release()

    async def mprotect(self, start: Hva, size: int, prot: Prot) -> None:
        """Mapping by mapping, the size rounded up.  EINVAL: not aligned, or it cuts a huge page of hugetlb;
        ENOMEM: part of the range is not mapped, or too many mappings; what lies before that was done.
        """
        if start % PAGE_SIZE or start < 0 or size < 0:
            raise UapiError(errno.EINVAL, f"mprotect {start:#x}+{size:#x}: not aligned")
        if not size:
            return
        end = Hva(start + align_up(size, PAGE_SIZE))
        await self.mmap_lock.acquire(write=True)
        at = start
        try:
            for vma in self.vmas.overlapping(start, end):
                if vma.start > at:
                    break
                first, at = at, Hva(min(end, vma.end))
                if vma.prot != prot:
                    self.check_split("mprotect", first, at)
                    self.check_map_count(first, at)
                    # await: at, each vma: cannot change: the mmap_lock is held for writing
                    await self.change(first, at, partial(self._protect, first, at, prot))
            self.check_mapped("mprotect", at, end)
        finally:
            self.vmas.merge(start, at)
            self.mmap_lock.release()

    def _protect(self, start: Hva, end: Hva, prot: Prot) -> None:
        for vma in self.vmas.isolate(start, end):
            vma.protect(prot)
            for entry in self.table.within(vma.start, vma.end):
                if not isinstance(entry, Pte):
                    continue
                if isinstance(entry, LazyFree):
                    kept = entry.writable and vma.writable
                    self.table.replace(entry, entry.page, entry.pfn, writable=kept)
                    continue
                writable = vma.writable and (entry.writable or writable_now(vma, entry))
                made = with_rights(entry, writable=writable)
                self.table.set(made if prot else made.as_kind(ProtNone))

    # -- pages -----------------------------------------------------------------------------------------

    async def get_user_page(self, hva: Hva, *, write: bool, tally: FaultCounts | None = None) -> MappedPage:
        """GUP as KVM maps a page: backed now, and writable if it is so already, for which the mapping's
        rights are not asked [KVM kvm_main.c, hva_to_pfn_fast].  It may sleep, and what its caller knew before
        need not hold after it.  EFAULT, EHWPOISON, ENOMEM.
        """
        entry = self.table.find(hva)
        if type(entry) is Pte and (entry.writable or not (write or self._may_not_read(hva))):
            return entry
        return await self.fault_in(hva, write=write, tally=tally)

    def _may_not_read(self, hva: Hva) -> bool:
        vma = self.vmas.find(hva)
        return vma is None or not vma.readable

    # awaits: counters, tally: cannot change: they only count
    async def fault_in(
        self, hva: Hva, *, write: bool, via: FaultOrigin = FaultOrigin.GUP, tally: FaultCounts | None = None
    ) -> Pte:
        """Fault until the entry serves."""
        counters = self.memory.counters
        tally = FaultCounts() if tally is None else tally
        while True:
            # await: found: cannot change: nothing is known of the page yet
            await self.mmap_lock.acquire(write=False)
            try:
                swap_ins, allocated = counters.swap_ins, counters.pages_allocated
                found = attempt(self, hva, write=write, via=via)
                tally.major += counters.swap_ins - swap_ins
                tally.allocated += counters.pages_allocated - allocated
                if isinstance(found, Pte):
                    return found
                if isinstance(found, CopyOnWrite):
                    # await: found: its entry may go; asked again: `_copy`, then here
                    # (tests/unit/kvmd/mm/test_sleeps.py::test_a_copy_is_of_the_page_that_is_there_then)
                    copied = await copy_on_write(self, found.entry, hva)
                    tally.allocated += copied  # not in one statement: others add to it while this one waits
                    continue
            finally:
                self.mmap_lock.release()
            # await: found: cannot change: it is what is waited for, and what was found is looked for anew
            await found  # a userfaultfd's reader, without the lock

    async def pin_user_page(self, hva: Hva) -> Page:
        """FOLL_LONGTERM | FOLL_WRITE: the page stays in its frame, whatever happens to the mapping.
        ENOMEM: the process may not have more pinned (RLIMIT_MEMLOCK).
        """
        entry = await self.fault_in(hva, write=True)
        self.pin(entry.page)
        return entry.page

    # awaits: tally: cannot change: it only counts
    async def fault_to_pin(self, hva: Hva, *, write: bool, tally: FaultCounts | None = None) -> Pte:
        """An entry whose page may be pinned for long: to be read, too, it must be the process's own, or
        that of the file it shares [mm gup.c, gup_must_unshare].  EFAULT, EHWPOISON, ENOMEM.
        """
        while True:
            entry = self.table.find(hva)
            if type(entry) is not Pte or (write and not entry.writable):
                entry = await self.fault_in(hva, write=write, tally=tally)
            vma = self.vmas.find(hva)
            assert vma is not None, "it has an entry"
            if write or vma.shared or entry.page.exclusive:
                return entry
            # await: entry, asked: the entry may go, or be another's too; asked again: `unshare`, then here
            # (tests/unit/kvmd/mm/test_sleeps.py::test_a_copy_for_a_pin_is_of_the_page_that_is_there_then)
            await self.mmap_lock.acquire(write=False)
            try:
                await unshare(self, entry, hva)
            finally:
                self.mmap_lock.release()

    def pin(self, page: Page, npages: int = 1, payer: LockedVm | None = None) -> None:
        """`payer`: whom it is charged to, the process itself if nobody is named.  ENOMEM: RLIMIT_MEMLOCK."""
        (payer or self.locked).charge(npages)
        self.pinned_pages += npages
        self.memory.counters.pinned_pages += npages
        self.memory.counters.pages_pinned += npages
        page.pins += 1

    def unpin(self, page: Page, npages: int = 1, payer: LockedVm | None = None) -> None:
        assert page.pins > 0, "unpinned more often than pinned"
        page.pins -= 1
        (payer or self.locked).uncharge(npages)
        self.pinned_pages -= npages
        self.memory.counters.pinned_pages -= npages
        self.memory.put(page)

    async def read(self, hva: Hva, size: int, *, user: bool = True) -> bytes:
        """What the process itself reads, or the kernel for it (not `user`).  EFAULT, EHWPOISON."""
        parts = []
        end = hva + size
        while hva < end:
            # await: end, hva, parts: cannot change: our own, and what was read stays read
            part = await self._bytes_at(hva, end - hva, write=False, user=user)
            parts.append(bytes(part))
            hva = Hva(hva + len(part))
        return b"".join(parts)

    async def write(self, hva: Hva, data: bytes, *, user: bool = True) -> None:
        """The same for a write.  EFAULT, after the pages before it were written."""
        at = 0
        while at < len(data):
            # await: at: cannot change: our own, and what was written stays written
            part = await self._bytes_at(Hva(hva + at), len(data) - at, write=True, user=user)
            part[:] = data[at : at + len(part)]
            at += len(part)

    async def _bytes_at(self, hva: Hva, size: int, *, write: bool, user: bool) -> memoryview:
        """Up to `size` bytes, as far as the page goes; nothing may await before they are used."""
        while (found := self.bytes_now(hva, size, write=write)) is None:
            await self.fault_in(hva, write=write, via=FaultOrigin.USER if user else FaultOrigin.KERNEL)
        return found

    def bytes_now(self, hva: Hva, size: int, *, write: bool) -> memoryview | None:
        """The same without a fault.  None: the entry does not serve; `fault_in` may sleep, so whoever awaits
        it looks at everything again.
        """
        entry = self.table.find(hva)
        if type(entry) is not Pte or (write and not entry.writable):
            return None
        offset = hva - entry.hva
        count = min(size, size_of_level(entry.level) - offset)
        at = self.memory.frames.offset_of(entry.pfn) + offset
        return self.memory.frames.view[at : at + count]

    async def exit(self) -> None:
        """The process is gone: unmap everything, and only then free it [RFC defect B-19]."""
        if self.alive:
            self.happens(MmEvent.EXIT)
            await self.mmap_lock.acquire(write=True)
            await self._unmap(Hva(0), TASK_SIZE)
            self.mmap_lock.release()
            self.happens(MmEvent.ALL_UNMAPPED)
