"""Runs of pages beside dicts of pages, and shadow tables beside a walk of the same words."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.pt.bits import READ
from simulator.ghost.spans import Spans, Translation, merged, side_by_side
from simulator.ghost.tables import ShadowTables

STEPS = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 8), st.none() | st.integers(0, 99)), max_size=30
)


def flat(runs: list[tuple[int, int, Translation]]) -> dict[int, int]:
    return {start + n: value.frame + n for start, end, value in runs for n in range(end - start)}


@given(STEPS, st.integers(0, 20), st.integers(1, 10))
def test_runs_are_what_a_dict_of_pages_is(
    steps: list[tuple[int, int, int | None]], first: int, size: int
) -> None:
    spans: Spans[Translation] = Spans()
    pages: dict[int, int] = {}
    for start, count, frame in steps:
        before = {page: pages[page] for page in range(start, start + count) if page in pages}
        if frame is None:
            assert flat(spans.clear(start, start + count)) == before
            for page in before:
                del pages[page]
        else:
            assert flat(spans.put(start, start + count, Translation(frame, READ))) == before
            pages.update({start + n: frame + n for n in range(count)})
    assert flat(list(spans)) == pages
    inside = {page: frame for page, frame in pages.items() if first <= page < first + size}
    assert flat(spans.within(first, first + size)) == inside
    assert flat(merged(spans.within(first, first + size))) == inside
    for page in range(30):
        found = spans.get(page)
        assert (None if found is None else found.frame) == pages.get(page)


@given(STEPS, STEPS)
def test_two_lists_of_runs_side_by_side(
    one: list[tuple[int, int, int | None]], other: list[tuple[int, int, int | None]]
) -> None:
    runs = []
    for steps in (one, other):
        spans: Spans[Translation] = Spans()
        for start, count, frame in steps:
            spans.put(start, start + count, Translation(frame or 0, READ))
        runs.append(spans.within(0, 30))
    was, now = flat(runs[0]), flat(runs[1])
    seen = 0
    for low, high, a, b in side_by_side(runs[0], runs[1], 0, 30):
        for page in range(low, high):
            seen += 1
            assert (None if a is None else a.frame + page - low) == was.get(page)
            assert (None if b is None else b.frame + page - low) == now.get(page)
    assert seen == 30


ROOT, TABLES = 0x1000, 6
LARGE = 1 << 7
LOOKED_AT = [n * 512 + k for n in range(3) for k in range(3)]


def walked(words: dict[int, int], page: int) -> tuple[int, int] | None:
    """(frame, rights) of a page by a walk of two levels."""
    rights, table = 7, ROOT
    for level in (2, 1):
        index = page >> 9 * (level - 1) & 511
        entry = words.get(table + 8 * index, 0)
        rights &= entry & 7
        if not rights:
            return None
        if level == 1 or entry & LARGE:
            inside = page & (1 << 9 * (level - 1)) - 1
            return ((entry >> 12) & ~((1 << 9 * (level - 1)) - 1)) + inside, rights
        table = entry & ~0xFFF
    raise AssertionError


@pytest.mark.parametrize("seed", range(20))
def test_shadow_tables_translate_as_a_walk_of_the_same_words_does(seed: int) -> None:
    random = Random(seed)
    shadow, words = ShadowTables(), dict[int, int]()
    tables = [ROOT + 0x1000 * n for n in range(1, TABLES)]
    shadow.add_root(ROOT, 2)
    for _ in range(300):
        before = {page: walked(words, page) for page in LOOKED_AT}
        linked = {words.get(ROOT + 8 * n, 0) & ~0xFFF for n in range(3)}
        if random.random() < 0.3:
            at = ROOT + 8 * random.randrange(3)
            free = [table for table in tables if table not in linked]
            choices = [0, random.randrange(1, 9) << 21 | LARGE | random.choice((1, 7))]
            entry = random.choice([*choices, random.choice(free) | random.choice((1, 7))])
        else:
            at = random.choice(tables) + 8 * random.randrange(3)
            entry = random.choice((0, random.randrange(1, 4096) << 12 | random.choice((1, 3, 7))))
        stored = shadow.store(at, entry)
        words[at] = entry
        after = {page: walked(words, page) for page in LOOKED_AT}
        for page, there in after.items():
            held = shadow.roots[ROOT].get(page)
            assert (None if held is None else (held.frame, held.rights)) == there
        told = {
            page: change
            for change in stored.changes
            for page in LOOKED_AT
            if change.start <= page < change.end
        }
        assert {page for page in LOOKED_AT if before[page] != after[page]} == set(told)
        for page, change in told.items():
            was, now = before[page], after[page]
            lost = was is not None and (now is None or now[0] != was[0] or bool(was[1] & ~now[1]))
            gained = now is not None and (was is None or now[0] != was[0] or bool(now[1] & ~was[1]))
            assert (change.lost, change.gained) == (lost, gained)
        still = {words.get(ROOT + 8 * n, 0) & ~0xFFF for n in range(3)}
        assert set(stored.cut) <= linked - still


def test_a_root_that_is_dropped_is_walked_no_more() -> None:
    shadow = ShadowTables()
    shadow.store(0x2000, 0x5000 | 7)
    shadow.add_root(ROOT, 2)
    shadow.store(ROOT, 0x2000 | 7)
    assert shadow.roots[ROOT].get(0) == Translation(5, 7)
    assert set(shadow.drop_root(ROOT)) == {ROOT, 0x2000}
    assert not shadow.is_linked(0x2000)
