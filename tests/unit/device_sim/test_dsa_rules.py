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
READING = BOF | 0b1_1110_0011_1100  # addresses' and record's traffic classes, record, interrupt, steering
WRITING = READING | 1 << 8 | 1 << 13
ALLOWED: dict[int, int] = {
    **dict.fromkeys((NOOP, BATCH), READING),
    DRAIN: READING & ~BOF | 0xF << 16,
    **dict.fromkeys((MEMMOVE, FILL, AP_DELTA, DUALCAST), WRITING),
    **dict.fromkeys((COMPARE, COMPVAL), READING | CR),
    CR_DELTA: WRITING | CR,
    CRCGEN: READING | 7 << 16,
    COPY_CRC: WRITING | 7 << 16,
    CFLUSH: READING | 1 << 8,
}


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


@pytest.mark.parametrize("opcode", GOOD)
def test_a_flag_the_operation_does_not_know_is_named_in_the_record(machine: Accelerator, opcode: int) -> None:
    refused = 0
    for n in range(24):
        record = machine.run(work(opcode, ASKED | 1 << n, handle=1, **GOOD[opcode]))  # type: ignore[arg-type]
        if record.status == 0x11:
            assert record.specific == (1 << n).to_bytes(16, "little")
            refused |= 1 << n
    assert refused == 0xFF_FFFF & ~ALLOWED[opcode]


@pytest.mark.parametrize("opcode", [FILL, NOOP])
def test_block_on_fault_needs_a_queue_that_allows_it(opcode: int) -> None:
    machine = ready(block=False)
    assert machine.run(good(opcode, ASKED | BOF)).specific[:3] == b"\x02\0\0"
    assert machine.record().status == 0x11


@pytest.mark.parametrize(
    ("opcode", "change", "status"),
    [
        *((opcode, {"size": 0}, 0x13) for opcode in GOOD if opcode not in (NOOP, BATCH, DRAIN)),
        (MEMMOVE, {"size": (2 << 20) + 1}, 0x13),
        (CR_DELTA, {"size": 68}, 0x13),
        (CR_DELTA, {"size": 0x80008}, 0x13),
        (AP_DELTA, {"size": 68}, 0x13),
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
        (AP_DELTA, {"src": SRC + 4}, 0x1C),
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
            op, flags, src=src, dst=dst, size=size, record=record, handle=1, specific=specific
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
        raws = [work(BATCH, ASKED | BOF, src=SRC, size=len(raws), record=RECORD + 32)]
    for raw in raws:
        machine.submit(raw)
    for _ in range(200):
        if not machine.silicon.serve(answer):
            break
    assert machine.dsa.queues[0].jobs == {}
    ended = sum(machine.statuses.values())
    assert ended == machine.counters.descriptors >= len(raws)
    failed = ended - machine.statuses.get(1, 0)
    assert failed <= records.count + machine.counters.software_errors <= ended
    machine.silicon.function.configure(ats=True, bus_master=True)
    machine.silicon.function.pri.enable(64)
    machine.map(RECORD, RECORD_FRAME)
    assert machine.run(good(MEMMOVE)).status == 1, "and the device goes on"
