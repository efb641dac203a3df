"""The bits of a slot against a set of page numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.core.slots.dirty_bitmap import DirtyBitmap, bitmap_bytes, is_set, runs

PAGES = st.integers(1, 20_000)


def pages_of(bitmap: bytes) -> set[int]:
    return {page for page in range(len(bitmap) * 8) if bitmap[page // 8] >> page % 8 & 1}


def bytes_of(pages: set[int], npages: int) -> bytes:
    """As user space would pass them: little-endian words, page 0 in bit 0 of byte 0."""
    return sum(1 << page for page in pages).to_bytes(bitmap_bytes(npages), "little")


@pytest.mark.parametrize(("npages", "size"), [(1, 8), (64, 8), (65, 16), (100, 16), (128, 16), (1024, 128)])
def test_user_space_gets_whole_words(npages: int, size: int) -> None:
    assert bitmap_bytes(npages) == size
    assert DirtyBitmap(npages).read() == bytes(size)


@pytest.mark.parametrize("npages", [1, 7, 8, 63, 64, 65, 100, 128])
def test_a_full_bitmap_has_no_bit_beyond_the_slot(npages: int) -> None:
    assert pages_of(DirtyBitmap(npages, full=True).read()) == set(range(npages))


@given(npages=PAGES, data=st.data())
def test_marks_and_clears_are_those_of_a_set(npages: int, data: st.DataObject) -> None:
    some = st.sets(st.integers(0, npages - 1), max_size=40)
    bitmap, model = DirtyBitmap(npages), set[int]()
    for _ in range(3):
        for page in data.draw(some):
            bitmap.mark(page)
            model.add(page)
        assert pages_of(bitmap.read()) == model
        first = data.draw(st.integers(0, (npages - 1) // 64)) * 64
        wanted = {page for page in data.draw(some) if page >= first}
        mask = bytes_of({page - first for page in wanted}, npages - first)
        cleared = {first + page for page in pages_of(bitmap.clear(first, mask))}
        assert cleared == model & wanted
        model -= wanted
    assert [page for page in sorted(model) if page not in bitmap] == []
    assert pages_of(bitmap.take()) == model
    assert pages_of(bitmap.read()) == set()


@given(npages=PAGES, data=st.data())
def test_runs_hold_every_page_and_no_clean_word(npages: int, data: st.DataObject) -> None:
    dirty = data.draw(st.sets(st.integers(0, npages - 1), max_size=60))
    bitmap = bytes_of(dirty, npages)
    found = list(runs(bitmap))
    inside = {page for start, end in found for page in range(start, end)}
    assert dirty <= inside
    assert {page // 64 for page in inside} == {page // 64 for page in dirty}
    assert all(one[1] < other[0] for one, other in pairwise(found)), "runs that touch"
    assert all(is_set(bitmap, page) == (page in dirty) for page in inside)


@pytest.mark.parametrize("page", range(18))
@pytest.mark.parametrize("count", [1, 2, 6, 7, 8, 9, 15, 16, 17, 64])
def test_a_range_is_marked_across_bytes_beside_what_is_marked_already(page: int, count: int) -> None:
    bitmap, marked = DirtyBitmap(128), {0, 17, 90}
    for one in marked:
        bitmap.mark(one)
    bitmap.mark(page, count)
    assert pages_of(bitmap.read()) == marked | set(range(page, page + count))
