"""What dirty logging does to a TDP: takes W or D away, gives W back, makes small leaves huge again.

Models the part of the TDP MMU that serves the logs [KVM tdp_mmu.c], [RFC 36/42].  A huge leaf is
write-protected whatever part of it is wanted, because a store to it must fault to be split.  A table that one
leaf could replace is frozen, flushed, and thawed to be empty, so that nobody meets both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvmd.core.tables.ranges import CLEAR_DIRTY, WRITE_PROTECT, edit_leaves
from kvmd.core.tables.spte import MAY_WRITE, restored
from kvmd.core.tables.tdp_table import Root, TdpMmu
from protocol.pt import bits
from protocol.pt.cursor import RangeEntry
from protocol.pt.entry import is_frozen, is_writable
from protocol.pt.geometry import MAX_LEAF_LEVEL, entry_span
from protocol.pt.leaf_edit import SomePages
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Level


def logs_by_dirty_bit(mmu: TdpMmu, root: Root) -> bool:
    """Clear D, and let the CPU's log tell the next store?  The remapping unit sets no D, so under a root
    that is lent only write protection notices a device's store (defect B-35)."""
    return mmu.pml and root.role.ad_enabled and not root.exported


def protect(mmu: TdpMmu, root: Root, span: GfnSpan, wanted: SomePages | None = None) -> bool:
    """Make the next store to pages of `span` (that are `wanted`) one that is noticed.  Whether to flush.

    A huge leaf is write-protected whatever part of it is wanted: a store to it must fault, to be split.
    """
    mmu.may_lack_write = True
    edit = CLEAR_DIRTY if logs_by_dirty_bit(mmu, root) else WRITE_PROTECT
    cleared = edit_leaves(mmu, root, mmu.cursor(root, span), edit, WRITE_PROTECT, wanted)
    return cleared > 0  # what is pinned is always dirty


def unnoticed(mmu: TdpMmu, as_id: int, span: GfnSpan) -> Iterator[GfnSpan]:
    """Where a store is told to no log: pinned gfns, and what devices write in a root without."""
    for gfn in mmu.pinned.within(as_id, span) if mmu.pinned else ():
        yield GfnSpan.of_pages(gfn, 1)
    for root in mmu.roots_of(as_id):
        if not root.role.policy.logs:
            for met in mmu.leaves_in(root, span):
                if is_writable(met.entry):
                    yield entry_span(met.gfn, met.level)


def fast_page_fault(mmu: TdpMmu, root: Root, gfn: Gfn, *, logs: bool) -> bool:
    """A store to a page that only logging made read-only: put W back [KVM mmu.c].  Whether that was it.

    Not on a huge leaf of a slot that logs: one store must not make 512 pages writable.
    """
    met = mmu.leaf_at(root, gfn)
    if met is None or is_writable(met.entry) or met.entry & MAY_WRITE != MAY_WRITE:
        return False
    if logs and met.level > LEVEL_4K:
        return False
    new = restored(met.entry) | bits.WRITE
    mmu.change(root, met.gfn, met.level, met.at, met.entry, new)
    return True


def freeze_collapsible(
    mmu: TdpMmu, root: Root, span: GfnSpan, level_of: Callable[[Gfn], Level]
) -> RangeEntry | None:
    """Cut off the first table within `span` that one huge leaf could replace: its entry is frozen until
    the flush of what it mapped is over, and then thawed [RFC 36/42]."""
    for frame, level, at, entries in mmu.cursor(root, span, with_tables=True):
        gfn, entry = Gfn(frame), entries[0]
        if level > MAX_LEAF_LEVEL or not root.format.is_table(entry, level) or level_of(gfn) < level:
            continue
        mmu.change(root, gfn, level, at, entry, bits.FROZEN)
        return RangeEntry(gfn, level, at, entry)
    return None


def thaw(mmu: TdpMmu, root: Root, met: RangeEntry) -> None:
    """The flush is over: the next fault maps what fits.  The entry's own table may be gone by now, and its
    page another's, where somebody else froze one."""
    _, at, entry = mmu.seek(root, met.gfn, met.level)
    if at == met.at and is_frozen(entry):
        mmu.change(root, met.gfn, met.level, met.at, bits.FROZEN, bits.EMPTY)
