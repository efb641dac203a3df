"""The TDP MMU against a dict: the raw bytes of the table always translate as the oracle says."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.tdp_mmu import MapOutcome
from kvmd.core.tables.tdp_table import Role, Root, RootEvent, TdpMmu
from protocol.errors import UapiError
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.pt.walk import ept_rules
from protocol.units import Gfn, GfnSpan, Hpa, Level, Pfn
from tests.oracle.table import RawTables, TdpOracle, flat

BASE = 0x10_0000
RULES = ept_rules(46, Level(3))
NORMAL = Role(Level(4), 0, True)
PFN = 0x10_0000


class Tdp:
    """A TDP MMU, its oracle, and an epoch that the test turns."""

    def __init__(self, pages: int = 64, role: Role = NORMAL) -> None:
        self.memory = bytearray(pages * 4096)
        self.writer = TableWriter(Hpa(BASE), memoryview(self.memory))
        self.pool = TablePool(self.writer, pages * 4096)
        self.epoch = 0
        self.mmu = TdpMmu(1, self.writer, self.pool, RULES, lambda: self.epoch + 1)
        self.root = self.mmu.get_root(role)
        self.oracle = TdpOracle()

    def map(
        self, gfn: int, pfn: int, level: int = 1, *, writable: bool = True
    ) -> tuple[MapOutcome, GfnSpan | None]:
        where = self.root, Gfn(gfn), Pfn(pfn), Level(level)
        outcome, flush = tdp_mmu.map_page(self.mmu, *where, writable=writable)
        if outcome is MapOutcome.FIXED:
            pages = 1 << 9 * (level - 1)
            self.oracle.map(gfn // pages * pages, pfn, pages, writable=writable)
        return outcome, flush

    def zap(self, start: int, end: int) -> bool:
        return tdp_mmu.zap_leafs(self.mmu, GfnSpan(Gfn(start), Gfn(end)))

    def flushed(self) -> int:
        self.epoch += 1
        return self.pool.reclaim(1, self.epoch)

    @property
    def wrong(self) -> list[str]:
        seen = flat(RawTables(BASE, self.memory), self.root.hpa, self.root.role.level)
        return self.oracle.differences(seen)

    def entry_at(self, gfn: int, level: int) -> int:
        """Where in memory the entry of `level` for `gfn` lies, by following the bytes."""
        table = int(self.root.hpa)
        for at_level in range(self.root.role.level, level, -1):
            at = table - BASE + 8 * (gfn >> 9 * (at_level - 1) & 511)
            table = struct.unpack_from("<Q", self.memory, at)[0] & 0xF_FFFF_FFFF_F000
        return table - BASE + 8 * (gfn >> 9 * (level - 1) & 511)


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize(("level", "pfn"), [(1, 0x10_1234), (2, 0x10_1200), (3, 0x14_0000)])
def test_a_mapped_leaf_translates(levels: int, level: int, pfn: int) -> None:
    tdp = Tdp(role=Role(Level(levels), 0, True))
    assert tdp.map(0x8_0000 + 0x155, pfn, level) == (MapOutcome.FIXED, None)
    assert tdp.wrong == []
    assert tdp.root.tables == levels - level + 1
    assert tdp.root.leaves[level] == 1


def test_the_bytes_of_a_small_table_are_those_worked_by_hand() -> None:
    tdp = Tdp()
    tdp.map(0x1_2345, PFN)
    pages = [struct.unpack_from("<512Q", tdp.memory, i * 4096) for i in range(4)]
    nonzero = [{i: hex(entry) for i, entry in enumerate(page) if entry} for page in pages]
    assert nonzero == [
        {0: "0x800000000101107"},
        {0: "0x800000000102107"},
        {0x91: "0x800000000103107"},
        {0x145: "0xe00000100000377"},
    ]


def test_mapping_what_is_mapped_is_spurious_and_changes_nothing() -> None:
    tdp = Tdp()
    tdp.map(5, PFN)
    before = bytes(tdp.memory)
    assert tdp.map(5, PFN) == (MapOutcome.SPURIOUS, None)
    assert tdp.memory == before
    assert tdp.root.leaves[1] == 1


@pytest.mark.parametrize("writable", [False, True])
def test_a_page_under_a_huge_leaf_that_allows_it_is_spurious(writable: bool) -> None:
    tdp = Tdp()
    tdp.map(0x200, PFN, 2)
    before = bytes(tdp.memory)
    assert tdp.map(0x2FF, PFN + 0xFF, writable=writable) == (MapOutcome.SPURIOUS, None)
    assert tdp.memory == before


def test_a_frozen_entry_is_left_to_who_froze_it() -> None:
    for level in (1, 2, 3, 4):
        tdp = Tdp()
        tdp.map(5, PFN)
        struct.pack_into("<Q", tdp.memory, tdp.entry_at(5, level), 0x5A0)
        before = bytes(tdp.memory)
        assert tdp.map(5, PFN) == (MapOutcome.RETRY, None)
        assert tdp.memory == before


def test_another_frame_at_the_same_gfn_must_be_flushed() -> None:
    tdp = Tdp()
    tdp.map(5, PFN)
    assert tdp.map(5, PFN + 1) == (MapOutcome.FIXED, GfnSpan(Gfn(5), Gfn(6)))
    assert tdp.map(5, PFN + 1, writable=False) == (MapOutcome.FIXED, GfnSpan(Gfn(5), Gfn(6)))
    assert tdp.wrong == []
    assert tdp.root.leaves[1] == 1


def test_more_rights_for_the_same_frame_need_no_flush() -> None:
    tdp = Tdp()
    tdp.map(5, PFN, writable=False)
    assert tdp.map(5, PFN) == (MapOutcome.FIXED, None)
    assert tdp.wrong == []


def test_a_table_replaced_by_a_huge_leaf_is_flushed_whole_and_held() -> None:
    tdp = Tdp()
    for i in (0, 7, 511):
        tdp.map(0x200 + i, PFN + i)
    assert tdp.root.tables == 4
    outcome, flush = tdp.map(0x207, PFN, 2)
    assert (outcome, flush) == (MapOutcome.FIXED, GfnSpan(Gfn(0x200), Gfn(0x400)))
    assert tdp.wrong == []
    assert (tdp.root.leaves, tdp.root.tables, tdp.pool.held(1)) == ([0, 0, 1, 0], 3, 1)
    assert tdp.flushed() == 1


def test_a_held_table_still_translates_as_it_did() -> None:
    """A walker whose paging-structure cache points to it must find nothing else there."""
    tdp = Tdp()
    tdp.map(0x205, PFN + 5)
    at = tdp.entry_at(0x205, 1)
    tdp.map(0x200, PFN, 2)
    assert struct.unpack_from("<Q", tdp.memory, at)[0] == (PFN + 5) << 12 | 0x0E00_0000_0000_0377
    tdp.flushed()
    assert struct.unpack_from("<Q", tdp.memory, at)[0] == 0


def test_a_deep_subtree_is_held_with_all_its_tables() -> None:
    tdp = Tdp()
    for i in range(4):
        tdp.map(i << 9, PFN + (i << 9), 2 if i == 3 else 1)
    assert tdp.root.tables == 1 + 1 + 1 + 3
    tdp.map(0, PFN, 3)
    assert (tdp.root.leaves, tdp.root.tables, tdp.pool.held(1)) == ([0, 0, 0, 1], 2, 4)
    assert tdp.wrong == []


@pytest.mark.parametrize(("level", "goal", "tables"), [(2, 1, 1), (3, 2, 1), (3, 1, 513)])
def test_a_split_changes_no_translation(level: int, goal: int, tables: int) -> None:
    tdp = Tdp(pages=600)
    pages = 1 << 9 * (level - 1)
    tdp.map(pages, PFN, level, writable=False)
    before = tdp.root.tables
    tdp_mmu.split(
        tdp.mmu,
        tdp.root,
        GfnSpan(Gfn(pages), Gfn(pages + 1)) if goal == 2 else tdp.root.everything,
        Level(goal),
    )
    assert tdp.root.tables == before + tables
    assert tdp.root.leaves[goal] == 1 << 9 * (level - goal)
    assert tdp.root.leaves[level] == 0
    assert tdp.wrong == []


CHANGES: dict[str, Callable[[TdpMmu, Root], object]] = {
    "split": lambda mmu, root: tdp_mmu.split(mmu, root, root.everything, Level(1)),
    "write-protected": lambda mmu, root: tdp_mmu.write_protect(mmu, Gfn(0x203), 0),
    "mapped in part": lambda mmu, root: tdp_mmu.map_page(
        mmu, root, Gfn(0x203), Pfn(PFN + 3), Level(1), writable=True
    ),
}


@pytest.mark.parametrize("what", list(CHANGES))
@pytest.mark.parametrize("writable", [True, False])
def test_a_walker_between_any_two_stores_sees_a_huge_leaf_as_it_was_or_as_it_becomes(
    what: str, writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No walker of the model's ever runs inside a turn, so that nothing else would notice."""
    tdp = Tdp()
    tdp.map(0x200, PFN, 2, writable=writable)

    def look() -> dict[int, tuple[int, bool]]:
        return flat(RawTables(BASE, tdp.memory), tdp.root.hpa, tdp.root.role.level)

    seen = [look()]

    def watched(act: Callable[..., None]) -> Callable[..., None]:
        def stores(*what: Any) -> None:
            act(*what)
            seen.append(look())

        return stores

    for name in ("store64", "fill_unlinked"):
        monkeypatch.setattr(TableWriter, name, watched(getattr(TableWriter, name)))
    CHANGES[what](tdp.mmu, tdp.root)
    assert all(saw in (seen[0], seen[-1]) for saw in seen)
    assert seen[-1].keys() == seen[0].keys()
    differ = {gfn for gfn, page in seen[0].items() if page != seen[-1][gfn]}
    assert differ == ({0x203} if writable == (what == "write-protected") and what != "split" else set())


def test_a_table_that_is_linked_before_it_is_filled_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: the two steps of a split the other way round."""
    tdp = Tdp()
    tdp.map(0x200, PFN, 2)
    fill, late = TableWriter.fill_unlinked, []
    monkeypatch.setattr(TableWriter, "fill_unlinked", lambda *what: late.append(what))
    tdp_mmu.split(tdp.mmu, tdp.root, tdp.root.everything, Level(1))
    with pytest.raises(AssertionError, match=r"I4: table .* is linked"):
        fill(*late[0])


def test_a_write_into_a_read_only_huge_leaf_splits_it_and_changes_one_page() -> None:
    tdp = Tdp()
    tdp.map(0x200, PFN, 2, writable=False)
    assert tdp.map(0x203, PFN + 3)[0] is MapOutcome.FIXED
    assert tdp.wrong == []
    assert tdp.root.leaves == [0, 512, 0, 0]


def test_a_zap_clears_what_overlaps_keeps_tables_and_says_whether_to_flush() -> None:
    tdp = Tdp()
    for gfn in (4, 5, 6):
        tdp.map(gfn, PFN + gfn)
    tdp.map(0x200, PFN + 0x200, 2)
    assert tdp.zap(5, 6)
    tdp.oracle.zap(5, 6)
    assert tdp.wrong == []
    assert not tdp.zap(5, 6)
    assert tdp.zap(0x3FF, 0x400)
    tdp.oracle.zap(0x200, 0x400)
    assert tdp.wrong == []
    assert (tdp.root.leaves, tdp.root.tables) == ([0, 2, 0, 0], 4)
    assert not tdp_mmu.zap_leafs(tdp.mmu, GfnSpan(Gfn(1 << 36), Gfn(1 << 40)))


def test_a_zap_reaches_every_root() -> None:
    tdp = Tdp()
    other = tdp.mmu.get_root(Role(Level(5), 0, True))
    tdp.map(5, PFN)
    tdp_mmu.map_page(tdp.mmu, other, Gfn(5), Pfn(PFN), Level(1), writable=True)
    assert tdp.zap(5, 6)
    assert flat(RawTables(BASE, tdp.memory), other.hpa, 5) == {}


@pytest.mark.parametrize("seed", range(6))
def test_any_mix_of_changes_leaves_what_the_dict_says(seed: int) -> None:
    random, tdp, huge = Random(seed), Tdp(pages=700), set[int]()
    for _ in range(250):
        gfn, level = random.randrange(1 << 13), random.choice((1, 1, 1, 2))
        if random.random() < 0.3:
            end = gfn + random.choice((1, 3, 600))
            tdp.zap(gfn, end)
            for start in huge & set(range(gfn & ~511, end, 512)):  # a huge leaf goes whole
                tdp.oracle.zap(start, start + 512)
                huge.remove(start)
            tdp.oracle.zap(gfn, end)
        else:
            pages = 1 << 9 * (level - 1)
            outcome, _ = tdp.map(gfn, PFN + gfn // pages * pages, level)
            if outcome is MapOutcome.FIXED and level == 2:
                huge.add(gfn & ~511)
        tdp.flushed()
    assert tdp.wrong == []


def test_without_table_pages_a_map_is_enomem_and_the_table_stays_sound() -> None:
    tdp = Tdp(pages=3)
    with pytest.raises(UapiError) as caught:
        tdp.map(5, PFN)
    assert caught.value.errno == errno.ENOMEM
    assert tdp.wrong == []
    assert tdp.root.tables == 3


# -- roots ---------------------------------------------------------------------------------------------


def test_equal_roles_share_a_root_and_others_do_not() -> None:
    tdp = Tdp()
    assert tdp.mmu.get_root(NORMAL) is tdp.root
    assert tdp.root.refs == 2
    assert tdp.mmu.get_root(Role(Level(5), 0, True)) is not tdp.root
    assert tdp.mmu.get_root(Role(Level(4), 1, True)) is not tdp.root


def test_a_valid_root_outlives_its_last_reference() -> None:
    tdp = Tdp()
    tdp.map(5, PFN)
    tdp.mmu.put_root(tdp.root)
    assert tdp.wrong == []
    assert tdp.mmu.get_root(NORMAL) is tdp.root


@pytest.mark.rfc("RFC-95", "RFC-96")
def test_an_exported_root_survives_a_memslot_change_and_others_do_not() -> None:
    tdp = Tdp()
    other = tdp.mmu.get_root(Role(Level(5), 0, True))
    tdp.root.happens(RootEvent.EXPORT)
    assert tdp.mmu.invalidate_roots()
    assert (tdp.root.invalid, other.invalid) == (False, True)
    assert tdp.mmu.get_root(NORMAL) is tdp.root
    assert tdp.mmu.get_root(Role(Level(5), 0, True)) is not other
    assert tdp.mmu.invalidate_roots(), "the new one"
    assert not tdp.mmu.invalidate_roots(), "nothing is left to flush for"
    for _ in tdp_mmu.dismantle(tdp.mmu, other):
        pass
    assert other in tdp.mmu.roots, "somebody still has it loaded"
    tdp.mmu.put_root(other)
    assert other not in tdp.mmu.roots


def test_an_obsolete_root_that_nobody_uses_is_held_with_everything_below() -> None:
    tdp = Tdp()
    tdp.map(5, PFN)
    tdp.mmu.put_root(tdp.root)
    tdp.mmu.invalidate_roots()
    held = [tdp.pool.held(1) for _ in tdp_mmu.dismantle(tdp.mmu, tdp.root)]
    assert held == [1, 2, 3], "a turn for others after each table"
    assert (tdp.mmu.roots, tdp.pool.held(1), tdp.pool.in_use) == ([], 4, 0)


def test_mapping_into_an_obsolete_root_is_a_bug() -> None:
    tdp = Tdp()
    tdp.mmu.invalidate_roots()
    with pytest.raises(AssertionError, match="obsolete"):
        tdp.map(5, PFN)


def test_putting_a_root_too_often_is_a_bug() -> None:
    tdp = Tdp()
    tdp.mmu.put_root(tdp.root)
    with pytest.raises(AssertionError, match="more often"):
        tdp.mmu.put_root(tdp.root)


def test_roots_taken_apart_give_every_page_back() -> None:
    tdp = Tdp()
    other: Root = tdp.mmu.get_root(Role(Level(5), 0, True))
    tdp.map(5, PFN)
    tdp_mmu.map_page(tdp.mmu, other, Gfn(9), Pfn(PFN), Level(1), writable=True)
    for root in (tdp.root, other):
        tdp.mmu.put_root(root)
        list(tdp_mmu.dismantle(tdp.mmu, root))
    assert tdp.flushed() == 4 + 5
    assert (tdp.mmu.roots, tdp.pool.in_use) == ([], 0)
    assert not any(tdp.memory)
