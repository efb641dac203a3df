"""The record of what should be mapped, against a plain dict of states."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmd.core.map_record import MAPPED, NEVER, READ_ONLY, WRITABLE, ZAPPED, MapRecord
from protocol.units import Gfn, GfnSpan, Level

LIMIT = 3000
gfns = st.integers(0, LIMIT - 1)
changes = st.one_of(
    st.tuples(st.just("map"), gfns, st.sampled_from([1, 1, 1, 2]), st.booleans()),
    st.tuples(st.sampled_from(["zap", "protect"]), gfns, st.integers(1, LIMIT), st.just(False)),
)


def apply(record: MapRecord, plain: dict[int, int], change: tuple[str, int, int, bool]) -> None:
    what, gfn, number, writable = change
    span = GfnSpan(Gfn(gfn), Gfn(gfn + number))
    if what == "map":
        record.map(Gfn(gfn), Level(number), writable=writable)
        size = 1 if number == 1 else 512
        start = gfn // size * size
        plain |= dict.fromkeys(range(start, start + size), WRITABLE if writable else READ_ONLY)
        return
    was = {g: state for g, state in plain.items() if g in span and state in MAPPED}
    if what == "zap":
        record.zap(span)
        plain |= dict.fromkeys(was, ZAPPED)
    else:
        record.write_protect(span)
        plain |= dict.fromkeys(was, READ_ONLY)


@given(st.lists(changes, max_size=15), st.integers(1, 600))
def test_a_record_follows_every_request(made: list[tuple[str, int, int, bool]], count: int) -> None:
    record, plain = MapRecord(), dict[int, int]()
    for change in made:
        apply(record, plain, change)
    for gfn in range(2 * LIMIT):
        assert record.state(Gfn(gfn)) == plain.get(gfn, NEVER)
    for states in (MAPPED, (ZAPPED,)):
        having = sorted(gfn for gfn, state in plain.items() if state in states)
        assert record.count(states) == len(having)
        chosen = list(record.spread(states, count))
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(having)
        assert bool(chosen) == bool(having)
        assert len(chosen) <= 3 * count + 16


def test_zapping_everything_looks_only_at_what_is_there() -> None:
    record = MapRecord()
    record.map(Gfn(1 << 44), Level(3), writable=True)
    assert record.count(MAPPED) == 1 << 18
    record.zap(GfnSpan(Gfn(0), Gfn(1 << 45)))
    assert record.count(MAPPED) == 0
    assert record.state(Gfn((1 << 44) + 5)) == ZAPPED


def test_a_page_changed_inside_a_huge_one_leaves_its_other_regions_alone() -> None:
    record = MapRecord()
    record.map(Gfn(0), Level(3), writable=True)
    record.map(Gfn(700), Level(1), writable=False)
    assert record.count((READ_ONLY,)) == 1
    assert record.count((WRITABLE,)) == (1 << 18) - 1
