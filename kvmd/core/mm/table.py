"""The page table of one process: entries by address, and the rmap of every page kept with them.

Models a process's page table [mm rmap.c]: an entry is found by any address it covers; setting and
clearing one keeps `Page.entries` its mirror image, so a page's users are always known. A page whose last
user went is put: whoever clears entries has waited for the notifiers (I6).

All of it is plain `def`: nothing awaits between reading an entry and replacing it, which is what the
page-table lock is for. An entry never crosses the edge of what a change covers: `whole` widens the range
to tell, `split` cuts the entry when the change is made.
"""

from __future__ import annotations

from copy import copy

from kvmd.core.mm.memory import PageAllocator
from kvmd.core.mm.notifier import Notified, Range
from kvmd.core.mm.page import Entry, Mapper, Page, Poisoned, Pte, Swapped, WpMarker
from protocol.units import LEVEL_2M, PAGE_SIZE, Hva, Level, Pfn, pages_of_level, size_of_level

_MASK = {Level(level): -size_of_level(Level(level)) for level in (1, 2, 3)}
_PAGE_MASK, _2M_MASK, _1G_MASK = _MASK.values()


class PageTable(Mapper):
    """The entries of `space`; frames taken for it are tagged with `owner`."""

    def __init__(self, space: Notified, memory: PageAllocator, owner: int) -> None:
        self.space = space
        self.memory = memory
        self.owner = owner
        self._entries: dict[Hva, Entry] = {}  # by first hva

    def find(self, hva: Hva) -> Entry | None:
        """The entry that covers `hva`."""
        entries = self._entries
        entry = entries.get(hva & _PAGE_MASK)  # type: ignore[call-overload]
        if entry is not None:
            return entry  # type: ignore[no-any-return]
        entry = entries.get(hva & _2M_MASK)  # type: ignore[call-overload]
        if entry is not None and entry.level >= LEVEL_2M:
            return entry  # type: ignore[no-any-return]
        entry = entries.get(hva & _1G_MASK)  # type: ignore[call-overload]
        return entry if entry is not None and entry.level > LEVEL_2M else None

    def find_exact(self, hva: Hva) -> Entry:
        """The entry that begins at `hva`, which is known to be there."""
        return self._entries[hva]

    def set(self, entry: Entry) -> None:
        """Put `entry` where it belongs, instead of what was there."""
        old = self._entries.get(entry.hva)
        self._entries[entry.hva] = entry
        page = entry.page if isinstance(entry, Pte) else None
        if isinstance(entry, Poisoned):
            entry.page.marks += 1
        if page is not None:
            page.entries[self, entry.hva] = None
        if old is not None:
            self._drop(old, page)

    def clear(self, entry: Entry) -> None:
        del self._entries[entry.hva]
        self._drop(entry, None)

    def zap(self, entry: Entry) -> None:
        """Clear, in a mapping of a file: what a userfaultfd protects is protected when it comes back."""
        if isinstance(entry, Pte | Swapped) and entry.uffd_wp:
            self.set(WpMarker(entry.hva, entry.level))
        elif not isinstance(entry, WpMarker):
            self.clear(entry)

    def move(self, entry: Entry, hva: Hva) -> None:
        """The same entry at another address, where no userfaultfd protects it."""
        moved = copy(entry)
        moved.hva = hva
        del self._entries[entry.hva]
        if isinstance(moved, WpMarker):
            return
        if isinstance(moved, Pte | Swapped):
            moved.uffd_wp = False
        self._entries[hva] = moved
        if isinstance(entry, Pte):
            del entry.page.entries[self, entry.hva]
            entry.page.entries[self, hva] = None

    def replace(self, entry: Pte, page: Page, pfn: Pfn, *, writable: bool) -> None:
        """The same kind of entry for another page, or another frame, or with other rights."""
        self.set(type(entry)(entry.hva, pfn, entry.level, writable, page, entry.uffd_wp))

    def _drop(self, old: Entry, kept: Page | None) -> None:
        if isinstance(old, Pte):
            if old.page is not kept:
                del old.page.entries[self, old.hva]
                self.memory.put(old.page)
        elif isinstance(old, Poisoned):
            old.page.marks -= 1
            self.memory.put(old.page)
        elif isinstance(old, Swapped):
            self.memory.put_swap(old.swap)

    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    def within(self, start: Hva, end: Hva) -> list[Entry]:
        """Entries that begin in start..end; looks at entries or at the range, whichever is fewer."""
        if (end - start) // PAGE_SIZE > len(self._entries):
            return [entry for hva, entry in self._entries.items() if start <= hva < end]
        found, hva = [], start
        while hva < end:
            entry = self._entries.get(hva)
            if entry is not None:
                found.append(entry)
            hva = Hva(hva + (PAGE_SIZE if entry is None else size_of_level(entry.level)))
        return found

    def is_empty(self, start: Hva, end: Hva) -> bool:
        return not self.within(start, end) and self.find(start) is None

    # -- huge entries ----------------------------------------------------------------------------------

    def whole(self, start: Hva, end: Hva) -> tuple[Hva, Hva]:
        """The range widened to the huge entries its edges cut."""
        first, last = self.find(start), self.find(end)
        if first is not None and first.hva < start:
            start = first.hva
        if last is not None and last.hva < end:
            end = Hva(last.hva + size_of_level(last.level))
        return start, end

    def split_edges(self, start: Hva, end: Hva) -> None:
        """No entry crosses an edge any more.  The whole of them was told to the notifiers."""
        for edge in (start, end):
            entry = self.find(edge)
            if entry is not None and entry.hva < edge:
                assert isinstance(entry, Pte)
                self.split(entry)

    def split(self, entry: Pte) -> None:
        """A huge entry becomes 512 of the same page with the same rights."""
        page, level = entry.page, Level(entry.level - 1)
        size, step = size_of_level(level), pages_of_level(level)
        kind = type(entry)
        del self._entries[entry.hva]
        del page.entries[self, entry.hva]
        for i in range(512):
            hva, pfn = Hva(entry.hva + i * size), Pfn(entry.pfn + i * step)
            self._entries[hva] = kind(hva, pfn, level, entry.writable, page, entry.uffd_wp)
            page.entries[self, hva] = None


def entries_of(page: Page) -> list[tuple[PageTable, Pte]]:
    """What maps the page or a part of it, to be replaced one by one."""
    found = []
    for table, hva in page.entries:
        assert isinstance(table, PageTable)
        entry = table.find_exact(hva)
        assert isinstance(entry, Pte)
        found.append((table, entry))
    return found


def users_of(page: Page) -> list[Range]:
    """Every range of an address space that maps `page` or a part of it."""
    return [
        Range(table.space, entry.hva, Hva(entry.hva + size_of_level(entry.level)))
        for table, entry in entries_of(page)
    ]
