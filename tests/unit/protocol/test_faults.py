"""Fault record against words worked by hand from its table [VT-d 10.4], and the sets of reasons."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.hw.faults import (
    QUALIFIED,
    RECOVERABLE,
    AddressType,
    FaultReason,
    FaultRecord,
    FaultType,
)
from protocol.hw.fields import FormatError
from protocol.units import Iova, Pasid


def raw(qw0: int, qw1: int) -> bytes:
    return struct.pack("<2Q", qw0, qw1)


READ = FaultRecord(
    sid=0x3A08,
    addr=Iova(0x1_2345_6000),
    reason=FaultReason.SGN_7,
    type=FaultType.READ,
    pasid_present=True,
    pasid=Pasid(1),
)


@pytest.mark.parametrize(
    ("record", "qw1"),
    [
        (READ, 0xC000_0186_8000_3A08),
        (replace(READ, type=FaultType.WRITE, reason=FaultReason.SGN_6), 0x8000_0185_8000_3A08),
        (replace(READ, type=FaultType.PAGE_REQUEST, reason=FaultReason.SCT_8), 0x8000_0147_9000_3A08),
        (replace(READ, type=FaultType.ATOMIC), 0xC000_0186_9000_3A08),
        (replace(READ, at=AddressType.TRANSLATION_REQUEST), 0xD000_0186_8000_3A08),
        (replace(READ, at=AddressType.TRANSLATED), 0xE000_0186_8000_3A08),
        (replace(READ, priv=True), 0xC000_0186_A000_3A08),
        (replace(READ, exec=True), 0xC000_0186_C000_3A08),
        (replace(READ, pasid=Pasid(0xFFFFF)), 0xCFFF_FF86_8000_3A08),
        (replace(READ, pasid_present=False, pasid=Pasid(0)), 0xC000_0086_0000_3A08),
        (replace(READ, f=False), 0x4000_0186_8000_3A08),
    ],
)
def test_record_has_the_bits_of_the_table(record: FaultRecord, qw1: int) -> None:
    assert record.to_bytes() == raw(0x1_2345_6000, qw1)
    assert FaultRecord.from_bytes(raw(0x1_2345_6000, qw1)) == record


@pytest.mark.parametrize("n", [0, 11, 80, 91])
def test_reserved_bit_is_a_format_error(n: int) -> None:
    word = int.from_bytes(READ.to_bytes(), "little") | 1 << n
    with pytest.raises(FormatError):
        FaultRecord.from_bytes(word.to_bytes(16, "little"))


def test_reserved_address_type_is_a_format_error() -> None:
    with pytest.raises(FormatError):
        FaultRecord.from_bytes(raw(0, 0xB000_0000_0000_0000))


@given(st.binary(max_size=20))
def test_foreign_bytes_give_a_record_or_a_format_error(junk: bytes) -> None:
    try:
        record = FaultRecord.from_bytes(junk)
    except FormatError:
        return
    assert record.to_bytes() == junk


@given(
    st.builds(
        FaultRecord,
        sid=st.integers(0, 0xFFFF),
        addr=st.integers(0, (1 << 52) - 1).map(lambda page: Iova(page << 12)),
        reason=st.integers(0, 0xFF),
        type=st.sampled_from(FaultType),
        at=st.sampled_from(AddressType),
        pasid_present=st.booleans(),
        pasid=st.integers(0, (1 << 20) - 1).map(Pasid),
        exec=st.booleans(),
        priv=st.booleans(),
        f=st.booleans(),
    )
)
def test_record_survives_the_round_trip(record: FaultRecord) -> None:
    assert FaultRecord.from_bytes(record.to_bytes()) == record


@pytest.mark.parametrize(
    "record",
    [
        replace(READ, reason=0x100),
        replace(READ, sid=0x1_0000),
        replace(READ, pasid=Pasid(1 << 20)),
        replace(READ, addr=Iova(0x10)),
    ],
)
def test_record_of_ours_past_a_limit_is_an_assertion(record: FaultRecord) -> None:
    with pytest.raises(AssertionError, match=r"does not fit|is not aligned"):
        record.to_bytes()


def test_sets_of_reasons_are_the_ones_of_the_table() -> None:
    assert {0x79, 0x85, 0x86} == RECOVERABLE
    unqualified = {0x30, 0x31, 0x32, 0x33, 0x38, 0x39, 0x3A, 0x40, 0x50, 0x58}
    assert set(FaultReason) - QUALIFIED == unqualified
