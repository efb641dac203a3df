"""The device TLB against a dict: what it says of a range is what each page alone would say."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_sim.core.devtlb import MAX_BLOCKS, MAX_HUGE, DevTlb, HpaRun
from protocol.units import LEVEL_1G, LEVEL_2M, LEVEL_4K, Hpa, Iova, IovaPfn, Level

R, W = 1, 2
HOST = 0x1_0000_0000
PAGE = 4096


def fill(devtlb: DevTlb, page: int, hpa: int, level: int = 1, rights: int = R | W) -> None:
    devtlb.fill(IovaPfn(page), Hpa(hpa), Level(level), rights, None)


def test_a_range_inside_one_page_is_one_run_with_its_offset() -> None:
    devtlb = DevTlb()
    fill(devtlb, 3, HOST)
    assert devtlb.runs(Iova(0x3123), 0x45, False) == ([(HOST + 0x123, 0x45)], 0x45)
    assert devtlb.runs(Iova(0x3000), PAGE, True) == ([(HOST, PAGE)], PAGE)
    assert devtlb.runs(Iova(0x3FFF), 1, False) == ([(HOST + 0xFFF, 1)], 1)


def test_neighbours_in_the_host_are_joined_with_partial_pages_at_both_ends() -> None:
    devtlb = DevTlb()
    for n in range(3):
        fill(devtlb, 8 + n, HOST + n * PAGE)
    assert devtlb.runs(Iova(0x8F00), 0x1200, False) == ([(HOST + 0xF00, 0x1200)], 0x1200)


def test_scattered_pages_are_pieces_with_partial_pages_at_both_ends() -> None:
    devtlb = DevTlb()
    for n, frame in enumerate([9, 4, 5, 2]):
        fill(devtlb, 8 + n, HOST + frame * PAGE)
    runs, covered = devtlb.runs(Iova(0x8F00), 0x100 + 2 * PAGE + 0x10, False)
    assert runs == [(HOST + 0x9F00, 0x100), (HOST + 0x4000, 2 * PAGE), (HOST + 0x2000, 0x10)]
    assert covered == 0x100 + 2 * PAGE + 0x10


def test_a_range_is_covered_up_to_the_first_page_that_misses() -> None:
    devtlb = DevTlb()
    fill(devtlb, 8, HOST)
    fill(devtlb, 9, HOST + PAGE)
    fill(devtlb, 11, HOST + 3 * PAGE)
    assert devtlb.runs(Iova(0x8800), 4 * PAGE, False) == ([(HOST + 0x800, 0x1800)], 0x1800)
    assert devtlb.runs(Iova(0xA000), PAGE, False) == ([], 0)


def test_an_entry_for_reading_is_none_for_writing() -> None:
    devtlb = DevTlb()
    fill(devtlb, 8, HOST, rights=R)
    fill(devtlb, 9, HOST + PAGE, rights=W)
    assert devtlb.runs(Iova(0x8000), 2 * PAGE, False) == ([(HOST, PAGE)], PAGE)
    assert devtlb.runs(Iova(0x8000), 2 * PAGE, True) == ([], 0)
    assert devtlb.runs(Iova(0x9000), PAGE, True) == ([(HOST + PAGE, PAGE)], PAGE)


def test_an_answer_without_rights_is_not_cached() -> None:
    devtlb = DevTlb()
    fill(devtlb, 8, HOST, rights=0)
    assert list(devtlb.entries()) == []


def test_a_huge_leaf_serves_its_whole_span_and_ends_there() -> None:
    devtlb = DevTlb()
    fill(devtlb, 512 + 77, HOST, 2)
    fill(devtlb, 511, HOST + 0x80_0000)
    fill(devtlb, 1024, HOST + 0x90_0000)
    runs, covered = devtlb.runs((Iova(Iova(511 << 12) + 0xF00)), 0x100 + 0x20_0000 + 0x10, True)
    assert runs == [(HOST + 0x80_0F00, 0x100), (HOST, 0x20_0000), (HOST + 0x90_0000, 0x10)]
    assert covered == 0x100 + 0x20_0000 + 0x10
    assert devtlb.runs(Iova(600 << 12), 8, False) == ([(HOST + (88 << 12), 8)], 8)


@pytest.mark.parametrize(
    ("level", "start", "npages", "dropped"),
    [
        (2, 512, 1, True),
        (2, 1023, 1, True),
        (2, 511, 1, False),
        (2, 1024, 1, False),
        (2, 511, 2, True),
        (2, 0, 2048, True),
        (2, 600, 8, True),
        (3, (1 << 18) - 1, 1, True),
        (3, 1 << 18, 1, False),
        (3, 0, 1 << 52, True),
    ],
)
def test_a_huge_leaf_goes_when_any_of_its_pages_is_invalidated(
    level: int, start: int, npages: int, dropped: bool
) -> None:
    devtlb = DevTlb()
    fill(devtlb, {2: 700, 3: 5}[level], HOST, level)
    devtlb.invalidate(IovaPfn(start), npages)
    assert (list(devtlb.entries()) == []) is dropped


def test_an_invalidation_takes_both_rights() -> None:
    devtlb = DevTlb()
    fill(devtlb, 8, HOST)
    assert sorted(write for *_, write in devtlb.entries()) == [False, True]
    devtlb.invalidate(IovaPfn(8), 1)
    assert list(devtlb.entries()) == []


@pytest.mark.parametrize(("level", "capacity"), [(1, MAX_BLOCKS), (2, MAX_HUGE)])
def test_beyond_its_capacity_the_oldest_2_mib_of_that_right_go(level: int, capacity: int) -> None:
    devtlb = DevTlb()
    fill(devtlb, 1 << 30, HOST, rights=W)
    for n in range(capacity):
        fill(devtlb, n * 512, HOST, level, rights=R)
    assert devtlb.runs(Iova(0), 8, False)[1] == 8
    fill(devtlb, capacity * 512, HOST, level, rights=R)
    assert devtlb.runs(Iova(0), 8, False)[1] == 0
    assert devtlb.runs(Iova(512 * PAGE), 8, False)[1] == 8
    assert devtlb.runs(Iova(1 << 42), 8, True)[1] == 8
    assert sum(1 for _ in devtlb.entries()) == capacity + 1


def test_the_tag_of_a_page_is_that_of_the_walk_that_filled_it() -> None:
    devtlb = DevTlb()
    devtlb.fill(IovaPfn(8), Hpa(HOST), LEVEL_4K, R, 0x10001)
    devtlb.fill(IovaPfn(600), Hpa(HOST + 0x20_0000), LEVEL_2M, R | W, 0x20001)
    devtlb.fill(IovaPfn(1 << 18), Hpa(HOST), LEVEL_1G, R, 0x30001)
    pfn = HOST >> 12
    assert devtlb.tag_of(IovaPfn(8), False) == (pfn, 0x10001)
    assert devtlb.tag_of(IovaPfn(8), True) is None
    assert devtlb.tag_of(IovaPfn(1000), True) == (pfn + 512 + 488, 0x20001)
    assert devtlb.tag_of((IovaPfn(IovaPfn(1 << 18) + 513)), False) == (pfn + 513, 0x30001)


# -- against the dict ----------------------------------------------------------------------------------

# Four regions of 2 MiB: two lie as one piece in the host, the others are permuted page by page.
WHOLE = {0: 7, 2: 3}
LAST_PAGE = 4 * 512


def frame_of(page: int) -> int:
    region, within = divmod(page, 512)
    if region in WHOLE:
        return WHOLE[region] * 512 + within
    return (10 + region) * 512 + (within ^ 1 if region == 1 else within * 5 % 512)


class Fill(NamedTuple):
    page: int
    huge: bool
    rights: int


class Drop(NamedTuple):
    page: int
    npages: int


EDGES = st.sampled_from([0, 1, 510, 511, 512, 513, 1023, 1024, 1535, 1536, 2047])
NEAR = st.integers(500, 530) | EDGES | st.integers(0, LAST_PAGE - 1)
STEPS = st.lists(
    st.builds(Fill, NEAR, st.booleans(), st.sampled_from([R, W, R | W]))
    | st.builds(lambda page, n: Drop(page >> n << n, 1 << n), NEAR, st.integers(0, 11)),
    max_size=40,
)


class LeafOracle:
    """The leaves as they are: (first page, pages, right)."""

    def __init__(self) -> None:
        self.leaves: set[tuple[int, int, int]] = set()

    def bytes_from(self, iova: int, size: int, right: int) -> list[int]:
        """Where each page of the range lies, up to the first that no leaf covers."""
        found = []
        for page in range(iova // PAGE, (iova + size - 1) // PAGE + 1):
            if not any(first <= page < first + n and r == right for first, n, r in self.leaves):
                break
            found.append(frame_of(page))
        return found


def take(devtlb: DevTlb, oracle: LeafOracle, step: Fill | Drop) -> None:
    if isinstance(step, Drop):
        end = step.page + step.npages
        devtlb.invalidate(IovaPfn(step.page), step.npages)
        oracle.leaves = {
            (first, n, r) for first, n, r in oracle.leaves if first + n <= step.page or end <= first
        }
        return
    huge = step.huge and step.page // 512 in WHOLE
    first, n = (step.page // 512 * 512, 512) if huge else (step.page, 1)
    fill(devtlb, step.page, frame_of(first) * PAGE, 2 if huge else 1, step.rights)
    oracle.leaves |= {(first, n, r) for r in (R, W) if step.rights & r}


def pages_of(runs: list[HpaRun]) -> list[int]:
    """The frames that runs touch, in order, one for each page of the iova."""
    return [frame for hpa, size in runs for frame in range(hpa // PAGE, (hpa + size - 1) // PAGE + 1)]


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, page=NEAR, offset=st.integers(0, PAGE - 1), size=st.integers(1, 40 * PAGE))
def test_a_range_is_what_its_pages_are_one_by_one(
    steps: list[Fill | Drop], page: int, offset: int, size: int
) -> None:
    devtlb, oracle = DevTlb(), LeafOracle()
    for step in steps:
        take(devtlb, oracle, step)
    iova = page * PAGE + offset
    for write, right in ((False, R), (True, W)):
        runs, covered = devtlb.runs(Iova(iova), size, write)
        expected = oracle.bytes_from(iova, size, right)
        assert pages_of(runs) == expected
        assert covered == sum(n for _, n in runs)
        assert covered == min(size, max(len(expected) * PAGE - offset, 0))
        if runs:
            assert runs[0][0] % PAGE == offset
            assert all(hpa % PAGE == 0 for hpa, _ in runs[1:])
