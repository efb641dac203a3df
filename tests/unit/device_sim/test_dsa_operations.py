"""Every operation against obvious code: results, records, and what a fault in the middle leaves behind."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.accelerator import (
    AP_DELTA,
    BOF,
    CFLUSH,
    COMPARE,
    COMPVAL,
    COPY_CRC,
    CR,
    CR_DELTA,
    CRAV,
    CRCGEN,
    DST,
    DST_FRAME,
    DUALCAST,
    FILL,
    MEMMOVE,
    PAGE,
    RCR,
    SRC,
    SRC_FRAME,
    THIRD,
    THIRD_FRAME,
    Accelerator,
    Record,
    pattern,
    work,
)
from tests.unit.device_sim.test_crc32c import crc_by_bits

ASKED = CRAV | RCR
READ_SEED, BYPASS_INVERT, BYPASS_REFLECT = 1 << 16, 1 << 17, 1 << 18


@pytest.fixture
def machine() -> Accelerator:
    machine = Accelerator()
    machine.map(SRC, SRC_FRAME, 4)
    machine.map(DST, DST_FRAME, 4)
    machine.map(THIRD, THIRD_FRAME, 4)
    return machine


def unmap(machine: Accelerator, iova: int) -> None:
    """Before anything was translated."""
    machine.silicon.tables.unmap(iova >> 12)


# -- comparisons ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, PAGE, 3 * PAGE])
def test_equal_buffers_give_result_0(machine: Accelerator, size: int) -> None:
    machine.put(SRC_FRAME, pattern(4 * PAGE))
    machine.put(DST_FRAME, pattern(4 * PAGE)[:-64], 64)
    assert machine.run(work(COMPARE, ASKED, src=SRC, dst=DST + 64, size=size)) == Record(1, False, 0, 0)


@pytest.mark.parametrize("at", [0, 1, 7, PAGE - 1, PAGE, 3 * PAGE - 1])
def test_the_first_byte_that_differs_is_told(machine: Accelerator, at: int) -> None:
    machine.put(SRC_FRAME, pattern(3 * PAGE))
    machine.put(DST_FRAME, pattern(3 * PAGE))
    machine.put(DST_FRAME, b"\xff" * (3 * PAGE - at), at)
    record = machine.run(work(COMPARE, ASKED, src=SRC, dst=DST, size=3 * PAGE))
    assert record == Record(1, False, at, 0, result=1)


@pytest.mark.parametrize(("differs", "expected", "status"), [(0, 0, 1), (0, 1, 2), (1, 1, 1), (1, 0, 2)])
def test_check_result_turns_an_unexpected_result_into_status_2(
    machine: Accelerator, differs: int, expected: int, status: int
) -> None:
    machine.put(SRC_FRAME, bytes([differs]))
    raw = work(COMPARE, ASKED | CR, src=SRC, dst=DST, size=8, specific=bytes([expected]))
    assert machine.run(raw)[:1] + machine.record()[4:5] == (status, differs)


@pytest.mark.parametrize(("at", "told"), [(0, 0), (7, 0), (8, 8), (13, 8), (PAGE + 9, PAGE + 8)])
def test_a_pattern_is_compared_in_units_of_eight_bytes(machine: Accelerator, at: int, told: int) -> None:
    word = bytes(range(1, 9))
    machine.put(SRC_FRAME, word * (2 * PAGE // 8), 5)
    raw = work(COMPVAL, ASKED, src=SRC + 5, dst=int.from_bytes(word, "little"), size=2 * PAGE - 8)
    assert machine.run(raw) == Record(1, False, 0, 0)
    machine.put(SRC_FRAME, b"\0", 5 + at)
    assert machine.run(raw) == Record(1, False, told, 0, result=1)


def test_a_comparison_that_faults_says_how_much_was_equal(machine: Accelerator) -> None:
    unmap(machine, DST + 2 * PAGE)
    record = machine.run(work(COMPARE, ASKED, src=SRC, dst=DST + 16, size=3 * PAGE))
    assert record == Record(3, False, 2 * PAGE - 16, DST + 2 * PAGE)


# -- CRC -----------------------------------------------------------------------------------------------


def crc_expected(data: bytes, seed: int, flags: int) -> int:
    """From the meaning of the two flags: how the data's bits are taken, and how seed and result are given."""
    if flags & BYPASS_REFLECT:
        data = bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)
    if not flags & BYPASS_INVERT:
        return crc_by_bits(data, seed)
    mirrored = int(f"{seed:032b}"[::-1], 2) ^ 0xFFFF_FFFF
    return int(f"{crc_by_bits(data, mirrored) ^ 0xFFFF_FFFF:032b}"[::-1], 2)


@pytest.mark.parametrize("flags", [0, BYPASS_INVERT, BYPASS_REFLECT, BYPASS_INVERT | BYPASS_REFLECT])
@pytest.mark.parametrize(("size", "seed"), [(1, 0), (9, 0x1234_5678), (2 * PAGE + 3, 0xFFFF_FFFF)])
def test_the_crc_is_told_in_the_record(machine: Accelerator, flags: int, size: int, seed: int) -> None:
    data = pattern(size)
    machine.put(SRC_FRAME, data, 33)
    raw = work(CRCGEN, ASKED | flags, src=SRC + 33, size=size, specific=struct.pack("<I", seed))
    expected = crc_expected(data, seed, flags)
    assert machine.run(raw) == Record(1, False, 0, 0, specific=struct.pack("<QQ", expected, 0))


def test_the_check_value_comes_out_of_the_device(machine: Accelerator) -> None:
    machine.put(SRC_FRAME, b"123456789")
    record = machine.run(work(CRCGEN, ASKED, src=SRC, size=9))
    assert record.specific[:8] == (0xE306_9283).to_bytes(8, "little")


def test_the_seed_may_lie_in_memory(machine: Accelerator) -> None:
    machine.put(SRC_FRAME, b"data")
    machine.put(THIRD_FRAME, (0xCAFE_BABE).to_bytes(4, "little"), PAGE - 4)
    specific = struct.pack("<QQ", 0, THIRD + PAGE - 4)
    record = machine.run(work(CRCGEN, ASKED | READ_SEED, src=SRC, size=4, specific=specific))
    assert record.specific[:4] == struct.pack("<I", crc_by_bits(b"data", 0xCAFE_BABE))


def test_a_copy_with_crc_is_both(machine: Accelerator) -> None:
    data = pattern(3 * PAGE, 9)
    machine.put(SRC_FRAME, data, 1)
    record = machine.run(work(COPY_CRC, ASKED, src=SRC + 1, dst=DST + 77, size=3 * PAGE))
    assert record.specific[:8] == struct.pack("<Q", crc_by_bits(data))
    assert machine.bytes_of(DST_FRAME, 4 * PAGE) == bytes(77) + data + bytes(PAGE - 77)


def test_a_crc_that_faults_can_be_continued_with_what_it_told_as_the_seed(machine: Accelerator) -> None:
    data = pattern(4 * PAGE)
    machine.put(SRC_FRAME, data)
    unmap(machine, SRC + 2 * PAGE)
    first = machine.run(work(CRCGEN, ASKED, src=SRC, size=4 * PAGE))
    assert first[:4] == (3, False, 2 * PAGE, SRC + 2 * PAGE)
    machine.map(SRC + 2 * PAGE, SRC_FRAME + 2)
    raw = work(CRCGEN, ASKED, src=SRC + 2 * PAGE, size=2 * PAGE, specific=first.specific[:4])
    assert machine.run(raw).specific[:4] == struct.pack("<I", crc_by_bits(data))


# -- delta records -------------------------------------------------------------------------------------


def delta_of(old: bytes, new: bytes) -> bytes:
    """The record, word by word."""
    record = b""
    for at in range(0, len(old), 8):
        if old[at : at + 8] != new[at : at + 8]:
            record += struct.pack("<H", at // 8) + new[at : at + 8]
    return record


def create(size: int, largest: int, *, flags: int = ASKED, mask: int = 0, src: int = SRC) -> bytes:
    specific = struct.pack("<QIIB", THIRD, largest, 0, mask)
    return work(CR_DELTA, flags, src=src, dst=DST, size=size, specific=specific)


def apply(delta_size: int, size: int) -> bytes:
    return work(AP_DELTA, ASKED, src=THIRD, dst=DST, size=size, specific=struct.pack("<I", delta_size))


@settings(max_examples=60)
@given(st.dictionaries(st.integers(0, 3 * PAGE - 1), st.integers(0, 255), max_size=40), st.integers(0, 1))
def test_a_delta_record_is_made_and_applied(changes: dict[int, int], words: int) -> None:
    machine = Accelerator()
    for iova, frame in ((SRC, SRC_FRAME), (DST, DST_FRAME), (THIRD, THIRD_FRAME)):
        machine.map(iova, frame, 4)
    old = pattern(3 * PAGE)
    new = bytearray(old)
    for at, value in changes.items():
        new[at] = value
    machine.put(SRC_FRAME, old, 8 * words)
    machine.put(DST_FRAME, bytes(new))
    expected = delta_of(old, bytes(new))
    record = machine.run(create(3 * PAGE, 1000, src=SRC + 8 * words))
    assert (record.status, record.result) == (1, 1 if expected else 0)
    assert record.specific == struct.pack("<IIQ", len(expected), 0, 0)
    assert machine.bytes_of(THIRD_FRAME, len(expected) + 10) == expected + bytes(10)
    if expected:
        machine.put(DST_FRAME, old)
        assert machine.run(apply(len(expected), 3 * PAGE)) == Record(1, False, 0, 0)
        assert machine.bytes_of(DST_FRAME, 3 * PAGE) == new


def test_a_delta_that_is_too_large_keeps_what_fits(machine: Accelerator) -> None:
    machine.put(DST_FRAME, b"\x01" * 2 * PAGE)
    record = machine.run(create(2 * PAGE, 80))
    assert record == Record(1, False, 64, 0, result=2, specific=struct.pack("<IIQ", 80, 0, 0))
    expected = delta_of(bytes(64), b"\x01" * 64)
    assert machine.bytes_of(THIRD_FRAME, 90) == expected + bytes(10)


@pytest.mark.parametrize(("mask", "status"), [(0b001, 2), (0b010, 1), (0b100, 2), (0b111, 1)])
def test_the_results_a_delta_may_have_are_a_mask(machine: Accelerator, mask: int, status: int) -> None:
    machine.put(DST_FRAME, b"\x01")
    assert machine.run(create(64, 80, flags=ASKED | CR, mask=mask)).status == status


@pytest.mark.parametrize(
    ("indices", "status", "applied"), [((3, 3), 7, 1), ((5, 4), 7, 1), ((1, 8), 8, 1), ((0xFFFF,), 8, 0)]
)
def test_an_entry_out_of_order_or_out_of_range_ends_the_application(
    machine: Accelerator, indices: tuple[int, ...], status: int, applied: int
) -> None:
    record = b"".join(struct.pack("<HQ", index, 0x1111) for index in indices)
    machine.put(THIRD_FRAME, record)
    assert machine.run(apply(len(record), 64)) == Record(status, False, 10 * applied, 0)


def test_an_application_that_faults_is_resumed_behind_the_entries_done(machine: Accelerator) -> None:
    old, new = bytes(4 * PAGE), pattern(4 * PAGE, 1)
    record = delta_of(old, new)[: 3 * PAGE // 10 * 10]
    machine.put(THIRD_FRAME, record)
    unmap(machine, THIRD + PAGE)
    first = machine.run(apply(len(record), 4 * PAGE))
    assert (first.status, first.bytes_completed, first.fault_addr) == (3, 4090, THIRD + PAGE)
    machine.map(THIRD + PAGE, THIRD_FRAME + 1)
    # The rest of the record, moved to where delta records must begin.
    machine.put(THIRD_FRAME, record[4090:])
    assert machine.run(apply(len(record) - 4090, 4 * PAGE)).status == 1
    words = len(record) // 10 * 8
    assert machine.bytes_of(DST_FRAME, 4 * PAGE) == new[:words] + bytes(4 * PAGE - words)


# -- dualcast, moves that overlap, flush ---------------------------------------------------------------


def test_dualcast_writes_both_destinations(machine: Accelerator) -> None:
    data = pattern(3 * PAGE)
    machine.put(SRC_FRAME, data, 5)
    specific = struct.pack("<Q", THIRD + 100)
    raw = work(DUALCAST, ASKED, src=SRC + 5, dst=DST + 100, size=3 * PAGE, specific=specific)
    assert machine.run(raw) == Record(1, False, 0, 0)
    assert machine.bytes_of(DST_FRAME, 3 * PAGE, 100) == data
    assert machine.bytes_of(THIRD_FRAME, 3 * PAGE, 100) == data


def test_dualcast_stops_where_either_destination_faults(machine: Accelerator) -> None:
    unmap(machine, THIRD + PAGE)
    machine.put(SRC_FRAME, pattern(2 * PAGE))
    raw = work(DUALCAST, ASKED, src=SRC, dst=DST, size=2 * PAGE, specific=struct.pack("<Q", THIRD))
    assert machine.run(raw) == Record(3, True, PAGE, THIRD + PAGE)
    assert machine.bytes_of(DST_FRAME, 2 * PAGE) == pattern(PAGE) + bytes(PAGE)


def test_a_move_onto_its_own_tail_goes_backwards_and_says_so_when_it_faults(machine: Accelerator) -> None:
    """Result 1: the addresses stay, the size shrinks by what was moved."""
    data = pattern(4 * PAGE)
    machine.put(SRC_FRAME, data)
    unmap(machine, SRC)
    src, dst = SRC + 0x10, SRC + 0x200
    size = 3 * PAGE + 0x20
    first = machine.run(work(MEMMOVE, ASKED, src=src, dst=dst, size=size))
    assert first[:2] + first[3:5] == (3, False, SRC, 1)
    assert first.bytes_completed == size - (PAGE - 0x10)
    machine.map(SRC, SRC_FRAME)
    assert machine.run(work(MEMMOVE, ASKED, src=src, dst=dst, size=size - first.bytes_completed)).status == 1
    expected = bytearray(data)
    expected[0x200 : 0x200 + size] = data[0x10 : 0x10 + size]
    assert machine.bytes_of(SRC_FRAME, 4 * PAGE) == expected


def test_a_move_onto_its_own_head_goes_forwards(machine: Accelerator) -> None:
    data = pattern(4 * PAGE)
    machine.put(SRC_FRAME, data)
    unmap(machine, SRC + 2 * PAGE)
    record = machine.run(work(MEMMOVE, ASKED, src=SRC + 0x200, dst=SRC + 0x10, size=3 * PAGE))
    assert record == Record(3, False, 2 * PAGE - 0x200, SRC + 2 * PAGE)


def test_a_fill_that_faults_goes_on_in_the_middle_of_its_pattern(machine: Accelerator) -> None:
    unmap(machine, DST + PAGE)
    word = int.from_bytes(bytes(range(1, 9)), "little")
    first = machine.run(work(FILL, ASKED, src=word, dst=DST + 3, size=2 * PAGE))
    assert first == Record(3, True, PAGE - 3, DST + PAGE)
    machine.map(DST + PAGE, DST_FRAME + 1)
    blocking = machine.run(work(FILL, ASKED | BOF, src=word, dst=DST + 3, size=2 * PAGE))
    assert blocking.status == 1
    assert machine.bytes_of(DST_FRAME, 2 * PAGE, 3) == bytes(range(1, 9)) * (2 * PAGE // 8)


def test_a_cache_flush_reaches_every_page_and_changes_none(machine: Accelerator) -> None:
    machine.put(DST_FRAME, pattern(2 * PAGE))
    assert machine.run(work(CFLUSH, ASKED, dst=DST, size=2 * PAGE)) == Record(1, False, 0, 0)
    assert machine.bytes_of(DST_FRAME, 2 * PAGE) == pattern(2 * PAGE)
    machine = Accelerator()
    assert machine.run(work(CFLUSH, ASKED, dst=DST, size=8)) == Record(3, False, 0, DST)
