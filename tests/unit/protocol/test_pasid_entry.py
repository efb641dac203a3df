"""PASID-table entry against bytes worked by hand from its table [VT-d 9.6]."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.hw.fields import FormatError
from protocol.hw.pasid_entry import (
    AW_OF_LEVEL,
    PASID_ENTRY_SIZE,
    PasidEntry,
    Pgtt,
    is_present,
    reserved_violation,
)
from protocol.units import Hpa, Level


def raw(*qwords: int) -> bytes:
    return struct.pack("<8Q", *qwords, *(0,) * (8 - len(qwords)))


KVM_ENTRY = PasidEntry(
    present=True,
    aw=2,
    pgtt=Pgtt.SECOND_STAGE,
    ss_ptr=Hpa(0x1234_5678_9000),
    did=0x42,
    pwsnp=True,
    pgsnp=True,
)
KVM_RAW = raw(0x1234_5678_9089, 0x0180_0042)


@pytest.mark.rfc("RFC-58")
def test_entry_of_a_kvm_domain_has_the_bits_of_the_table() -> None:
    assert KVM_ENTRY.to_bytes() == KVM_RAW
    assert PasidEntry.from_bytes(KVM_RAW) == KVM_ENTRY


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (replace(KVM_ENTRY, aw=3), raw(0x1234_5678_908D, 0x0180_0042)),
        (replace(KVM_ENTRY, fpd=True), raw(0x1234_5678_908B, 0x0180_0042)),
        (replace(KVM_ENTRY, ssee=True), raw(0x1234_5678_90A9, 0x0180_0042)),
        (replace(KVM_ENTRY, ssade=True), raw(0x1234_5678_9289, 0x0180_0042)),
        (replace(KVM_ENTRY, pgsnp=False), raw(0x1234_5678_9089, 0x0080_0042)),
        (replace(KVM_ENTRY, did=0xFFFF), raw(0x1234_5678_9089, 0x0180_FFFF)),
        (replace(KVM_ENTRY, sre=True), raw(0x1234_5678_9089, 0x0180_0042, 1)),
        (replace(KVM_ENTRY, ere=True), raw(0x1234_5678_9089, 0x0180_0042, 2)),
        (PasidEntry(), raw()),
    ],
)
def test_each_field_moves_only_its_own_bits(entry: PasidEntry, expected: bytes) -> None:
    assert entry.to_bytes() == expected
    assert PasidEntry.from_bytes(expected) == entry


@pytest.mark.parametrize(("level", "aw"), [(3, 1), (4, 2), (5, 3)])
def test_width_names_the_level_of_the_root(level: int, aw: int) -> None:
    assert AW_OF_LEVEL[Level(level)] == aw
    assert replace(KVM_ENTRY, aw=aw).level == level


@pytest.mark.parametrize("aw", [0, 4, 7])
def test_width_without_meaning_has_no_level(aw: int) -> None:
    assert replace(KVM_ENTRY, aw=aw).level is None


RESERVED_BITS = [10, 11, 80, 86, 136, 139, 192, 255, 511]
FIRST_STAGE_BITS = [89, 90, 91, 93, 94, 95, 96, 127, 130, 131, 132, 135, 140, 191]


@pytest.mark.parametrize("n", RESERVED_BITS + FIRST_STAGE_BITS)
def test_reserved_bit_of_a_second_stage_entry_is_seen(n: int) -> None:
    bad = (int.from_bytes(KVM_RAW, "little") | 1 << n).to_bytes(PASID_ENTRY_SIZE, "little")
    assert not reserved_violation(KVM_RAW)
    assert reserved_violation(bad)
    with pytest.raises(FormatError):
        PasidEntry.from_bytes(bad)


@pytest.mark.parametrize("n", FIRST_STAGE_BITS)
def test_first_stage_entry_may_use_its_fields(n: int) -> None:
    # P = 1, AW = 2, PGTT = 1
    first_stage = (0x49 | 1 << n).to_bytes(PASID_ENTRY_SIZE, "little")
    assert not reserved_violation(first_stage)
    assert PasidEntry.from_bytes(first_stage).pgtt == Pgtt.FIRST_STAGE


@given(st.binary(min_size=64, max_size=64))
def test_entry_that_is_not_present_may_hold_anything(junk: bytes) -> None:
    absent = bytes([junk[0] & 0xFE]) + junk[1:]
    assert not is_present(absent)
    assert not PasidEntry.from_bytes(absent).present


@given(st.binary(max_size=80))
def test_foreign_bytes_give_an_entry_or_a_format_error(junk: bytes) -> None:
    try:
        entry = PasidEntry.from_bytes(junk)
    except FormatError:
        return
    assert PasidEntry.from_bytes(entry.to_bytes()) == entry


@given(
    st.builds(
        PasidEntry,
        present=st.booleans(),
        fpd=st.booleans(),
        aw=st.integers(0, 7),
        ssee=st.booleans(),
        pgtt=st.integers(0, 7),
        ssade=st.booleans(),
        ss_ptr=st.integers(0, (1 << 52) - 1).map(lambda pfn: Hpa(pfn << 12)),
        did=st.integers(0, 0xFFFF),
        pwsnp=st.booleans(),
        pgsnp=st.booleans(),
        sre=st.booleans(),
        ere=st.booleans(),
    )
)
def test_entry_survives_the_round_trip(entry: PasidEntry) -> None:
    assert PasidEntry.from_bytes(entry.to_bytes()) == entry


@pytest.mark.parametrize(
    "entry",
    [
        replace(KVM_ENTRY, did=0x1_0000),
        replace(KVM_ENTRY, aw=8),
        replace(KVM_ENTRY, pgtt=8),
        replace(KVM_ENTRY, ss_ptr=Hpa(0x1800)),
        replace(KVM_ENTRY, ss_ptr=Hpa(1 << 64)),
    ],
)
def test_entry_of_ours_past_a_limit_is_an_assertion(entry: PasidEntry) -> None:
    with pytest.raises(AssertionError, match=r"does not fit|is not aligned"):
        entry.to_bytes()


@pytest.mark.parametrize("size", [0, 63, 65])
def test_wrong_length_is_a_format_error(size: int) -> None:
    for read in (PasidEntry.from_bytes, is_present, reserved_violation):
        with pytest.raises(FormatError):
            read(bytes(size))
