"""Batches, fences and drains: who waits for whom, who is abandoned, and what the batch's record counts."""

from __future__ import annotations

import struct

import pytest

from device_sim.core.dsa.engine import EngineGroup
from tests.kit.accelerator import (
    ABORT_WQ,
    BATCH,
    BOF,
    COMPARE,
    CR,
    CRAV,
    DRAIN,
    DST,
    DST_FRAME,
    FENCE,
    FILL,
    NOOP,
    PAGE,
    RCI,
    RCR,
    RECORD,
    SRC,
    SRC_FRAME,
    THIRD,
    Accelerator,
    Record,
    work,
)

ASKED = CRAV | RCR
LIST, LIST_FRAME = SRC, SRC_FRAME


@pytest.fixture
def machine() -> Accelerator:
    machine = Accelerator()
    machine.map(LIST, LIST_FRAME, 4)
    machine.map(DST, DST_FRAME, 4)
    return machine


def fill(n: int, flags: int = ASKED, *, dst: int | None = None, value: int = 0x55) -> bytes:
    """A descriptor with record n + 1, if it has one, that fills eight bytes of its own."""
    record = RECORD + 32 * (n + 1) if flags & CRAV else 0
    return work(FILL, flags, src=value, dst=DST + 8 * n if dst is None else dst, size=8, record=record)


def submit(machine: Accelerator, children: list[bytes], flags: int = ASKED | RCI, at: int = 0) -> None:
    machine.put(LIST_FRAME, b"".join(children), at)
    handle = 7 if flags & RCI else 0
    machine.submit(work(BATCH, flags, src=LIST + at, size=len(children), handle=handle))


def statuses(machine: Accelerator, count: int) -> list[int]:
    return [machine.record(n + 1).status for n in range(count)]


@pytest.mark.parametrize("count", [2, 3, 64, 65, 120])
def test_a_batch_runs_its_descriptors_and_counts_them(machine: Accelerator, count: int) -> None:
    submit(machine, [fill(n, value=n + 1) for n in range(count)])
    assert statuses(machine, count) == [1] * count
    assert machine.record() == Record(1, False, count, 0)
    filled = struct.unpack(f"<{count}Q", machine.bytes_of(DST_FRAME, 8 * count))
    assert filled == tuple(range(1, count + 1))
    assert machine.interrupts == [7]


def test_one_bad_descriptor_makes_status_5_and_the_others_run(machine: Accelerator) -> None:
    submit(machine, [fill(0), work(0x7F, ASKED, record=RECORD + 64), fill(2)])
    assert statuses(machine, 3) == [1, 0x10, 1]
    assert machine.record() == Record(5, False, 3, 0)


@pytest.mark.parametrize("opcode", [BATCH, DRAIN])
def test_neither_a_batch_nor_a_drain_belongs_into_a_batch(machine: Accelerator, opcode: int) -> None:
    submit(
        machine,
        [work(opcode, ASKED, src=LIST if opcode == BATCH else 0, size=0, record=RECORD + 32), fill(1)],
    )
    assert statuses(machine, 2) == [0x10, 1]


def test_an_error_of_a_descriptor_in_a_batch_names_its_index(machine: Accelerator) -> None:
    submit(machine, [fill(0), fill(1), work(0x7F, 0)])
    flags, error, _, _, opcode, index = struct.unpack("<BBBBB3xH", machine.software_error[:10])
    assert (flags, error, opcode, index) == (0b1_1101, 0x10, 0x7F, 2)


def test_outside_a_batch_a_fence_is_an_invalid_flag(machine: Accelerator) -> None:
    machine.submit(fill(0, ASKED | FENCE))
    assert machine.record(1).status == 0x11


# -- fences --------------------------------------------------------------------------------------------


def test_without_a_fence_a_later_descriptor_passes_one_that_waits(machine: Accelerator) -> None:
    submit(machine, [fill(0, ASKED | BOF, dst=THIRD), fill(1)])
    assert statuses(machine, 2) == [0, 1]
    machine.map(THIRD, DST_FRAME + 30)
    machine.silicon.serve()
    assert statuses(machine, 2) == [1, 1]
    assert machine.record() == Record(1, False, 2, 0)


def test_a_fence_waits_for_everything_before_it(machine: Accelerator) -> None:
    submit(machine, [fill(0, ASKED | BOF, dst=THIRD), fill(1), fill(2, ASKED | FENCE)])
    assert statuses(machine, 3) == [0, 1, 0]
    machine.map(THIRD, DST_FRAME + 30)
    machine.silicon.serve()
    assert statuses(machine, 3) == [1, 1, 1]


def test_a_fence_after_a_failure_abandons_the_rest_of_the_batch(machine: Accelerator) -> None:
    submit(machine, [fill(0), fill(1, dst=THIRD), fill(2), fill(3, ASKED | FENCE), fill(4)])
    assert statuses(machine, 5) == [1, 3, 1, 0, 0], "the abandoned have no record"
    assert machine.record() == Record(5, False, 3, 0)
    assert machine.bytes_of(DST_FRAME, 8, 24) == bytes(8)


def test_an_unexpected_result_of_a_comparison_counts_as_a_failure_for_a_fence(machine: Accelerator) -> None:
    compare = work(COMPARE, ASKED | CR, src=LIST, dst=DST + 64, size=8, record=RECORD + 32)
    submit(machine, [compare, fill(1, ASKED | FENCE)])
    assert statuses(machine, 2) == [2, 0]
    assert machine.record() == Record(5, False, 1, 0)


# -- faults of the list --------------------------------------------------------------------------------


def test_a_list_that_faults_is_status_6_with_what_was_run(machine: Accelerator) -> None:
    machine.data_alone().silicon.tables.unmap((LIST >> 12) + 1)
    submit(machine, [fill(n) for n in range(6)], at=PAGE - 2 * 64)
    assert machine.record() == Record(6, False, 2, LIST + PAGE)
    assert statuses(machine, 6) == [1, 1, 0, 0, 0, 0]


def test_a_list_that_faults_behind_a_failure_has_result_1(machine: Accelerator) -> None:
    machine.data_alone().silicon.tables.unmap((LIST >> 12) + 1)
    submit(machine, [fill(0), work(0x7F, ASKED, record=RECORD + 64), fill(2)], at=PAGE - 2 * 64)
    assert machine.record() == Record(6, False, 2, LIST + PAGE, result=1)


def test_a_device_that_asks_for_data_alone_ends_a_batch_whose_list_faults(machine: Accelerator) -> None:
    machine.data_alone().silicon.tables.unmap((LIST >> 12) + 1)
    submit(machine, [fill(n) for n in range(4)], ASKED, at=PAGE - 2 * 64)
    assert machine.record() == Record(6, False, 2, LIST + PAGE)
    assert machine.silicon.driver.take_requests() == []


def test_a_device_that_asks_for_data_alone_loses_a_record_whose_page_is_absent() -> None:
    """Software error 0x1A; the data before it was asked for."""
    machine = Accelerator(records=False).data_alone()
    machine.map(DST, DST_FRAME)
    machine.submit(fill(0, ASKED | BOF))
    assert machine.silicon.driver.take_requests() == []
    assert machine.software_error[1] == 0x1A
    machine.submit(fill(0, ASKED | BOF, dst=THIRD))
    assert machine.silicon.driver.take_requests() != []


@pytest.mark.parametrize("block", [False, True])
def test_a_list_blocks_on_its_fault_whatever_its_queue_says(block: bool) -> None:
    machine = Accelerator(block=block)
    machine.map(LIST, LIST_FRAME)
    machine.map(DST, DST_FRAME, 4)
    submit(machine, [fill(n) for n in range(4)], ASKED, at=PAGE - 2 * 64)
    assert statuses(machine, 4) == [1, 1, 0, 0]
    machine.map(LIST + PAGE, LIST_FRAME + 1)
    machine.silicon.serve()
    assert statuses(machine, 4) == [1] * 4


# -- engines and queues --------------------------------------------------------------------------------


def test_a_batch_that_waits_keeps_no_engine(machine: Accelerator) -> None:
    """More batches than engines, each waiting for a page, and all their descriptors are asked for."""
    machine.two_queues(engines=(1, 2))
    for n in range(3):
        machine.put(
            LIST_FRAME, fill(n, BOF, dst=THIRD + n * PAGE) + fill(n, BOF, dst=THIRD + n * PAGE), n * 128
        )
        machine.submit(work(BATCH, ASKED, src=LIST + n * 128, size=2, record=RECORD))
    pages = []
    while asked := machine.silicon.requests():
        for request in asked:
            pages.append(request.page - (THIRD >> 12))
            machine.map(request.page << 12, DST_FRAME + 30)
            machine.silicon.respond(request.prgi)
    assert pages == [0, 1, 2]
    assert machine.record().status == 1


def test_a_batch_has_only_so_many_descriptors_in_flight(machine: Accelerator) -> None:
    children = [fill(n % 100, BOF, dst=THIRD + n * PAGE) for n in range(100)]
    machine.put(LIST_FRAME, b"".join(children))
    machine.submit(work(BATCH, ASKED, src=LIST, size=100))
    group = machine.dsa.queues[0].group
    assert isinstance(group, EngineGroup)
    assert machine.counters.descriptors - 1 + len(group._staged) == 16


def test_a_batch_that_is_aborted_ends_with_all_its_descriptors(machine: Accelerator) -> None:
    submit(machine, [fill(n, ASKED | BOF, dst=THIRD + n * PAGE) for n in range(30)])
    assert machine.command(ABORT_WQ, 1) == -1
    machine.map(THIRD, DST_FRAME, 30)
    machine.silicon.serve()
    assert machine.load(0xA8) == 0
    assert statuses(machine, 30) == [0] * 30
    assert (machine.record().status, machine.interrupts, machine.statuses) == (0, [], {})


def test_a_blocked_queue_stops_no_queue_of_another_group(machine: Accelerator) -> None:
    machine.two_queues()
    for n in range(3):
        machine.submit(fill(n, ASKED | BOF, dst=THIRD + n * PAGE), wq=0)
    machine.submit(fill(5), wq=1)
    machine.submit(fill(6), wq=0)
    assert [machine.record(n + 1).status for n in (0, 1, 2, 5, 6)] == [0, 0, 0, 1, 0]


def test_queues_of_a_group_are_served_in_turn(machine: Accelerator) -> None:
    assert machine.command(5) == 0
    for n in (0, 1):
        machine.configure(n, 8)
    machine.group(0, queues=0b11, engines=1)
    assert [machine.command(1), machine.command(6, 0), machine.command(6, 1)] == [0, 0, 0]
    order = [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4)]
    for wq, page in order:
        machine.submit(work(FILL, BOF, src=1, dst=THIRD + page * PAGE, size=8), wq=wq)
    served = []
    while asked := machine.silicon.requests():
        served.append(asked[0].page - (THIRD >> 12))
        machine.map(asked[0].page << 12, DST_FRAME)
        machine.silicon.respond(asked[0].prgi)
    assert served == [0, 3, 1, 4, 2]


# -- drains --------------------------------------------------------------------------------------------


def test_a_drain_waits_for_what_its_queue_took_before_it_and_for_no_other(machine: Accelerator) -> None:
    machine.two_queues()
    machine.submit(fill(0, ASKED | BOF, dst=THIRD))
    machine.submit(work(DRAIN, ASKED, record=RECORD + 64))
    machine.submit(fill(2, ASKED | BOF, dst=THIRD + PAGE))
    machine.submit(work(DRAIN, ASKED, record=RECORD + 128), wq=1)
    assert statuses(machine, 4) == [0, 0, 0, 1]
    machine.map(THIRD, DST_FRAME + 30)
    machine.silicon.serve()
    assert statuses(machine, 3) == [1, 1, 0]


def test_a_read_back_blocks_on_its_fault_which_no_flag_can_say(machine: Accelerator) -> None:
    machine.submit(work(DRAIN, ASKED | 1 << 17, dst=THIRD))
    assert machine.record().status == 0
    machine.map(THIRD, 30)
    machine.silicon.serve()
    assert machine.record() == Record(1, False, 0, 0)


@pytest.mark.parametrize("present", [True, False])
def test_a_drain_reads_back_if_it_is_told_to(machine: Accelerator, present: bool) -> None:
    target = DST if present else THIRD
    record = machine.data_alone().run(work(DRAIN, ASKED | 1 << 17, dst=target))
    assert record == (Record(1, False, 0, 0) if present else Record(0x1F, False, 0, THIRD))
    assert machine.run(work(DRAIN, ASKED, dst=THIRD)).status == 1
    assert machine.run(work(NOOP, ASKED)).status == 1
