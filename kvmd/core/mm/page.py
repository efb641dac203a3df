"""Host pages: a frame, who counts on it, and what one entry of a process's page table says.

Models struct page and the kinds of entry of a page table as far as a secondary MMU can tell them apart
[mm memory.c]. A `Page` knows every entry that maps it (rmap), whether a file holds it and how often it is
pinned; its frame goes back with the last of them, never earlier (I6). Entries are replaced, not changed,
so that one handed out by a lookup goes on saying what was true then.

Invariant I21 has its home here: a page knows every entry that maps it; what several processes have is
writable to none of them, unless it is a file's. An entry is present exactly if it is a `Pte` and no
subclass: `type(entry) is Pte` is what a lookup without the lock asks. An absent page is no entry at all,
or one of the classes below it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from protocol.units import LEVEL_4K, Hva, Level, Pfn


class PageKind(Enum):
    ANON = auto()  # of one process, or of several since a fork
    KSM = auto()  # merged: never written, not even by its last owner
    FILE = auto()  # in a file's page cache
    ZERO = auto()  # zeroes for everybody

    __hash__ = object.__hash__


class Mapper:
    """What maps pages, as a page knows it: a page table, whose entries `table.entries_of` finds again."""


@dataclass(slots=True, eq=False)
class Page:
    """One block of frames of `level`.  `exclusive`: anonymous, and no other process ever got to see it
    [PG_anon_exclusive]."""

    pfn: Pfn
    level: Level
    kind: PageKind
    exclusive: bool = False
    poisoned: bool = False
    cached: bool = False  # a file holds it
    index: int = 0  # its place in that file, in pages of its size
    pins: int = 0  # long-term pins: it must stay where it is
    marks: int = 0  # entries that say it failed
    entries: dict[tuple[Mapper, Hva], None] = field(default_factory=dict)  # what maps it, or part of it

    @property
    def in_use(self) -> bool:
        return bool(self.entries) or self.cached or self.pins > 0 or self.marks > 0


@dataclass(slots=True, eq=False)
class MappedPage:
    """What KVM learns of a present page: `level` says its size, `hva` its first byte."""

    hva: Hva
    pfn: Pfn
    level: Level
    writable: bool  # now; a write fault may make it so


@dataclass(slots=True, eq=False)
class Pte(MappedPage):
    """A present entry: `pfn` is in `page`, which may be larger than what the entry maps."""

    page: Page
    uffd_wp: bool = False  # write-protected by a userfaultfd

    def as_kind(self, kind: type[Pte]) -> Pte:
        """The same entry as one of the classes below, or as a present one."""
        return kind(self.hva, self.pfn, self.level, self.writable, self.page, self.uffd_wp)


@dataclass(slots=True, eq=False)
class ProtNone(Pte):
    """The page is there but no access is allowed: PROT_NONE, or a NUMA hint for the next one to clear."""


@dataclass(slots=True, eq=False)
class LazyFree(Pte):
    """MADV_FREE: the page may be dropped until somebody uses it again."""


@dataclass(slots=True, eq=False)
class Swap:
    """A place in the swap area and how many entries, or a file, name it."""

    data: bytes
    count: int = 0


@dataclass(slots=True, eq=False)
class Swapped:
    hva: Hva
    swap: Swap
    uffd_wp: bool = False
    level: Level = LEVEL_4K


@dataclass(slots=True, eq=False)
class Poisoned:
    """The memory failed; whoever touches it gets EHWPOISON.  `page` is what was there."""

    hva: Hva
    level: Level
    page: Page


@dataclass(slots=True, eq=False)
class WpMarker:
    """Nothing is mapped; what a fault maps here a userfaultfd write-protects [PTE_MARKER_UFFD_WP]."""

    hva: Hva
    level: Level


Entry = Pte | Swapped | Poisoned | WpMarker


def with_rights(entry: Pte, *, writable: bool, uffd_wp: bool | None = None) -> Pte:
    """The same page, present, with these rights."""
    wp = entry.uffd_wp if uffd_wp is None else uffd_wp
    return Pte(entry.hva, entry.pfn, entry.level, writable, entry.page, wp)
