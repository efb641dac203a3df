"""DSA descriptor and completion record against bytes worked by hand from their tables [DSA 8.1, 8.2]."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.hw import dsa
from protocol.hw.dsa import CompletionRecord, Descriptor, Flag, Opcode, Status
from protocol.hw.fields import Field, FormatError
from protocol.units import Iova, Pasid

MEMMOVE = Descriptor(
    opcode=Opcode.MEMMOVE,
    flags=Flag.BOF | Flag.CRAV | Flag.RCR,
    pasid=Pasid(0x12345),
    priv=True,
    completion_addr=Iova(0x1020),
    src=0x7F00_0000_2000,
    dst=0x7F00_0000_3000,
    size=0x4000,
    int_handle=0x0807,
)
MEMMOVE_RAW = bytes.fromhex(
    "45230180"  # PASID, priv
    "0e000003"  # BOF | CRAV | RCR, opcode
    "2010000000000000"
    "00200000007f0000"
    "00300000007f0000"
    "00400000"
    "0708"
    "0000" + "00" * 24
)


def test_descriptor_has_the_bytes_of_the_table() -> None:
    assert MEMMOVE.to_bytes() == MEMMOVE_RAW
    assert Descriptor.from_bytes(MEMMOVE_RAW) == MEMMOVE


@pytest.mark.parametrize(
    ("operands", "expected"),
    [
        (((dsa.EXPECTED_RESULT, 1),), "01" + "00" * 23),
        (((dsa.DEST2, 0x7F00_0000_5000),), "00500000007f0000" + "00" * 16),
        (
            ((dsa.DELTA_ADDR, 0x8000), (dsa.MAX_DELTA_SIZE, 80), (dsa.EXPECTED_RESULT_MASK, 3)),
            "0080000000000000" + "50000000" + "00000000" + "03" + "00" * 7,
        ),
        (((dsa.CRC_SEED, 0x1EDC6F41), (dsa.CRC_SEED_ADDR, 0x9000)), "416fdc1e00000000" + "0090" + "00" * 14),
    ],
)
def test_operands_lie_behind_byte_40(operands: tuple[tuple[Field, int], ...], expected: str) -> None:
    desc = replace(MEMMOVE, op_specific=dsa.op_bytes(*operands))
    assert desc.to_bytes()[40:].hex() == expected
    assert [desc.op(field) for field, _ in operands] == [value for _, value in operands]


@pytest.mark.parametrize("n", [20, 30, 304, 319])
def test_reserved_bit_is_left_to_the_engine(n: int) -> None:
    bad = (int.from_bytes(MEMMOVE_RAW, "little") | 1 << n).to_bytes(64, "little")
    assert not dsa.reserved_violation(MEMMOVE_RAW)
    assert dsa.reserved_violation(bad)
    assert Descriptor.from_bytes(bad).completion_addr == MEMMOVE.completion_addr


@given(st.binary(min_size=64, max_size=64))
def test_any_64_bytes_are_a_descriptor(junk: bytes) -> None:
    desc = Descriptor.from_bytes(junk)
    assert Descriptor.from_bytes(desc.to_bytes()) == desc
    assert dsa.reserved_violation(junk) == (desc.to_bytes() != junk)


@pytest.mark.parametrize("size", [0, 63, 65])
def test_wrong_length_is_a_format_error(size: int) -> None:
    for read in (Descriptor.from_bytes, CompletionRecord.from_bytes, dsa.reserved_violation):
        with pytest.raises(FormatError):
            read(bytes(size))


@pytest.mark.parametrize(
    "desc",
    [
        replace(MEMMOVE, pasid=Pasid(1 << 20)),
        replace(MEMMOVE, opcode=0x100),
        replace(MEMMOVE, flags=Flag(1 << 24)),
        replace(MEMMOVE, size=1 << 32),
        replace(MEMMOVE, src=1 << 64),
        replace(MEMMOVE, int_handle=1 << 16),
        replace(MEMMOVE, op_specific=bytes(23)),
    ],
)
def test_descriptor_of_ours_past_a_limit_is_an_assertion(desc: Descriptor) -> None:
    with pytest.raises(AssertionError, match=r"does not fit|operation-specific bytes"):
        desc.to_bytes()


FAULTED = CompletionRecord(
    status=Status.PAGE_FAULT_NOBOF,
    write_fault=True,
    result=1,
    bytes_completed=0x2000,
    fault_addr=Iova(0x7F00_0000_3000),
)
FAULTED_RAW = bytes.fromhex("830100000020000000300000007f0000" + "00" * 16)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (FAULTED, FAULTED_RAW),
        (replace(FAULTED, write_fault=False), b"\x03" + FAULTED_RAW[1:]),
        (CompletionRecord(status=Status.NONE), bytes(32)),
        (CompletionRecord(status=Status.SUCCESS), b"\x01" + bytes(31)),
        (
            CompletionRecord(status=Status.SUCCESS, op_specific=b"\x0a" + bytes(15)),
            b"\x01" + bytes(15) + b"\x0a" + bytes(15),
        ),
    ],
)
def test_completion_record_has_the_bytes_of_the_table(record: CompletionRecord, expected: bytes) -> None:
    assert record.to_bytes() == expected
    assert CompletionRecord.from_bytes(expected) == record


def test_reserved_byte_or_unknown_status_is_a_format_error() -> None:
    for bad in (b"\x01\x00\x00\x01" + bytes(28), b"\x0f" + bytes(31), b"\x7f" + bytes(31)):
        with pytest.raises(FormatError):
            CompletionRecord.from_bytes(bad)


@given(st.binary(max_size=34))
def test_foreign_bytes_give_a_completion_record_or_a_format_error(junk: bytes) -> None:
    try:
        record = CompletionRecord.from_bytes(junk)
    except FormatError:
        return
    assert record.to_bytes() == junk


@given(
    st.builds(
        CompletionRecord,
        status=st.sampled_from(Status),
        write_fault=st.booleans(),
        result=st.integers(0, 0xFF),
        fault_info=st.integers(0, 0xFF),
        bytes_completed=st.integers(0, (1 << 32) - 1),
        fault_addr=st.integers(0, (1 << 64) - 1).map(Iova),
        op_specific=st.binary(min_size=16, max_size=16),
    )
)
def test_completion_record_survives_the_round_trip(record: CompletionRecord) -> None:
    assert CompletionRecord.from_bytes(record.to_bytes()) == record


@pytest.mark.parametrize(
    "record",
    [
        replace(FAULTED, bytes_completed=1 << 32),
        replace(FAULTED, result=0x100),
        replace(FAULTED, op_specific=bytes(17)),
    ],
)
def test_completion_record_of_ours_past_a_limit_is_an_assertion(record: CompletionRecord) -> None:
    with pytest.raises(AssertionError, match=r"does not fit|operation-specific bytes"):
        record.to_bytes()


def test_numbers_of_opcodes_flags_and_states() -> None:
    assert [int(op) for op in Opcode] == [*range(0x0B), 0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x17, 0x20]
    assert int(Flag.FENCE | Flag.BOF | Flag.CRAV | Flag.RCR | Flag.RCI | Flag.CRSTS) == 0x3F
    assert int(Flag.CR | Flag.CC) == 0x180
    assert int(dsa.CrcFlag.BYPASS_REFLECT) == 0x40000
    assert int(dsa.DrainFlag.SUPPRESS_TC_B) == 0x80000
    assert [int(s) for s in Status] == [*range(0x0A), *range(0x10, 0x23), 0x26, 0x27]
