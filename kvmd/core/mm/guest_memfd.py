"""guest_memfd: memory for a guest that no process can map.

Models KVM_CREATE_GUEST_MEMFD's file [KVM guest_memfd.c]: pages by index, made at their first use and zero
then; a memslot bound to it maps them without any process's page table, so its notifier is told by file
index. A hole is punched as an invalidation is made: bindings let go, the pages go, the end is told (I6).
"""

from __future__ import annotations

import errno
from typing import Protocol

from kvmd.core.mm.memory import SHARED_OWNER, Memory
from kvmd.core.mm.page import Kind, Page
from protocol.errors import EHWPOISON, UapiError
from protocol.flow import RwLock
from protocol.units import LEVEL_4K, PAGE_SIZE


class Binding(Protocol):
    """A VM that maps pages of the file [kvm_gmem_invalidate_begin]."""

    async def gmem_invalidate_start(self, file: GuestMemfd, first: int, last: int) -> None:
        """Stop using pages first..last; returns when nobody can use them any more."""

    def gmem_invalidate_end(self, file: GuestMemfd, first: int, last: int) -> None:
        """They are gone; `get_page` makes new ones."""


class GuestMemfd:
    """`size` bytes, whole pages.  EINVAL."""

    def __init__(self, memory: Memory, size: int) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise UapiError(errno.EINVAL, f"guest_memfd of {size:#x} bytes: not whole pages")
        self.size = size
        self.bindings: list[Binding] = []
        self._memory = memory
        self._pages: dict[int, Page] = {}
        self._lock = RwLock()

    def get_page(self, index: int) -> Page:
        """The page at `index`, made now if there is none.  EFAULT: beyond the end; EHWPOISON; ENOMEM."""
        if not 0 <= index < self.size // PAGE_SIZE:
            raise UapiError(errno.EFAULT, f"guest_memfd page {index:#x} of {self.size:#x} bytes")
        page = self._pages.get(index)
        if page is None:
            page = self._pages[index] = self._memory.allocate(LEVEL_4K, SHARED_OWNER, Kind.FILE)
            page.cached = True
        if page.poisoned:
            raise UapiError(EHWPOISON, f"guest_memfd page {index:#x}: its memory failed")
        return page

    def present_page(self, index: int) -> Page | None:
        """The page at `index` if there is one."""
        return self._pages.get(index)

    async def punch_hole(self, offset: int, size: int) -> None:
        """EINVAL: not whole pages."""
        if offset < 0 or size <= 0 or offset % PAGE_SIZE or size % PAGE_SIZE:
            raise UapiError(errno.EINVAL, f"guest_memfd hole {offset:#x}+{size:#x}: not whole pages")
        await self._drop(offset // PAGE_SIZE, (offset + size) // PAGE_SIZE)

    async def release(self) -> None:
        """Nobody has the file any more."""
        await self._drop(0, self.size // PAGE_SIZE)

    async def _drop(self, first: int, last: int) -> None:
        await self._lock.acquire(write=True)
        bindings = list(self.bindings)
        for binding in bindings:
            await binding.gmem_invalidate_start(self, first, last)
        for index in [i for i in self._pages if first <= i < last]:
            page = self._pages.pop(index)
            page.cached = False
            self._memory.put(page)
        for binding in bindings:
            binding.gmem_invalidate_end(self, first, last)
        self._lock.release()
