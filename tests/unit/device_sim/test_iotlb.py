"""The IOTLB against sets of pages: an invalidation drops what overlaps it, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_sim.core.iotlb import MAX_ENTRIES, Iotlb, IotlbEntry, PscEntry
from protocol.units import Hpa, IovaPfn, Level

R, W = 1, 2
PAGES = {1: 1, 2: 512, 3: 512 * 512}


def leaf(hpa: int, level: int = 1, rights: int = R | W) -> IotlbEntry:
    return IotlbEntry(Hpa(hpa), Level(level), rights, 0)


def held(iotlb: Iotlb, did: int) -> set[tuple[int, int]]:
    """(first page, level) of everything cached."""
    return {(page, entry.level) for page, entry in iotlb.entries(did)}


@pytest.mark.parametrize(("level", "inside", "outside"), [(1, [7], [6, 8]), (2, [512, 1023], [511, 1024])])
def test_a_leaf_serves_all_its_pages_and_no_other(level: int, inside: list[int], outside: list[int]) -> None:
    iotlb = Iotlb()
    entry = leaf(0x4000_0000, level)
    iotlb.fill(5, IovaPfn(inside[-1]), entry)
    assert [iotlb.lookup(5, IovaPfn(page), R) for page in inside] == [entry] * len(inside)
    assert [iotlb.lookup(5, IovaPfn(page), R) for page in outside] == [None, None]
    assert (iotlb.hits, iotlb.misses) == (len(inside), 2)


def test_a_gigabyte_leaf_serves_its_last_page() -> None:
    iotlb = Iotlb()
    iotlb.fill(5, IovaPfn(1 << 18), leaf(0x4000_0000, 3))
    assert iotlb.lookup(5, (IovaPfn(IovaPfn(2 << 18) - 1)), W) is not None
    assert iotlb.lookup(5, IovaPfn(2 << 18), W) is None
    assert iotlb.lookup(5, (IovaPfn(IovaPfn(1 << 18) - 1)), W) is None


def test_one_domain_never_sees_another_domains_entries() -> None:
    iotlb = Iotlb()
    iotlb.fill(5, IovaPfn(7), leaf(0x1000))
    iotlb.fill_table(5, IovaPfn(7), PscEntry(Hpa(0x2000), 7))
    assert iotlb.lookup(6, IovaPfn(7), R) is None
    assert iotlb.lookup_table(6, IovaPfn(7), R) is None
    iotlb.fill(6, IovaPfn(7), leaf(0x9000))
    found = iotlb.lookup(5, IovaPfn(7), R)
    assert found is not None
    assert found.hpa == 0x1000


def test_an_entry_without_the_right_is_a_miss() -> None:
    iotlb = Iotlb()
    iotlb.fill(5, IovaPfn(7), leaf(0x1000, rights=R))
    assert iotlb.lookup(5, IovaPfn(7), W) is None
    assert iotlb.misses == 1
    iotlb.fill(5, IovaPfn(7), leaf(0x1000, rights=R | W))
    assert iotlb.lookup(5, IovaPfn(7), W) == leaf(0x1000)


def test_a_table_pointer_without_the_right_is_none() -> None:
    iotlb = Iotlb()
    iotlb.fill_table(5, IovaPfn(7), PscEntry(Hpa(0x2000), R))
    assert iotlb.lookup_table(5, IovaPfn(7), W) is None
    assert iotlb.psc_hits == 0
    assert iotlb.lookup_table(5, IovaPfn(7), R) == (0x2000, R)
    assert iotlb.psc_hits == 1


def test_a_small_entry_without_the_right_does_not_hide_a_huge_one_with_it() -> None:
    iotlb = Iotlb()
    iotlb.fill(5, IovaPfn(512), leaf(0x20_0000, 1, R))
    iotlb.fill(5, IovaPfn(512), leaf(0x20_0000, 2, R | W))
    assert iotlb.lookup(5, IovaPfn(512), W) == leaf(0x20_0000, 2)


def populated() -> Iotlb:
    iotlb = Iotlb()
    for did in (5, 6):
        for page in (511, 512, 513, 1024):
            iotlb.fill(did, IovaPfn(page), leaf(page << 12))
            iotlb.fill_table(did, IovaPfn(page), PscEntry(Hpa(0x10_0000 + (page >> 9 << 12)), 7))
        iotlb.fill(did, IovaPfn(512), leaf(0x20_0000, 2))
        iotlb.fill(did, IovaPfn(0), leaf(0, 3))
    return iotlb


ALL = {(511, 1), (512, 1), (513, 1), (1024, 1), (512, 2), (0, 3)}


def test_a_domain_selective_invalidation_empties_that_domain_only() -> None:
    iotlb = populated()
    iotlb.invalidate_domain(5)
    assert (held(iotlb, 5), held(iotlb, 6)) == (set(), ALL)
    assert iotlb.lookup_table(5, IovaPfn(512), R) is None
    assert iotlb.lookup_table(6, IovaPfn(512), R) is not None


def test_a_global_invalidation_empties_all_domains() -> None:
    iotlb = populated()
    iotlb.invalidate_all()
    assert held(iotlb, 5) == held(iotlb, 6) == set()
    assert iotlb.lookup_table(5, IovaPfn(512), R) is iotlb.lookup_table(6, IovaPfn(512), R) is None


@pytest.mark.parametrize(("hint", "tables_left"), [(False, [0, 2]), (True, [0, 1, 2])])
def test_one_page_drops_the_leaves_over_it_and_its_table_pointer_unless_ih(
    hint: bool, tables_left: list[int]
) -> None:
    iotlb = populated()
    iotlb.invalidate_pages(5, IovaPfn(513), 1, leaves_only=hint)
    assert held(iotlb, 5) == {(511, 1), (512, 1), (1024, 1)}, "the 2M and 1G leaves hold page 513 as well"
    assert [n for n in range(3) if iotlb.lookup_table(5, IovaPfn(n << 9), R) is not None] == tables_left
    assert held(iotlb, 6) == ALL


def test_invalidating_a_domain_nothing_is_cached_of_is_no_error() -> None:
    iotlb = Iotlb()
    iotlb.invalidate_domain(9)
    iotlb.invalidate_pages(9, IovaPfn(0), 1 << 52, leaves_only=False)
    assert iotlb.entries(9) == []


LEAVES = st.lists(st.tuples(st.integers(0, 3 << 18), st.sampled_from([1, 1, 1, 2, 2, 3])), max_size=30)


@settings(max_examples=150, deadline=None)
@given(leaves=LEAVES, at=st.integers(0, 3 << 18), am=st.integers(0, 20), hint=st.booleans())
def test_a_page_selective_invalidation_drops_exactly_what_overlaps(
    leaves: list[tuple[int, int]], at: int, am: int, hint: bool
) -> None:
    iotlb = Iotlb()
    expected, tables = set(), set()
    start, end = at >> am << am, (at >> am << am) + (1 << am)
    for page, level in leaves:
        first = page // PAGES[level] * PAGES[level]
        iotlb.fill(5, IovaPfn(page), leaf(first << 12, level))
        if first + PAGES[level] <= start or end <= first:
            expected.add((first, level))
        if level == 1:
            table = page // 512
            iotlb.fill_table(5, IovaPfn(page), PscEntry(Hpa(table << 12), 7))
            if hint or table * 512 + 512 <= start or end <= table * 512:
                tables.add(table)
    iotlb.invalidate_pages(5, IovaPfn(start), 1 << am, leaves_only=hint)
    assert held(iotlb, 5) == expected
    filled = {page // 512 for page, level in leaves if level == 1}
    assert {table for table in filled if iotlb.lookup_table(5, IovaPfn(table * 512), R) is not None} == tables


@pytest.mark.parametrize("level", [1, 2])
def test_beyond_its_capacity_the_oldest_entry_of_that_size_and_domain_goes(level: int) -> None:
    iotlb = Iotlb()
    size = PAGES[level]
    iotlb.fill(6, IovaPfn(0), leaf(0, level))
    iotlb.fill(5, IovaPfn(0), leaf(0, 3 - level))
    for n in range(MAX_ENTRIES):
        iotlb.fill(5, IovaPfn(n * size), leaf(n * size << 12, level))
    assert (0, level) in held(iotlb, 5), "full, and nothing went yet"
    iotlb.fill(5, IovaPfn(MAX_ENTRIES * size), leaf(0, level))
    now = held(iotlb, 5)
    assert (0, level) not in now
    assert {(size, level), (MAX_ENTRIES * size, level), (0, 3 - level)} <= now
    assert len(now) == MAX_ENTRIES + 1
    assert held(iotlb, 6) == {(0, level)}


def test_beyond_its_capacity_the_oldest_table_pointer_goes() -> None:
    iotlb = Iotlb()
    for n in range(MAX_ENTRIES + 1):
        iotlb.fill_table(5, IovaPfn(n << 9), PscEntry(Hpa(n << 12), 7))
    assert iotlb.lookup_table(5, IovaPfn(0), R) is None
    assert iotlb.lookup_table(5, IovaPfn(1 << 9), R) == (1 << 12, 7)
    assert iotlb.lookup_table(5, IovaPfn(MAX_ENTRIES << 9), R) == (MAX_ENTRIES << 12, 7)
