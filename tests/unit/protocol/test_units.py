"""Conversions against numbers worked by hand."""

from __future__ import annotations

import pytest

from protocol import units
from protocol.errors import UapiError, errno_name
from protocol.units import Gfn, GfnSpan, Gpa, Hpa, Iova, Level


def test_masks_are_inclusive_as_the_manuals_write_them() -> None:
    assert units.bit(11) == 0x800
    assert units.bits(5, 3) == 0x38
    assert units.bits(51, 12) == 0x000F_FFFF_FFFF_F000
    assert units.bits(7, 7) == 0x80


def test_an_address_lies_in_its_frame() -> None:
    assert units.gfn_of(Gpa(0x12345_678)) == 0x12345
    assert units.pfn_of(Hpa(0x1_0000_0FFF)) == 0x10_0000
    assert units.gpa_of_iova(Iova(0xFFFF_F123)) == 0xFFFF_F123


@pytest.mark.parametrize(("level", "pages"), [(1, 1), (2, 512), (3, 262_144), (4, 134_217_728)])
def test_each_level_maps_512_times_the_one_below(level: int, pages: int) -> None:
    assert units.pages_of_level(Level(level)) == pages
    assert units.size_of_level(Level(level)) == pages * 4096


def test_alignment_goes_to_the_next_multiple_or_stays() -> None:
    assert [units.align_down(v, 0x1000) for v in (0xFFF, 0x1000, 0x1001)] == [0, 0x1000, 0x1000]
    assert [units.align_up(v, 0x1000) for v in (0xFFF, 0x1000, 0x1001)] == [0x1000, 0x1000, 0x2000]


def test_a_span_is_half_open() -> None:
    span = GfnSpan.of_pages(Gfn(10), 5)
    assert (span.start, span.end, span.npages) == (10, 15, 5)
    assert [gfn in span for gfn in (9, 10, 14, 15)] == [False, True, True, False]
    assert not span.overlaps(GfnSpan(Gfn(15), Gfn(20)))
    assert span.overlaps(GfnSpan(Gfn(14), Gfn(20)))
    assert not span.overlaps(GfnSpan(Gfn(5), Gfn(10)))
    assert str(span) == "gfn 0xa..0xf"


@pytest.mark.parametrize(("start", "end"), [(2, 1), (-1, 1)])
def test_a_span_backwards_is_a_bug(start: int, end: int) -> None:
    with pytest.raises(AssertionError, match="span "):
        GfnSpan(Gfn(start), Gfn(end))


def test_an_error_names_its_errno() -> None:
    error = UapiError(22, "as_id 7: at most 1")
    assert str(error) == "[EINVAL] as_id 7: at most 1"
    assert errno_name(4095) == "errno 4095"
