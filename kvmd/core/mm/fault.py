"""A page fault of a process: what one look at its mapping and its entry leads to.

Models handle_mm_fault [mm memory.c]. `attempt` does everything that gives rights where there were none,
which nobody needs to be told of: it makes the entry, or says what must happen first, a userfaultfd's
answer or a copy. Replacing a page that is mapped (`copy_on_write`) takes rights away, so notifiers come
before it.

What is writable afterwards: a page of its own if the mapping is; a shared file's page at once, as shmem's
is; the zero page, a private file's page and a page shared since a fork not before a write. A page that no
other process ever saw, or that its last sharer left alone, is written in place.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmd.core.mm.page import (
    LazyFree,
    Page,
    PageKind,
    ProtNone,
    Pte,
    Swapped,
    WpMarker,
    with_rights,
)
from kvmd.core.mm.space import AddressSpace, FaultOrigin
from kvmd.core.mm.vma import Vma
from protocol.errors import EHWPOISON, UapiError
from protocol.flow import Wait
from protocol.units import LEVEL_2M, LEVEL_4K, Hva, Level, align_down, pages_of_level, size_of_level

SIZE_2M = size_of_level(LEVEL_2M)


@dataclass(slots=True)
class FaultCounts:
    """What the faults of one request, or of one kind, cost."""

    major: int = 0  # pages read back from swap
    allocated: int = 0  # of 4 KiB, those too


class CopyOnWrite:
    """The entry's page is not the process's to write: `copy_on_write` it."""

    __slots__ = ("entry",)

    def __init__(self, entry: Pte) -> None:
        self.entry = entry


def attempt(
    space: AddressSpace, hva: Hva, *, write: bool, via: FaultOrigin
) -> Pte | CopyOnWrite | Wait[None]:
    """Make the entry at `hva` serve the access, or say what it must wait for.  EFAULT, EHWPOISON, ENOMEM."""
    vma = space.accessible(hva, write=write, via=via)
    user = via is FaultOrigin.USER
    while True:
        entry = space.table.find(hva)
        if entry is None:
            return _missing(space, vma, hva, write=write, user=user)
        if isinstance(entry, ProtNone | LazyFree):
            space.table.set(with_rights(entry, writable=writable_now(vma, entry)))
        elif isinstance(entry, Pte):
            if not write or entry.writable:
                return entry
            return _write(space, vma, entry, hva, user=user)
        elif isinstance(entry, Swapped):
            _swap_in(space, vma, entry)
        elif isinstance(entry, WpMarker):
            if (asked := _ask_missing(vma, entry.hva, hva, write=write, user=user)) is not None:
                return asked
            space.table.set(_file_entry(vma, entry.hva, write=write, uffd_wp=vma.uffd_wp))
        else:
            raise poisoned(hva)


def poisoned(hva: Hva) -> UapiError:
    return UapiError(EHWPOISON, f"hva {hva:#x}: the page's memory failed")


def writable_now(vma: Vma, entry: Pte) -> bool:
    """Whether an entry of `vma` may be writable without a fault [can_change_pte_writable]."""
    if not vma.writable or entry.uffd_wp:
        return False
    return vma.shared or entry.page.exclusive


def _write(
    space: AddressSpace, vma: Vma, entry: Pte, hva: Hva, *, user: bool
) -> Pte | CopyOnWrite | Wait[None]:
    """A write to a page that is there but not writable."""
    if entry.uffd_wp and vma.uffd is not None and vma.uffd_wp:
        return vma.uffd.ask(hva, write=True, wp=True, user=user)
    if not vma.shared and not _may_reuse(space, entry.page):
        return CopyOnWrite(entry)
    if entry.page.kind is PageKind.ANON:
        entry.page.exclusive = True
    entry = with_rights(entry, writable=True, uffd_wp=False)
    space.table.set(entry)
    return entry


def _may_reuse(space: AddressSpace, page: Page) -> bool:
    """Nobody else has the page any more [wp_can_reuse_anon_folio]."""
    if page.kind is not PageKind.ANON:
        return False
    return page.exclusive or (not page.pins and all(table is space.table for table, _ in page.entries))


# -- nothing there ------------------------------------------------------------------------------------------


def _missing(space: AddressSpace, vma: Vma, hva: Hva, *, write: bool, user: bool) -> Pte | Wait[None]:
    """No entry: make one."""
    level = _huge_level(space, vma, hva) if vma.file is None else vma.level
    head = Hva(align_down(hva, size_of_level(level)))
    if (asked := _ask_missing(vma, head, hva, write=write, user=user)) is not None:
        return asked
    if vma.file is not None:
        entry = _file_entry(vma, head, write=write, uffd_wp=False)
        if write and not vma.shared:
            page = space.memory.copy(entry, space.id)
            entry = Pte(head, page.pfn, vma.level, True, page)
        space.table.set(entry)
        return entry
    if write or vma.level > LEVEL_4K:
        # A read of a hugetlb page gets a page of its own too, not writable yet [hugetlb_no_page].
        page = _allocate(space, vma, level)
        if page.level != level:
            level, head = page.level, Hva(align_down(hva, size_of_level(page.level)))
        entry = Pte(head, page.pfn, level, write, page)
    else:
        page = space.memory.zero(level)
        entry = Pte(head, page.pfn, level, False, page)
    space.table.set(entry)
    return entry


def _ask_missing(vma: Vma, head: Hva, hva: Hva, *, write: bool, user: bool) -> Wait[None] | None:
    """A userfaultfd that is to bring the page at `head`, if neither it nor a file has it."""
    if vma.uffd is None or not vma.uffd_missing:
        return None
    if vma.file is not None and vma.file.has(vma.offset_of(head)):
        return None
    return vma.uffd.ask(hva, write=write, wp=False, user=user)


def _allocate(space: AddressSpace, vma: Vma, level: Level) -> Page:
    """A page of `level`; a transparent huge one falls back to a small one when there is none."""
    try:
        return space.memory.allocate(level, space.id)
    except UapiError:
        if level == vma.level:
            raise
        return space.memory.allocate(vma.level, space.id)


def _huge_level(space: AddressSpace, vma: Vma, hva: Hva) -> Level:
    """2 MiB where the mapping is advised, has room and is empty all around [do_huge_pmd_anonymous_page]."""
    if vma.level > LEVEL_4K or not vma.huge:
        return vma.level
    head = Hva(align_down(hva, SIZE_2M))
    end = Hva(head + SIZE_2M)
    fits = vma.start <= head and end <= vma.end and space.table.is_empty(head, end)
    return LEVEL_2M if fits else LEVEL_4K


def _file_entry(vma: Vma, head: Hva, *, write: bool, uffd_wp: bool) -> Pte:
    """The file's own page: never writable in a private mapping, at once in a shared one, unless a
    userfaultfd wants to know of first writes [vma_wants_writenotify]."""
    assert vma.file is not None
    page = vma.file.page_at(vma.offset_of(head), head)
    writable = vma.shared and vma.writable and not uffd_wp and (write or not vma.uffd_wp)
    return Pte(head, page.pfn, vma.level, writable, page, uffd_wp)


def _swap_in(space: AddressSpace, vma: Vma, entry: Swapped) -> None:
    """A page of its own with what was swapped out; the swap area keeps it for who else names it."""
    page = space.memory.swap_in(entry.swap, space.id)
    writable = vma.writable and not entry.uffd_wp
    space.table.set(Pte(entry.hva, page.pfn, LEVEL_4K, writable, page, entry.uffd_wp))


# -- copies -------------------------------------------------------------------------------------------------


async def copy_on_write(space: AddressSpace, entry: Pte, hva: Hva) -> int:
    """Give the process its own copy of the page at `hva`, and nobody the old one through its entry any more;
    how many pages were allocated for it.  A huge page is copied as one only if it is hugetlb's, or zeroes."""
    end = Hva(entry.hva + size_of_level(entry.level))
    return await space.change(entry.hva, end, lambda: _copy(space, entry, hva))


async def unshare(space: AddressSpace, entry: Pte, hva: Hva) -> None:
    """The page at `hva` becomes the process's own though it only reads [mm memory.c, FAULT_FLAG_UNSHARE]:
    what is pinned for long must be what the process sees, also after it wrote there."""
    if space.table.find(hva) is entry and _may_reuse(space, entry.page):
        entry.page.exclusive = True
        return
    end = Hva(entry.hva + size_of_level(entry.level))
    await space.change(entry.hva, end, lambda: _copy(space, entry, hva, unshare=True))


def _copy(space: AddressSpace, entry: Pte, hva: Hva, *, unshare: bool = False) -> int:
    """How many pages of 4 KiB the copy has.  ENOMEM."""
    table = space.table
    vma = space.vmas.find(hva)
    if table.find(hva) is not entry or vma is None or not (vma.writable or unshare):
        return 0  # changed meanwhile: the fault looks again
    if entry.level > vma.level and entry.page.kind is not PageKind.ZERO:
        table.split(entry)
        split = table.find(hva)
        assert isinstance(split, Pte)
        entry = split
    try:
        page = space.memory.copy(entry, space.id)
    except UapiError:
        if entry.level == vma.level:
            raise
        table.split(entry)  # no huge page for zeroes: a small one will do
        return 0
    table.set(Pte(entry.hva, page.pfn, entry.level, not unshare, page, unshare and entry.uffd_wp))
    return pages_of_level(page.level)
