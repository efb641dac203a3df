"""Index math against the address bits of the format tables [SDM 29.3.2]."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.pt import geometry
from protocol.units import Gfn, GfnSpan, Level

LOW_BIT = {5: 48, 4: 39, 3: 30, 2: 21, 1: 12}


@pytest.mark.parametrize("level", LOW_BIT)
def test_a_level_is_indexed_by_its_nine_address_bits(level: int) -> None:
    low = LOW_BIT[level]
    assert geometry.level_shift(Level(level)) == low
    for index in (0, 1, 0x155, 0x1FF):
        gpa = index << low | (1 << low) - 1
        assert geometry.index_of(Gfn(gpa >> 12), Level(level)) == index


@pytest.mark.parametrize(("levels", "width"), [(4, 48), (5, 57)])
def test_a_root_translates_48_or_57_bits(levels: int, width: int) -> None:
    assert geometry.address_bits(Level(levels)) == width
    assert geometry.gfn_limit(Level(levels)) == 1 << (width - 12)


@pytest.mark.parametrize(
    ("level", "start", "end"),
    [(1, 0x12345, 0x12346), (2, 0x12200, 0x12400), (3, 0, 0x40000), (4, 0, 0x800_0000)],
)
def test_an_entry_covers_the_aligned_span_around_its_gfn(level: int, start: int, end: int) -> None:
    assert geometry.entry_span(Gfn(0x12345), Level(level)) == GfnSpan(Gfn(start), Gfn(end))
    assert geometry.entry_start(Gfn(0x12345), Level(level)) == start


@given(st.integers(0, (1 << 45) - 1))
def test_the_indices_of_all_levels_spell_the_gfn(gfn: int) -> None:
    spelled = 0
    for level in (5, 4, 3, 2, 1):
        spelled = spelled << 9 | geometry.index_of(Gfn(gfn), Level(level))
    assert spelled == gfn
