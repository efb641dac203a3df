"""A file in memory: its pages, who maps it, and what shrinking it takes from them.

Models shmem as memfd, shared anonymous memory and hugetlbfs use it [mm shmem.c]: the page cache is the
file; a shared mapping shows its pages, a private one shows them until it has copies.

Truncating takes what lies beyond the new end from every mapping, private copies too; a hole takes only
the file's own pages. Both first take them from every mapping (`mappable`); then the pages leave the cache
(I6).
"""

from __future__ import annotations

import errno

from kvmd.core.mm.mappable import Mappable
from kvmd.core.mm.memory import SHARED_OWNER, PageAllocator
from kvmd.core.mm.page import Page, PageKind, Pte, Swap
from protocol.errors import EHWPOISON, UapiError
from protocol.flow import RwLock
from protocol.units import LEVEL_4K, Hva, Level, align_up

MAX_FILE_BYTES = (1 << 63) - 1  # MAX_LFS_FILESIZE, s_maxbytes of shmem and hugetlbfs


class MemoryFile(Mappable):
    """`size` bytes, in pages of `level`; whoever makes it has its first reference."""

    def __init__(self, memory: PageAllocator, name: str, size: int, level: Level = LEVEL_4K) -> None:
        super().__init__(name, level)
        self.size = size
        self._memory = memory
        self._cache: dict[int, Page | Swap] = {}
        self._lock = RwLock()  # of the inode: one change of the file at a time

    def _free(self) -> None:
        self._drop(0)

    # -- pages -----------------------------------------------------------------------------------------

    def has(self, offset: int) -> bool:
        """Whether there is a page at `offset`, or no file any more."""
        return offset >= self.size or offset // self._page in self._cache

    def pinned(self, offset: int, end: int) -> list[int]:
        first, last = offset // self._page, align_up(end, self._page) // self._page
        pages = ((index, held) for index, held in self._cache.items() if first <= index < last)
        return [index * self._page for index, held in pages if isinstance(held, Page) and held.pins]

    def page_at(self, offset: int, hva: Hva) -> Page:
        """The page a mapping shows at `hva`, made if need be.  EFAULT: beyond the end, a SIGBUS for the
        process; EHWPOISON; ENOMEM.
        """
        if offset >= align_up(self.size, self._page):
            raise UapiError(
                errno.EFAULT, f"hva {hva:#x}: beyond the end of {self.name}, {self.size:#x} bytes"
            )
        page = self._get(offset // self._page)
        if page.poisoned:
            raise UapiError(EHWPOISON, f"hva {hva:#x}: the page's memory failed")
        return page

    def _get(self, index: int) -> Page:
        held = self._cache.get(index)
        if isinstance(held, Page):
            return held
        if held is None:
            page = self._memory.allocate(self.level, SHARED_OWNER, PageKind.FILE)
        else:
            page = self._memory.swap_in(held, SHARED_OWNER, PageKind.FILE)
            self._memory.put_swap(held)
        page.cached, page.index = True, index
        self._cache[index] = page
        return page

    def page_to_pin(self, offset: int, hva: Hva) -> Pte:
        """The page at `offset` as an entry that begins at `hva` - what lies before it of a huge page.
        EHWPOISON; ENOMEM.
        """
        page = self.page_at(offset, hva)
        return Pte(Hva(hva - offset % self._page), page.pfn, page.level, True, page)

    def insert(self, offset: int, data: bytes) -> Page:
        """A new page with `data`, as UFFDIO_COPY makes it.  EEXIST: there is one; EFAULT; ENOMEM."""
        index = offset // self._page
        if offset >= self.size:
            raise UapiError(errno.EFAULT, f"offset {offset:#x} is beyond the end of {self.name}")
        if index in self._cache:
            raise UapiError(errno.EEXIST, f"{self.name} has a page at {offset:#x}")
        page = self._get(index)
        self._memory.view(page.pfn, len(data))[:] = data
        return page

    def swap_out(self, page: Page) -> None:
        """An unmapped page of ours leaves memory.  ENOMEM: swap is full."""
        assert self._cache[page.index] is page, "not ours"
        self._cache[page.index] = self._memory.swap_out(page, 1)
        page.cached = False
        self._memory.put(page)

    def _drop(self, first: int, last: int | None = None) -> None:
        for index in [i for i in self._cache if first <= i and (last is None or i < last)]:
            held = self._cache.pop(index)
            if isinstance(held, Page):
                held.cached = False
                self._memory.put(held)
            else:
                self._memory.put_swap(held)

    # -- what a process does with the fd ---------------------------------------------------------------

    def pread(self, offset: int, size: int) -> bytes:
        """Up to the end of the file; a hole is zeroes.  EIO: the memory failed."""
        end = min(offset + size, self.size)
        parts = []
        while offset < end:
            index, at = divmod(offset, self._page)
            count = min(end - offset, self._page - at)
            if index in self._cache:
                parts.append(bytes(self._bytes(index)[at : at + count]))
            else:
                parts.append(bytes(count))
            offset += count
        return b"".join(parts)

    async def pwrite(self, offset: int, data: bytes) -> None:
        """Grows the file if it must.  EFBIG; EIO; ENOMEM."""
        await self._begin()
        try:
            end = offset + len(data)
            self._check_size(end)
            at = 0
            while at < len(data):
                index, first = divmod(offset + at, self._page)
                part = self._bytes(index)[first : first + len(data) - at]
                part[:] = data[at : at + len(part)]
                at += len(part)
                self.size = max(self.size, offset + at)
        finally:
            self._end()

    def _bytes(self, index: int) -> memoryview:
        page = self._get(index)
        if page.poisoned:
            raise UapiError(errno.EIO, f"{self.name} page {index}: the memory failed")
        return self._memory.view(page.pfn, self._page)

    async def _begin(self) -> None:
        """A change of the file, which keeps it: the fd it came over may be closed before its turn comes."""
        self._refs += 1
        await self._lock.acquire(write=True)

    def _end(self) -> None:
        self._lock.release()
        self.put()

    def _check_size(self, size: int) -> None:
        if size > MAX_FILE_BYTES:
            raise UapiError(errno.EFBIG, f"{self.name}: {size:#x} bytes, at most {MAX_FILE_BYTES:#x}")

    async def truncate(self, size: int) -> None:
        """Shrink or grow.  EFBIG; EINVAL: negative, or not whole huge pages."""
        if size < 0:
            raise UapiError(errno.EINVAL, f"{self.name}: ftruncate to {size}")
        self._check_size(size)
        if self.level > LEVEL_4K and size % self._page:
            raise UapiError(
                errno.EINVAL, f"{self.name}: {size:#x} bytes are not whole pages of {self._page:#x}"
            )
        # await: asked: cannot change: it was about the size that is asked for
        await self._begin()
        try:
            self.size = size  # from here on a fault beyond it fails
            first = align_up(size, self._page) // self._page
            # await: first: cannot change: the file's lock is held
            await self.unmap(first, None, copies_too=True)
            self._drop(first)
            tail = size % self._page
            if tail and size // self._page in self._cache:
                self._bytes(size // self._page)[tail:] = bytes(self._page - tail)
        finally:
            self._end()

    async def punch_hole(self, offset: int, size: int) -> None:
        """The range reads as zeroes from now on.  Errors as `check_hole` has them."""
        check_hole(self.name, offset, size)
        await self._begin()
        try:
            first, last = align_up(offset, self._page) // self._page, (offset + size) // self._page
            if first < last:
                # await: first, last: cannot change: the file's lock is held
                await self.unmap(first, last, copies_too=False)
                self._drop(first, last)
            self._zero_part(offset, min(offset + size, first * self._page))
            self._zero_part(max(offset, last * self._page), offset + size)
        finally:
            self._end()

    def _zero_part(self, start: int, end: int) -> None:
        index, at = divmod(start, self._page)
        if start < end and index in self._cache:
            self._bytes(index)[at : at + end - start] = bytes(end - start)


def check_hole(name: str, offset: int, size: int) -> None:
    """What vfs_fallocate asks of any file.  EINVAL: no range; EFBIG: it ends beyond what a file can have."""
    if offset < 0 or size <= 0:
        raise UapiError(errno.EINVAL, f"{name}: hole {offset:#x}+{size:#x} is no range")
    if offset + size > MAX_FILE_BYTES:
        raise UapiError(errno.EFBIG, f"{name}: hole {offset:#x}+{size:#x} ends beyond {MAX_FILE_BYTES:#x}")
