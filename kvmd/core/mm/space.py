"""An address space: its mappings, its page table, its lock, and how anything in it changes.

Models mm_struct as far as faults and changes of pages need it; what a process asks for is in `mm`, what
the host does on its own in `reclaim`. The mmap_lock is taken as Linux does: for writing by what changes
mappings, for reading by what looks up or changes pages; a lookup of a present page takes no lock at all,
as fast GUP does not [mm gup.c]. Files change page tables without it: an edit is atomic.

Errors are told apart as GUP's are: EFAULT for no mapping, no right or beyond a file's end; EHWPOISON;
ENOMEM.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from kvmd.core.mm.memory import Memory
from kvmd.core.mm.notifier import MmuNotifier, Range, changing
from kvmd.core.mm.page import HostPage, Pte
from kvmd.core.mm.table import PageTable
from kvmd.core.mm.vma import Vma, Vmas
from protocol.errors import UapiError
from protocol.flow import RwLock
from protocol.units import PAGE_SIZE, Hva, size_of_level

T = TypeVar("T")

TASK_SIZE = Hva((1 << 47) - PAGE_SIZE)  # the last page is nobody's [mm mmap.c]


class AddressSpace:
    def __init__(self, mm_id: int, memory: Memory) -> None:
        self.id = mm_id  # owner of its frames
        self.alive = True
        self.notifiers: list[MmuNotifier] = []
        self.memory = memory
        self.vmas = Vmas(self)
        self.table = PageTable(self, memory, mm_id)
        self.mmap_lock = RwLock()

    # -- changes ---------------------------------------------------------------------------------------

    async def change(self, start: Hva, end: Hva, edit: Callable[[], T]) -> T:
        """Change pages of start..end: no entry crosses its edges when `edit` runs.  A huge entry that does is
        split, and told of as a whole, as split_huge_pmd tells."""
        while True:
            low, high = self.table.whole(start, end)

            def cut_and_edit(low: Hva = low, high: Hva = high) -> tuple[T] | None:
                if self.table.whole(start, end) != (low, high):
                    return None  # a huge page came up at an edge meanwhile, or went
                self.table.split_edges(start, end)
                return (edit(),)

            changed = await changing([Range(self, low, high)], cut_and_edit)
            if changed is not None:
                return changed[0]

    async def isolate(self, start: Hva, end: Hva) -> list[Vma]:
        """The VMAs that make up start..end, split from their rest, and so is a huge page that is cut
        [vma_adjust_trans_huge].  The mmap_lock is held for writing."""
        for edge in (start, end):
            if self.table.whole(edge, edge) != (edge, edge):
                await self.change(edge, edge, lambda: None)
        return self.vmas.isolate(start, end)

    async def change_pages(self, what: str, start: Hva, size: int, edit: Callable[[Hva, Hva], int]) -> int:
        """A change of pages but of no mapping: faults and other such changes go on meanwhile."""
        await self.mmap_lock.acquire(write=False)
        try:
            end = self.check_range(what, start, size)
            changed = await self.change(start, end, lambda: edit(start, end))
            self.check_mapped(what, start, end)  # the rest was done, as madvise does
            return changed
        finally:
            self.mmap_lock.release()

    def check_range(self, what: str, start: Hva, size: int) -> Hva:
        """The end of a range of whole pages.  EINVAL."""
        end = Hva(start + size)
        if size <= 0 or start < 0 or end > TASK_SIZE:
            raise UapiError(errno.EINVAL, f"{what} {start:#x}+{size:#x}: not a range of user space")
        for vma in (self.vmas.find(start), self.vmas.find(Hva(end - 1))):
            page = PAGE_SIZE if vma is None else size_of_level(vma.level)
            cut = vma is not None and (max(start, vma.start) % page or min(end, vma.end) % page)
            if start % PAGE_SIZE or size % PAGE_SIZE or cut:
                raise UapiError(errno.EINVAL, f"{what} {start:#x}+{size:#x}: not whole pages of {page:#x}")
        return end

    def check_mapped(self, what: str, start: Hva, end: Hva) -> None:
        """ENOMEM: nothing is mapped somewhere in start..end."""
        hole = self.vmas.first_hole(start, end)
        if hole is not None:
            raise UapiError(errno.ENOMEM, f"{what} {start:#x}..{end:#x}: nothing is mapped at {hole:#x}")

    # -- lookups ---------------------------------------------------------------------------------------

    def present_page(self, hva: Hva) -> HostPage | None:
        """The page at `hva` as the process's entry has it now; touches nothing."""
        entry = self.table.find(hva)
        return entry if type(entry) is Pte else None

    def accessible(self, hva: Hva, *, write: bool) -> Vma:
        """The mapping at `hva`.  EFAULT: none, or not with that right."""
        vma = self.vmas.find(hva)
        if vma is None or not self.alive or not (vma.writable if write else vma.readable):
            what = "write to" if write else "read of"
            raise UapiError(
                errno.EFAULT, f"{what} hva {hva:#x}: " + ("no mapping" if vma is None else "protection")
            )
        return vma
