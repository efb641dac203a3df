"""The table pages of one VM: its roots, how an entry is stored, how a table is linked and cut off.

What everybody who changes a TDP shares [RFC 35/42]: `tdp_mmu` and `tdp_log` are operations on it.  All of it
is plain `def`: nothing awaits between reading an entry and storing it, so that pair is our compare and
exchange.  Every store into a live table is made by `change`, for leaves of one table page by `change_run`, or
by compiled code, with `changed_leaves` behind it: they see to what follows from it [KVM tdp_mmu.c,
handle_changed_spte].

Invariants with their home here: I10 the root of an exported TDP never moves; I16 a root's counters equal its
table; I18 a table page is linked once; I23 no entry of an IOMMU's root asks for a fault.  I2 and I17 are kept
with `protocol/pt/ept.py`, I3 with `spte`, I7 with `protocol/pt/table_pool.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from kvmd.core.tables.compiled import WORTH_TABLES, Compiled
from kvmd.core.tables.map_record import MapRecord
from kvmd.core.tables.root_policy import CPUS, RootPolicy
from kvmd.core.tables.spte import split_children
from protocol.lifecycle import LifeCycle
from protocol.pt import bits
from protocol.pt.cursor import Cursor, EntryAt, EntryRun, RangeEntry, leaves_of, seek
from protocol.pt.ept import ept_format
from protocol.pt.format import TableFormat
from protocol.pt.geometry import ENTRIES, ENTRY_BYTES, INDEX_BITS, entry_span, entry_start, gfn_limit
from protocol.pt.leaf_edit import LeafEdit, SomePages
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.pt.walk import WalkRules
from protocol.trace import TRACE, KvmMmuSplitHugePage, KvmTdpMmuSpteChanged
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Hpa, Level


@dataclass(frozen=True, slots=True)
class Role:
    """What a root is for [KVM kvm_mmu_page_role]; two users with equal roles share a root."""

    level: Level
    as_id: int
    ad_enabled: bool
    policy: RootPolicy = CPUS


class RootState(Enum):
    VALID = auto()
    EXPORTED = auto()  # lent out: no memslot change makes it obsolete [RFC 36/42]
    INVALID = auto()  # obsolete: nobody maps into it, nor walks it after the next flush
    DISMANTLED = auto()  # nothing is below it any more; its own page goes with its last user


class RootEvent(Enum):
    EXPORT = auto()
    RELEASE = auto()  # its TDP FD is closed
    INVALIDATE = auto()
    DISMANTLE = auto()


ROOT_LIFE = LifeCycle(
    "root of a TDP",
    RootState.VALID,
    {
        (RootState.VALID, RootEvent.EXPORT): RootState.EXPORTED,
        (RootState.EXPORTED, RootEvent.RELEASE): RootState.VALID,
        (RootState.VALID, RootEvent.INVALIDATE): RootState.INVALID,
        (RootState.INVALID, RootEvent.DISMANTLE): RootState.DISMANTLED,
    },
)


@dataclass(slots=True, eq=False)
class Root:
    hpa: Hpa
    role: Role
    format: TableFormat
    refs: int = 0  # besides the MMU's own
    state: RootState = ROOT_LIFE.born
    stale: bool = False  # what was cached of it is not right any more, and nobody was told so far
    leaves: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # by level
    tables_at: list[int] = field(default_factory=lambda: [0, 0, 0, 0, 0, 0])  # by the level of their entries
    nx_split: dict[tuple[Level, Gfn], Hpa] = field(default_factory=dict)  # tables only a fetch asked for
    record: MapRecord = field(default_factory=MapRecord)

    def __post_init__(self) -> None:
        self.tables_at[self.role.level] = 1

    def happens(self, event: RootEvent) -> None:
        self.state = ROOT_LIFE.after(self.state, event)

    @property
    def exported(self) -> bool:
        return self.state is RootState.EXPORTED

    @property
    def invalid(self) -> bool:
        """Obsolete, whether or not it was taken apart yet."""
        return self.state is RootState.INVALID or self.state is RootState.DISMANTLED

    @property
    def tables(self) -> int:
        return sum(self.tables_at)

    @property
    def owner(self) -> str:
        """Whose tables they are, for those who count."""
        if not self.role.policy.cpus:
            return "iommu"
        return "shared" if self.exported else "cpu"

    @property
    def everything(self) -> GfnSpan:
        return GfnSpan(Gfn(0), gfn_limit(self.role.level))


class PinnedEntries(Protocol):
    """What entries must stay as they are: those of pinned gfns (`slots/pinned.py`)."""

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
        self.splits = 0  # huge leaves that became tables
        self.collapses = 0  # tables that became a huge leaf
        self.pinned: PinnedEntries | None = None
        self.compiled = Compiled(writer)  # code for ranges of leaves: none, unless the host has some
        self.lent_policy = CPUS  # of the roots that TDP FDs lend
        self.may_lack_write = False  # nothing was ever protected: no store can find W taken
        self._vm_id = vm_id
        self.writer = writer
        self.pool = pool
        self._formats = [ept_format(rules, ad_enabled=enabled) for enabled in (False, True)]
        self.next_epoch = next_epoch
        self.pml = pml
        self.nx_huge_pages = False  # no huge leaf is executable

    def roots_of(self, as_id: int) -> list[Root]:
        """Roots of an address space that somebody may still walk into new faults."""
        return [root for root in self.roots if root.role.as_id == as_id and not root.invalid]

    def cpu_roots(self, as_id: int) -> list[Root]:
        """Those that CPUs walk, alone or with devices."""
        return [root for root in self.roots_of(as_id) if root.role.policy.cpus]

    def logged_roots(self, as_id: int) -> list[Root]:
        return [root for root in self.roots_of(as_id) if root.role.policy.logs]

    def exported_root(self, as_id: int) -> Root | None:
        """The one that is lent out, if one is."""
        for root in self.roots:  # at each fault of a device
            if root.exported and root.role.as_id == as_id and not root.invalid:
                return root
        return None

    # -- roots -----------------------------------------------------------------------------------------

    def get_root(self, role: Role) -> Root:
        """A reference to the valid root of `role`, found or made."""
        root = next((r for r in self.roots if r.role == role and not r.invalid), None)
        if root is None:
            root = Root(self.pool.allocate(), role, self._formats[role.ad_enabled])
            self.roots.append(root)
        root.refs += 1
        return root

    def put_root(self, root: Root) -> None:
        """Drop a reference.  A valid root stays, as KVM's does; an invalid one goes with its last user."""
        assert root.refs > 0, "root put more often than it was got"
        root.refs -= 1
        if root.state is RootState.DISMANTLED and root.refs == 0:
            self.drop_root(root)

    def invalidate_roots(self) -> bool:
        """Every root but exported ones is obsolete [RFC 36/42]: nobody walks them after the flush that must
        follow.  Whether to flush."""
        obsolete = [root for root in self.roots if root.state is RootState.VALID]
        for root in obsolete:
            root.happens(RootEvent.INVALIDATE)
        return bool(obsolete)

    def drop_root(self, root: Root) -> None:
        self._quarantine(root, root.hpa, root.role.level, self.next_epoch() - 1)
        self.roots.remove(root)

    def aged_roots(self) -> list[Root]:
        return [root for root in self.roots if root.role.policy.ages]

    # -- storing ---------------------------------------------------------------------------------------

    def change(
        self, root: Root, gfn: Gfn, level: Level, at: Hpa, old: int, new: int, epoch: int | None = None
    ) -> None:
        """Store `new` where `old` is.  A table that this cuts off is held, with all below it, until the flush
        of `epoch`, the next one unless said, is acked (I7)."""
        fmt = root.format
        mask, value = fmt.table[level]
        links = new & mask == value
        if self.pinned and not links:
            self._check_pinned(root, gfn, level, old, new)
        self.writer.store64(at, new)
        if TRACE.on:
            TRACE.emit(KvmTdpMmuSpteChanged(root.role.as_id, gfn, level, old, new))
        if not (old | new) & bits.MMU_PRESENT:
            return  # MMIO and frozen entries: absent for every walker, before and after
        if links:  # it translates as what was there
            root.tables_at[level - 1] += 1
            if root.tables_at[LEVEL_4K] == WORTH_TABLES:
                self.compiled.is_wanted()
        else:
            if old & bits.MMU_PRESENT and (old & ~new & bits.RWX or (old ^ new) & bits.ADDRESS_MASK):
                root.stale = True
            root.record.store(gfn, level, new)
            if new & bits.MMU_PRESENT:
                root.leaves[level] += 1
        if not old & bits.MMU_PRESENT:
            return
        if old & mask != value:
            root.leaves[level] -= 1
        else:
            until = self.next_epoch() if epoch is None else epoch
            self.unlink_subtree(root, fmt.table_of(old), Level(level - 1), until)

    def change_run(self, root: Root, run: EntryRun, new: list[int]) -> int:
        """Store what becomes of a run's leaves: each keeps its frame, or goes.  How many changed."""
        frame, level, at, old = run
        if new == old:
            return 0
        size = 1 << INDEX_BITS * (level - 1)
        kept = self.any_pinned(root, GfnSpan.of_pages(Gfn(frame), size * len(new)))
        store, lost, changed, gone = self.writer.store64, 0, 0, 0
        for index, (was, now) in enumerate(zip(old, new, strict=True)):
            if was == now:
                continue
            if kept:
                self._check_pinned(root, Gfn(frame + index * size), level, was, now)
            store(at + index * ENTRY_BYTES, now)
            changed += 1
            lost |= was & ~now
            gone += not now
            if TRACE.on:
                gfn = Gfn(frame + index * size)
                TRACE.emit(KvmTdpMmuSpteChanged(root.role.as_id, gfn, level, was, now))
        self._count_lost(root, level, lost, gone)
        root.record.store_run(Gfn(frame), level, old, new)
        return changed

    def changed_leaves(
        self, root: Root, span: GfnSpan, edit: LeafEdit, wanted: SomePages | None, lost: int, gone: int
    ) -> None:
        """What follows where compiled code made `edit` of the small leaves in `span`: some lost bits, some
        are gone."""
        self._count_lost(root, LEVEL_4K, lost, gone)
        root.record.edit(span, edit, wanted)

    def _count_lost(self, root: Root, level: Level, lost: int, gone: int) -> None:
        if lost & (bits.RWX | bits.ADDRESS_MASK):
            root.stale = True
        root.leaves[level] -= gone

    def _check_pinned(self, root: Root, gfn: Gfn, level: Level, old: int, new: int) -> None:
        """I22 where it is made or broken: a pinned gfn's entry loses nothing, no other entry covers one."""
        if level > LEVEL_4K:
            assert root.invalid or not self.any_pinned(root, entry_span(gfn, level)), f"I22: {gfn:#x} {level}"
        elif self.is_pinned(root, gfn) and old & bits.MMU_PRESENT:
            lost = (old ^ new) & bits.ADDRESS_MASK | old & ~new & (bits.RWX | bits.DIRTY)
            assert not lost, f"I22: pinned gfn {gfn:#x}: {old:#x} became {new:#x}"

    def is_pinned(self, root: Root, gfn: Gfn) -> bool:
        """Must the entry stay?  An obsolete root's is nobody's any more."""
        return bool(self.pinned and not root.invalid and self.pinned.holds(root.role.as_id, gfn))

    def skip_pinned(self, root: Root, run: EntryRun, new: list[int]) -> list[int]:
        """`new`, with what a run has of pinned gfns as it is."""
        if self.pinned and new != run.entries:
            size = 1 << INDEX_BITS * (run.level - 1)
            if self.any_pinned(root, GfnSpan.of_pages(Gfn(run.frame), size * len(new))):
                for index, was in enumerate(run.entries):
                    if was != new[index] and self.is_pinned(root, Gfn(run.frame + index * size)):
                        new[index] = was
        return new

    def any_pinned(self, root: Root, span: GfnSpan) -> bool:
        return bool(self.pinned and self.pinned.any_in(root.role.as_id, span))

    def link(self, root: Root, gfn: Gfn, level: Level, at: Hpa, old: int, table: Hpa) -> None:
        """The entry over `gfn` points to `table` from now on, which translates as `old` does."""
        self.change(root, entry_start(gfn, level), level, at, old, root.format.make_table(table, level))

    def split_leaf(self, root: Root, gfn: Gfn, level: Level, at: Hpa, leaf: int) -> None:
        """No walker sees a change: the new table translates as the leaf did before it is linked.  ENOMEM."""
        table = self.pool.allocate()
        if TRACE.on:
            TRACE.emit(KvmMmuSplitHugePage(gfn, leaf, level, 0))
        self.writer.fill_unlinked(table, split_children(root.format, leaf, level))
        root.leaves[level - 1] += ENTRIES
        self.splits += 1
        self.link(root, gfn, level, at, leaf, table)

    def unlink_subtree(self, root: Root, table: Hpa, level: Level, epoch: int) -> None:
        """`table` is cut off (or its root dropped): hold it and all below it until the flush of `epoch` is
        acked.
        """
        fmt = root.format
        if level == LEVEL_4K:  # as nearly all are
            root.leaves[LEVEL_4K] -= self.writer.count(table, *fmt.leaf[LEVEL_4K])
            self._quarantine(root, table, level, epoch)
            return
        for _, met_level, _, entries in Cursor(self.writer, fmt, table, level, with_tables=True):
            if fmt.is_table(entries[0], met_level):
                self._quarantine(root, fmt.table_of(entries[0]), Level(met_level - 1), epoch)
            elif any(entries):
                mask, value = fmt.leaf[met_level]
                root.leaves[met_level] -= sum([entry & mask == value for entry in entries])
        self._quarantine(root, table, level, epoch)

    def _quarantine(self, root: Root, table: Hpa, level: Level, epoch: int) -> None:
        self.pool.quarantine(self._vm_id, table, epoch)
        root.tables_at[level] -= 1

    # -- looking ---------------------------------------------------------------------------------------

    def cursor(
        self, root: Root, span: GfnSpan, lowest: Level = LEVEL_4K, *, with_tables: bool = False
    ) -> Cursor:
        """Over what translates `span` in a root."""
        levels = root.role.level
        return Cursor(self.writer, root.format, root.hpa, levels, span.start, span.end, lowest, with_tables)

    def seek(self, root: Root, gfn: Gfn, lowest: Level = LEVEL_4K) -> EntryAt:
        """Where a way down towards `gfn` ends."""
        return seek(self.writer, root.format, root.hpa, root.role.level, gfn, lowest)

    def leaves_in(self, root: Root, span: GfnSpan) -> Iterator[RangeEntry]:
        return leaves_of(root.format, self.cursor(root, span))

    def table_at(self, root: Root, gfn: Gfn, level: Level) -> Hpa | None:
        """The table that the entry of `level` over `gfn` points to, if it does."""
        met = self.seek(root, gfn, level)
        is_table = met.level == level and root.format.is_table(met.entry, level)
        return root.format.table_of(met.entry) if is_table else None

    def leaf_at(self, root: Root, gfn: Gfn) -> RangeEntry | None:
        """The leaf that maps `gfn`, if one does."""
        if gfn >= gfn_limit(root.role.level):
            return None
        level, at, entry = self.seek(root, gfn)
        if not entry & bits.MMU_PRESENT:
            return None
        return RangeEntry(entry_start(gfn, level), level, at, entry)

    def leaves(self, root: Root) -> Iterator[RangeEntry]:
        """Every leaf of a root, in gfn order."""
        return self.leaves_in(root, root.everything)
