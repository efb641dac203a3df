"""What becomes of all leaves in a range: compiled where nothing unusual is in the way, run by run elsewhere.

Models the loops of the TDP MMU over a range of gfns [KVM tdp_mmu.c].  The loop over runs is the one that
says what is right: it is in every process, the simulator stops it at each access, and a test holds the
compiled one to it entry by entry (tests/unit/kvmd/test_ranges.py).  What the compiled one does not know ends
its piece: a huge leaf, a table that lies nowhere; where entries are pinned in the range or changes are traced
it is not asked at all (docs/decisions/0029).
"""

from __future__ import annotations

from kvmd.core.tables.tdp_table import Root, TdpMmu
from protocol.pt import bits
from protocol.pt.cursor import Cursor, EntryRun
from protocol.pt.geometry import INDEX_BITS
from protocol.pt.leaf_edit import ALL_BITS, LeafEdit, RangeKernels, SomePages
from protocol.trace import TRACE
from protocol.units import LEVEL_4K, Gfn, GfnSpan

ZAP = LeafEdit(ALL_BITS)
WRITE_PROTECT = LeafEdit(bits.WRITE)
CLEAR_DIRTY = LeafEdit(bits.DIRTY)
CLEAR_ACCESSED = LeafEdit(bits.ACCESSED)
# The same without A/D bits: no access at all, so that the next one faults [KVM mark_spte_for_access_track]
# (RFC-99).
TRACK_ACCESS = LeafEdit(bits.RWX, save=bits.READ | bits.EXEC)

UNLIMITED = 1 << 52  # more frames than there are


def edit_leaves(
    mmu: TdpMmu,
    root: Root,
    cursor: Cursor,
    edit: LeafEdit,
    huge: LeafEdit | None = None,
    wanted: SomePages | None = None,
    limit: int = UNLIMITED,
) -> int:
    """Each leaf that `cursor` comes to becomes what `edit` makes of it, or `huge` of a huge one, but for what
    is pinned and for small ones that are not `wanted`; `limit` of them at most.  How many changed; the cursor
    stands behind the last.
    """
    changed = 0
    kernels = _kernels_for(mmu, root, cursor)
    while changed < limit:
        if kernels is not None:
            changed += _edit_at_once(mmu, root, kernels, cursor, edit, wanted, limit - changed)
            if changed == limit:
                break
        run = cursor.next()
        if run is None:
            break
        small = run.level == LEVEL_4K
        new = _edited(run, edit if small else huge or edit, wanted if small else None)
        new = mmu.skip_pinned(root, run, new)
        left = _cut(run, new, limit - changed)
        if left is not None:
            cursor.resume(left)
        changed += mmu.change_run(root, run, new)
    return changed


def _kernels_for(mmu: TdpMmu, root: Root, cursor: Cursor) -> RangeKernels | None:
    start, end = cursor.frame, cursor.end  # a huge leaf may have led it beyond
    if TRACE.on or start >= end or mmu.any_pinned(root, GfnSpan(Gfn(start), Gfn(end))):
        return None
    return mmu.compiled.kernels


def _edit_at_once(
    mmu: TdpMmu,
    root: Root,
    kernels: RangeKernels,
    cursor: Cursor,
    edit: LeafEdit,
    wanted: SomePages | None,
    limit: int,
) -> int:
    """The small leaves up to what the compiled code does not know.  How many changed."""
    start = cursor.frame
    if start >= cursor.end:
        return 0
    if wanted is not None and wanted.all_in(start, cursor.end):
        wanted = None  # nothing to ask of each
    where = root.format, root.hpa, root.role.level, start, cursor.end
    reached, changed, lost, gone = kernels.edit_leaves(*where, edit, wanted, limit)
    mmu.changed_leaves(root, GfnSpan(Gfn(start), Gfn(reached)), edit, wanted, lost, gone)
    cursor.resume(reached)
    return changed


def _edited(run: EntryRun, edit: LeafEdit, wanted: SomePages | None) -> list[int]:
    """What a run becomes."""
    clear, save = edit
    keep = ~clear
    new = [
        entry & keep | (entry & save) << bits.SAVED_SHIFT if entry & bits.MMU_PRESENT else entry
        for entry in run.entries
    ]
    if wanted is not None:
        for index, was in enumerate(run.entries):
            if was != new[index] and run.frame + index not in wanted:
                new[index] = was
    return new


def _cut(run: EntryRun, new: list[int], limit: int) -> int | None:
    """Leave what is beyond `limit` changes as it is.  The frame to go on at, if there is any."""
    if len(new) <= limit:
        return None
    going = [index for index, (was, now) in enumerate(zip(run.entries, new, strict=True)) if was != now]
    if len(going) <= limit:
        return None
    left = going[limit]
    new[left:] = run.entries[left:]
    return run.frame + (left << INDEX_BITS * (run.level - 1))
