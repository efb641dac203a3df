"""What is done to a TDP: pages mapped, leaves zapped, aged, split and write-protected, roots taken apart.

Models KVM's TDP MMU as the sole writer of the shared table [RFC 35/42], [RFC 36/42], [RFC 37/42].
What must be flushed is returned; cut-off table pages go to quarantine under the epoch of the flush that
must follow at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from kvmd.core.tables.ranges import CLEAR_ACCESSED, TRACK_ACCESS, ZAP, edit_leaves
from kvmd.core.tables.spte import make_mmio_entry, mmio_generation
from kvmd.core.tables.tdp_table import Root, RootEvent, RootState, TdpMmu
from protocol.errors import UapiError
from protocol.pt import bits
from protocol.pt.cursor import Cursor, EntryAt, filled
from protocol.pt.entry import is_access_tracked, is_frozen, is_mmio, is_present, is_writable
from protocol.pt.geometry import ENTRY_BYTES, INDEX_BITS, entry_span
from protocol.trace import TRACE, KvmMmuSetSpte, MarkMmioSpte
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Hpa, Level, Pfn

# Tables one split may make: what is left huge is split by the first write to it, as where memory is short.
SPLIT_BATCH = 4096
_AD = bits.ACCESSED | bits.DIRTY
_MAY_WRITE = bits.WRITE | bits.MMU_WRITABLE


class MapOutcome(Enum):
    FIXED = auto()  # stored
    SPURIOUS = auto()  # the same entry was there already: success too [RFC defect B-13]
    RETRY = auto()  # a frozen entry: somebody is changing it


class Mapped(NamedTuple):
    outcome: MapOutcome
    flush: GfnSpan | None = None  # a table was replaced by a leaf: flush this before its pages are reused


_MAPPED = Mapped(MapOutcome.FIXED)  # and what may be cached of the old entry is still right


def dismantle(mmu: TdpMmu, root: Root) -> Iterator[None]:
    """Take a root apart that nobody walks since the last flush, from the smallest tables up; others may
    run after each.  The root's own page goes with its last user.
    """
    if root.state is RootState.VALID:
        root.happens(RootEvent.INVALIDATE)
    for number in range(LEVEL_4K + 1, root.role.level + 1):
        cursor = mmu.cursor(root, root.everything, Level(number))
        for frame, level, at, entries in cursor:
            for index, entry in filled(entries):
                if root.format.is_table(entry, level):
                    gfn = Gfn(frame + (index << INDEX_BITS * (level - 1)))
                    where = Hpa(at + index * ENTRY_BYTES)
                    mmu.change(root, gfn, level, where, entry, bits.EMPTY, mmu.next_epoch() - 1)
                    yield
            cursor.resume()
    root.happens(RootEvent.DISMANTLE)
    if root.refs == 0 and root in mmu.roots:
        mmu.drop_root(root)


# -- mapping ---------------------------------------------------------------------------------------


def map_page(
    mmu: TdpMmu,
    root: Root,
    gfn: Gfn,
    pfn: Pfn,
    goal: Level,
    *,
    writable: bool,
    accessed: bool = True,
    fetch: bool = False,
) -> Mapped:
    """Install a leaf of level `goal` for the entry that covers `gfn`; `pfn` is its first frame.

    Raises UapiError(ENOMEM) when no table page is left; tables linked so far stay, they are valid.
    """
    assert not root.invalid, "R3: mapping into an obsolete root"
    while (met := mmu.seek(root, gfn, goal)).level > goal:
        level, at, entry = met
        if is_frozen(entry):
            return Mapped(MapOutcome.RETRY)
        if is_present(entry):
            enough = (is_writable(entry) or not writable) and (entry & bits.EXEC or not fetch)
            if not is_access_tracked(entry) and enough:
                return Mapped(MapOutcome.SPURIOUS)
            mmu.split_leaf(root, gfn, level, at, entry)
        else:
            mmu.link(root, gfn, level, at, entry, mmu.pool.allocate())
    executable = goal == LEVEL_4K or not (mmu.nx_huge_pages and root.role.policy.nx_huge)
    leaf = root.format.make_leaf(pfn, goal, writable=writable, executable=executable, accessed=accessed)
    root.format.check(leaf, goal)
    return _store_leaf(mmu, root, gfn, met, leaf)


def _store_leaf(mmu: TdpMmu, root: Root, gfn: Gfn, met: EntryAt, leaf: int) -> Mapped:
    level, at, old = met
    if not (old ^ leaf) & ~_AD:  # what the CPU has set, or logging has cleared, is not ours to redo
        return Mapped(MapOutcome.SPURIOUS)
    if is_frozen(old):
        return Mapped(MapOutcome.RETRY)
    mmu.change(root, gfn, level, at, old, leaf)
    if TRACE.on:
        TRACE.emit(KvmMmuSetSpte(gfn, leaf, level, at))
    if not is_present(old):
        return _MAPPED
    if root.format.is_table(old, level):
        # The translations of the table are still right; its pages wait for the flush.
        mmu.collapses += 1
        return Mapped(MapOutcome.FIXED, entry_span(gfn, level))
    if (old ^ leaf) & bits.ADDRESS_MASK or old & bits.RWX & ~leaf:
        # Another frame, or fewer rights: cached copies of the old entry must go first.
        return Mapped(MapOutcome.FIXED, entry_span(gfn, level))
    return _MAPPED


def map_mmio(mmu: TdpMmu, root: Root, gfn: Gfn, generation: int) -> bool:
    """Remember in the table that `gfn` has no slot.  False: something else is there, or no room."""
    while True:
        level, at, entry = mmu.seek(root, gfn)
        if level == LEVEL_4K or is_frozen(entry) or is_present(entry):
            break
        try:
            mmu.link(root, gfn, level, at, entry, mmu.pool.allocate())
        except UapiError:  # a vCPU gets on without
            return False
    if entry and not is_mmio(entry):
        return False
    made = make_mmio_entry(gfn, generation)
    mmu.change(root, gfn, level, at, entry, made)
    if TRACE.on:
        TRACE.emit(MarkMmioSpte(at, gfn, 0, mmio_generation(made)))  # with EPT no access is kept
    return True


# -- changing what is mapped -----------------------------------------------------------------------


def zap_leafs(mmu: TdpMmu, span: GfnSpan) -> bool:
    """Clear every leaf that overlaps `span`, in all roots, but what is pinned; tables stay.  Whether to
    flush."""
    zapped = 0
    for root in mmu.roots:
        zapped += edit_leaves(mmu, root, mmu.cursor(root, span), ZAP)
    return zapped > 0


def zap_some(mmu: TdpMmu, root: Root, cursor: Cursor, limit: int) -> int:
    """Clear at most `limit` leaves of one root, on from where `cursor` is.  How many."""
    return edit_leaves(mmu, root, cursor, ZAP, limit=limit)


def zap_table(mmu: TdpMmu, root: Root, gfn: Gfn, level: Level) -> None:
    """Cut off the table under the entry of `level`, if one is there.  Everything is to be flushed."""
    met = mmu.seek(root, gfn, level)
    is_table = met.level == level and root.format.is_table(met.entry, level)
    if is_table and not mmu.any_pinned(root, entry_span(gfn, level)):
        mmu.change(root, gfn, level, met.at, met.entry, bits.EMPTY)


def age_leafs(mmu: TdpMmu, span: GfnSpan) -> bool:
    """Mark leaves that overlap `span` as not used.  Whether one was, and so whether to flush."""
    young = 0
    for root in mmu.aged_roots():
        edit = CLEAR_ACCESSED if root.role.ad_enabled else TRACK_ACCESS
        young += edit_leaves(mmu, root, mmu.cursor(root, span), edit)
    return young > 0


def split(mmu: TdpMmu, root: Root, span: GfnSpan, goal: Level, budget: int = SPLIT_BATCH) -> int:
    """Replace huge leaves in `span` by tables of smaller ones, down to `goal`.  How many; it stops at
    `budget` or where no table page is left."""
    count = 0
    cursor = mmu.cursor(root, span, Level(goal + 1))
    for frame, level, at, entries in cursor:
        for index, entry in enumerate(entries):
            if not root.format.is_leaf(entry, level):
                continue
            if count == budget:
                return count
            gfn = Gfn(frame + (index << INDEX_BITS * (level - 1)))
            try:
                mmu.split_leaf(root, gfn, level, Hpa(at + index * ENTRY_BYTES), entry)
            except UapiError:  # ENOMEM
                return count
            count += 1
            if level - 1 > goal:  # its parts are to be split, too
                cursor.resume(max(gfn, span.start))
                break
    return count


def zap_mmio(mmu: TdpMmu) -> None:
    """Forget every gfn without a slot: the generation starts over.  Nobody caches what is absent."""
    for root in mmu.roots:
        for frame, level, at, entries in mmu.cursor(root, root.everything):
            for index, entry in enumerate(entries):
                if entry and is_mmio(entry):
                    gfn = Gfn(frame + (index << INDEX_BITS * (level - 1)))
                    mmu.change(root, gfn, level, Hpa(at + index * ENTRY_BYTES), entry, bits.EMPTY)


def write_protect(mmu: TdpMmu, gfn: Gfn, as_id: int) -> bool:
    """No CPU writes `gfn`, and no short way gives the right back.  Whether to flush."""
    changed = False
    for root in mmu.roots:
        if root.role.as_id == as_id and root.role.policy.tracks:
            changed |= _protect_leaf(mmu, root, gfn)
    return changed


def _protect_leaf(mmu: TdpMmu, root: Root, gfn: Gfn) -> bool:
    met = mmu.leaf_at(root, gfn)
    if met is None or not met.entry & _MAY_WRITE:
        return False
    if met.level > LEVEL_4K:  # where no page is left for a table the whole leaf is protected
        split(mmu, root, GfnSpan.of_pages(gfn, 1), LEVEL_4K)
        met = mmu.leaf_at(root, gfn) or met
    mmu.change(root, met.gfn, met.level, met.at, met.entry, met.entry & ~_MAY_WRITE)
    return True
