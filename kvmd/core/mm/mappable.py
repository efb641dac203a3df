"""What a mapping can show: who maps it, and taking pages from all of them.

Models struct address_space as mappings need it [mm filemap.c]: shmem and hugetlbfs (`file`), guest_memfd. It
lives while an fd or a mapping names it. Taking pages first tells the notifiers of every process that maps the
range, and looks again for mappings made meanwhile, until none is left (I6).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple, Protocol

from kvmd.core.mm.claims import Claims
from kvmd.core.mm.notifier import Notified, Range, ToldRanges, edit_notified
from kvmd.core.mm.page import Entry, Page, PageKind, Pte
from kvmd.core.mm.table import PageTable
from protocol.units import Hva, Level, size_of_level


class FileMapping(Protocol):
    """A mapping, as what it shows needs it: start..end, from byte `offset` of `file` on."""

    @property
    def start(self) -> Hva: ...
    @property
    def end(self) -> Hva: ...
    @property
    def file(self) -> Mappable | None: ...
    @property
    def offset(self) -> int: ...


class MappingSpace(Notified, Protocol):
    """An address space that maps something."""

    table: PageTable
    claims: Claims

    @property
    def vmas(self) -> Iterable[FileMapping]: ...


class MappedRange(NamedTuple):
    """Where pages are mapped: start..end of `space`."""

    space: MappingSpace
    start: Hva
    end: Hva


class Mappable:
    """In pages of `level`; whoever makes it has its first reference."""

    def __init__(self, name: str, level: Level) -> None:
        self.name = name
        self.level = level
        self._page = size_of_level(level)
        self._refs = 1
        self._spaces: dict[MappingSpace, int] = {}  # who maps it, how many mappings each

    # -- what each has of its own ----------------------------------------------------------------------

    def check_mmap(self, *, shared: bool) -> None:
        """May it be mapped so?  ENODEV, EINVAL."""

    def has(self, offset: int) -> bool:
        """Whether there is a page at `offset`, or nothing to be had any more."""
        raise NotImplementedError

    def pinned(self, offset: int, end: int) -> list[int]:
        """Where pages of offset..end are pinned for long."""
        return []

    def page_at(self, offset: int, hva: Hva) -> Page:
        """The page a mapping shows at `hva`, made if need be.  EFAULT: a SIGBUS for the process; EHWPOISON;
        ENOMEM.
        """
        raise NotImplementedError

    async def punch_hole(self, offset: int, size: int) -> None:
        """The range reads as zeroes from now on.  EINVAL: no range; EFBIG."""
        raise NotImplementedError

    def _free(self) -> None:
        """Neither an fd nor a mapping names it."""
        raise NotImplementedError

    # -- references ------------------------------------------------------------------------------------

    def get(self) -> None:
        """One more has it open."""
        self._refs += 1

    def put(self) -> None:
        """The fd is closed."""
        self._refs -= 1
        self._free_if_unused()

    def attach(self, space: MappingSpace) -> None:
        """A mapping was made in `space`."""
        self._spaces[space] = self._spaces.get(space, 0) + 1

    def detach(self, space: MappingSpace) -> None:
        self._spaces[space] -= 1
        if not self._spaces[space]:
            del self._spaces[space]
        self._free_if_unused()

    def _free_if_unused(self) -> None:
        if not self._refs and not self._spaces:
            self._free()

    # -- taking pages from those who map them ----------------------------------------------------------

    async def unmap(self, first: int, last: int | None, *, copies_too: bool) -> None:
        """Take pages first..last from every mapping; returns with none left.  Who maps the range is told
        once even if what it has there stays [unmap_mapping_range]."""
        ranges = [Range(*mapped) for mapped in self.mapped(first, last)]
        while ranges:
            # await: mapped: cannot change: it belongs to the looks before and after
            await edit_notified(
                ranges, partial(self._unmap_told, ToldRanges(ranges), first, last, copies_too)
            )
            ranges = [Range(*mapped) for mapped in self.mapped(first, last) if _entries(mapped, copies_too)]

    def _unmap_told(self, told: ToldRanges, first: int, last: int | None, copies_too: bool) -> None:
        for mapped in self.mapped(first, last):
            for entry in _entries(mapped, copies_too):
                if told.covers(Range(mapped.space, entry.hva, Hva(entry.hva + self._page))):
                    (mapped.space.table.clear if copies_too else mapped.space.table.zap)(entry)

    def mapped(self, first: int, last: int | None) -> list[MappedRange]:
        """Where pages first..last are mapped now."""
        found = []
        for space in self._spaces:
            for vma in space.vmas:
                if vma.file is self:
                    start = max(vma.start, vma.start + first * self._page - vma.offset)
                    end = (
                        vma.end if last is None else min(vma.end, vma.start + last * self._page - vma.offset)
                    )
                    if start < end:
                        found.append(MappedRange(space, Hva(start), Hva(end)))
        return found


def _entries(mapped: MappedRange, copies_too: bool) -> list[Entry]:
    """What is mapped there: of the file alone, or also what a private mapping made of it."""
    return [
        entry
        for entry in mapped.space.table.within(mapped.start, mapped.end)
        if copies_too or (isinstance(entry, Pte) and entry.page.kind is PageKind.FILE)
    ]
