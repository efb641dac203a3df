"""What must hold of the host's memory whenever no change is half made.

I21: `Page.entries` is what the page tables say, and nobody can write what somebody else counts on being
his. I6's books: every frame in use belongs to a page somebody counts on, or failed; so nothing leaks and
nothing is freed twice. What another MMU pinned is where it was (`hmm`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.locked import LockedVm
from kvmd.core.mm.memory import PageAllocator
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.page import Page, PageKind, Poisoned, Pte
from kvmd.core.mm.space import AddressSpace
from protocol.units import pages_of_level, size_of_level


def check_memory(memory: PageAllocator, spaces: Sequence[AddressSpace]) -> list[str]:
    """Every violation as a sentence with its invariant number; empty when all hold."""
    mapped = 0
    found = []
    failed = Counter[Page]()
    for space in spaces:
        end = 0
        for entry in sorted(space.table.entries(), key=lambda entry: entry.hva):
            if entry.hva < end:
                found.append(f"I21: mm {space.id}: two entries cover {entry.hva:#x}")
            end = entry.hva + size_of_level(entry.level)
            if isinstance(entry, Pte):
                mapped += 1
                found += [f"I21: mm {space.id} hva {entry.hva:#x}: {why}" for why in _check(space, entry)]
            elif isinstance(entry, Poisoned):
                failed[entry.page] += 1
    for page in memory.pages:
        mapped -= len(page.entries)
        if page.marks != failed[page]:
            found.append(
                f"I21: pfn {page.pfn:#x}: {failed[page]} entries say it failed, it knows of {page.marks}"
            )
        if not page.in_use:
            found.append(f"I6: pfn {page.pfn:#x} is kept though nobody counts on it")
    if mapped:
        found.append(f"I21: {mapped} more entries map pages than the pages know of")
    mirrors = [user for space in spaces for user in space.notifiers if isinstance(user, Mirror)]
    found += _check_pins(mirrors)
    frames = sum(pages_of_level(page.level) for page in memory.pages)
    if frames != memory.frames.in_use:
        found.append(f"I6: {memory.frames.in_use} frames are in use, the pages have {frames}")
    return found


def _check(space: AddressSpace, entry: Pte) -> Iterable[str]:
    page = entry.page
    vma = space.vmas.find(entry.hva)
    if (space.table, entry.hva) not in page.entries or page not in space.memory.pages:
        yield "the page does not know of the entry"
    if not page.pfn <= entry.pfn <= page.pfn + pages_of_level(page.level) - pages_of_level(entry.level):
        yield f"pfn {entry.pfn:#x} is not in its page at {page.pfn:#x}"
    if vma is None or entry.hva + size_of_level(entry.level) > vma.end:
        yield "there is a page but no mapping for all of it"
    elif entry.writable and (not vma.writable or entry.uffd_wp or not _may_write(page, shared=vma.shared)):
        yield f"writable, the mapping is {vma.prot}, the page {page.kind.name}"


def _may_write(page: Page, *, shared: bool) -> bool:
    if page.kind is PageKind.ANON:
        return page.exclusive and len({table for table, _ in page.entries}) == 1
    return page.kind is PageKind.FILE and shared


def _check_pins(mirrors: list[Mirror]) -> list[str]:
    """I6: what a mirror pinned is in its frame, counted by the page and by its process."""
    found = []
    pins: Counter[Page] = Counter()
    charged: Counter[Mm] = Counter()
    locked: Counter[LockedVm] = Counter()
    for mirror in mirrors:
        mm = mirror.mm
        for at, pinned in mirror.pins:
            page = pinned.page
            pins[page] += 1
            charged[mm] += pinned.npages
            locked[mirror.payer] += pinned.npages
            last = page.pfn + pages_of_level(page.level) - pinned.npages
            if page not in mm.memory.pages or not page.pfn <= pinned.pfn <= last:
                found.append(
                    f"I6: mm {mm.id}: pinned at {at:#x}, pfn {pinned.pfn:#x} is not the page's any more"
                )
    for page, held in pins.items():
        if page.pins < held:
            found.append(f"I6: pfn {page.pfn:#x} has {page.pins} pins, mirrors have {held} of it")
    for mm, npages in charged.items():
        if mm.pinned_pages < npages:
            found.append(f"I6: mm {mm.id} has {mm.pinned_pages} pages pinned, its mirrors {npages}")
    for payer, npages in locked.items():
        if payer.pages < npages:
            found.append(
                f"I6: {payer.whose} has {payer.pages} pages locked, the mirrors it pays for {npages}"
            )
    return found
