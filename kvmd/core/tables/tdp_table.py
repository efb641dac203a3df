"""The table pages of one VM: its roots, how an entry is stored, how a table is linked and cut off.

What everybody who changes a TDP shares [RFC 35/42]: `tdp_log` and `tdp_mmu` are built on it.  All of it is
plain `def`: nothing awaits between reading an entry and storing it, so that pair is our compare-and-exchange.

Invariants with their home here: I16 a root's counters equal its table; I18 a table page is linked once.
I23 no entry of an IOMMU's root asks for a fault.  I2, I3, I7 and I17 are kept with `spte` and `table_pool`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from kvmd.core.tables.map_record import MapRecord
from kvmd.core.tables.spte import make_table_entry, split_child
from kvmd.core.tables.table_pool import TablePool
from protocol.lifecycle import LifeCycle
from protocol.pt import bits
from protocol.pt.entry import is_leaf, is_present, is_table, table_of
from protocol.pt.geometry import ENTRIES, ENTRY_BYTES, entry_span, entry_start, gfn_limit, index_of
from protocol.pt.mem import TableWriter
from protocol.pt.walk import RangeEntry, WalkRules, walk_range
from protocol.trace import TRACE, KvmMmuSplitHugePage, KvmTdpMmuSpteChanged
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Hpa, Level


@dataclass(frozen=True, slots=True)
class Role:
    """What a root is for [KVM kvm_mmu_page_role]; two users with equal roles share a root.

    `iommu`, the model's [RFC review]: devices alone walk it, so what KVM does to an entry to hear of the next
    access is not done to it (I23): the access would be an IO page fault, dearer than what it tells.
    """

    level: Level
    as_id: int
    ad_enabled: bool
    iommu: bool = False


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
        return "iommu" if self.role.iommu else "shared" if self.exported else "cpu"

    @property
    def everything(self) -> GfnSpan:
        return GfnSpan(Gfn(0), gfn_limit(self.role.level))


class Keep(Protocol):
    """What entries must stay as they are: those of pinned gfns (`pinning.PinnedGfns`)."""

    def __len__(self) -> int: ...
    def holds(self, as_id: int, gfn: Gfn) -> bool: ...
    def any_in(self, as_id: int, span: GfnSpan) -> bool: ...
    def within(self, as_id: int, span: GfnSpan) -> list[Gfn]: ...


class TdpTable:
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
        self.keep: Keep | None = None
        self._vm_id = vm_id
        self._writer = writer
        self._pool = pool
        self._rules = rules
        self._next_epoch = next_epoch
        self._pml = pml
        self.nx_huge_pages = False  # no huge leaf is executable

    @property
    def load64(self) -> Callable[[int], int]:
        return self._writer.load64

    def roots_of(self, as_id: int) -> list[Root]:
        """Roots of an address space that somebody may still walk into new faults."""
        return [root for root in self.roots if root.role.as_id == as_id and not root.invalid]

    def cpu_roots(self, as_id: int) -> list[Root]:
        """Those that CPUs walk, alone or with devices: what logging and tracking protect."""
        return [root for root in self.roots_of(as_id) if not root.role.iommu]

    # -- storing ---------------------------------------------------------------------------------------

    def _set(self, root: Root, gfn: Gfn, level: Level, at: int, old: int, new: int) -> None:
        """Store an entry of `root`'s: whatever changes what a gfn translates to goes through here."""
        if self.keep:
            self._check_kept(root, gfn, level, old, new)
        self._writer.store64(at, new)
        if old & ~new & bits.RWX or (old and (old ^ new) & bits.ADDRESS_MASK):
            root.stale = True
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

    def _link(self, root: Root, at: int, table: Hpa, level: Level) -> int:
        """The entry at `at`, of `level`, points to `table` from now on."""
        entry = make_table_entry(table, ad_enabled=root.role.ad_enabled)
        self._writer.store64(at, entry)
        root.tables_at[level - 1] += 1
        return entry

    def _split(self, root: Root, at: int, gfn: Gfn, leaf: int, level: Level) -> int:
        """No walker sees a change: the new table translates as the leaf did before it is linked."""
        table = self._pool.allocate()
        if TRACE.on:
            TRACE.emit(KvmMmuSplitHugePage(gfn, leaf, level, 0))
        self._writer.fill_unlinked(table, [split_child(leaf, level, i) for i in range(ENTRIES)])
        root.leaves[level] -= 1
        root.leaves[level - 1] += ENTRIES
        self.splits += 1
        return self._link(root, at, table, level)

    def _unlink_subtree(self, root: Root, table: Hpa, level: Level, epoch: int) -> None:
        """`table` is cut off (or its root dropped): hold it and all below it until the flush of `epoch` is
        acked.
        """
        relative = GfnSpan(Gfn(0), gfn_limit(level))
        for met in walk_range(self._writer.load64, table, level, relative):
            if is_table(met.entry, met.level):
                self._quarantine(root, table_of(met.entry), Level(met.level - 1), epoch)
            elif is_present(met.entry):
                root.leaves[met.level] -= 1
        self._quarantine(root, table, level, epoch)

    def _quarantine(self, root: Root, table: Hpa, level: Level, epoch: int) -> None:
        self._pool.quarantine(self._vm_id, table, epoch)
        root.tables_at[level] -= 1

    # -- looking ---------------------------------------------------------------------------------------

    def _leaves(self, root: Root, span: GfnSpan) -> Iterator[RangeEntry]:
        limit = gfn_limit(root.role.level)
        within = GfnSpan(min(span.start, limit), min(span.end, limit))
        for met in walk_range(self._writer.load64, root.hpa, root.role.level, within):
            if is_present(met.entry) and is_leaf(met.entry, met.level):
                yield met

    def _tables_at(self, root: Root, level: Level) -> Iterator[tuple[int, Hpa]]:
        """Every entry of `level` that points to a table: where it lies, and the table."""
        row = [root.hpa]
        for above in range(root.role.level, level, -1):
            entries = (entry for table in row for entry in self._writer.load_table(table))
            row = [table_of(entry) for entry in entries if is_table(entry, Level(above))]
        for table in row:
            for index, entry in enumerate(self._writer.load_table(table)):
                if is_table(entry, level):
                    yield table + index * ENTRY_BYTES, table_of(entry)

    def _entry_at(self, root: Root, gfn: Gfn, level: Level) -> int | None:
        """Where the entry of `level` lies that covers `gfn`, if its table is there."""
        table = root.hpa
        for number in range(root.role.level, level, -1):
            entry = self._writer.load64(table + index_of(gfn, Level(number)) * ENTRY_BYTES)
            if not is_table(entry, Level(number)):
                return None
            table = table_of(entry)
        return table + index_of(gfn, level) * ENTRY_BYTES

    def table_at(self, root: Root, gfn: Gfn, level: Level) -> Hpa | None:
        """The table that the entry of `level` over `gfn` points to, if it does."""
        at = self._entry_at(root, gfn, level)
        entry = 0 if at is None else self._writer.load64(at)
        return table_of(entry) if is_table(entry, level) else None

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
