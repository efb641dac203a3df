"""Descriptors as 64 literal bytes in, memory and 32-byte completion records out: moves, fills, faults."""

from __future__ import annotations

import pytest

from protocol.flow import Wait
from protocol.units import Iova
from tests.kit.accelerator import (
    ABORT_ALL,
    BOF,
    CRAV,
    DISABLE_WQ,
    DRAIN_ALL,
    DST,
    DST_FRAME,
    ENABLE_WQ,
    FILL,
    MEMMOVE,
    NOOP,
    PAGE,
    RCI,
    RCR,
    RECORD,
    RECORD_FRAME,
    SRC,
    Accelerator,
    Record,
    pattern,
    work,
)
from tests.kit.silicon import DID, RID, R, devtlb_all, iotlb_domain

MAX_TRANSFER = 2 << 20
ENGINES = 4


@pytest.fixture
def machine() -> Accelerator:
    return Accelerator()


# -- what it does --------------------------------------------------------------------------------------


def test_a_move_copies_the_bytes_and_its_record_is_success_and_zeroes(machine: Accelerator) -> None:
    machine.map(SRC, 10, 3)
    machine.map(DST, 20, 3)
    data = pattern(2 * PAGE)
    machine.silicon.fill_frame(10, data, 0x80)
    machine.submit(work(MEMMOVE, CRAV | RCR, src=SRC + 0x80, dst=DST + 0x123, size=2 * PAGE))
    assert machine.bytes_of(20, 3 * PAGE) == bytes(0x123) + data + bytes(PAGE - 0x123)
    assert machine.raw_record() == b"\x01" + bytes(31)
    assert (machine.counters.bytes_moved, machine.counters.pages_moved) == (2 * PAGE, 2)


@pytest.mark.parametrize("distance", [1, 64, PAGE, PAGE + 5])
@pytest.mark.parametrize("forward", [False, True])
def test_an_overlapping_move_is_a_memmove(machine: Accelerator, distance: int, forward: bool) -> None:
    for n, frame in enumerate([10, 17, 12, 13, 30, 31]):
        machine.map(SRC + n * PAGE, frame)
    src, dst = (SRC + 16, SRC + 16 + distance) if forward else (SRC + 16 + distance, SRC + 16)
    frames = [10, 17, 12, 13, 30, 31]
    before = bytearray(pattern(6 * PAGE, 3))
    for n, frame in enumerate(frames):
        machine.silicon.fill_frame(frame, bytes(before[n * PAGE : (n + 1) * PAGE]))
    machine.submit(work(MEMMOVE, CRAV | RCR, src=src, dst=dst, size=3 * PAGE))
    before[dst - SRC : dst - SRC + 3 * PAGE] = bytes(before[src - SRC : src - SRC + 3 * PAGE])
    assert b"".join(machine.bytes_of(frame) for frame in frames) == before
    assert machine.record().status == 1


@pytest.mark.parametrize("size", [1, 7, 8, 13, PAGE, PAGE + 3])
def test_a_fill_repeats_its_eight_bytes(machine: Accelerator, size: int) -> None:
    machine.map(DST, 20, 3)
    machine.submit(work(FILL, CRAV | RCR, src=0x0807_0605_0403_0201, dst=DST + 5, size=size))
    expected = (b"\x01\x02\x03\x04\x05\x06\x07\x08" * 700)[:size]
    assert machine.bytes_of(20, 3 * PAGE) == bytes(5) + expected + bytes(3 * PAGE - 5 - size)
    assert machine.record() == Record(1, False, 0, 0)


def test_no_operation_completes_without_touching_memory(machine: Accelerator) -> None:
    machine.submit(work(NOOP, CRAV | RCR | RCI, handle=9))
    assert machine.raw_record() == b"\x01" + bytes(31)
    assert machine.interrupts == [9]


def test_the_largest_transfer_is_two_mebibytes(machine: Accelerator) -> None:
    machine.silicon.map(SRC >> 12, 0, level=2)
    machine.submit(work(FILL, CRAV | RCR, src=0x11, dst=SRC, size=MAX_TRANSFER))
    assert machine.record().status == 1
    assert machine.bytes_of(0, MAX_TRANSFER) == (b"\x11" + bytes(7)) * (MAX_TRANSFER // 8)


# -- the record ----------------------------------------------------------------------------------------


def test_the_status_byte_is_written_after_the_rest_of_the_record(
    machine: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = machine.silicon.function
    stores: list[tuple[int, int]] = []
    real = function.write

    def write(iova: int, data: bytes) -> bool:
        stored = real(Iova(iova), data)
        if stored:
            stores.append((iova, len(data)))
            if iova != RECORD:
                assert machine.raw_record()[0] == 0, "software polls the status byte"
        return stored

    monkeypatch.setattr(function, "write", write)
    machine.submit(work(NOOP, CRAV | RCR))
    assert stores == [(RECORD + 1, 31), (RECORD, 1)]


@pytest.mark.parametrize(
    ("flags", "record", "interrupts"),
    [
        (CRAV | RCR, True, []),
        (CRAV, False, []),
        (RCI, False, [5]),
        (CRAV | RCR | RCI, True, [5]),
        (0, False, []),
    ],
)
def test_a_record_and_an_interrupt_come_if_asked_for(
    machine: Accelerator, flags: int, record: bool, interrupts: list[int]
) -> None:
    machine.submit(work(NOOP, flags, handle=5 if flags & RCI else 0))
    assert (machine.raw_record() != bytes(32)) is record
    assert machine.interrupts == interrupts
    assert machine.counters.software_errors == 0


def test_an_error_is_recorded_even_if_no_record_was_asked_for(machine: Accelerator) -> None:
    machine.submit(work(0x7F, CRAV))
    assert machine.record().status == 0x10


def test_an_error_without_a_record_address_is_a_software_error(machine: Accelerator) -> None:
    machine.submit(work(0x7F, 0))
    assert machine.raw_record() == bytes(32)
    assert machine.counters.software_errors == 1


def test_the_record_itself_may_fault_and_block() -> None:
    machine = Accelerator(records=False)
    machine.submit(work(NOOP, CRAV | RCR | RCI, handle=3))
    (asked,) = machine.silicon.requests()
    assert (asked.page, asked.write) == (RECORD >> 12, True)
    assert machine.interrupts == []
    machine.silicon.map(RECORD >> 12, RECORD_FRAME)
    machine.silicon.respond(asked.prgi)
    assert machine.record().status == 1
    assert machine.interrupts == [3]


@pytest.mark.parametrize("block", [False, True])
def test_a_record_blocks_on_its_fault_whatever_its_queue_says(*, block: bool) -> None:
    machine = Accelerator(records=False, block=block)
    machine.submit(work(NOOP, CRAV | RCR))
    assert machine.counters.software_errors == 0
    machine.silicon.map(RECORD >> 12, RECORD_FRAME)
    machine.silicon.serve()
    assert machine.record().status == 1


def test_a_record_that_cannot_be_written_is_a_software_error() -> None:
    machine = Accelerator(records=False).data_alone()
    machine.submit(work(NOOP, CRAV | RCR))
    assert machine.silicon.requests() == []
    assert machine.counters.software_errors == 1


@pytest.mark.parametrize("offset", [1, 8, 16, 31, PAGE - 1, PAGE - 16])
def test_a_misaligned_record_is_a_software_error_and_is_written_nowhere(
    machine: Accelerator, offset: int
) -> None:
    machine.silicon.map((RECORD >> 12) + 1, RECORD_FRAME + 1)
    machine.map(DST, 20)
    machine.submit(work(FILL, CRAV | RCR | BOF, src=1, dst=DST, size=8, record=RECORD + offset))
    assert machine.bytes_of(RECORD_FRAME, 2 * PAGE) == bytes(2 * PAGE)
    assert machine.bytes_of(20, 8) == bytes(8), "the descriptor was not run"
    assert machine.counters.software_errors == 1
    assert machine.statuses == {0x1B: 1}


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (work(0x7F, CRAV | RCR), 0x10),
        (work(FILL, CRAV | RCR, dst=DST, size=0), 0x13),
        (work(MEMMOVE, CRAV | RCR, src=SRC, dst=DST, size=MAX_TRANSFER + 1), 0x13),
        (work(FILL, CRAV | RCR, dst=DST, size=0xFFFF_FFFF), 0x13),
        (work(FILL, CRAV | RCR, dst=DST, size=8, dword0=1 << 20), 0x12),
        (work(FILL, CRAV | RCR, dst=DST, size=8, dword0=1 << 30), 0x12),
        (work(FILL, CRAV | RCR, dst=DST, size=8)[:38] + b"\x01" + bytes(25), 0x12),
    ],
)
def test_a_bad_descriptor_is_answered_in_its_record_and_moves_nothing(
    machine: Accelerator, raw: bytes, status: int
) -> None:
    machine.map(DST, 20)
    machine.map(SRC, 10)
    machine.silicon.fill_frame(10, b"source")
    machine.submit(raw)
    assert machine.record() == Record(status, False, 0, 0)
    assert machine.bytes_of(20) == bytes(PAGE)


def test_block_on_fault_where_the_queue_forbids_it_is_invalid_flags() -> None:
    machine = Accelerator(block=False)
    machine.map(DST, 20)
    machine.submit(work(FILL, CRAV | RCR | BOF, src=1, dst=DST, size=8))
    assert machine.record() == Record(0x11, False, 0, 0, specific=b"\x02" + bytes(15))
    assert machine.bytes_of(20) == bytes(PAGE)


def test_a_record_asked_for_without_an_address_is_invalid_flags(machine: Accelerator) -> None:
    machine.map(DST, 20)
    machine.submit(work(FILL, RCR | RCI, src=1, dst=DST, size=8, handle=4))
    assert machine.bytes_of(20) == bytes(PAGE)
    assert machine.raw_record() == bytes(32)
    assert machine.statuses == {0x11: 1}
    assert (machine.counters.software_errors, machine.interrupts) == (1, [4])


# -- faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("src_pages", "dst_pages", "write", "fault", "completed"),
    [
        (4, 4, False, None, 0),
        (0, 4, False, SRC, 0),
        (4, 0, True, DST, 0),
        (2, 4, False, SRC + 2 * PAGE, 2 * PAGE - 0x100),
        (4, 3, True, DST + 3 * PAGE, 3 * PAGE - 0x40),
    ],
)
def test_without_block_on_fault_a_move_ends_at_the_page_that_misses(
    machine: Accelerator, src_pages: int, dst_pages: int, write: bool, fault: int | None, completed: int
) -> None:
    machine.map(SRC, 10, src_pages)
    machine.map(DST, 20, dst_pages)
    data = pattern(4 * PAGE)
    machine.silicon.fill_frame(10, data)
    size = 3 * PAGE + 0x80
    machine.submit(work(MEMMOVE, CRAV | RCR, src=SRC + 0x100, dst=DST + 0x40, size=size))
    if fault is None:
        assert machine.record() == Record(1, False, 0, 0)
        completed = size
    else:
        assert machine.record() == Record(3, write, completed, fault)
    moved = machine.bytes_of(20, 4 * PAGE)
    assert moved == bytes(0x40) + data[0x100 : 0x100 + completed] + bytes(4 * PAGE - 0x40 - completed)
    assert machine.silicon.requests() == []


def test_a_faulted_move_resumed_where_its_record_says_moves_every_byte_once(machine: Accelerator) -> None:
    data = pattern(4 * PAGE)
    machine.silicon.fill_frame(10, data)
    machine.map(SRC, 10)
    done = faults = 0
    while done < 4 * PAGE:
        machine.submit(work(MEMMOVE, CRAV | RCR, src=SRC + done, dst=DST + done, size=4 * PAGE - done))
        status, write, completed, fault, *_ = machine.record()
        if status == 1:
            break
        assert status == 3
        done += completed
        base, frame = (DST, 20) if write else (SRC, 10)
        machine.map(fault, frame + (fault - base) // PAGE)
        faults += 1
    assert faults == 3 + 4
    assert machine.bytes_of(20, 4 * PAGE) == data


def test_with_block_on_fault_a_move_waits_for_its_pages_and_succeeds(machine: Accelerator) -> None:
    data = pattern(4 * PAGE)
    machine.silicon.fill_frame(10, data)
    machine.submit(work(MEMMOVE, CRAV | RCR | RCI | BOF, src=SRC, dst=DST, size=4 * PAGE, handle=9))
    seen = set()
    while asked := machine.silicon.requests():
        assert machine.raw_record() == bytes(32)
        for request in asked:
            base, frame = (DST, 20) if request.page >= DST >> 12 else (SRC, 10)
            machine.map(request.page << 12, frame + request.page - (base >> 12))
            seen.add((request.page, request.write))
        machine.silicon.respond(asked[-1].prgi)
    assert seen == {(SRC // PAGE + n, False) for n in range(4)} | {(DST // PAGE + n, True) for n in range(4)}
    assert machine.bytes_of(20, 4 * PAGE) == data
    assert (machine.record(), machine.interrupts) == (Record(1, False, 0, 0), [9])


@pytest.mark.parametrize(("code", "status"), [(1, 4), (0xF, 0x22)])
@pytest.mark.parametrize("write", [False, True])
def test_a_refused_page_request_is_told_with_the_page_and_the_kind_of_access(
    machine: Accelerator, code: int, status: int, write: bool
) -> None:
    machine.map(SRC, 10, 2)
    machine.map(DST, 20, 2)
    absent = (DST if write else SRC) + PAGE
    machine.silicon.tables.unmap(absent >> 12)
    machine.submit(work(MEMMOVE, CRAV | RCR | BOF, src=SRC + 8, dst=DST + 8, size=PAGE))
    assert [(asked.page << 12, asked.write) for asked in machine.silicon.serve(code)] == [(absent, write)]
    assert machine.raw_record()[0] == (0x80 | status if write else status)
    assert machine.record() == Record(status, write, PAGE - 8, absent)


def test_a_read_only_destination_is_a_write_fault(machine: Accelerator) -> None:
    machine.map(DST, 20, rights=R)
    machine.submit(work(FILL, CRAV | RCR, src=1, dst=DST + 0x10, size=8))
    assert machine.record() == Record(3, True, 0, DST)


def test_the_record_is_written_after_failure_switched_page_requests_off(machine: Accelerator) -> None:
    machine.submit(work(FILL, CRAV | RCR | RCI | BOF, src=1, dst=DST, size=8, handle=2))
    machine.silicon.serve(0xF)
    assert machine.record() == Record(0x22, True, 0, DST)
    assert machine.interrupts == [2]


# -- work queues ---------------------------------------------------------------------------------------


def blocked(page: int) -> bytes:
    """A descriptor that waits for a page of its own."""
    return work(FILL, BOF, src=1, dst=DST + page * PAGE, size=8)


def test_at_most_four_descriptors_run_at_a_time_and_the_others_follow_in_order(machine: Accelerator) -> None:
    for n in range(7):
        machine.submit(blocked(n))
    first = machine.silicon.requests()
    assert [asked.page - (DST >> 12) for asked in first] == list(range(ENGINES))
    machine.silicon.map(first[2].page, 20)
    machine.silicon.respond(first[2].prgi)
    assert [asked.page - (DST >> 12) for asked in machine.silicon.requests()] == [4]
    assert machine.counters.descriptors == 5


def test_a_disabled_queue_finishes_what_it_took(machine: Accelerator) -> None:
    machine.submit(blocked(0))
    assert machine.command(DISABLE_WQ, 1 << 0) == -1, "the command waits for it"
    machine.submit(work(NOOP, CRAV | RCR))
    assert len(machine.dsa.queues[0].jobs) == 1, "and nothing more is taken"
    machine.map(DST, 20)
    machine.silicon.serve()
    assert machine.bytes_of(20, 8) == b"\x01" + bytes(7)
    assert (machine.raw_record(), machine.counters.software_errors) == (bytes(32), 0)
    assert machine.command(ENABLE_WQ, 0) == 0


# -- drain, abort, reset -------------------------------------------------------------------------------


def test_an_idle_device_is_drained_at_once(machine: Accelerator) -> None:
    assert machine.command(DRAIN_ALL) == 0
    machine.submit(work(NOOP, 0))
    assert machine.command(DRAIN_ALL) == 0


def test_a_drain_returns_when_the_last_descriptor_is_done(machine: Accelerator) -> None:
    for n in range(6):
        machine.submit(blocked(n))
    assert machine.command(DRAIN_ALL, interrupt=True) == -1
    answered = 0
    while asked := machine.silicon.requests():
        for request in asked:
            assert machine.interrupts == []
            machine.map(request.page << 12, 20)
            machine.silicon.respond(request.prgi)
            answered += 1
    assert answered == 6
    assert machine.interrupts == [0], "vector 0 is the device's own"


def test_an_abort_drops_what_is_queued_and_what_runs_ends_without_a_trace(machine: Accelerator) -> None:
    for n in range(6):
        machine.submit(work(FILL, CRAV | RCR | RCI | BOF, src=1, dst=DST + n * PAGE, size=8, handle=3))
    assert machine.command(ABORT_ALL) == -1, "requests for pages are out"
    machine.map(DST, DST_FRAME, 6)
    assert len(machine.silicon.serve()) == ENGINES
    assert machine.load(0xA8) == 0
    assert (machine.statuses, machine.counters.aborted, machine.interrupts) == ({}, 6, [])
    assert machine.raw_record() == bytes(32)
    assert machine.counters.software_errors == 0
    machine.submit(work(NOOP, CRAV | RCR))
    assert machine.record().status == 1, "the queue is enabled still"


def test_when_the_driver_of_the_unit_dies_everything_ends_silently_and_a_reset_finds_it_empty(
    machine: Accelerator,
) -> None:
    for n in range(6):
        machine.submit(blocked(n))
    machine.dsa.abandon()
    reset: Wait[None] = machine.silicon.start(machine.dsa.reset())
    assert not reset.done
    machine.silicon.function.stop()
    machine.silicon.flows.run_ready()
    assert reset.done
    assert (machine.statuses, machine.counters.aborted) == ({}, 6)
    machine.submit(work(NOOP, CRAV | RCR))
    assert machine.dsa.queues[0].jobs == {}
    assert (machine.raw_record(), machine.counters.software_errors) == (bytes(32), 0)


# -- invalidation under DMA ----------------------------------------------------------------------------


def test_pages_moved_under_a_running_copy_get_every_byte(machine: Accelerator) -> None:
    """The host moves the destination's first page each time the copy stops for another one."""
    data = pattern(4 * PAGE)
    machine.silicon.fill_frame(10, data)
    machine.map(SRC, 10, 4)
    machine.map(DST, 20)
    machine.submit(work(MEMMOVE, CRAV | RCR | BOF, src=SRC, dst=DST, size=4 * PAGE))
    for old, new in ((20, 30), (30, 20), (20, 40)):
        asked = machine.silicon.requests()
        assert asked
        machine.silicon.tables.unmap(DST >> 12)
        machine.silicon.execute(iotlb_domain(DID) + devtlb_all(RID))
        machine.silicon.fill_frame(new, machine.bytes_of(old))
        machine.silicon.fill_frame(old, b"\xee" * PAGE)
        machine.silicon.map(DST >> 12, new)
        page = asked[0].page
        machine.silicon.map(page, 50 + page - (DST >> 12))
        machine.silicon.respond(asked[-1].prgi)
    assert machine.record().status == 1
    assert machine.bytes_of(40) + machine.bytes_of(51, 3 * PAGE) == data
