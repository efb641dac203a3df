"""The interrupt address range: never memory, whatever a table maps there and whoever asks."""

from __future__ import annotations

import struct

import pytest

from device_sim.core.dmar import RequestRefused
from device_sim.core.function import DmaFault, DmaRange
from device_sim.core.msi import END, START, InterruptMessage
from protocol.flow import Wait
from protocol.units import Iova
from tests.kit.accelerator import (
    BOF,
    CFLUSH,
    COMPARE,
    CRAV,
    CRCGEN,
    DST_FRAME,
    DUALCAST,
    FILL,
    MEMMOVE,
    RCR,
    SRC,
    SRC_FRAME,
    THIRD,
    THIRD_FRAME,
    Accelerator,
    work,
)
from tests.kit.silicon import FRAMES, RID, R, Recorded, Silicon, W

SGN_8 = 0x87
PAGE = 4096
RANGE_PAGE = START >> 12


@pytest.fixture
def silicon() -> Silicon:
    """Guest memory is mapped there as well, page by page: it must make no difference."""
    attached = Silicon()
    attached.attach()
    attached.map(RANGE_PAGE, 1)
    attached.map(RANGE_PAGE + 255, 2)
    attached.map(7, 3)
    return attached


def access(silicon: Silicon, *ranges: DmaRange) -> Wait[None]:
    return silicon.start(silicon.function.make_accessible(list(ranges), block=True))


@pytest.mark.parametrize("addr", [START, START + 0x10, START + 0x1234, END - 4])
def test_an_aligned_write_of_four_bytes_is_a_message_and_reaches_no_memory(
    silicon: Silicon, addr: int
) -> None:
    access(silicon, DmaRange(Iova(addr), 4, True)).result()
    assert silicon.function.write(Iova(addr), struct.pack("<I", 0x4021))
    assert list(silicon.unit.interrupt_messages) == [InterruptMessage(RID, Iova(addr), 0x4021)]
    assert silicon.unit.interrupts == 1
    assert bytes(silicon.frames) == bytes(len(silicon.frames))
    assert (silicon.requests(), silicon.faults(), silicon.unit.walks) == ([], [], 0)


def test_a_copy_of_four_bytes_is_a_message_once_its_source_is_there(silicon: Silicon) -> None:
    silicon.fill_frame(3, struct.pack("<I", 0xABCD))
    assert silicon.function.copy(Iova(0x7000), START, 4) == 0
    access(silicon, DmaRange(Iova(0x7000), 4, False), DmaRange(START, 4, True)).result()
    assert silicon.function.copy(Iova(0x7000), START, 4) == 4
    assert list(silicon.unit.interrupt_messages) == [InterruptMessage(RID, START, 0xABCD)]


@pytest.mark.parametrize(
    ("start", "size", "write"),
    [
        (START, 4, False),
        (START, 8, True),
        (START, 2, True),
        (START + 2, 4, True),
        (START + 0x1FFE, 4, True),
        (END - 2, 4, True),
        (START, PAGE, True),
    ],
)
def test_anything_else_is_refused_and_recorded(silicon: Silicon, start: int, size: int, write: bool) -> None:
    done = access(silicon, DmaRange(Iova(start), size, write))
    with pytest.raises(DmaFault):
        done.result()
    assert silicon.faults() == [Recorded(SGN_8, start >> 12, RID, True)]
    if write:
        assert not silicon.function.write(Iova(start), bytes(size))
    assert silicon.function.read(Iova(start), size) is None
    assert (silicon.unit.interrupts, silicon.requests()) == (0, [])


def test_its_neighbours_are_memory(silicon: Silicon) -> None:
    silicon.map(RANGE_PAGE - 1, 4)
    silicon.map(END >> 12, 5)
    for at in (START - 4, END):
        access(silicon, DmaRange(Iova(at), 4, True)).result()
        assert silicon.function.write(Iova(at), b"here")
    assert (silicon.bytes_of(4, 4, PAGE - 4), silicon.bytes_of(5, 4)) == (b"here", b"here")
    assert silicon.unit.interrupts == 0


# -- an access that runs into it -----------------------------------------------------------------------

BEFORE, SIZE = START - PAGE, 2 * PAGE  # half of it is memory
INTO_IT = {
    "fill": work(FILL, BOF | CRAV | RCR, src=0x5A, dst=BEFORE, size=SIZE),
    "move there": work(MEMMOVE, BOF | CRAV | RCR, src=SRC, dst=BEFORE, size=SIZE),
    "move from there": work(MEMMOVE, BOF | CRAV | RCR, src=BEFORE, dst=SRC, size=SIZE),
    "dualcast": work(
        DUALCAST, BOF | CRAV | RCR, src=SRC, dst=THIRD, size=SIZE, specific=struct.pack("<Q", BEFORE)
    ),
    "compare": work(COMPARE, BOF | CRAV | RCR, src=SRC, dst=BEFORE, size=SIZE),
    "CRC": work(CRCGEN, BOF | CRAV | RCR, src=BEFORE, size=SIZE),
    "flush": work(CFLUSH, BOF | CRAV | RCR, dst=BEFORE, size=SIZE),
}
STORES = ("fill", "move there", "dualcast")


@pytest.mark.parametrize("state", ["absent", "cold", "warm"])
@pytest.mark.parametrize("name", INTO_IT)
def test_an_access_that_runs_into_it_is_done_up_to_it_and_faults_there(name: str, state: str) -> None:
    """Cold it reported nothing done and its own first byte: requests do not cross 4 KiB."""
    machine = Accelerator()
    machine.map(SRC, SRC_FRAME, 2)
    machine.map(THIRD, THIRD_FRAME, 2)
    if state != "absent":
        machine.map(BEFORE, DST_FRAME)
    if state == "warm":
        for write in (False, True):
            access(machine.silicon, DmaRange(Iova(BEFORE), PAGE, write)).result()
    machine.submit(INTO_IT[name])
    if state == "absent":
        assert [asked.page for asked in machine.silicon.requests()] == [BEFORE >> 12]
        machine.map(BEFORE, DST_FRAME)
        machine.silicon.respond(0)
    record = machine.record()
    assert (record.bytes_completed, record.fault_addr) == (PAGE, START)
    assert (record.status, record.write) == (4, name in STORES)
    assert machine.silicon.faults() == [Recorded(SGN_8, RANGE_PAGE, RID, True)]
    assert (machine.silicon.unit.interrupts, machine.silicon.requests()) == (0, [])


def test_what_is_never_reached_is_not_refused() -> None:
    """A comparison that ends before the range has asked for nothing there."""
    machine = Accelerator()
    machine.map(SRC, SRC_FRAME, 2)
    machine.map(BEFORE, DST_FRAME)
    machine.put(SRC_FRAME, b"different")
    assert machine.run(INTO_IT["compare"]).status == 1
    assert machine.silicon.faults() == []


def test_a_write_whose_last_four_bytes_lie_there_is_memory_and_a_message() -> None:
    machine = Accelerator()
    machine.map(BEFORE, DST_FRAME)
    assert machine.run(work(FILL, BOF | CRAV | RCR, src=0x4021 << 32, dst=START - 4, size=8)).status == 1
    assert list(machine.silicon.unit.interrupt_messages) == [InterruptMessage(RID, START, 0x4021)]
    assert machine.run(work(FILL, BOF | CRAV | RCR, src=0x4022, dst=START + PAGE - 4, size=8)).status == 1
    assert [message.addr - START for message in machine.silicon.unit.interrupt_messages] == [
        0,
        PAGE - 4,
        PAGE,
    ]
    assert (machine.silicon.faults(), machine.silicon.requests()) == ([], [])


@pytest.mark.parametrize("page", [RANGE_PAGE, RANGE_PAGE + 255])
def test_a_translation_of_it_is_never_given_out(silicon: Silicon, page: int) -> None:
    with pytest.raises(RequestRefused):
        silicon.translate(page, W)
    assert [record.reason for record in silicon.faults()] == [SGN_8]


def test_a_huge_leaf_over_it_is_given_out_page_by_page_cached_or_not(silicon: Silicon) -> None:
    """Otherwise a device that asked for a neighbour could store into the range through its device TLB."""
    at = silicon.tables.entry_at(RANGE_PAGE, 2)
    silicon.tables.store(at, FRAMES + (512 << 12) | 0x80 | 7)
    for _ in range(2):
        assert silicon.translate(END >> 12, R | W) == (FRAMES + (768 << 12), 1, R | W)
    access(silicon, DmaRange(END, 4, True)).result()
    assert silicon.function.write(END, b"here")
    assert silicon.function.write(START, b"MSI!")
    assert silicon.unit.interrupts == 1
    assert silicon.bytes_of(512, 4) == bytes(4)
    assert silicon.bytes_of(768, 4) == b"here"
    with pytest.raises(RequestRefused):
        silicon.translate(RANGE_PAGE, W)


@pytest.mark.parametrize("level", [1, 2])
def test_a_leaf_that_leads_into_it_is_refused(silicon: Silicon, level: int) -> None:
    at = silicon.tables.entry_at(1024, level)
    silicon.tables.store(at, START | 7 | (0x80 if level == 2 else 0))
    with pytest.raises(RequestRefused):
        silicon.translate(1024)
    assert [record.reason for record in silicon.faults()] == [SGN_8]


def test_a_function_that_may_not_master_the_bus_sends_none(silicon: Silicon) -> None:
    silicon.function.configure(bus_master=False)
    done = access(silicon, DmaRange(START, 4, True))
    with pytest.raises(DmaFault):
        done.result()
    assert not silicon.function.write(START, b"MSI!")
    assert (silicon.unit.interrupts, silicon.faults()) == (0, [])


@pytest.mark.parametrize("absent_source", [False, True])
def test_a_descriptor_may_send_a_message_and_one_that_sends_none_ends(absent_source: bool) -> None:
    """An engine that takes "not translated" for "not yet" asks for ever, and nobody else gets a turn."""
    machine = Accelerator()
    if not absent_source:
        machine.map(SRC, SRC_FRAME)
    machine.put(SRC_FRAME, struct.pack("<I", 0x4021))
    machine.submit(work(MEMMOVE, BOF | CRAV | RCR, src=SRC, dst=START + 0x40, size=4))
    if absent_source:
        machine.map(SRC, SRC_FRAME)
        assert [asked.page for asked in machine.silicon.serve()] == [SRC >> 12]
    assert machine.record().status == 1
    assert list(machine.silicon.unit.interrupt_messages) == [
        InterruptMessage(RID, Iova(START + 0x40), 0x4021)
    ]
    for raw in (
        work(MEMMOVE, BOF | CRAV | RCR, src=SRC, dst=START, size=8),
        work(MEMMOVE, BOF | CRAV | RCR, src=START, dst=SRC, size=4),
        work(FILL, BOF | CRAV | RCR, src=1, dst=START + 2, size=4),
    ):
        assert machine.run(raw).status == 4
    assert machine.silicon.unit.interrupts == 1


def test_a_message_goes_on_to_whoever_delivers_it(silicon: Silicon) -> None:
    delivered: list[InterruptMessage] = []
    silicon.unit.deliver = delivered.append
    assert silicon.function.write(START, struct.pack("<I", 0x4021))
    assert delivered == [InterruptMessage(RID, START, 0x4021)]
