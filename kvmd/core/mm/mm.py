"""What a process does to its address space: map, protect, move, read, write, exit.

Models the system calls of [mm mmap.c], [mm mprotect.c], [mm mremap.c], and get_user_pages as KVM uses it:
a fault on its behalf, which may sleep. Each call takes the mmap_lock, tells the notifiers what it is
about to change, changes it, and says so.

A protection that is there already is a no-op. One that comes back makes the pages nobody else ever had
writable at once; the others wait for a write.
"""

from __future__ import annotations

import errno
from functools import partial

from kvmd.core.mm.fault import CopyFirst, Tally, attempt, copy_on_write, unshare, writable_now
from kvmd.core.mm.file import File
from kvmd.core.mm.locked import LockedVm
from kvmd.core.mm.madvise import dontneed
from kvmd.core.mm.memory import Memory
from kvmd.core.mm.notifier import Range, announced
from kvmd.core.mm.page import HostPage, LazyFree, Page, ProtNone, Pte, with_rights
from kvmd.core.mm.reclaim import migrate
from kvmd.core.mm.space import TASK_SIZE, AddressSpace
from kvmd.core.mm.vma import Prot, Vma
from protocol.errors import UapiError
from protocol.units import LEVEL_4K, TIB, Hva, Level, size_of_level

MMAP_BASE = Hva(0x1000_0000_0000)
MAX_MAPPING_BYTES = 64 * TIB
MAX_MAP_COUNT = 65530
UNMAP_BATCH = 4096  # entries cleared before others get a turn


class Mm(AddressSpace):
    """The address space of one process."""

    def __init__(self, mm_id: int, memory: Memory) -> None:
        super().__init__(mm_id, memory)
        self.token = 0  # how other processes name it: a bare number, no reference, as domain->mm [RFC 15/42]
        self.pinned_pages = 0  # for long, by whoever, whoever pays [mm->pinned_vm]
        self.locked = LockedVm("the process", memory.memlock_pages)
        self.exited = False  # and everything it had is given back

    madvise_dontneed = dontneed
    migrate = migrate  # move_pages(2)

    # -- mappings --------------------------------------------------------------------------------------

    async def mmap(
        self,
        hva: Hva | None,
        size: int,
        prot: Prot,
        level: Level = LEVEL_4K,
        *,
        shared: bool = False,
        file: File | None = None,
        offset: int = 0,
        fixed: bool = False,
    ) -> Hva:
        """Map anonymous memory or `file`.  EINVAL: size, address or offset not whole pages of `level`, or not
        the file's size of page; EEXIST: overlap, unless `fixed`; ENOMEM.
        """
        page = size_of_level(level)
        if size <= 0 or size % page or size > MAX_MAPPING_BYTES:
            raise UapiError(
                errno.EINVAL, f"mmap of {size:#x} bytes: not a multiple of {page:#x} up to 64 TiB"
            )
        if hva is not None and (hva % page or hva < 0):
            raise UapiError(errno.EINVAL, f"mmap at {hva:#x}: not aligned to {page:#x}")
        if file is not None and (file.level != level or offset < 0 or offset % page):
            raise UapiError(errno.EINVAL, f"mmap of {file.name} at {offset:#x}: not whole pages of its size")
        if file is None and shared:
            file = File(self.memory, "anonymous", size, level)
            file.put()  # the mapping is its only reference
        await self.mmap_lock.acquire(write=True)
        try:
            start = self.vmas.gap(MMAP_BASE, TASK_SIZE, size, page) if hva is None else hva
            await self._make_room(start, Hva(start + size), fixed=fixed)
            self.vmas.insert(Vma(start, Hva(start + size), prot, level, file, offset, shared))
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
            self.check_range("mmap", start, end - start)
            await self._unmap(start, end)

    async def munmap(self, start: Hva, size: int) -> None:
        """Unmap a range; mappings it cuts keep the rest.  EINVAL: not whole pages."""
        await self.mmap_lock.acquire(write=True)
        try:
            await self._unmap(start, self.check_range("munmap", start, size))
        finally:
            self.mmap_lock.release()

    async def _unmap(self, start: Hva, end: Hva) -> None:
        """A large range goes in turns; until all of it is gone, notifiers let nobody map what is left."""
        while True:
            low, high = self.table.whole(start, end)
            async with announced([Range(self, low, high)]):
                if self.table.whole(start, end) != (low, high):
                    continue  # as in `change`
                self.table.split_edges(start, end)
                await self._clear_in_turns(start, end)
                for vma in self.vmas.isolate(start, end):
                    if vma.uffd is not None:
                        vma.uffd.wake(vma.start, vma.end)
                    self.vmas.remove(vma)
                return

    async def _clear_in_turns(self, start: Hva, end: Hva) -> None:
        """Others may change an entry meanwhile, or split one: it is looked for again."""
        while entries := self.table.within(start, end):
            for first in range(0, len(entries), UNMAP_BATCH):
                if first:
                    await self.memory.cond_resched()
                for entry in entries[first : first + UNMAP_BATCH]:
                    found = self.table.find(entry.hva)
                    if found is not None and found.hva == entry.hva:
                        self.table.clear(found)

    async def mprotect(self, start: Hva, size: int, prot: Prot) -> None:
        """EINVAL: not whole pages; ENOMEM: part of the range is not mapped."""
        await self.mmap_lock.acquire(write=True)
        try:
            end = self.check_range("mprotect", start, size)
            hole = self.vmas.first_hole(start, end)
            end, asked = (end if hole is None else hole), end
            for vma in self.vmas.overlapping(start, end):
                if vma.prot != prot:
                    first, last = Hva(max(start, vma.start)), Hva(min(end, vma.end))
                    await self.change(first, last, partial(self._protect, first, last, prot))
            self.vmas.merge(start, end)
            self.check_mapped("mprotect", start, asked)  # what lies before the hole was done
        finally:
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
                self.table.set(made if vma.readable else made.as_kind(ProtNone))

    async def mremap(self, start: Hva, old_size: int, new_size: int, new: Hva | None = None) -> Hva:
        """Resize, moving if it must, or to `new`.  EINVAL: not whole pages, overlap; EFAULT: the old
        range is not in one mapping; ENOMEM.
        """
        await self.mmap_lock.acquire(write=True)
        try:
            old_end = self.check_range("mremap", start, old_size)
            self.check_range("mremap", start if new is None else new, new_size)
            vma = self.vmas.find(start)
            if vma is None or vma.end < old_end:
                raise UapiError(errno.EFAULT, f"mremap {start:#x}..{old_end:#x}: not in one mapping")
            if new_size % size_of_level(vma.level):
                raise UapiError(errno.EINVAL, f"mremap to {new_size:#x} bytes: not whole pages")
            if new is None:
                new = await self._resize_in_place(vma, start, old_end, Hva(start + new_size))
                if new is not None:
                    return new
            return await self._move(vma, start, old_size, new_size, new)
        finally:
            self.mmap_lock.release()

    async def _resize_in_place(self, vma: Vma, start: Hva, old_end: Hva, new_end: Hva) -> Hva | None:
        if new_end < old_end:
            await self._unmap(new_end, old_end)
        elif new_end > old_end:
            if vma.end != old_end or new_end > TASK_SIZE or self.vmas.overlapping(old_end, new_end):
                return None
            vma.end = new_end
            self.vmas.merge(start, new_end)
        return start

    async def _move(self, vma: Vma, start: Hva, old_size: int, new_size: int, new: Hva | None) -> Hva:
        page = size_of_level(vma.level)
        if new is None:
            new = self.vmas.gap(MMAP_BASE, TASK_SIZE, new_size, page)
        elif new % page or (new < start + old_size and start < new + new_size):
            raise UapiError(
                errno.EINVAL, f"mremap {start:#x} to {new:#x}: overlaps itself or not whole pages"
            )
        await self._make_room(new, Hva(new + new_size), fixed=True)
        if new_size < old_size:
            await self._unmap(Hva(start + new_size), Hva(start + old_size))
        end = Hva(start + min(old_size, new_size))
        to = new

        def edit() -> None:
            for old in self.vmas.isolate(start, end):
                moved = old.part(start, end)
                moved.start, moved.end = to, Hva(to + new_size)
                moved.forget_uffd()  # no EVENT_REMAP was asked for
                self.vmas.insert(moved)
                self._move_entries(start, end, to)
                if old.uffd is not None:
                    old.uffd.wake(start, end)
                self.vmas.remove(old)

        await self.change(start, end, edit)
        self.vmas.merge(new, Hva(new + new_size))
        return new

    def _move_entries(self, start: Hva, end: Hva, new: Hva) -> None:
        by = new - start
        for entry in self.table.within(start, end):
            if entry.level > LEVEL_4K and by % size_of_level(entry.level):
                assert isinstance(entry, Pte)
                self.table.split(entry)
        for entry in self.table.within(start, end):
            self.table.move(entry, Hva(entry.hva + by))

    # -- pages -----------------------------------------------------------------------------------------

    async def get_user_page(self, hva: Hva, *, write: bool, tally: Tally | None = None) -> HostPage:
        """GUP: the page at `hva`, backed now.  It may sleep, and what its caller knew before need not hold
        after it.  EFAULT, EHWPOISON, ENOMEM.
        """
        entry = self.table.find(hva)
        if type(entry) is Pte and (entry.writable or not write):
            return entry
        return await self.fault_in(hva, write=write, tally=tally)

    async def fault_in(self, hva: Hva, *, write: bool, user: bool = False, tally: Tally | None = None) -> Pte:
        """Fault until the entry serves; `user`: by the process itself, not by the kernel for it."""
        counters = self.memory.counters
        tally = Tally() if tally is None else tally
        while True:
            await self.mmap_lock.acquire(write=False)
            try:
                swap_ins, allocated = counters.swap_ins, counters.pages_allocated
                found = attempt(self, hva, write=write, user=user)
                tally.major += counters.swap_ins - swap_ins
                tally.allocated += counters.pages_allocated - allocated
                if isinstance(found, Pte):
                    return found
                if isinstance(found, CopyFirst):
                    copied = await copy_on_write(self, found.entry, hva)
                    tally.allocated += copied  # not in one statement: others add to it while this one waits
                    continue
            finally:
                self.mmap_lock.release()
            await found  # a userfaultfd's reader, without the lock

    async def pin_user_page(self, hva: Hva) -> Page:
        """FOLL_LONGTERM | FOLL_WRITE: the page stays in its frame, whatever happens to the mapping.
        ENOMEM: the process may not have more pinned (RLIMIT_MEMLOCK).
        """
        entry = await self.fault_in(hva, write=True)
        self.pin(entry.page)
        return entry.page

    async def fault_to_pin(self, hva: Hva, *, write: bool, tally: Tally | None = None) -> Pte:
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
            part = await self._bytes_at(hva, end - hva, write=False, user=user)
            parts.append(bytes(part))
            hva = Hva(hva + len(part))
        return b"".join(parts)

    async def write(self, hva: Hva, data: bytes, *, user: bool = True) -> None:
        """The same for a write.  EFAULT, after the pages before it were written."""
        at = 0
        while at < len(data):
            part = await self._bytes_at(Hva(hva + at), len(data) - at, write=True, user=user)
            part[:] = data[at : at + len(part)]
            at += len(part)

    async def _bytes_at(self, hva: Hva, size: int, *, write: bool, user: bool) -> memoryview:
        """Up to `size` bytes, as far as the page goes; nothing may await before they are used."""
        while (found := self.bytes_now(hva, size, write=write)) is None:
            await self.fault_in(hva, write=write, user=user)
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
            self.alive = False
            await self.mmap_lock.acquire(write=True)
            await self._unmap(Hva(0), TASK_SIZE)
            self.mmap_lock.release()
            self.exited = True
