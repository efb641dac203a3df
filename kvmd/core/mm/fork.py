"""A child with its parent's memory: every private page shared until one of them writes.

Models dup_mmap and copy_page_range [mm memory.c]: the parent's entries lose their write right, so its
notifiers are told, mapping by mapping; the child gets the same entries. Shared mappings are left for the
child to fault in again. A page that is pinned for long cannot be shared: the child gets a copy at once.

A userfaultfd stays the parent's (UFFD_FEATURE_EVENT_FORK is not offered).
"""

from __future__ import annotations

from functools import partial

from kvmd.core.mm.mm import Mm
from kvmd.core.mm.page import Entry, LazyFree, PageKind, Poisoned, Pte, Swapped, with_rights
from kvmd.core.mm.vma import Vma
from protocol.errors import UapiError


# awaits: parent, child: cannot change: the caller's own, and nobody else has the child yet
async def fork(parent: Mm, child: Mm) -> None:
    """Fill the empty `child`.  ENOMEM: it is empty again, and exited."""
    await parent.mmap_lock.acquire(write=True)
    try:
        for vma in list(parent.vmas):
            twin = vma.part(vma.start, vma.end)
            twin.forget_uffd()
            child.vmas.insert(twin)
            if not vma.shared:
                # await: each vma: cannot change: the mmap_lock is held for writing
                await parent.change(vma.start, vma.end, partial(_copy_entries, parent, child, vma))
    except UapiError:
        await child.exit()
        raise
    finally:
        parent.mmap_lock.release()


def _copy_entries(parent: Mm, child: Mm, vma: Vma) -> None:
    for entry in parent.table.within(vma.start, vma.end):
        copied = _share(parent, child, vma, entry)
        if copied is not None:
            child.table.set(copied)


def _share(parent: Mm, child: Mm, vma: Vma, entry: Entry) -> Entry | None:
    """The child's entry; the parent's is write-protected."""
    if isinstance(entry, Swapped):
        entry.swap.count += 1
        return Swapped(entry.hva, entry.swap)
    if isinstance(entry, Poisoned):
        return Poisoned(entry.hva, entry.level, entry.page)
    if not isinstance(entry, Pte):
        return None
    page = entry.page
    if page.pins and page.kind is PageKind.ANON:
        page = child.memory.copy(entry, child.id)
        return type(entry)(entry.hva, page.pfn, entry.level, vma.writable, page)
    page.exclusive = False
    if isinstance(entry, LazyFree):
        entry = with_rights(entry, writable=False)
        parent.table.set(entry)
    elif entry.writable:
        parent.table.replace(entry, page, entry.pfn, writable=False)
    return type(entry)(entry.hva, entry.pfn, entry.level, False, page)
