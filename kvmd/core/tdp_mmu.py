"""The TDP MMU: roots, and every change of an entry of theirs.

Models KVM's TDP MMU as the sole writer of the shared table [RFC 35/42], [RFC 36/42], [RFC 37/42]: map a
page, zap leaves, split a huge leaf, replace a table by a huge leaf, drop a root.  All of it is plain
`def`: nothing awaits between reading an entry and storing it, so that pair is our compare-and-exchange.
What must be flushed is returned; cut-off table pages go to quarantine under the epoch of the flush that
must follow at once.

Invariants with their home here: I10 the root of an exported TDP never moves; I16 a root's counters equal its
table; I18 a table page is linked once.  I2, I3, I7 and I17 are kept with `spte` and `table_pool`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from kvmd.core.map_record import MapRecord
from kvmd.core.spte import check_entry, make_leaf, make_table_entry, split_child
from kvmd.core.table_pool import TablePool
from protocol.pt import bits
from protocol.pt.entry import is_frozen, is_leaf, is_present, is_present_leaf, is_table, is_writable, table_of
from protocol.pt.geometry import ENTRIES, ENTRY_BYTES, entry_span, gfn_limit, index_of
from protocol.pt.mem import TableWriter
from protocol.pt.walk import RangeEntry, WalkRules, walk_range
from protocol.trace import TRACE, KvmMmuSetSpte, KvmMmuSplitHugePage, KvmTdpMmuSpteChanged
from protocol.units import Gfn, GfnSpan, Hpa, Level, Pfn


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


class TdpMmu:
    """The tables of one VM.  `next_epoch()` is the number the next flush will have."""

    def __init__(
        self,
        vm_id: int,
        writer: TableWriter,
        pool: TablePool,
        rules: WalkRules,
        next_epoch: Callable[[], int],
    ) -> None:
        self.roots: list[Root] = []
        self._vm_id = vm_id
        self._writer = writer
        self._pool = pool
        self._rules = rules
        self._next_epoch = next_epoch

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

    def map(self, root: Root, gfn: Gfn, pfn: Pfn, goal: Level, *, writable: bool) -> Mapped:
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
                if is_writable(entry) or not writable:
                    return Mapped(Outcome.SPURIOUS)
                if TRACE.on:
                    TRACE.emit(KvmMmuSplitHugePage(gfn, entry, level, 0))
                entry = self._split(root, at, entry, Level(level))
            else:
                entry = self._link(root, at, self._pool.allocate())
            table = table_of(entry)
        at = table + index_of(gfn, goal) * ENTRY_BYTES
        return self._store_leaf(
            root, at, gfn, goal, make_leaf(pfn, goal, writable=writable, ad_enabled=root.role.ad_enabled)
        )

    def _store_leaf(self, root: Root, at: int, gfn: Gfn, level: Level, leaf: int) -> Mapped:
        check_entry(leaf, level, leaf=True, rules=self._rules)
        old = self._writer.load64(at)
        if old == leaf:
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
        self._writer.store64(at, new)
        root.record.store(gfn, level, new)
        if TRACE.on:
            TRACE.emit(KvmTdpMmuSpteChanged(root.role.as_id, gfn, level, old, new))

    def _link(self, root: Root, at: int, table: Hpa) -> int:
        entry = make_table_entry(table, ad_enabled=root.role.ad_enabled)
        self._writer.store64(at, entry)
        root.tables += 1
        return entry

    # -- changing what is mapped -----------------------------------------------------------------------

    def zap_leafs(self, span: GfnSpan) -> bool:
        """Clear every leaf that overlaps `span`, in all roots; tables stay.  Whether to flush."""
        zapped = False
        for root in self.roots:
            for met in self._leaves(root, span):
                self._set(root, met.gfn, met.level, met.at, met.entry, bits.EMPTY)
                root.leaves[met.level] -= 1
                zapped = True
        return zapped

    def split(self, root: Root, span: GfnSpan, goal: Level) -> int:
        """Replace huge leaves in `span` by tables of smaller ones, down to `goal`.  How many."""
        count = 0
        for met in self._leaves(root, span):
            if met.level > goal:
                # The range walk read this entry as a leaf and does not descend; do it here.
                self._split(root, met.at, met.entry, met.level)
                if TRACE.on:
                    TRACE.emit(KvmMmuSplitHugePage(met.gfn, met.entry, met.level, 0))
                count += 1
                if met.level - 1 > goal:
                    count += self.split(root, entry_span(met.gfn, met.level), goal)
        return count

    def _split(self, root: Root, at: int, leaf: int, level: Level) -> int:
        """No walker sees a change: the new table translates as the leaf did before it is linked."""
        table = self._pool.allocate()
        self._writer.fill_unlinked(table, [split_child(leaf, level, i) for i in range(ENTRIES)])
        root.leaves[level] -= 1
        root.leaves[level - 1] += ENTRIES
        return self._link(root, at, table)

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

    def leaves(self, root: Root) -> Iterator[RangeEntry]:
        """Every leaf of a root, in gfn order."""
        return self._leaves(root, root.everything)
