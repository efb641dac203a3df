"""What is wrong with a descriptor, status by status; and 64 bytes of anything never do harm."""

from __future__ import annotations

import struct
from collections.abc import Set

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.units import Iova
from tests.kit.accelerator import (
    AP_DELTA,
    BATCH,
    BOF,
    CFLUSH,
    COMPARE,
    COMPVAL,
    COPY_CRC,
    CR,
    CR_DELTA,
    CRAV,
    CRCGEN,
    DRAIN,
    DST,
    DST_FRAME,
    DUALCAST,
    FENCE,
    FILL,
    MEMMOVE,
    NOOP,
    PAGE,
    RCI,
    RCR,
    RECORD,
    RECORD_FRAME,
    SRC,
    SRC_FRAME,
    SWERR,
    THIRD,
    THIRD_FRAME,
    TRANSL_FETCH,
    Accelerator,
    work,
)

ASKED = CRAV | RCR
GOOD: dict[int, dict[str, object]] = {
    NOOP: {},
    BATCH: {"src": SRC, "size": 2},
    DRAIN: {},
    MEMMOVE: {"src": SRC, "dst": DST, "size": 64},
    FILL: {"src": 1, "dst": DST, "size": 64},
    COMPARE: {"src": SRC, "dst": DST, "size": 64},
    COMPVAL: {"src": SRC, "dst": 1, "size": 64},
    CR_DELTA: {"src": SRC, "dst": DST, "size": 64, "specific": struct.pack("<QI", THIRD, 80)},
    AP_DELTA: {"src": SRC, "dst": DST, "size": 64, "specific": struct.pack("<I", 10)},
    DUALCAST: {"src": SRC, "dst": DST, "size": 64, "specific": struct.pack("<Q", THIRD)},
    CRCGEN: {"src": SRC, "size": 64},
    COPY_CRC: {"src": SRC, "dst": DST, "size": 64},
    CFLUSH: {"dst": DST, "size": 64},
}
# Of bytes 16..63: source, destination, size and, of the operation's own, what its table names.
USED_BYTES: dict[int, Set[int]] = {
    NOOP: set(),
    BATCH: {*range(16, 24), *range(32, 36)},
    DRAIN: set(range(16, 32)),
    **dict.fromkeys((MEMMOVE, FILL), frozenset(range(16, 36))),
    **dict.fromkeys((COMPARE, COMPVAL), frozenset({*range(16, 36), 40})),
    CR_DELTA: {*range(16, 36), *range(40, 52), 56},
    AP_DELTA: {*range(16, 36), *range(40, 44)},
    DUALCAST: {*range(16, 36), *range(40, 48)},
    CRCGEN: {*range(16, 24), *range(32, 36), *range(40, 44), *range(48, 56)},
    COPY_CRC: {*range(16, 36), *range(40, 44), *range(48, 56)},
    CFLUSH: set(range(24, 36)),
}
# Table 5-3: what each operation allows beside what all do.
A1, A2, A3, CR_TCS = 1 << 9, 1 << 10, 1 << 11, 1 << 12  # the traffic classes of addresses and record
CC, STORD = 1 << 8, 1 << 13
FOR_ALL = CRAV | RCR | RCI | 1 << 5 | CR_TCS
ALLOWED: dict[int, int] = {
    NOOP: 0,
    BATCH: A1,
    DRAIN: 0xF << 16,  # and A1, A2 with the read-back they are of
    MEMMOVE: BOF | CC | STORD | A1 | A2,
    FILL: BOF | CC | STORD | A2,
    COMPARE: BOF | CR | A1 | A2,
    COMPVAL: BOF | CR | A1,
    CR_DELTA: BOF | CR | CC | STORD | A1 | A2 | A3,
    AP_DELTA: BOF | CC | STORD | A1 | A2,
    DUALCAST: BOF | CC | STORD | A1 | A2 | A3,
    CRCGEN: BOF | A1 | A3 | 7 << 16,
    COPY_CRC: BOF | CC | STORD | A1 | A2 | A3 | 7 << 16,
    CFLUSH: BOF | CC | STORD | A2,
}
# Table 5-5.
NEED_THEIR_RECORD = (COMPARE, COMPVAL, CR_DELTA, CRCGEN, COPY_CRC)


def good(opcode: int, flags: int = ASKED) -> bytes:
    return work(opcode, flags, **GOOD[opcode])  # type: ignore[arg-type]


@pytest.fixture
def machine() -> Accelerator:
    return ready()


def ready(**config: bool) -> Accelerator:
    machine = Accelerator(**config)
    for iova, frame in ((SRC, SRC_FRAME), (DST, DST_FRAME), (THIRD, THIRD_FRAME)):
        machine.map(iova, frame, 4)
    return machine


@pytest.mark.parametrize("opcode", [*set(range(0x100)) - set(GOOD)])
def test_what_is_no_operation_of_this_device_is_a_bad_opcode(opcode: int) -> None:
    """DIF (0x12..0x17) and translation fetch (0x0A) among them."""
    assert TRANSL_FETCH not in GOOD
    assert Accelerator().run(work(opcode, ASKED)).status == 0x10


@pytest.mark.parametrize("opcode", GOOD)
def test_the_operations_of_this_device_are_those_opcap_names(machine: Accelerator, opcode: int) -> None:
    assert machine.load(0x40, 32) == sum(1 << known for known in GOOD)
    assert machine.run(good(opcode)).status == 1


@pytest.mark.parametrize("opcode", GOOD)
def test_a_byte_the_operation_has_no_use_for_must_be_zero(machine: Accelerator, opcode: int) -> None:
    refused = set()
    for at in {*range(16, 36), *range(38, 64)}:
        raw = bytearray(good(opcode))
        raw[at] ^= 0x80
        if machine.run(bytes(raw)).status == 0x12:
            refused.add(at)
    assert refused == {*range(16, 36), *range(38, 64)} - USED_BYTES[opcode]


def named(machine: Accelerator, opcode: int, flags: int) -> int:
    """What Invalid Flags names: in the record if it has one, else in the software error; 0 is that it ran."""
    machine.map(0, THIRD_FRAME)  # where a seed and read-backs are, without an address
    machine.counters.statuses.clear()
    machine.store(SWERR, 3, 8)
    handle = 1 if flags & RCI else 0
    record = machine.run(work(opcode, flags, handle=handle, **GOOD[opcode]))  # type: ignore[arg-type]
    (status,) = machine.statuses
    if status != 0x11:
        assert status in (1, 2)
        assert record.status == (status if flags & RCR else 0)
        assert machine.software_error == bytes(32)
        return 0
    if flags & CRAV:
        assert record == (0x11, False, 0, 0, 0, record.specific[:3] + bytes(13))
        return int.from_bytes(record.specific[:3], "little")
    assert machine.raw_record() == bytes(32)
    assert swerr(machine) == (0b1101, 0x11, 0, opcode, 0, swerr(machine)[5], 0)
    return swerr(machine)[5]


@pytest.mark.parametrize("opcode", GOOD)
@pytest.mark.parametrize("n", [*range(24)])
def test_a_flag_an_operation_does_not_allow_is_named_as_invalid(
    machine: Accelerator, opcode: int, n: int
) -> None:
    invalid = 1 << n & ~(FOR_ALL | ALLOWED[opcode])
    assert named(machine, opcode, ASKED | 1 << n) == invalid


@pytest.mark.parametrize("opcode", GOOD)
def test_all_that_an_operation_allows_it_allows_together(machine: Accelerator, opcode: int) -> None:
    read_backs = A1 | A2 if opcode == DRAIN else 0
    assert named(machine, opcode, FOR_ALL | ALLOWED[opcode] | read_backs) == 0


@pytest.mark.parametrize("opcode", GOOD)
def test_every_flag_that_is_wrong_is_named(machine: Accelerator, opcode: int) -> None:
    wrong = 0xFF_FFFF & ~(FOR_ALL | ALLOWED[opcode])
    assert named(machine, opcode, ASKED | wrong) == wrong


@pytest.mark.parametrize("opcode", GOOD)
def test_an_operation_whose_result_is_its_record_needs_one(machine: Accelerator, opcode: int) -> None:
    needs = opcode in NEED_THEIR_RECORD
    assert named(machine, opcode, RCI) == (CRAV | RCR if needs else 0)
    assert named(machine, opcode, CRAV | RCI) == (RCR if needs else 0)
    assert named(machine, opcode, ASKED) == 0


@pytest.mark.parametrize("address", [0, CRAV])
def test_a_drain_needs_a_record_or_an_interrupt(machine: Accelerator, address: int) -> None:
    assert named(machine, DRAIN, address) == RCR | RCI
    assert named(machine, DRAIN, address | RCI) == 0
    assert named(machine, DRAIN, ASKED) == 0


@pytest.mark.parametrize(("tcs", "valid"), [(A1, 1 << 16), (A2, 1 << 17)])
def test_a_drains_traffic_class_needs_the_read_back_it_is_of(
    machine: Accelerator, tcs: int, valid: int
) -> None:
    other = 0b11 << 16 & ~valid
    assert named(machine, DRAIN, ASKED | tcs | other) == tcs
    assert named(machine, DRAIN, ASKED | tcs | valid) == 0


@pytest.mark.parametrize("flag", [RCR, CR_TCS])
def test_what_is_said_of_a_record_needs_its_address(machine: Accelerator, flag: int) -> None:
    assert named(machine, MEMMOVE, flag) == flag
    assert named(machine, MEMMOVE, flag | CRAV) == 0


@pytest.mark.parametrize(("flags", "fields"), [(0, {"record": RECORD}), (ASKED, {"handle": 1})])
def test_the_address_of_no_record_and_the_handle_of_no_interrupt_are_reserved(
    machine: Accelerator, flags: int, fields: dict[str, int]
) -> None:
    machine.submit(work(MEMMOVE, flags, src=SRC, dst=DST, size=64, **fields))  # type: ignore[arg-type]
    assert machine.statuses == {0x12: 1}


def test_block_on_fault_needs_a_queue_that_allows_it() -> None:
    machine = ready(block=False)
    for opcode in GOOD:
        assert named(machine, opcode, ASKED | BOF) == BOF
        assert named(machine, opcode, ASKED) == 0


@pytest.mark.parametrize(
    ("opcode", "change", "status"),
    [
        *((opcode, {"size": 0}, 0x13) for opcode in GOOD if opcode not in (NOOP, BATCH, DRAIN)),
        (MEMMOVE, {"size": (2 << 20) + 1}, 0x13),
        (CR_DELTA, {"size": 0x80001}, 0x13),
        (AP_DELTA, {"size": 0x80008}, 0x13),
        (BATCH, {"size": 0}, 0x14),
        (BATCH, {"size": 1}, 0x14),
        (BATCH, {"size": 1025}, 0x14),
        (CR_DELTA, {"specific": struct.pack("<QI", THIRD, 70)}, 0x15),
        (CR_DELTA, {"specific": struct.pack("<QI", THIRD, 88)}, 0x15),
        (AP_DELTA, {"specific": struct.pack("<I", 0)}, 0x15),
        (AP_DELTA, {"specific": struct.pack("<I", 11)}, 0x15),
        (AP_DELTA, {"specific": struct.pack("<I", 655370)}, 0x15),
        (COPY_CRC, {"dst": SRC + 63}, 0x16),
        (DUALCAST, {"dst": SRC + PAGE, "size": PAGE + 1}, 0x16),
        (DUALCAST, {"specific": struct.pack("<Q", SRC)}, 0x16),
        (DUALCAST, {"specific": struct.pack("<Q", DST)}, 0x16),
        (CR_DELTA, {"specific": struct.pack("<QI", SRC - 72, 80)}, 0x16),
        (CR_DELTA, {"specific": struct.pack("<QI", DST + 56, 80)}, 0x16),
        (AP_DELTA, {"src": DST - 8}, 0x16),
        (DUALCAST, {"dst": DST + 8}, 0x17),
        (BATCH, {"src": SRC + 32}, 0x18),
        (MEMMOVE, {"handle": 0}, 0x19),
        (MEMMOVE, {"handle": 2048}, 0x19),
        (MEMMOVE, {"handle": 0xFFFF}, 0x19),
        (CR_DELTA, {"specific": struct.pack("<QI", THIRD + 4, 80)}, 0x1C),
        *((delta, {"size": 68}, 0x1C) for delta in (CR_DELTA, AP_DELTA)),
        *((delta, {"src": SRC + 4}, 0x1C) for delta in (CR_DELTA, AP_DELTA)),
        *((delta, {"dst": DST + 4}, 0x1C) for delta in (CR_DELTA, AP_DELTA)),
        (AP_DELTA, {"src": DST - 4}, 0x1C),
        (NOOP, {"dword0": 1 << 20}, 0x12),
    ],
)
def test_each_limit_has_its_status(
    machine: Accelerator, opcode: int, change: dict[str, object], status: int
) -> None:
    fields = {"handle": 1, **GOOD[opcode], **change}
    record = machine.run(work(opcode, ASKED | RCI, **fields))  # type: ignore[arg-type]
    assert record == (status, False, 0, 0, 0, bytes(16))
    assert machine.interrupts == ([] if status == 0x19 else [1])


@pytest.mark.parametrize("opcode", [CRCGEN, COPY_CRC])
@pytest.mark.parametrize(("read_seed", "status"), [(0, 1), (1 << 16, 0x1C)])
def test_the_address_of_a_seed_that_is_read_is_aligned(
    machine: Accelerator, opcode: int, read_seed: int, status: int
) -> None:
    fields = {**GOOD[opcode], "specific": struct.pack("<QQ", 0, THIRD + 2)}
    assert machine.run(work(opcode, ASKED | read_seed, **fields)).status == status  # type: ignore[arg-type]


def test_in_a_batch_privilege_is_ignored() -> None:
    machine = ready(dedicated=False)
    children = [work(NOOP, ASKED, dword0=1 << 31, record=RECORD + 32 * n) for n in (1, 2)]
    machine.put(SRC_FRAME, b"".join(children))
    assert not machine.enqcmd(work(BATCH, ASKED, src=SRC, size=2))
    assert [machine.record(n).status for n in range(3)] == [1, 1, 1]


def test_privilege_needs_a_shared_queue_that_has_it() -> None:
    machine = Accelerator(dedicated=False)
    assert not machine.enqcmd(work(NOOP, ASKED, dword0=1 << 31))
    assert machine.record().status == 0x1D
    assert Accelerator().run(work(NOOP, ASKED, dword0=1 << 31)).status == 1, "a dedicated queue has its own"


def test_the_queues_own_limits_hold(machine: Accelerator) -> None:
    machine = Accelerator(max_xfer=12, max_batch=2)
    machine.map(DST, DST_FRAME, 2)
    assert machine.run(work(FILL, ASKED, dst=DST, size=4096)).status == 1
    assert machine.run(work(FILL, ASKED, dst=DST, size=4097)).status == 0x13
    assert machine.run(work(BATCH, ASKED, src=DST, size=5)).status == 0x14


# -- the software error register -----------------------------------------------------------------------


def swerr(machine: Accelerator) -> tuple[int, ...]:
    """Byte 0's flags, error, queue, opcode, batch index, invalid flags, fault address."""
    flags, error, wq, zero, opcode, pasid, index, more, invalid, fault, last = struct.unpack(
        "<BBBBB3sHHIQQ", machine.software_error
    )
    assert (zero, pasid, more, last) == (0, bytes(3), 0, 0)
    return flags, error, wq, opcode, index, invalid, fault


def test_an_error_without_a_record_is_told_in_the_register_with_what_it_was(machine: Accelerator) -> None:
    machine.submit(work(0x7F, 0))
    assert swerr(machine) == (0b1101, 0x10, 0, 0x7F, 0, 0, 0)
    machine.store(SWERR, 3, 8)
    assert machine.software_error == bytes(32)
    machine.submit(work(FILL, RCR | FENCE, dst=DST, size=8))
    assert swerr(machine) == (0b1101, 0x11, 0, FILL, 0, RCR | FENCE, 0)


def test_the_first_error_stays_and_later_ones_set_overflow(machine: Accelerator) -> None:
    machine.submit(work(0x7F, 0))
    machine.submit(work(0x7E, 0))
    assert swerr(machine) == (0b1111, 0x10, 0, 0x7F, 0, 0, 0)
    assert machine.counters.software_errors == 2


def test_a_record_that_cannot_be_written_is_told_with_its_address() -> None:
    machine = Accelerator(records=False).data_alone()
    machine.submit(work(NOOP, ASKED))
    assert swerr(machine) == (0b10_1101, 0x1A, 0, NOOP, 0, 0, RECORD)


def test_a_record_at_a_crooked_address_is_told_as_such(machine: Accelerator) -> None:
    machine.submit(work(NOOP, ASKED, record=RECORD + 16))
    assert swerr(machine) == (0b1101, 0x1B, 0, NOOP, 0, 0, 0)


@pytest.mark.parametrize("enabled", [False, True])
def test_the_register_interrupts_if_it_may(machine: Accelerator, enabled: bool) -> None:
    machine.store(0x88, int(enabled))
    machine.submit(work(0x7F, 0))
    assert machine.interrupts == ([0] if enabled else [])
    assert machine.load(0x98) == int(enabled)
    machine.store(0x98, 1)
    assert machine.load(0x98) == 0


# -- anything at all -----------------------------------------------------------------------------------

ADDRESSES = st.one_of(
    st.sampled_from([SRC, DST, THIRD, RECORD + 64, 0, 0xFEE0_0000, (1 << 64) - PAGE, (1 << 64) - 1, 1 << 57]),
    st.integers(0, (1 << 64) - 1),
)
NEAR = st.builds(lambda base, off: (base + off) % (1 << 64), ADDRESSES, st.integers(-70, 70))
SIZES = st.one_of(st.integers(0, 3 * PAGE), st.integers(0, (1 << 32) - 1), st.sampled_from([64, 80, 2 << 20]))
SPECIFIC = st.one_of(
    st.binary(min_size=24, max_size=24),
    st.builds(lambda a, b, c: struct.pack("<QII", a, b, c).ljust(24, b"\0"), NEAR, SIZES, st.integers(0, 7)),
    st.builds(lambda size: struct.pack("<I", size).ljust(24, b"\0"), SIZES),
    st.just(bytes(24)),
)
DESCRIPTORS = st.one_of(
    st.binary(min_size=64, max_size=64),
    st.builds(
        lambda op, flags, src, dst, size, record, specific: work(
            op,
            flags,
            src=src,
            dst=dst,
            size=size,
            record=record if flags & CRAV else 0,
            handle=1 if flags & RCI else 0,
            specific=specific,
        ),
        st.sampled_from([*GOOD]),
        st.one_of(st.just(ASKED), st.just(ASKED | BOF), st.integers(0, (1 << 24) - 1)),
        NEAR,
        NEAR,
        SIZES,
        st.one_of(st.just(RECORD), NEAR),
        SPECIFIC,
    ),
)


class RecordsWritten:
    """Counts completion records by how they are stored: 31 bytes, then the status byte before them."""

    def __init__(self, machine: Accelerator) -> None:
        self.count = 0
        self._last = (0, 0)
        self._store = machine.silicon.function.write
        machine.silicon.function.write = self._write  # type: ignore[method-assign]

    def _write(self, iova: int, data: bytes) -> bool:
        self.count += (self._last, len(data)) == ((iova + 1, 31), 1)
        self._last = iova, len(data)
        return self._store(Iova(iova), data)


@settings(max_examples=400)
@given(st.lists(DESCRIPTORS, min_size=1, max_size=4), st.booleans(), st.sampled_from([0, 1, 0xF]))
def test_any_descriptor_ends_in_a_record_a_software_error_or_silence(
    raws: list[bytes], in_a_batch: bool, answer: int
) -> None:
    machine = ready()
    records = RecordsWritten(machine)
    if in_a_batch:
        machine.put(SRC_FRAME, b"".join(raws))
        raws = [work(BATCH, ASKED, src=SRC, size=len(raws), record=RECORD + 32)]
    for raw in raws:
        machine.submit(raw)
    for _ in range(200):
        if not machine.silicon.serve(answer):
            break
    assert machine.dsa.queues[0].jobs == {}
    ended = sum(machine.statuses.values())
    assert ended == machine.counters.descriptors >= len(raws)
    failed = ended - sum(machine.statuses.get(status, 0) for status in (1, 2, 5))
    told_twice = machine.statuses.get(0x22, 0)
    assert failed <= records.count + machine.counters.software_errors <= ended + told_twice
    machine.silicon.function.configure(ats=True, bus_master=True)
    machine.silicon.function.pri.enable(64)
    machine.map(RECORD, RECORD_FRAME)
    assert machine.run(good(MEMMOVE)).status == 1, "and the device goes on"
