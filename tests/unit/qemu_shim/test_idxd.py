"""The guest's DSA driver before a portal that writes down every byte it is given."""

from __future__ import annotations

import struct

import pytest

from protocol.flow import Flows, Wait
from protocol.hw.dsa import CompletionRecord, Status
from qemu_shim.guest.idxd import WQ_SIZE, IdxdWorkQueue
from tests.unit.qemu_shim.guests import PAGE, FakePortal, Ram

BOF, CRAV, RCR, RCI = 1 << 1, 1 << 2, 1 << 3, 1 << 4


def driver(*, block: bool = True) -> tuple[IdxdWorkQueue, FakePortal]:
    ram = Ram()
    portal = FakePortal(ram)
    return IdxdWorkQueue(portal, ram.memory(), block_on_fault=block), portal


def submitted(portal: FakePortal) -> list[bytes]:
    return [what[2] for what in portal.log if what[0] == "movdir64b" and isinstance(what[2], bytes)]


@pytest.mark.parametrize("block", [False, True])
async def test_the_queue_is_dedicated_and_blocks_if_asked_to(block: bool) -> None:
    queue, portal = driver(block=block)
    await queue.enable()
    await queue.disable()
    assert portal.log == [("configure", 0, 16, True, block), ("disable", 0)]


async def test_a_blocking_driver_never_touches_its_records_before_the_device() -> None:
    queue, portal = driver()
    await queue.enable()
    assert portal.ram.batches == [], "the device's write of the first record is to raise a page request"


@pytest.mark.parametrize(("block", "flags"), [(True, BOF | CRAV | RCR | RCI), (False, CRAV | RCR | RCI)])
async def test_a_move_is_this_descriptor(block: bool, flags: int) -> None:
    queue, portal = driver(block=block)
    record = await queue.memmove(0x9000, 0x5123, 0x1000)
    (raw,) = submitted(portal)
    pasid, op, at, src, dst, size, handle, zero = struct.unpack("<IIQQQIHH24x", raw)
    assert (pasid, op, src, dst, size, zero) == (0, flags | 3 << 24, 0x5123, 0x9000, 0x1000, 0)
    assert raw[40:] == bytes(24)
    assert at == queue.record_page + 32 * handle
    assert portal.log[-1] == ("interrupt", handle)
    assert record == CompletionRecord(status=Status.SUCCESS)


async def test_a_fill_carries_its_pattern_where_the_source_would_be() -> None:
    queue, portal = driver()
    await queue.fill(0x9000, 0x1122_3344_5566_7788, 64)
    (raw,) = submitted(portal)
    assert raw[7] == 4
    assert raw[16:24].hex() == "8877665544332211"
    assert struct.unpack_from("<QI", raw, 24) == (0x9000, 64)


async def test_the_record_is_what_the_device_wrote() -> None:
    queue, portal = driver()
    portal.record = struct.pack("<BBBBIQ16x", 0x84, 0, 0, 0, 0x800, 0x7000)
    record = await queue.memmove(0x9000, 0x5000, 0x1000)
    assert (record.status, record.write_fault) == (Status.PAGE_FAULT_IR, True)
    assert (record.bytes_completed, record.fault_addr) == (0x800, 0x7000)


async def test_records_lie_in_one_page_of_their_own_32_bytes_apart() -> None:
    queue, _ = driver()
    assert queue.record_page % PAGE == 0
    assert WQ_SIZE * 32 <= PAGE


class LatePortal(FakePortal):
    """Interrupts come when the test says so."""

    def __init__(self, ram: Ram) -> None:
        super().__init__(ram)
        self.late: dict[int, Wait[None]] = {}

    async def wait_interrupt(self, handle: int) -> None:
        self.late[handle] = Wait()
        await self.late[handle]


def test_descriptors_in_flight_have_slots_of_their_own_and_one_too_many_is_a_bug() -> None:
    ram = Ram()
    portal, flows = LatePortal(ram), Flows()
    queue = IdxdWorkQueue(portal, ram.memory(), block_on_fault=True)
    out = [flows.start(queue.memmove(0x9000, 0x5000, 8)) for _ in range(WQ_SIZE)]
    assert sorted(portal.late) == list(range(WQ_SIZE))
    places = [struct.unpack_from("<Q", raw, 8)[0] for raw in submitted(portal)]
    assert sorted(places) == [queue.record_page + 32 * n for n in range(WQ_SIZE)]
    with pytest.raises(AssertionError, match="16 descriptors"):
        flows.start(queue.memmove(0x9000, 0x5000, 8)).result()
    portal.late.pop(7).set(None)
    flows.run_ready()
    assert [wait.done for wait in out].count(True) == 1
    flows.start(queue.memmove(0x9000, 0x5000, 8))
    assert 7 in portal.late, "the slot that is free is used again"
