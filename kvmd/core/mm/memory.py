"""The host's pages: taken, copied, split, swapped out and given back, for all processes and files together.

Models the page allocator's users: every frame handed out belongs to one `Page`, and is released when
nothing counts on that page any more. The zero pages, the tree of merged pages [mm ksm.c] and the swap
area are the host's. A frame's tag says whom it was taken for and does not change while it is shared: a
fork gives the page to more processes but nobody's translation of it goes stale.

Departures: a zero page goes back with its last mapping, a frame that failed with the last that knew of it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

from kvmd.core.mm.frames import Frames
from kvmd.core.mm.locked import LockedVm
from kvmd.core.mm.page import Page, PageKind, Pte, Swap
from protocol.errors import UapiError
from protocol.flow import Wait, done
from protocol.frame_tags import OWNER_BITS
from protocol.units import LEVEL_4K, PAGE_SIZE, Level, Pfn, pages_of_level, size_of_level

SHARED_OWNER = (1 << OWNER_BITS) - 1  # of what no process owns: zero pages and files
MAX_SWAP_PAGES = 1 << 18
PAGE_KIB = PAGE_SIZE // 1024
WATERMARK_SCALE_FACTOR = 10  # in ten-thousandths of all pages


@dataclass(slots=True)
class MemoryCounters:
    """What happened to the host's memory so far, in pages of 4 KiB where it is pages."""

    pinned_pages: int = 0  # for long, by whomever; what is pinned now
    pages_pinned: int = 0  # so far
    pages_allocated: int = 0
    swap_outs: int = 0
    swap_ins: int = 0
    notifier_calls: int = 0  # each notifier of each change
    hmm_invalidations: int = 0  # sent to other MMUs
    hmm_faults: int = 0  # range faults of theirs
    hmm_faults_major: int = 0  # pages that these, or their pins, read back from swap
    hmm_faults_allocated: int = 0  # pages that these took from the host, not their pins


def low_watermark(pages: int) -> int:
    """Of a host with so many pages, the free ones from which on the allocator has kswapd at work [mm
    page_alloc.c, calculate_min_free_kbytes, __setup_per_zone_wmarks].
    """
    least = min(max(isqrt(16 * pages * PAGE_KIB), 128), 262144) // PAGE_KIB
    return least + max(least // 4, pages * WATERMARK_SCALE_FACTOR // 10_000)


class PageAllocator:
    """What all address spaces and files of the host share."""

    def __init__(
        self,
        frames: Frames,
        cond_resched: Callable[[], Wait[None]] = lambda: done(None),
        memlock_pages: int | None = None,
    ) -> None:
        self.frames = frames
        self.cond_resched = cond_resched  # awaited by long work
        self.memlock_pages = memlock_pages  # RLIMIT_MEMLOCK of every process; None: none
        self.locked = LockedVm("the user", memlock_pages)  # of all processes: there is one user
        self.merged: dict[bytes, Page] = {}  # contents -> the one page that has them
        self.pages: dict[Page, None] = {}  # every page there is
        self.swapped = 0
        self.counters = MemoryCounters()
        self._zero: dict[Level, Page] = {}
        self._low = low_watermark(frames.total)

    # -- taking and giving back ------------------------------------------------------------------------

    def allocate(self, level: Level, owner: int, kind: PageKind = PageKind.ANON) -> Page:
        """A zeroed page.  ENOMEM."""
        page = Page(self._take(level, owner), level, kind, kind is PageKind.ANON)
        self.pages[page] = None
        return page

    def _take(self, level: Level, owner: int) -> Pfn:
        pfn = self.frames.allocate(level, owner)
        self.counters.pages_allocated += pages_of_level(level)
        return pfn

    @property
    def is_low(self) -> bool:
        """Who only guesses that a page will be wanted takes none."""
        return self.frames.free < self._low

    def zero(self, level: Level) -> Page:
        """The zero page of that size."""
        page = self._zero.get(level)
        if page is None:
            page = self._zero[level] = self.allocate(level, SHARED_OWNER, PageKind.ZERO)
        return page

    def put(self, page: Page) -> None:
        """Release the frame if nothing counts on it.  The caller has seen every flush of it acked (I6)."""
        if page.in_use:
            return
        if page.kind is PageKind.ZERO:
            del self._zero[page.level]
        elif page.kind is PageKind.KSM and not page.poisoned:
            del self.merged[self.contents(page)]
        del self.pages[page]
        self.frames.release(page.pfn, page.level)

    def poison(self, page: Page) -> None:
        """Nobody uses the frame again as long as somebody knows that it failed."""
        if page.kind is PageKind.KSM:
            del self.merged[self.contents(page)]
        page.poisoned = True

    # -- contents --------------------------------------------------------------------------------------

    def view(self, pfn: Pfn, size: int) -> memoryview:
        at = self.frames.offset_of(pfn)
        return self.frames.view[at : at + size]

    def contents(self, page: Page) -> bytes:
        return bytes(self.view(page.pfn, size_of_level(page.level)))

    def copy(self, entry: Pte, owner: int) -> Page:
        """A page of its own with what `entry` shows.  ENOMEM."""
        page = self.allocate(entry.level, owner)
        if entry.page.kind is not PageKind.ZERO:
            size = size_of_level(entry.level)
            self.view(page.pfn, size)[:] = self.view(entry.pfn, size)
        return page

    def move(self, page: Page, owner: int) -> Pfn:
        """To another frame, contents and all; gives the old one, to be released when whoever maps the page
        has been given the new one.  ENOMEM.
        """
        size = size_of_level(page.level)
        old, page.pfn = page.pfn, self._take(page.level, owner)
        self.view(page.pfn, size)[:] = self.view(old, size)
        return old

    # -- splitting -------------------------------------------------------------------------------------

    def split(self, page: Page) -> list[Page]:
        """A huge page becomes small ones at the same place, itself the first; its entries must be rewritten
        to name them."""
        self.frames.split(page.pfn, page.level)
        pages = pages_of_level(page.level)
        page.level = Level(page.level - 1)
        step = pages_of_level(page.level)
        starts = range(page.pfn + step, page.pfn + pages, step)
        rest = [Page(Pfn(pfn), page.level, page.kind, page.exclusive) for pfn in starts]
        self.pages.update(dict.fromkeys(rest))
        return [page, *rest]

    # -- swap ------------------------------------------------------------------------------------------

    def swap_out(self, page: Page, count: int) -> Swap:
        """Its contents, for `count` entries.  ENOMEM: the swap area is full."""
        assert page.level == LEVEL_4K
        if self.swapped >= MAX_SWAP_PAGES:
            raise UapiError(errno.ENOMEM, f"swap is full: {self.swapped} pages")
        self.swapped += 1
        self.counters.swap_outs += 1
        return Swap(self.contents(page), count)

    def swap_in(self, swap: Swap, owner: int, kind: PageKind = PageKind.ANON) -> Page:
        """A page with those contents; the caller drops its entry's count.  ENOMEM."""
        page = self.allocate(LEVEL_4K, owner, kind)
        self.counters.swap_ins += 1
        self.view(page.pfn, PAGE_SIZE)[:] = swap.data
        return page

    def put_swap(self, swap: Swap) -> None:
        swap.count -= 1
        if swap.count == 0:
            self.swapped -= 1
