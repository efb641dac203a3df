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
from enum import Enum, auto
from typing import TypeVar

from kvmd.core.mm.claims import Claims
from kvmd.core.mm.memory import PageAllocator
from kvmd.core.mm.notifier import MmuNotifier, Range, announced, edit_notified
from kvmd.core.mm.page import MappedPage, Pte
from kvmd.core.mm.table import PageTable
from kvmd.core.mm.vma import Vma, Vmas
from protocol.errors import UapiError
from protocol.flow import RwLock
from protocol.lifecycle import LifeCycle
from protocol.units import PAGE_SIZE, Hva, align_up, size_of_level

T = TypeVar("T")

TASK_SIZE = Hva((1 << 47) - PAGE_SIZE)  # the last page is nobody's [mm mmap.c]
MMAP_BASE = Hva(0x1000_0000_0000)
MAX_MAP_COUNT = 65530  # mappings of a process [vm.max_map_count]
UNMAP_BATCH = 4096  # entries cleared before others get a turn


class FaultOrigin(Enum):
    """Who wants a page: the CPU running the process (FAULT_FLAG_USER), the CPU in the kernel on its behalf
    (copy_from_user), or get_user_pages, which touches nothing and looks at the mapping's rights instead."""

    USER = auto()
    KERNEL = auto()
    GUP = auto()

    __hash__ = object.__hash__


class MmState(Enum):
    LIVE = auto()
    EXITING = auto()  # no fault is served, nothing is mapped any more; what there is goes
    EXITED = auto()  # everything it had is given back


class MmEvent(Enum):
    EXIT = auto()
    ALL_UNMAPPED = auto()


MM_LIFE = LifeCycle(
    "address space of a process",
    MmState.LIVE,
    {
        (MmState.LIVE, MmEvent.EXIT): MmState.EXITING,
        (MmState.EXITING, MmEvent.ALL_UNMAPPED): MmState.EXITED,
    },
)


class AddressSpace:
    def __init__(self, mm_id: int, memory: PageAllocator) -> None:
        self.id = mm_id  # owner of its frames
        self.state = MM_LIFE.born
        self.notifiers: list[MmuNotifier] = []
        self.claims = Claims()
        self.claims.mapped.append(self.shows_pinned)
        self.memory = memory
        self.vmas = Vmas(self)
        self.table = PageTable(self, memory, mm_id)
        self.mmap_lock = RwLock()

    def happens(self, event: MmEvent) -> None:
        self.state = MM_LIFE.after(self.state, event)

    @property
    def alive(self) -> bool:
        return self.state is MmState.LIVE

    def shows_pinned(self, start: Hva, end: Hva) -> bool:
        """Is a page of a file that is mapped in start..end pinned: by whoever has the file, at its offset?"""
        vmas = self.vmas.overlapping(start, end)
        parts = [vma.part(Hva(max(start, vma.start)), Hva(min(end, vma.end))) for vma in vmas]
        return any(part.file.pinned(part.offset, part.offset_of(part.end)) for part in parts if part.file)

    def check_showing(self, vma: Vma) -> None:
        """May it be mapped?  EBUSY: a device has a page of its file, where a guest's memory is private."""
        if vma.file is not None:
            page = size_of_level(vma.file.level)
            for at in vma.file.pinned(vma.offset, vma.offset_of(vma.end)):
                shown = Hva(vma.start + at - vma.offset)
                self.claims.check_mapping(shown, Hva(shown + page))

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

            # await: edit: cannot change: the caller's own
            changed = await edit_notified([Range(self, low, high)], cut_and_edit)
            if changed is not None:
                return changed[0]

    async def isolate(self, start: Hva, end: Hva) -> list[Vma]:
        """The VMAs that make up start..end, split from their rest, and so is a huge page that is cut
        [vma_adjust_trans_huge].  The mmap_lock is held for writing.  ENOMEM: too many mappings."""
        self.check_map_count(start, end)
        for edge in (start, end):
            if self.table.whole(edge, edge) != (edge, edge):
                await self.change(edge, edge, lambda: None)
        return self.vmas.isolate(start, end)

    async def change_pages(self, what: str, start: Hva, size: int, edit: Callable[[Hva, Hva], int]) -> int:
        """A change of pages but of no mapping: faults and other such changes go on meanwhile."""
        # await: edit: cannot change: the caller's own
        await self.mmap_lock.acquire(write=False)
        try:
            end = self.check_range(what, start, size)
            # await: end: cannot change: a value of our own
            changed = await self.change(start, end, lambda: edit(start, end))
            self.check_mapped(what, start, end)  # the rest was done, as madvise does
            return changed
        finally:
            self.mmap_lock.release()

    async def unmap(self, what: str, start: Hva, end: Hva) -> None:
        """do_munmap, with the mmap_lock held for writing.  Before anything is unmapped: EINVAL: beyond user
        space, or it cuts a huge page of hugetlb; ENOMEM: too many mappings."""
        if not 0 <= start <= end <= TASK_SIZE:
            raise UapiError(errno.EINVAL, f"{what} {start:#x}..{end:#x}: not a range of user space")
        self.check_split(what, start, end)
        if self.vmas.find(start) is self.vmas.find(end):  # else no mapping is more than shortened
            self.check_map_count(start)
        await self._unmap(start, end)

    async def _unmap(self, start: Hva, end: Hva) -> None:
        """A large range goes in turns; until all of it is gone, notifiers let nobody map what is left."""
        while True:
            low, high = self.table.whole(start, end)
            # await: low, high: the huge pages at the edges; asked again: `whole`
            # (tests/unit/kvmd/mm/test_sleeps.py::test_a_huge_page_that_is_split_meanwhile)
            async with announced([Range(self, low, high)]):
                if self.table.whole(start, end) != (low, high):
                    continue  # as in `change`
                self.table.split_edges(start, end)
                await self._clear_in_turns(start, end)
                for vma in self.vmas.isolate(start, end):
                    if vma.uffd is not None:
                        vma.uffd.wake(vma.start, vma.end)
                    self.vmas.remove(vma)
                return

    async def _clear_in_turns(self, start: Hva, end: Hva) -> None:
        """Others may change an entry meanwhile, or split one: it is looked for again."""
        while entries := self.table.within(start, end):
            for first in range(0, len(entries), UNMAP_BATCH):
                if first:
                    # await: entries, first, each first: an entry goes; asked again: `find`
                    # (tests/unit/kvmd/mm/test_sleeps.py::test_an_entry_that_went_between_two_turns)
                    await self.memory.cond_resched()
                for entry in entries[first : first + UNMAP_BATCH]:
                    found = self.table.find(entry.hva)
                    if found is not None and found.hva == entry.hva:
                        self.table.clear(found)

    def check_range(self, what: str, start: Hva, size: int) -> Hva:
        """The end of a range of whole pages, of hugetlb too.  EINVAL."""
        end = Hva(start + size)
        if size <= 0 or start < 0 or end > TASK_SIZE or start % PAGE_SIZE or size % PAGE_SIZE:
            raise UapiError(errno.EINVAL, f"{what} {start:#x}+{size:#x}: not whole pages of user space")
        self.check_split(what, start, end)
        return end

    def check_split(self, what: str, *edges: Hva) -> None:
        """EINVAL: there a mapping of hugetlb would be cut within a page of it [hugetlb_vm_op_split]."""
        for edge in edges:
            vma = self.vmas.find(edge)
            page = PAGE_SIZE if vma is None else size_of_level(vma.level)
            if edge % page:
                raise UapiError(errno.EINVAL, f"{what}: {edge:#x} is within a page of {page:#x} bytes")

    def check_map_count(self, *edges: Hva) -> None:
        """ENOMEM: with what is cut there the process would have too many mappings [mm vma.c, split_vma]."""
        cut = sum((vma := self.vmas.find(edge)) is not None and vma.start < edge for edge in edges)
        if cut and len(self.vmas) + cut > MAX_MAP_COUNT:
            raise UapiError(errno.ENOMEM, f"the process has {len(self.vmas)} mappings: none is split")

    def check_mapped(self, what: str, start: Hva, end: Hva) -> None:
        """ENOMEM: nothing is mapped somewhere in start..end."""
        hole = self.vmas.first_hole(start, end)
        if hole is not None:
            raise UapiError(errno.ENOMEM, f"{what} {start:#x}..{end:#x}: nothing is mapped at {hole:#x}")

    # -- lookups ---------------------------------------------------------------------------------------

    def present_page(self, hva: Hva) -> MappedPage | None:
        """The page at `hva` as the process's entry has it now; touches nothing."""
        entry = self.table.find(hva)
        return entry if type(entry) is Pte else None

    def accessible(self, hva: Hva, *, write: bool, via: FaultOrigin) -> Vma:
        """The mapping at `hva`.  EFAULT: none, or not with that right: a CPU reads whatever is not PROT_NONE
        (arch/x86, access_error), get_user_pages wants VM_READ [mm gup.c]."""
        vma = self.vmas.find(hva)
        readable = vma is not None and (vma.readable or (vma.writable and via is not FaultOrigin.GUP))
        if vma is not None and self.alive and (vma.writable if write else readable):
            return vma
        what = "write to" if write else "read of"
        why = "no mapping" if vma is None else "protection"
        raise UapiError(errno.EFAULT, f"{what} hva {hva:#x}: {why}")


def page_align(size: int) -> int:
    """PAGE_ALIGN of an unsigned long, which wraps."""
    return align_up(size, PAGE_SIZE) & (1 << 64) - 1
