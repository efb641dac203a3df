"""A userfaultfd: faults of a range of memory are answered by a reader in user space.

Models fs/userfaultfd.c [mm userfaultfd.c]: a fault in a registered range sleeps until the page is there
(missing) or may be written (wp), or until the range is unregistered or the fd closed, and is then tried
again from the start. A fault nobody has read about yet disappears with its reason. With
UFFD_USER_MODE_ONLY a fault the kernel takes for the process, as KVM does, fails with EFAULT instead.

Departures: huge pages of hugetlb cannot be registered; there is no UFFDIO_WAKE, so an answer for a page that
is there already (EEXIST) wakes who sleeps for it.
"""

from __future__ import annotations

import errno
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import NamedTuple

from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.page import PageKind, Pte, Swapped, WpMarker
from kvmd.core.mm.space import AddressSpace
from kvmd.core.mm.vma import Vma
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.units import GIB, LEVEL_4K, PAGE_SIZE, Hva, align_down

MAX_FILLED_BYTES = GIB  # by one request: each page of it takes an entry


class UffdFault(NamedTuple):
    """UFFD_EVENT_PAGEFAULT."""

    address: Hva
    write: bool
    wp: bool


@dataclass(slots=True, eq=False)
class _Sleeper:
    event: UffdFault
    woken: Wait[None]


class Userfaultfd:
    """What one fd does for the address space it was made in."""

    def __init__(self, space: AddressSpace, *, user_mode_only: bool) -> None:
        self.user_mode_only = user_mode_only
        self._space = space
        self._closed = False
        self._pending: deque[_Sleeper] = deque()  # nobody has read of them yet
        self._read: list[_Sleeper] = []
        self._readers: deque[Wait[None]] = deque()

    # -- faults ----------------------------------------------------------------------------------------

    def ask(self, hva: Hva, *, write: bool, wp: bool, user: bool) -> Wait[None]:
        """A fault at `hva`: what it sleeps on.  EFAULT: the kernel's; this fd takes only the process's."""
        if self.user_mode_only and not user:
            raise UapiError(
                errno.EFAULT, f"hva {hva:#x}: a kernel fault, and the userfaultfd takes user mode only"
            )
        event = UffdFault(Hva(align_down(hva, PAGE_SIZE)), write, wp)
        sleeper = _Sleeper(event, Wait())
        self._pending.append(sleeper)
        if self._readers:
            self._readers.popleft().set(None)
        return sleeper.woken

    def wake(self, start: Hva, end: Hva) -> None:
        """Every fault of the range is tried again."""
        woken = [s for s in (*self._pending, *self._read) if start <= s.event.address < end]
        self._pending = deque(s for s in self._pending if s not in woken)
        self._read = [s for s in self._read if s not in woken]
        for sleeper in woken:
            sleeper.woken.set(None)

    async def next_event(self) -> UffdFault:
        """What a read of the fd gives: sleeps until there is a fault.  EBADF: closed meanwhile."""
        while not self._pending:
            if self._closed:
                raise UapiError(errno.EBADF, "the userfaultfd is closed")
            wait: Wait[None] = Wait()
            self._readers.append(wait)
            await wait
        sleeper = self._pending.popleft()
        self._read.append(sleeper)
        return sleeper.event

    # -- ranges ----------------------------------------------------------------------------------------

    async def register(self, start: Hva, size: int, *, missing: bool, wp: bool) -> None:
        """What has these modes already keeps what it has besides.  EINVAL: not whole pages, nothing mapped,
        hugetlb; EBUSY: another userfaultfd's; ENOMEM: the process is gone.
        """
        space = self._space
        await space.mmap_lock.acquire(write=True)
        try:
            end = space.check_range("UFFDIO_REGISTER", start, size)
            self._check_alive("UFFDIO_REGISTER", errno.ENOMEM)
            found = space.vmas.overlapping(start, end)
            if not found or not (missing or wp) or not all(_can_userfault(vma) for vma in found):
                raise UapiError(
                    errno.EINVAL, f"UFFDIO_REGISTER {start:#x}..{end:#x}: no small pages mapped, or no mode"
                )
            if any(vma.uffd not in (None, self) for vma in found):
                raise UapiError(errno.EBUSY, f"UFFDIO_REGISTER {start:#x}..{end:#x}: another userfaultfd's")
            # await: end, asked: cannot change: the mmap_lock is held for writing
            for vma in await space.isolate(start, end):
                if vma.uffd is None or (missing and not vma.uffd_missing) or (wp and not vma.uffd_wp):
                    vma.uffd, vma.uffd_missing, vma.uffd_wp = self, missing, wp
            space.vmas.merge(start, end)
        finally:
            space.mmap_lock.release()

    async def unregister(self, start: Hva, size: int) -> None:
        """EINVAL: not whole pages, nothing mapped; ENOMEM: the process is gone."""
        space = self._space
        await space.mmap_lock.acquire(write=True)
        try:
            end = space.check_range("UFFDIO_UNREGISTER", start, size)
            self._check_alive("UFFDIO_UNREGISTER", errno.ENOMEM)
            if not space.vmas.overlapping(start, end):
                raise UapiError(errno.EINVAL, f"UFFDIO_UNREGISTER {start:#x}..{end:#x}: nothing is mapped")
            await self._leave(start, end)
        finally:
            space.mmap_lock.release()

    def _check_alive(self, what: str, number: int) -> None:
        """The fd holds the address space, not its user: what it asks for finds nobody [mmget_not_zero]."""
        if not self._space.alive:
            raise UapiError(number, f"{what}: process {self._space.id} has exited")

    async def close(self) -> None:
        """The last copy of the fd is closed: every fault goes on as an ordinary one."""
        await self._space.mmap_lock.acquire(write=True)
        self._closed = True
        for vma in list(self._space.vmas):
            if vma.uffd is self:
                # await: each vma: cannot change: the mmap_lock is held for writing, and only what has left
                # is merged
                await self._leave(vma.start, vma.end)
        self._space.mmap_lock.release()
        self.wake(Hva(0), Hva(1 << 64))
        while self._readers:
            self._readers.popleft().set(None)

    async def _leave(self, start: Hva, end: Hva) -> None:
        """Drop our part of start..end; the mmap_lock is held for writing."""
        space = self._space
        for vma in await space.isolate(start, end):
            if vma.uffd is self:
                if vma.uffd_wp:
                    edit = partial(self._protect, vma.start, vma.end, on=False)
                    # await: vma, each vma: cannot change: the mmap_lock is held for writing
                    await space.change(vma.start, vma.end, edit)
                vma.forget_uffd()
                self.wake(vma.start, vma.end)
        space.vmas.merge(start, end)

    # -- answers ---------------------------------------------------------------------------------------

    async def copy(self, dst: Hva, data: bytes, *, wp: bool) -> None:
        """UFFDIO_COPY: `data` becomes the pages at `dst`.  ENOENT: not one registered mapping; EEXIST: a page
        is there; EINVAL: not whole pages, or wp without its mode; ESRCH: the process is gone; ENOMEM;
        EAGAIN: what comes first is filled, the rest could not be.
        """
        vma = await self._begin("UFFDIO_COPY", dst, len(data))
        try:
            if wp and not vma.uffd_wp:
                raise UapiError(errno.EINVAL, f"UFFDIO_COPY to {dst:#x}: not registered for write protection")
            self._fill_all(vma, dst, len(data), data, wp=wp)
        finally:
            self._space.mmap_lock.release()

    async def zeropage(self, start: Hva, size: int) -> None:
        """UFFDIO_ZEROPAGE.  Errors as for UFFDIO_COPY."""
        _check_size("UFFDIO_ZEROPAGE", start, size)
        vma = await self._begin("UFFDIO_ZEROPAGE", start, size)
        try:
            self._fill_all(vma, start, size, b"", wp=False)
        finally:
            self._space.mmap_lock.release()

    async def _begin(self, what: str, start: Hva, size: int) -> Vma:
        """The mapping to fill, with the mmap_lock held for reading."""
        space = self._space
        await space.mmap_lock.acquire(write=False)
        try:
            end = space.check_range(what, start, size)
            self._check_alive(what, errno.ESRCH)
            vma = space.vmas.find(start)
            if vma is None or vma.end < end or vma.uffd is None:
                raise UapiError(errno.ENOENT, f"{what} {start:#x}..{end:#x}: not one registered mapping")
        except UapiError:
            space.mmap_lock.release()
            raise
        return vma

    def _fill_all(self, vma: Vma, start: Hva, size: int, data: bytes, *, wp: bool) -> None:
        """As far as it goes; who sleeps for what is filled is woken, and nobody else."""
        filled = 0
        try:
            for at in range(0, size, PAGE_SIZE):
                self._fill(vma, Hva(start + at), data[at : at + PAGE_SIZE], wp=wp)
                filled = at + PAGE_SIZE
        except UapiError as error:
            if filled:
                raise UapiError(errno.EAGAIN, f"{filled:#x} bytes are filled; {error.why}") from None
            if error.errno == errno.EEXIST:
                self.wake(start, Hva(start + PAGE_SIZE))
            raise
        finally:
            self.wake(start, Hva(start + filled))

    def _fill(self, vma: Vma, hva: Hva, data: bytes, *, wp: bool) -> None:
        space, memory = self._space, self._space.memory
        there = space.table.find(hva)
        if there is not None and not isinstance(there, WpMarker):
            raise UapiError(errno.EEXIST, f"hva {hva:#x} has a page")
        if vma.shared:
            assert isinstance(vma.file, MemoryFile), "nothing else is registered"
            page = vma.file.insert(vma.offset_of(hva), data)
        elif data:
            page = memory.allocate(LEVEL_4K, space.id)
            memory.view(page.pfn, PAGE_SIZE)[:] = data
        else:
            page = memory.zero(LEVEL_4K)
        writable = vma.writable and not wp and page.kind is not PageKind.ZERO
        space.table.set(Pte(hva, page.pfn, LEVEL_4K, writable, page, wp))

    async def writeprotect(self, start: Hva, size: int, *, on: bool) -> None:
        """UFFDIO_WRITEPROTECT; holes are passed by.  ENOENT: nothing is mapped, or what is mapped behind that
        which is done is not registered for it [mm userfaultfd.c, mwriteprotect_range]; ESRCH: the process is
        gone.
        """
        space = self._space
        await space.mmap_lock.acquire(write=False)
        try:
            end = space.check_range("UFFDIO_WRITEPROTECT", start, size)
            self._check_alive("UFFDIO_WRITEPROTECT", errno.ESRCH)
            found = space.vmas.overlapping(start, end)
            ours = list(takewhile(lambda vma: vma.uffd_wp, found))
            _check_size("UFFDIO_WRITEPROTECT", start, size if any(vma.file for vma in ours) else 0)
            if ours:
                first, last = Hva(max(start, ours[0].start)), Hva(min(end, ours[-1].end))
                # await: end, found, ours: cannot change: the mmap_lock is held
                await space.change(first, last, partial(self._protect, first, last, on=on))
            if not ours or len(ours) < len(found):
                raise UapiError(
                    errno.ENOENT, f"UFFDIO_WRITEPROTECT {start:#x}..{end:#x}: not all registered for it"
                )
        finally:
            space.mmap_lock.release()
        if not on:
            self.wake(start, end)

    def _protect(self, start: Hva, end: Hva, *, on: bool) -> None:
        table = self._space.table
        for vma in self._space.vmas.overlapping(start, end):
            first, last = Hva(max(start, vma.start)), Hva(min(end, vma.end))
            for entry in table.within(first, last):
                if isinstance(entry, Pte):
                    writable = not on and vma.writable and (vma.shared or entry.page.exclusive)
                    table.set(type(entry)(entry.hva, entry.pfn, entry.level, writable, entry.page, on))
                elif isinstance(entry, Swapped):
                    entry.uffd_wp = on
                elif isinstance(entry, WpMarker) and not on:
                    table.clear(entry)
            if on and vma.file is not None:
                self._mark(vma, first, last)

    def _mark(self, vma: Vma, first: Hva, last: Hva) -> None:
        """A file's pages may come and go: what is not mapped yet is protected too."""
        for hva in range(first, last, PAGE_SIZE):
            if self._space.table.find(Hva(hva)) is None:
                self._space.table.set(WpMarker(Hva(hva), vma.level))


def _can_userfault(vma: Vma) -> bool:
    """Anonymous memory and shmem [vma_can_userfault]."""
    return vma.level == LEVEL_4K and (vma.file is None or isinstance(vma.file, MemoryFile))


def _check_size(what: str, start: Hva, size: int) -> None:
    if size > MAX_FILLED_BYTES:
        raise UapiError(errno.ENOMEM, f"{what} {start:#x}+{size:#x}: at most {MAX_FILLED_BYTES:#x} at once")
