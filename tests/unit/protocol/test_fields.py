"""Bit fields: positions, pieces, shifts and biases, and who is blamed for a value that does not fit."""

from __future__ import annotations

import re
from inspect import get_annotations
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.hw import dsa, faults, pasid_entry, prq, qi
from protocol.hw.fields import (
    Field,
    FormatError,
    Layout,
    at,
    byte_at,
    covered,
    flag,
    load,
    page_at,
    require_zero,
)


def test_field_lies_where_the_table_says() -> None:
    assert at(15, 8).mask == 0xFF00
    assert at(15, 8).put(0xAB) == 0xAB00
    assert at(15, 8).get(0x12AB34) == 0xAB
    assert flag(5).get(0x20) is True
    assert byte_at(2, 2).put(0xBEEF) == 0xBEEF0000


def test_split_field_joins_its_pieces_low_piece_first() -> None:
    field = Field(((15, 12), (63, 52)))
    assert field.put(0xABC5) == 0xABC0_0000_0000_5000
    assert field.get(0xABCF_FFFF_FFFF_5FFF) == 0xABC5


def test_shift_and_bias_are_undone() -> None:
    assert page_at(127, 76).put(0x7000) == 0x7 << 76
    assert at(21, 16, bias=1).put(48) == 0x2F0000
    assert at(21, 16, bias=1).get(0x2F0000) == 48


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (at(19, 0), 1 << 20),
        (at(19, 0), -1),
        (page_at(63, 12), 0x1001),
        (page_at(51, 12), 1 << 52),
        (at(21, 16, bias=1), 0),
        (at(21, 16, bias=1), 65),
    ],
)
def test_value_of_ours_that_does_not_fit_is_an_assertion(field: Field, value: int) -> None:
    with pytest.raises(AssertionError, match=r"does not fit|is not aligned"):
        field.put(value)


def test_number_without_meaning_is_a_format_error() -> None:
    with pytest.raises(FormatError):
        at(5, 4, qi.IotlbGranularity).get(0)


def test_overlapping_fields_are_an_assertion() -> None:
    with pytest.raises(AssertionError, match="overlaps another field"):
        covered({"a": at(7, 4), "b": flag(4)})


def test_load_refuses_another_length_and_require_zero_a_set_bit() -> None:
    assert load(b"\x01\x02", 2, "x") == 0x0201
    with pytest.raises(FormatError):
        load(b"\x01", 2, "x")
    require_zero(0xF0, 0x0F, "x")
    with pytest.raises(FormatError):
        require_zero(0xF1, 0x0F, "x")


@given(st.integers(0, (1 << 16) - 1), st.integers(0, (1 << 64) - 1))
def test_put_and_get_are_inverse_whatever_lies_around(value: int, noise: int) -> None:
    field = Field(((15, 12), (63, 52)))
    assert field.get(field.put(value) | (noise & ~field.mask)) == value


RECORDS: list[tuple[type, Layout, set[str]]] = [
    (pasid_entry.PasidEntry, pasid_entry.LAYOUT, set()),
    (faults.FaultRecord, faults.LAYOUT, set()),
    (prq.PageRequest, prq.LAYOUT, set()),
    (dsa.Descriptor, dsa.LAYOUT, {"op_specific"}),
    (dsa.CompletionRecord, dsa.CR_LAYOUT, {"op_specific"}),
    (qi.ContextInv, qi.ContextInv.LAYOUT, set()),
    (qi.IotlbInv, qi.IotlbInv.LAYOUT, set()),
    (qi.DevTlbInv, qi.DevTlbInv.LAYOUT, set()),
    (qi.IecInv, qi.IecInv.LAYOUT, set()),
    (qi.WaitDescriptor, qi.WaitDescriptor.LAYOUT, set()),
    (qi.PasidIotlbInv, qi.PasidIotlbInv.LAYOUT, set()),
    (qi.PasidCacheInv, qi.PasidCacheInv.LAYOUT, set()),
    (qi.PasidDevTlbInv, qi.PasidDevTlbInv.LAYOUT, set()),
    (qi.PageGroupResponse, qi.PageGroupResponse.LAYOUT, set()),
]


@pytest.mark.parametrize(("record", "layout", "apart"), RECORDS)
def test_every_member_of_a_record_has_a_place(record: type, layout: Layout, apart: set[str]) -> None:
    members = {name for name, kind in get_annotations(record).items() if not str(kind).startswith("ClassVar")}
    assert members == set(layout) | apart


@pytest.mark.parametrize("layout", [layout for _, layout, _ in RECORDS])
@given(data=st.data())
def test_what_is_made_for_a_layout_is_its_fields_one_by_one(layout: Layout, data: st.DataObject) -> None:
    word = data.draw(st.integers(0, covered(layout))) & covered(layout)
    try:
        expected = {name: field.get(word) for name, field in layout.items()}
    except FormatError:
        with pytest.raises(FormatError):
            layout.unpack(word)
        return
    assert layout.unpack(word) == expected
    record = SimpleNamespace(**expected)
    assert layout.pack(record) == sum(field.put(expected[name]) for name, field in layout.items()) == word


@pytest.mark.parametrize("layout", [layout for _, layout, _ in RECORDS])
def test_a_value_of_ours_that_does_not_fit_is_an_assertion_in_every_field(layout: Layout) -> None:
    for name, field in layout.items():
        for wrong in (-1, (1 << field.width) << field.shift) + ((1,) if field.shift else ()):
            values = {other: of.bias for other, of in layout.items()} | {name: wrong + field.bias}
            with pytest.raises(AssertionError, match=re.escape(f"bits {field}:")):
                layout.pack(SimpleNamespace(**values))
