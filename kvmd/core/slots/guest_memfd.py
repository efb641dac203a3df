"""A guest_memfd file, and the set of gfns that are private.

Models struct kvm_gmem and the memory attributes of a VM [KVM guest_memfd.c]: a file that no process maps
unless it was made for that, bound to slots of one VM; a page is made, zeroed, when it is first touched.  A
gfn that is private is served from the file of its slot, a shared one by the process.  No gfn is mapped or
flushed here: that is `private_memory`.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

from kvmd.core.mm.file import check_hole
from kvmd.core.mm.mappable import Mappable
from kvmd.core.mm.memory import PageAllocator
from kvmd.core.mm.page import Page, PageKind
from protocol.errors import EHWPOISON, UapiError
from protocol.flow import RwLock
from protocol.pt.geometry import entry_span
from protocol.units import LEVEL_4K, PAGE_SHIFT, PAGE_SIZE, Gfn, GfnSpan, Gpa, Hva, Level, gfn_of

ATTRIBUTE_PRIVATE = 1 << 3


class MemfdFlag(IntFlag):
    MMAP = 1  # shared pages of the slot come from the file too
    INIT_SHARED = 2


class GuestMemfd(Mappable):
    """One file of `size` bytes; `owner` tags its frames.  `punch` and `release` are its VM's to do, which
    knows what gfns have of it.

    `invalidate_lock` is the kernel's filemap_invalidate_lock: pages are given back only from slots that were
    bound when it was taken, so that nobody may be bound meanwhile.
    """

    def __init__(self, vm_id: int, memory: PageAllocator, owner: int, size: int, flags: MemfdFlag) -> None:
        super().__init__("guest_memfd", LEVEL_4K)
        self.vm_id = vm_id
        self.punch: Callable[[int, int], Coroutine[Any, Any, None]] | None = None
        self.release: Callable[[], None] | None = None
        self.npages = size >> PAGE_SHIFT
        self.flags = flags
        self.bindings: list[Binding] = []
        self.closed = False
        self.invalidate_lock = RwLock()
        self._memory = memory
        self._owner = owner
        self._pages: dict[int, Page] = {}

    async def bind(self, vm_id: int, offset: int, span: GfnSpan) -> Binding:
        """Give the pages from `offset` on to a slot, once no hole is being made [KVM kvm_gmem_bind].  EINVAL:
        another VM's, too short, or taken."""
        first, end = offset >> PAGE_SHIFT, (offset >> PAGE_SHIFT) + span.npages
        if self.vm_id != vm_id:
            raise UapiError(errno.EINVAL, f"the guest_memfd is VM {self.vm_id}'s, not VM {vm_id}'s")
        if end > self.npages:
            raise UapiError(errno.EINVAL, f"pages {first:#x}..{end:#x} of a guest_memfd of {self.npages:#x}")
        # await: asked, first, end: cannot change: a file has one VM and one size for life
        async with self.invalidate_lock:
            if any(held.first < end and first < held.first + held.span.npages for held in self.bindings):
                raise UapiError(errno.EINVAL, f"pages {first:#x}..{end:#x} are bound to another slot")
            binding = Binding(self, first, span)
            self.bindings.append(binding)
            return binding

    def page(self, index: int) -> Page:
        """The page at `index`, made now if there is none.  EHWPOISON, ENOMEM."""
        page = self._pages.get(index)
        if page is None:
            page = self._pages[index] = self._memory.allocate(LEVEL_4K, self._owner, PageKind.FILE)
            page.cached = True
        if page.poisoned:
            raise UapiError(EHWPOISON, f"guest_memfd page {index:#x}: its memory failed")
        return page

    # -- as a process maps it --------------------------------------------------------------------------

    def check_mmap(self, *, shared: bool) -> None:
        """[KVM guest_memfd.c, kvm_gmem_mmap]"""
        if MemfdFlag.MMAP not in self.flags:
            raise UapiError(errno.ENODEV, "the guest_memfd was made without the MMAP flag")
        if not shared:
            raise UapiError(errno.EINVAL, "a guest_memfd is mapped shared")

    def has(self, offset: int) -> bool:
        index = offset >> PAGE_SHIFT
        return index >= self.npages or index in self._pages

    def page_at(self, offset: int, hva: Hva) -> Page:
        index = offset >> PAGE_SHIFT
        if index >= self.npages or MemfdFlag.INIT_SHARED not in self.flags:
            raise UapiError(errno.EFAULT, f"hva {hva:#x}: beyond the guest_memfd's end, or private")
        return self.page(index)

    async def punch_hole(self, offset: int, size: int) -> None:
        assert self.punch is not None, "its VM made it"
        await self.punch(offset, size)

    def _free(self) -> None:
        if self.release is not None:
            self.release()

    # -- pages -----------------------------------------------------------------------------------------

    def present(self, index: int) -> Page | None:
        return self._pages.get(index)

    def pages(self) -> Iterator[tuple[int, Page]]:
        """Those that were touched, and their indices."""
        return iter(self._pages.items())

    def pages_of_hole(self, offset: int, size: int) -> range:
        """Which pages PUNCH_HOLE is about.  EINVAL: not whole pages, or none."""
        check_hole(self.name, offset, size)
        if offset % PAGE_SIZE or size % PAGE_SIZE:
            raise UapiError(errno.EINVAL, f"guest_memfd hole {offset:#x}+{size:#x}: not whole pages")
        first, end = offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT
        return range(min(first, self.npages), min(end, self.npages))

    def spans_of(self, pages: range) -> list[GfnSpan]:
        """The gfns that have these pages."""
        return [span for binding in self.bindings if (span := binding.gfns_of(pages)) is not None]

    def drop(self, pages: range) -> None:
        """Give the pages back.  Whoever calls has zapped `spans_of` them and seen the acks (I6)."""
        held = list(pages) if len(pages) < len(self._pages) else [i for i in self._pages if i in pages]
        for index in held:
            page = self._pages.pop(index, None)
            if page is not None:
                page.cached = False
                self._memory.put(page)


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """Which part of a file a slot has: gfn `span.start` is page `first`."""

    memfd: GuestMemfd
    first: int
    span: GfnSpan

    def index_of(self, gfn: Gfn) -> int:
        return self.first + gfn - self.span.start

    def gfns_of(self, pages: range) -> GfnSpan | None:
        first, end = max(pages.start, self.first), min(pages.stop, self.first + self.span.npages)
        if first >= end:
            return None
        return GfnSpan.of_pages(Gfn(self.span.start + first - self.first), end - first)

    @property
    def serves_shared(self) -> bool:
        return MemfdFlag.MMAP in self.memfd.flags

    def unbind(self) -> None:
        self.memfd.bindings.remove(self)


class MemoryAttributes:
    """Which gfns are private: disjoint spans in order, none of them touching the next."""

    def __init__(self, *, supported: bool) -> None:
        self.supported = supported
        self._edges: list[int] = []  # start, end, start, end: an odd count to the left means inside

    def __bool__(self) -> bool:
        return bool(self._edges)

    def is_private(self, gfn: Gfn) -> bool:
        return bisect_right(self._edges, gfn) % 2 == 1

    def any_private(self, span: GfnSpan) -> bool:
        first = bisect_right(self._edges, span.start)
        return first % 2 == 1 or first < bisect_left(self._edges, span.end)

    def set(self, span: GfnSpan, *, private: bool) -> None:
        left = bisect_left(self._edges, span.start)
        right = bisect_right(self._edges, span.end)
        edges = []
        if (left % 2 == 1) != private:
            edges.append(int(span.start))
        if (right % 2 == 1) != private:
            edges.append(int(span.end))
        self._edges[left:right] = edges

    def max_level(self, gfn: Gfn, limit: Level) -> Level:
        """The largest entry around `gfn` whose pages are all private or all shared."""
        for level in range(limit if self._edges else 0, LEVEL_4K, -1):
            span = entry_span(gfn, Level(level))
            if bisect_right(self._edges, span.start) == bisect_left(self._edges, span.end):
                return Level(level)
        return LEVEL_4K if self._edges else limit

    def __iter__(self) -> Iterator[GfnSpan]:
        edges = self._edges
        return (GfnSpan(Gfn(edges[i]), Gfn(edges[i + 1])) for i in range(0, len(edges), 2))

    def check(self, address: Gpa, size: int, attributes: int, flags: int) -> GfnSpan:
        """What KVM_SET_MEMORY_ATTRIBUTES is asked for.  ENOTTY: the VM has no private memory; EINVAL."""
        if not self.supported:
            raise UapiError(errno.ENOTTY, "KVM_SET_MEMORY_ATTRIBUTES: a VM of type 0 has no attributes")
        if flags or attributes & ~ATTRIBUTE_PRIVATE:
            raise UapiError(errno.EINVAL, f"attributes {attributes:#x} flags {flags:#x}: only PRIVATE, 8")
        if size == 0 or address + size >= 1 << 64:
            raise UapiError(errno.EINVAL, f"attributes of {address:#x}+{size:#x}: empty or wraps")
        if address % PAGE_SIZE or size % PAGE_SIZE:
            raise UapiError(errno.EINVAL, f"attributes of {address:#x}+{size:#x}: not whole pages")
        return GfnSpan.of_pages(gfn_of(address), size >> PAGE_SHIFT)
