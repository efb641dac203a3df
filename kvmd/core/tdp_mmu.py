"""The TDP MMU: roots, and every change of an entry of theirs.

Models KVM's TDP MMU as the sole writer of the shared table [RFC 35/42], [RFC 36/42], [RFC 37/42]: map a
page, zap leaves, split a huge leaf, replace a table by a huge leaf, take W or D away for dirty logging and
give it back, drop a root.  All of it is plain `def`: nothing awaits between reading an entry and storing it,
so that pair is our compare-and-exchange.
What must be flushed is returned; cut-off table pages go to quarantine under the epoch of the flush that
must follow at once.

Invariants with their home here: I10 the root of an exported TDP never moves; I16 a root's counters equal its
table; I18 a table page is linked once.  I2, I3, I7 and I17 are kept with `spte` and `table_pool`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple, Protocol

from kvmd.core.map_record import MapRecord
from kvmd.core.spte import (
    aged,
    check_entry,
    is_young,
    make_leaf,
    make_mmio_entry,
    make_table_entry,
    split_child,
)
from kvmd.core.table_pool import TablePool
from protocol.errors import UapiError
from protocol.pt import bits
from protocol.pt.entry import (
    is_access_tracked,
    is_frozen,
    is_leaf,
    is_mmio,
    is_present,
    is_present_leaf,
    is_table,
    is_writable,
    table_of,
)
from protocol.pt.geometry import (
    ENTRIES,
    ENTRY_BYTES,
    MAX_LEAF_LEVEL,
    entry_span,
    entry_start,
    gfn_limit,
    index_of,
)
from protocol.pt.mem import TableWriter
from protocol.pt.walk import RangeEntry, WalkRules, walk_range
from protocol.trace import TRACE, KvmMmuSetSpte, KvmMmuSplitHugePage, KvmTdpMmuSpteChanged
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Hpa, Level, Pfn

# Tables one split may make: what is left huge is split by the first write to it, as where memory is short.
SPLIT_BUDGET = 4096
_AD = bits.ACCESSED | bits.DIRTY
_MAY_WRITE = bits.HOST_WRITABLE | bits.MMU_WRITABLE


class Outcome(Enum):
    FIXED = auto()  # stored
    SPURIOUS = auto()  # the same entry was there already: success too [RFC defect B-13]
    RETRY = auto()  # a frozen entry: somebody is changing it


class Mapped(NamedTuple):
    outcome: Outcome
    flush: GfnSpan | None = None  # a table was replaced by a leaf: flush this before its pages are reused


@dataclass(frozen=True, slots=True)
class Role:
    """What a root is for [KVM kvm_mmu_page_role]; two users with equal roles share a root."""

    level: Level
    as_id: int
    ad_enabled: bool


@dataclass(slots=True, eq=False)
class Root:
    hpa: Hpa
    role: Role
    refs: int = 0  # besides the MMU's own
    exported: bool = False
    invalid: bool = False
    leaves: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # by level
    tables: int = 1
    record: MapRecord = field(default_factory=MapRecord)

    @property
    def everything(self) -> GfnSpan:
        return GfnSpan(Gfn(0), gfn_limit(self.role.level))


class Keep(Protocol):
    """What entries must stay as they are: those of pinned gfns (`pinning.Pinned`)."""

    def __len__(self) -> int: ...
    def holds(self, as_id: int, gfn: Gfn) -> bool: ...
    def any_in(self, as_id: int, span: GfnSpan) -> bool: ...
    def within(self, as_id: int, span: GfnSpan) -> list[Gfn]: ...


class TdpMmu:
    """The tables of one VM.  `next_epoch()` is the number the next flush will have; with `pml` the CPUs log
    each page whose D they set."""

    def __init__(
        self,
        vm_id: int,
        writer: TableWriter,
        pool: TablePool,
        rules: WalkRules,
        next_epoch: Callable[[], int],
        *,
        pml: bool = False,
    ) -> None:
        self.roots: list[Root] = []
        self.keep: Keep | None = None
        self._vm_id = vm_id
        self._writer = writer
        self._pool = pool
        self._rules = rules
        self._next_epoch = next_epoch
        self._pml = pml
        self._protected = False  # nothing ever was: no store can find W taken

    @property
    def load64(self) -> Callable[[int], int]:
        return self._writer.load64

    # -- roots -----------------------------------------------------------------------------------------

    def get_root(self, role: Role) -> Root:
        """A reference to the valid root of `role`, found or made."""
        root = next((r for r in self.roots if r.role == role and not r.invalid), None)
        if root is None:
            root = Root(self._pool.allocate(), role)
            self.roots.append(root)
        root.refs += 1
        return root

    def put_root(self, root: Root) -> None:
        """Drop a reference.  A valid root stays, as KVM's does; an invalid one goes with its last user."""
        assert root.refs > 0, "root put more often than it was got"
        root.refs -= 1
        if root.invalid and root.refs == 0:
            # The flush that followed its invalidation covers it: nobody has walked it since.
            self._drop_root(root, self._next_epoch() - 1)

    def invalidate_roots(self) -> bool:
        """Memslot change: every root but exported ones is obsolete [RFC 36/42].  Whether to flush."""
        obsolete = [root for root in self.roots if not root.exported and not root.invalid]
        for root in obsolete:
            root.invalid = True
            if root.refs == 0:
                self._drop_root(root, self._next_epoch())
        return bool(obsolete)

    def drop_all(self) -> None:
        """The VM is gone: every page to quarantine."""
        for root in list(self.roots):
            self._drop_root(root, self._next_epoch())

    def _drop_root(self, root: Root, epoch: int) -> None:
        self._unlink_subtree(root, root.hpa, root.role.level, epoch)
        root.invalid = True
        self.roots.remove(root)

    # -- mapping ---------------------------------------------------------------------------------------

    def map(
        self, root: Root, gfn: Gfn, pfn: Pfn, goal: Level, *, writable: bool, accessed: bool = True
    ) -> Mapped:
        """Install a leaf of level `goal` for the entry that covers `gfn`; `pfn` is its first frame.

        Raises UapiError(ENOMEM) when no table page is left; tables linked so far stay, they are valid.
        """
        assert not root.invalid, "mapping into an obsolete root (R3)"
        table, at = root.hpa, 0
        for level in range(root.role.level, goal, -1):
            at = table + index_of(gfn, Level(level)) * ENTRY_BYTES
            entry = self._writer.load64(at)
            if is_table(entry, Level(level)):
                table = table_of(entry)
                continue
            if is_frozen(entry):
                return Mapped(Outcome.RETRY)
            if is_present(entry):
                if not is_access_tracked(entry) and (is_writable(entry) or not writable):
                    return Mapped(Outcome.SPURIOUS)
                entry = self._split(root, at, gfn, entry, Level(level))
            else:
                entry = self._link(root, at, self._pool.allocate())
            table = table_of(entry)
        at = table + index_of(gfn, goal) * ENTRY_BYTES
        ad_enabled = root.role.ad_enabled
        leaf = make_leaf(pfn, goal, writable=writable, ad_enabled=ad_enabled, accessed=accessed)
        return self._store_leaf(root, at, gfn, goal, leaf)

    def _store_leaf(self, root: Root, at: int, gfn: Gfn, level: Level, leaf: int) -> Mapped:
        check_entry(leaf, level, leaf=True, rules=self._rules)
        old = self._writer.load64(at)
        if not (old ^ leaf) & ~_AD:  # what the CPU has set, or logging has cleared, is not ours to redo
            return Mapped(Outcome.SPURIOUS)
        if is_frozen(old):
            return Mapped(Outcome.RETRY)
        self._set(root, gfn, level, at, old, leaf)
        if TRACE.on:
            TRACE.emit(KvmMmuSetSpte(gfn, leaf, level, at))
        root.leaves[level] += 1
        if is_table(old, level):
            # The translations of the table are still right; its pages wait for the flush.
            self._unlink_subtree(root, table_of(old), Level(level - 1), self._next_epoch())
            return Mapped(Outcome.FIXED, entry_span(gfn, level))
        if is_present_leaf(old, level):
            root.leaves[level] -= 1
            if (old ^ leaf) & bits.ADDRESS_MASK or old & bits.RWX & ~leaf:
                # Another frame, or fewer rights: cached copies of the old entry must go first.
                return Mapped(Outcome.FIXED, entry_span(gfn, level))
        return Mapped(Outcome.FIXED)

    def _set(self, root: Root, gfn: Gfn, level: Level, at: int, old: int, new: int) -> None:
        """Store an entry of `root`'s: whatever changes what a gfn translates to goes through here."""
        if self.keep:
            self._check_kept(root, gfn, level, old, new)
        self._writer.store64(at, new)
        root.record.store(gfn, level, new)
        if TRACE.on:
            TRACE.emit(KvmTdpMmuSpteChanged(root.role.as_id, gfn, level, old, new))

    def _check_kept(self, root: Root, gfn: Gfn, level: Level, old: int, new: int) -> None:
        """I22 where it is made or broken: a pinned gfn's entry loses nothing, no other entry covers one."""
        if level > LEVEL_4K:
            assert root.invalid or not self._keeps_any(root, entry_span(gfn, level)), f"I22: {gfn:#x} {level}"
        elif self._is_kept(root, gfn) and is_present(old):
            lost = (old ^ new) & bits.ADDRESS_MASK | old & ~new & (bits.RWX | bits.DIRTY)
            assert not lost, f"I22: pinned gfn {gfn:#x}: {old:#x} became {new:#x}"

    def _is_kept(self, root: Root, gfn: Gfn) -> bool:
        """Must the entry stay?  An obsolete root's is nobody's any more."""
        return bool(self.keep and not root.invalid and self.keep.holds(root.role.as_id, gfn))

    def _keeps_any(self, root: Root, span: GfnSpan) -> bool:
        return bool(self.keep and self.keep.any_in(root.role.as_id, span))

    def map_mmio(self, root: Root, gfn: Gfn, generation: int) -> bool:
        """Remember in the table that `gfn` has no slot.  False: something else is there, or no room."""
        table, at = root.hpa, 0
        for level in range(root.role.level, 0, -1):
            at = table + index_of(gfn, Level(level)) * ENTRY_BYTES
            entry = self._writer.load64(at)
            if level == LEVEL_4K or is_frozen(entry) or is_present_leaf(entry, Level(level)):
                break
            if not is_present(entry):
                try:
                    entry = self._link(root, at, self._pool.allocate())
                except UapiError:  # a vCPU gets on without
                    return False
            table = table_of(entry)
        if entry and not is_mmio(entry):
            return False
        self._writer.store64(
            at, make_mmio_entry(gfn, generation)
        )  # absent before and after: nothing to flush
        return True

    def _link(self, root: Root, at: int, table: Hpa) -> int:
        entry = make_table_entry(table, ad_enabled=root.role.ad_enabled)
        self._writer.store64(at, entry)
        root.tables += 1
        return entry

    # -- changing what is mapped -----------------------------------------------------------------------

    def zap_leafs(self, span: GfnSpan) -> bool:
        """Clear every leaf that overlaps `span`, in all roots, but what is pinned; tables stay.  Whether to
        flush."""
        zapped = False
        for root in self.roots:
            for met in self._leaves(root, span):
                if not (self.keep and self._is_kept(root, met.gfn)):
                    self._clear(root, met)
                    zapped = True
        return zapped

    def zap_some(self, root: Root, span: GfnSpan, limit: int) -> tuple[bool, GfnSpan | None]:
        """Clear at most `limit` leaves of one root: whether to flush, and what of `span` is left to do."""
        count = 0
        for met in self._leaves(root, span):
            if self.keep and self._is_kept(root, met.gfn):
                continue
            if count == limit:
                return True, GfnSpan(met.gfn, span.end)
            self._clear(root, met)
            count += 1
        return count > 0, None

    def _clear(self, root: Root, met: RangeEntry) -> None:
        self._set(root, met.gfn, met.level, met.at, met.entry, bits.EMPTY)
        root.leaves[met.level] -= 1

    def age_leafs(self, span: GfnSpan) -> bool:
        """Mark every leaf that overlaps `span` as not used.  Whether one was, and so whether to flush."""
        young = False
        for root in self.roots:
            for met in self._leaves(root, span):
                if is_young(met.entry) and not self._is_kept(root, met.gfn):
                    self._set(root, met.gfn, met.level, met.at, met.entry, aged(met.entry))
                    young = True
        return young

    def has_young(self, span: GfnSpan) -> bool:
        return any(is_young(met.entry) for root in self.roots for met in self._leaves(root, span))

    def split(self, root: Root, span: GfnSpan, goal: Level, budget: int = SPLIT_BUDGET) -> int:
        """Replace huge leaves in `span` by tables of smaller ones, down to `goal`.  How many; it stops at
        `budget` or where no table page is left."""
        count = 0
        for met in self._leaves(root, span):
            if met.level <= goal:
                continue
            if count == budget:
                break
            try:
                self._split(root, met.at, met.gfn, met.entry, met.level)
            except UapiError:  # ENOMEM
                break
            count += 1
            if met.level - 1 > goal:  # the range walk read this entry as a leaf and does not descend
                inside = entry_span(met.gfn, met.level)
                inside = GfnSpan(max(span.start, inside.start), min(span.end, inside.end))
                count += self.split(root, inside, goal, budget - count)
        return count

    def _split(self, root: Root, at: int, gfn: Gfn, leaf: int, level: Level) -> int:
        """No walker sees a change: the new table translates as the leaf did before it is linked."""
        table = self._pool.allocate()
        if TRACE.on:
            TRACE.emit(KvmMmuSplitHugePage(gfn, leaf, level, 0))
        self._writer.fill_unlinked(table, [split_child(leaf, level, i) for i in range(ENTRIES)])
        root.leaves[level] -= 1
        root.leaves[level - 1] += ENTRIES
        return self._link(root, at, table)

    def zap_mmio(self) -> None:
        """Forget every gfn without a slot: the generation starts over.  Nobody caches what is absent."""
        for root in self.roots:
            for met in walk_range(self._writer.load64, root.hpa, root.role.level, root.everything):
                if is_mmio(met.entry):
                    self._writer.store64(met.at, bits.EMPTY)

    def write_protect(self, gfn: Gfn, as_id: int) -> bool:
        """Nobody writes `gfn`, and no short way gives the right back.  Whether to flush."""
        changed = False
        for root in self.roots:
            if root.role.as_id == as_id:
                for met in self._leaves(root, GfnSpan.of_pages(gfn, 1)):
                    changed |= self._protect_leaf(root, met, gfn)
        return changed

    def _protect_leaf(self, root: Root, met: RangeEntry, gfn: Gfn) -> bool:
        _, level, at, entry = met
        if not entry & (bits.WRITE | bits.MMU_WRITABLE):
            return False
        try:
            while level > LEVEL_4K:
                table = table_of(self._split(root, at, gfn, entry, level))
                level = Level(level - 1)
                at = Hpa(table + index_of(gfn, level) * ENTRY_BYTES)
                entry = self._writer.load64(at)
        except UapiError:  # no page left for a table: the whole leaf is protected
            pass
        self._set(root, gfn, level, at, entry, entry & ~(bits.WRITE | bits.MMU_WRITABLE))
        return True

    # -- dirty logging ---------------------------------------------------------------------------------

    def roots_of(self, as_id: int) -> list[Root]:
        """Roots of an address space that somebody may still walk into new faults."""
        return [root for root in self.roots if root.role.as_id == as_id and not root.invalid]

    def logs_by_dirty_bit(self, root: Root) -> bool:
        """Clear D, and let the CPU's log tell the next store?  The remapping unit sets no D, so under a root
        that is lent only write protection notices a device's store (defect B-35)."""
        return self._pml and root.role.ad_enabled and not root.exported

    def protect(self, root: Root, span: GfnSpan, wanted: Callable[[Gfn], bool] | None = None) -> bool:
        """Make the next store to pages of `span` (that are `wanted`) one that is noticed.  Whether to flush.

        A huge leaf is write-protected whatever part of it is wanted: a store to it must fault, to be split.
        """
        self._protected = True
        small = bits.DIRTY if self.logs_by_dirty_bit(root) else bits.WRITE
        cleared = False
        for met in self._leaves(root, span):
            if met.level == LEVEL_4K and wanted is not None and not wanted(met.gfn):
                continue
            if self._is_kept(root, met.gfn):  # always dirty
                continue
            bit = small if met.level == LEVEL_4K else bits.WRITE
            if met.entry & bit:
                self._set(root, met.gfn, met.level, met.at, met.entry, met.entry & ~bit)
                cleared = True
        return cleared

    def fast_page_fault(self, root: Root, gfn: Gfn, *, logs: bool) -> bool:
        """A store to a page that only logging made read-only: put W back [KVM mmu.c].  Whether that was it.

        Not on a huge leaf of a slot that logs: one store must not make 512 pages writable.
        """
        met = self.leaf_at(root, gfn) if self._protected else None
        if met is None or is_writable(met.entry) or met.entry & _MAY_WRITE != _MAY_WRITE:
            return False
        if logs and met.level > LEVEL_4K:
            return False
        self._set(root, met.gfn, met.level, met.at, met.entry, met.entry | bits.WRITE)
        return True

    def freeze_collapsible(
        self, root: Root, span: GfnSpan, level_of: Callable[[Gfn], Level]
    ) -> RangeEntry | None:
        """Cut off the first table within `span` that one huge leaf could replace: its entry is frozen until
        the flush of what it mapped is over, and then thawed [RFC 36/42]."""
        limit = gfn_limit(root.role.level)
        within = GfnSpan(min(span.start, limit), min(span.end, limit))
        for met in walk_range(self._writer.load64, root.hpa, root.role.level, within):
            if met.level > MAX_LEAF_LEVEL or not is_table(met.entry, met.level):
                continue
            region = entry_span(met.gfn, met.level)
            if span.start <= region.start and region.end <= span.end and level_of(met.gfn) >= met.level:
                self._set(root, met.gfn, met.level, met.at, met.entry, bits.FROZEN)
                below = Level(met.level - 1)
                self._unlink_subtree(root, table_of(met.entry), below, self._next_epoch())
                return met
        return None

    def thaw(self, met: RangeEntry) -> None:
        """The flush is over: the next fault maps what fits.  The entry's own table may be gone by now."""
        if is_frozen(self._writer.load64(met.at)):
            self._writer.store64(met.at, bits.EMPTY)

    def _unlink_subtree(self, root: Root, table: Hpa, level: Level, epoch: int) -> None:
        """`table` is cut off (or its root dropped): hold it and all below it until the flush of `epoch` is
        acked.
        """
        relative = GfnSpan(Gfn(0), gfn_limit(level))
        for met in walk_range(self._writer.load64, table, level, relative):
            if is_table(met.entry, met.level):
                self._quarantine(root, table_of(met.entry), epoch)
            elif is_present(met.entry):
                root.leaves[met.level] -= 1
        self._quarantine(root, table, epoch)

    def _quarantine(self, root: Root, table: Hpa, epoch: int) -> None:
        self._pool.quarantine(self._vm_id, table, epoch)
        root.tables -= 1

    # -- looking ---------------------------------------------------------------------------------------

    def _leaves(self, root: Root, span: GfnSpan) -> Iterator[RangeEntry]:
        limit = gfn_limit(root.role.level)
        within = GfnSpan(min(span.start, limit), min(span.end, limit))
        for met in walk_range(self._writer.load64, root.hpa, root.role.level, within):
            if is_present(met.entry) and is_leaf(met.entry, met.level):
                yield met

    def leaf_at(self, root: Root, gfn: Gfn) -> RangeEntry | None:
        """The leaf that maps `gfn`, if one does."""
        if gfn >= gfn_limit(root.role.level):
            return None
        table = root.hpa
        for number in range(root.role.level, 0, -1):
            level = Level(number)
            at = Hpa(table + index_of(gfn, level) * ENTRY_BYTES)
            entry = self._writer.load64(at)
            if not is_present(entry):
                return None
            if is_leaf(entry, level):
                return RangeEntry(entry_start(gfn, level), level, at, entry)
            table = table_of(entry)
        raise AssertionError("an entry of level 1 is a leaf")

    def leaves(self, root: Root) -> Iterator[RangeEntry]:
        """Every leaf of a root, in gfn order."""
        return self._leaves(root, root.everything)
