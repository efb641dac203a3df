"""The TDP MMU: roots got and put, pages mapped, leaves zapped, aged, split and write-protected.

Models KVM's TDP MMU as the sole writer of the shared table [RFC 35/42], [RFC 36/42], [RFC 37/42].
What must be flushed is returned; cut-off table pages go to quarantine under the epoch of the flush that
must follow at once.

Invariant with its home here: I10 the root of an exported TDP never moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from kvmd.core.tables.spte import aged, check_entry, is_young, make_leaf, make_mmio_entry, mmio_generation
from kvmd.core.tables.tdp_log import TdpLog
from kvmd.core.tables.tdp_table import Role, Root, RootEvent, RootState
from protocol.errors import UapiError
from protocol.pt import bits
from protocol.pt.entry import (
    is_access_tracked,
    is_frozen,
    is_mmio,
    is_present,
    is_present_leaf,
    is_table,
    is_writable,
    table_of,
)
from protocol.pt.geometry import ENTRY_BYTES, entry_span, index_of
from protocol.pt.walk import RangeEntry, walk_range
from protocol.trace import TRACE, KvmMmuSetSpte, MarkMmioSpte
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Hpa, Level, Pfn

# Tables one split may make: what is left huge is split by the first write to it, as where memory is short.
SPLIT_BUDGET = 4096
_AD = bits.ACCESSED | bits.DIRTY


class Outcome(Enum):
    FIXED = auto()  # stored
    SPURIOUS = auto()  # the same entry was there already: success too [RFC defect B-13]
    RETRY = auto()  # a frozen entry: somebody is changing it


class Mapped(NamedTuple):
    outcome: Outcome
    flush: GfnSpan | None = None  # a table was replaced by a leaf: flush this before its pages are reused


_MAPPED = Mapped(Outcome.FIXED)  # and what may be cached of the old entry is still right


class TdpMmu(TdpLog):
    """The tables of one VM, as faults, zaps and the ageing of pages change them."""

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
        if root.state is RootState.DISMANTLED and root.refs == 0:
            self._drop_root(root)

    def invalidate_roots(self) -> bool:
        """Every root but exported ones is obsolete [RFC 36/42]: nobody walks them after the flush that must
        follow.  Whether to flush."""
        obsolete = [root for root in self.roots if root.state is RootState.VALID]
        for root in obsolete:
            root.happens(RootEvent.INVALIDATE)
        return bool(obsolete)

    def dismantle(self, root: Root) -> Iterator[None]:
        """Take a root apart that nobody walks since the last flush, from the smallest tables up; others may
        run after each.  The root's own page goes with its last user.
        """
        if root.state is RootState.VALID:
            root.happens(RootEvent.INVALIDATE)
        for level in range(LEVEL_4K + 1, root.role.level + 1):
            for at, table in self._tables_at(root, Level(level)):
                self._writer.store64(at, bits.EMPTY)
                self._unlink_subtree(root, table, Level(level - 1), self._next_epoch() - 1)
                yield
        root.happens(RootEvent.DISMANTLE)
        if root.refs == 0 and root in self.roots:
            self._drop_root(root)

    def _drop_root(self, root: Root) -> None:
        self._quarantine(root, root.hpa, root.role.level, self._next_epoch() - 1)
        self.roots.remove(root)

    # -- mapping ---------------------------------------------------------------------------------------

    def map(
        self,
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
                enough = (is_writable(entry) or not writable) and (entry & bits.EXEC or not fetch)
                if not is_access_tracked(entry) and enough:
                    return Mapped(Outcome.SPURIOUS)
                entry = self._split(root, at, gfn, entry, Level(level))
            else:
                entry = self._link(root, at, self._pool.allocate(), Level(level))
            table = table_of(entry)
        at = table + index_of(gfn, goal) * ENTRY_BYTES
        ad_enabled = root.role.ad_enabled
        leaf = make_leaf(
            pfn,
            goal,
            writable=writable,
            ad_enabled=ad_enabled,
            accessed=accessed,
            executable=goal == LEVEL_4K or root.role.iommu or not self.nx_huge_pages,
        )
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
        if not is_present(old):
            return _MAPPED
        if is_table(old, level):
            # The translations of the table are still right; its pages wait for the flush.
            self.collapses += 1
            self._unlink_subtree(root, table_of(old), Level(level - 1), self._next_epoch())
            return Mapped(Outcome.FIXED, entry_span(gfn, level))
        root.leaves[level] -= 1
        if (old ^ leaf) & bits.ADDRESS_MASK or old & bits.RWX & ~leaf:
            # Another frame, or fewer rights: cached copies of the old entry must go first.
            return Mapped(Outcome.FIXED, entry_span(gfn, level))
        return _MAPPED

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
                    entry = self._link(root, at, self._pool.allocate(), Level(level))
                except UapiError:  # a vCPU gets on without
                    return False
            table = table_of(entry)
        if entry and not is_mmio(entry):
            return False
        made = make_mmio_entry(gfn, generation)
        self._writer.store64(at, made)  # absent before and after: nothing to flush
        if TRACE.on:
            TRACE.emit(MarkMmioSpte(at, gfn, 0, mmio_generation(made)))  # with EPT no access is kept
        return True

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

    def zap_some(self, root: Root, span: GfnSpan, limit: int) -> tuple[int, GfnSpan | None]:
        """Clear at most `limit` leaves of one root: how many, and what of `span` is left to do."""
        count = 0
        for met in self._leaves(root, span):
            if self.keep and self._is_kept(root, met.gfn):
                continue
            if count == limit:
                return count, GfnSpan(met.gfn, span.end)
            self._clear(root, met)
            count += 1
        return count, None

    def zap_table(self, root: Root, gfn: Gfn, level: Level) -> None:
        """Cut off the table under the entry of `level`, if one is there.  Everything is to be flushed."""
        at, table = self._entry_at(root, gfn, level), self.table_at(root, gfn, level)
        if at is not None and table is not None and not self._keeps_any(root, entry_span(gfn, level)):
            self._set(root, gfn, level, at, self._writer.load64(at), bits.EMPTY)
            self._unlink_subtree(root, table, Level(level - 1), self._next_epoch())

    def _clear(self, root: Root, met: RangeEntry) -> None:
        self._set(root, met.gfn, met.level, met.at, met.entry, bits.EMPTY)
        root.leaves[met.level] -= 1

    def age_leafs(self, span: GfnSpan) -> bool:
        """Mark leaves of CPUs that overlap `span` as not used.  Whether one was, and so whether to flush."""
        young = False
        for root in self._aged_roots():
            for met in self._leaves(root, span):
                if is_young(met.entry) and not self._is_kept(root, met.gfn):
                    self._set(root, met.gfn, met.level, met.at, met.entry, aged(met.entry))
                    young = True
        return young

    def _aged_roots(self) -> list[Root]:
        return [root for root in self.roots if not root.role.iommu]

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

    def zap_mmio(self) -> None:
        """Forget every gfn without a slot: the generation starts over.  Nobody caches what is absent."""
        for root in self.roots:
            for met in walk_range(self._writer.load64, root.hpa, root.role.level, root.everything):
                if is_mmio(met.entry):
                    self._writer.store64(met.at, bits.EMPTY)

    def write_protect(self, gfn: Gfn, as_id: int) -> bool:
        """No CPU writes `gfn`, and no short way gives the right back.  Whether to flush."""
        changed = False
        for root in self.roots:
            if root.role.as_id == as_id and not root.role.iommu:
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
