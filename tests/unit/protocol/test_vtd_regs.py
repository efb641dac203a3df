"""Registers of the remapping unit against numbers worked by hand from their tables [VT-d 11.4]."""

from __future__ import annotations

import mmap
from itertools import pairwise

import pytest

from protocol.hw.register_page import RegisterPage
from protocol.hw.vtd_regs import (
    FSTS_FRI,
    IQERCD_ICESID,
    IQERCD_IQEI,
    IQERCD_ITESID,
    REGISTER_PAGE,
    RTADDR_RTA,
    RTADDR_TTM,
    RW1C,
    WIDE,
    EventControl,
    Fsts,
    Gcmd,
    Reg,
    TranslationTableMode,
    invalidation_ring,
    page_request_ring,
    width,
)


def test_registers_lie_side_by_side_and_none_overlaps_another() -> None:
    registers = sorted(offset for name, offset in vars(Reg).items() if name.isupper())
    assert len(registers) == 30
    ends = [(register, register + width(register)) for register in registers]
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert all(register % width(register) == 0 for register in registers if register in WIDE)


@pytest.mark.parametrize(
    ("bits", "number"),
    [
        (Gcmd.TE, 0x8000_0000),
        (Gcmd.SRTP, 0x4000_0000),
        (Gcmd.QIE, 0x0400_0000),
        (Fsts.PFO | Fsts.PPF, 0x3),
        (Fsts.IQE | Fsts.ICE | Fsts.ITE, 0x70),
        (EventControl.IM, 0x8000_0000),
        (EventControl.IP, 0x4000_0000),
    ],
)
def test_bits_are_those_of_the_table(bits: int, number: int) -> None:
    assert bits == number


def test_what_software_clears_by_storing_1() -> None:
    assert RW1C == {Reg.FSTS: 0x71, Reg.ICS: 1, Reg.PRS: 3}


def test_fields_within_registers() -> None:
    assert FSTS_FRI.get(0xAB71) == 0xAB
    assert IQERCD_IQEI.get(0x1111_2222_0000_0003) == 3
    assert IQERCD_ITESID.get(0x1111_2222_0000_0003) == 0x2222
    assert IQERCD_ICESID.get(0x1111_2222_0000_0003) == 0x1111
    assert RTADDR_TTM.put(TranslationTableMode.SCALABLE) | RTADDR_RTA.put(0x5000) == 0x5400


@pytest.mark.parametrize(
    ("iqa", "base", "entries", "entry_bytes"),
    [
        (0x5800, 0x5000, 128, 32),
        (0x5801, 0x5000, 256, 32),
        (0x5000, 0x5000, 256, 16),
        (0x5807, 0x5000, 1 << 14, 32),
    ],
)
def test_the_invalidation_queue_is_as_iqa_says(iqa: int, base: int, entries: int, entry_bytes: int) -> None:
    ring = invalidation_ring(iqa)
    assert (ring.base, ring.entries, ring.entry_bytes) == (base, entries, entry_bytes)


@pytest.mark.parametrize(("pqa", "entries", "size"), [(0x7000, 128, 4096), (0x7004, 2048, 65536)])
def test_the_page_request_queue_is_as_pqa_says(pqa: int, entries: int, size: int) -> None:
    ring = page_request_ring(pqa)
    assert (ring.base, ring.entries, ring.size) == (0x7000, entries, size)


@pytest.mark.parametrize(
    ("offset", "index"), [(0, 0), (32, 1), (4064, 127), (4096, None), (16, None), (1 << 63, None), (8, None)]
)
def test_a_head_or_tail_names_an_entry_or_nothing(offset: int, index: int | None) -> None:
    assert invalidation_ring(0x5800).index(offset) == index


def test_a_ring_wraps_at_its_end() -> None:
    ring = invalidation_ring(0x5800)
    assert ring.offset(127) == 4064
    assert ring.offset(128) == 0
    assert ring.distance(127, 2) == 3
    assert ring.distance(5, 5) == 0


def test_a_register_is_stored_in_its_own_width_and_where_it_lies() -> None:
    memory = mmap.mmap(-1, REGISTER_PAGE)
    page = RegisterPage(memoryview(memory))
    page.store(Reg.IQT, 0x1122_3344_5566_7788)
    page.store(Reg.GCMD, 0x8400_0000)
    page.store64(0x408, 1 << 63)
    assert memory[0x88:0x90] == bytes.fromhex("8877665544332211")
    assert memory[0x18:0x20] == bytes.fromhex("0000008400000000")
    assert memory[0x40F] == 0x80
    assert page.load(Reg.IQT) == 0x1122_3344_5566_7788
    assert page.load(Reg.GCMD) == 0x8400_0000
    assert page.load64(0x408) == 1 << 63


def test_a_page_that_is_mapped_read_only_takes_no_store() -> None:
    page = RegisterPage(memoryview(bytes(REGISTER_PAGE)))
    with pytest.raises(TypeError):
        page.store(Reg.IQT, 0)
