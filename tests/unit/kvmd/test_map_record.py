"""The record of what should be mapped, against a plain dict of states."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmd.core.tables.map_record import MAPPED, NEVER_MAPPED, READ_ONLY, WRITABLE, ZAPPED, MapRecord
from protocol.units import Gfn, Level

LIMIT = 3000
RO, RW, PS, GONE, FROZEN = 0x1, 0x3, 0x80, 0, 0x5A0
stores = st.tuples(
    st.integers(0, LIMIT - 1), st.sampled_from([1, 1, 1, 2]), st.sampled_from([RO, RW, GONE, FROZEN])
)


def store(record: MapRecord, plain: dict[int, int], gfn: int, level: int, entry: int) -> None:
    record.store(Gfn(gfn), Level(level), entry | PS if level > 1 and entry & 1 else entry)
    size = 512 ** (level - 1)
    for frame in range(gfn // size * size, gfn // size * size + size):
        if entry & 1:
            plain[frame] = WRITABLE if entry & 2 else READ_ONLY
        elif plain.get(frame) in MAPPED:
            plain[frame] = ZAPPED


@given(st.lists(stores, max_size=15), st.integers(1, 600))
def test_a_record_follows_every_store(made: list[tuple[int, int, int]], count: int) -> None:
    record, plain = MapRecord(), dict[int, int]()
    for gfn, level, entry in made:
        store(record, plain, gfn, level, entry)
    for gfn in range(2 * LIMIT):
        assert record.state(Gfn(gfn)) == plain.get(gfn, NEVER_MAPPED)
    for states in (MAPPED, (ZAPPED,)):
        having = sorted(gfn for gfn, state in plain.items() if state in states)
        assert record.count(states) == len(having)
        chosen = list(record.spread(states, count))
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(having)
        assert bool(chosen) == bool(having)
        assert len(chosen) <= 3 * count + 16


def test_a_gigabyte_comes_and_goes() -> None:
    record = MapRecord()
    record.store(Gfn(1 << 44), Level(3), RW | PS)
    assert record.count(MAPPED) == 1 << 18
    record.store(Gfn((1 << 44) + 77), Level(3), GONE)
    assert record.count(MAPPED) == 0
    assert record.state(Gfn((1 << 44) + 5)) == ZAPPED


def test_a_table_that_takes_a_leafs_place_translates_as_it_did() -> None:
    record = MapRecord()
    record.store(Gfn(0), Level(3), RW | PS)
    record.store(Gfn(0), Level(3), 0x5000 | RW)
    record.store(Gfn(700), Level(1), RO)
    assert record.count((READ_ONLY,)) == 1
    assert record.count((WRITABLE,)) == (1 << 18) - 1
