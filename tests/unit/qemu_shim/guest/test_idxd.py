"""The guest's DSA driver before a portal that writes down every byte it is given."""

from __future__ import annotations

import struct

import pytest

from protocol.errors import UapiError
from protocol.flow import Flows, Wait
from protocol.hw.dsa import CompletionRecord, Descriptor, Opcode, Status
from qemu_shim.guest.idxd import WQ_SIZE, IdxdWorkQueue
from tests.unit.qemu_shim.guest.guests import ENABLE_DEVICE, ENABLE_WQ, PAGE, SWERR, FakePortal, Ram

BOF, CRAV, RCR, RCI = 1 << 1, 1 << 2, 1 << 3, 1 << 4
ENQCMDS = 32
HANDLE = 1


def driver(*, block: bool = True, dedicated: bool = True, wq: int = 0) -> tuple[IdxdWorkQueue, FakePortal]:
    ram = Ram()
    portal = FakePortal(ram)
    queue = IdxdWorkQueue(portal, ram.memory(), block_on_fault=block, dedicated=dedicated, wq=wq)
    return queue, portal


def fault(completed: int, at: int, *, write: bool = False, result: int = 0) -> bytes:
    return struct.pack("<BBBBIQ16x", 3 | write << 7, result, 0, 0, completed, at)


# -- bring-up ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [False, True])
async def test_the_queue_is_dedicated_and_blocks_if_asked_to(block: bool) -> None:
    queue, portal = driver(block=block)
    await queue.enable()
    await queue.disable()
    assert portal.commands == [(ENABLE_DEVICE, 0), (ENABLE_WQ, 0), (7, 1)]
    size, threshold, mode, limits = struct.unpack_from("<4I", portal.bar, 0x500)
    assert (size, threshold, mode, limits) == (16, 0, 1 | block << 1, 21 | 5 << 5)
    assert struct.unpack_from("<Q", portal.bar, 0x400) == (1,)
    assert struct.unpack_from("<Q", portal.bar, 0x420) == (0xF,), "all engines are the group's"


async def test_a_device_that_is_set_up_is_left_as_it_is() -> None:
    queue, portal = driver(wq=2)
    other = IdxdWorkQueue(portal, portal.ram.memory(), block_on_fault=False, dedicated=False, wq=1)
    await queue.device.set_up([[None, other.config], [queue.config]])
    groups = [struct.unpack_from("<Q24xQ", portal.bar, at) for at in (0x400, 0x440)]
    assert groups == [(0b010, 0b0101), (0b100, 0b1010)], "queues and engines"
    assert struct.unpack_from("<3I", portal.bar, 0x520) == (16, 16, 0), "a shared queue's threshold"
    await queue.enable()
    await other.enable()
    assert portal.commands == [(ENABLE_DEVICE, 0), (ENABLE_WQ, 2), (ENABLE_WQ, 1)]


async def test_a_command_that_fails_says_which_and_why() -> None:
    queue, portal = driver()
    portal.errors[ENABLE_WQ] = 0x22
    with pytest.raises(UapiError, match="ENABLE_WQ 0x0: WQ_SIZE"):
        await queue.enable()


async def test_a_software_error_is_read_and_acknowledged() -> None:
    queue, portal = driver()
    assert not (await queue.device.take_software_error()).valid
    portal.bar[SWERR : SWERR + 3] = b"\x09\x52\x03"
    error = await queue.device.take_software_error()
    assert (error.valid, error.error, error.wq_idx) == (True, 0x52, 3)
    assert portal.bar[SWERR] == 3, "valid and overflow, written as ones"


async def test_a_blocking_driver_never_touches_its_records_before_the_device() -> None:
    queue, portal = driver()
    await queue.enable()
    assert portal.ram.batches == [], "the device's write of the first record is to raise a page request"


# -- descriptors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "flags"), [(True, BOF | CRAV | RCR | RCI), (False, CRAV | RCR | RCI)])
async def test_a_move_is_this_descriptor(block: bool, flags: int) -> None:
    queue, portal = driver(block=block)
    record = await queue.memmove(0x9000, 0x5123, 0x1000)
    (raw,) = portal.submitted()
    pasid, op, at, src, dst, size, handle, zero = struct.unpack("<IIQQQIHH24x", raw)
    assert (pasid, op, src, dst, size, zero) == (0, flags | 3 << 24, 0x5123, 0x9000, 0x1000, 0)
    assert raw[40:] == bytes(24)
    assert at == queue.record_page + 32 * (handle - HANDLE)
    assert portal.log[-1] == ("interrupt", handle)
    assert record == CompletionRecord(status=Status.SUCCESS)


async def test_a_fill_carries_its_pattern_where_the_source_would_be() -> None:
    queue, portal = driver()
    await queue.fill(0x9000, 0x1122_3344_5566_7788, 64)
    (raw,) = portal.submitted()
    assert raw[7] == 4
    assert raw[16:24].hex() == "8877665544332211"
    assert struct.unpack_from("<QI", raw, 24) == (0x9000, 64)


@pytest.mark.parametrize("opcode", [Opcode.NOOP, Opcode.BATCH, Opcode.DRAIN])
async def test_what_may_not_block_on_faults_does_not_say_so(opcode: Opcode) -> None:
    queue, portal = driver()
    await queue.run(opcode)
    (raw,) = portal.submitted()
    assert raw[4] == CRAV | RCR | RCI


async def test_in_a_batch_too_what_may_not_block_on_faults_does_not_say_so() -> None:
    queue, portal = driver()
    await queue.batch([Descriptor(opcode=Opcode.NOOP), Descriptor(opcode=Opcode.MEMFILL)])
    (raw,) = portal.submitted()
    at, _, _ = operands(raw)
    assert [portal.ram.bytes[at + 64 * n + 4] for n in range(2)] == [CRAV | RCR, BOF | CRAV | RCR]


async def test_the_record_is_what_the_device_wrote() -> None:
    queue, portal = driver()
    portal.records = [struct.pack("<BBBBIQ16x", 0x84, 0, 0, 0, 0x800, 0x7000)]
    record = await queue.memmove(0x9000, 0x5000, 0x1000)
    assert (record.status, record.write_fault) == (Status.PAGE_FAULT_IR, True)
    assert (record.bytes_completed, record.fault_addr) == (0x800, 0x7000)


async def test_records_lie_in_one_page_of_their_own_32_bytes_apart() -> None:
    queue, _ = driver()
    assert queue.record_page % PAGE == 0
    assert WQ_SIZE * 32 <= PAGE


async def test_queues_of_one_device_have_interrupts_of_their_own() -> None:
    handles = set()
    for wq in range(8):
        queue, portal = driver(wq=wq)
        for _ in range(WQ_SIZE):
            queue._free.insert(0, queue._free.pop())
            await queue.run(Opcode.NOOP)
        handles |= {struct.unpack_from("<H", raw, 36)[0] for raw in portal.submitted()}
    assert len(handles) == 8 * WQ_SIZE
    assert 0 not in handles, "the device's own"


@pytest.mark.parametrize(("retries", "sent"), [(0, 1), (5, 6), (ENQCMDS - 1, ENQCMDS)])
async def test_a_shared_queue_is_asked_again_while_it_says_retry(retries: int, sent: int) -> None:
    queue, portal = driver(dedicated=False)
    portal.retries = retries
    assert (await queue.run(Opcode.NOOP)).status is Status.SUCCESS
    assert [what[0] for what in portal.log].count("enqcmd") == sent


async def test_a_shared_queue_that_stays_full_is_eagain_and_the_slot_is_free_again() -> None:
    queue, portal = driver(dedicated=False)
    portal.retries = ENQCMDS
    with pytest.raises(UapiError, match="EAGAIN"):
        await queue.run(Opcode.NOOP)
    assert len(queue._free) == WQ_SIZE


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
    assert sorted(portal.late) == list(range(HANDLE, HANDLE + WQ_SIZE))
    places = [struct.unpack_from("<Q", raw, 8)[0] for raw in portal.submitted()]
    assert sorted(places) == [queue.record_page + 32 * n for n in range(WQ_SIZE)]
    with pytest.raises(AssertionError, match="16 descriptors"):
        flows.start(queue.memmove(0x9000, 0x5000, 8)).result()
    portal.late.pop(7).set(None)
    flows.run_ready()
    assert [wait.done for wait in out].count(True) == 1
    flows.start(queue.memmove(0x9000, 0x5000, 8))
    assert 7 in portal.late, "the slot that is free is used again"


# -- resuming ------------------------------------------------------------------------------------------


def operands(raw: bytes) -> tuple[int, int, int]:
    src, dst, size = struct.unpack_from("<QQI", raw, 16)
    return src, dst, size


@pytest.mark.rfc("RFC-109")
async def test_after_a_fault_the_page_is_touched_and_the_rest_submitted() -> None:
    queue, portal = driver(block=False)
    portal.records = [fault(0x1000, 0x6000), fault(0x800, 0xA000, write=True), b"\x01" + bytes(31)]
    move = Descriptor(opcode=Opcode.MEMMOVE, src=0x5000, dst=0x9000, size=0x3000)
    completion = await queue.complete(move)
    assert [operands(raw) for raw in portal.submitted()] == [
        (0x5000, 0x9000, 0x3000),
        (0x6000, 0xA000, 0x2000),
        (0x6800, 0xA800, 0x1800),
    ]
    assert (completion.record.status, completion.faults, queue.faults) == (Status.SUCCESS, 2, 2)
    touched = [access for batch in portal.ram.batches for access in batch]
    assert (0x6000, 1) in touched
    assert touched.count((0xA000, b"")) == 1, "stored as it is"
    assert not any(gpa == 0x6000 and isinstance(what, bytes) for gpa, what in touched)


async def test_a_move_that_went_backwards_keeps_its_addresses() -> None:
    queue, portal = driver(block=False)
    portal.records = [fault(0x1800, 0x5000, result=1), b"\x01" + bytes(31)]
    await queue.complete(Descriptor(opcode=Opcode.MEMMOVE, src=0x5000, dst=0x5100, size=0x3000))
    assert [operands(raw) for raw in portal.submitted()][1] == (0x5000, 0x5100, 0x1800)


async def test_a_comparison_counts_from_its_beginning() -> None:
    queue, portal = driver(block=False)
    portal.records = [fault(0x1000, 0x6000), struct.pack("<BBBBI24x", 1, 1, 0, 0, 0x123)]
    compare = Descriptor(opcode=Opcode.COMPARE, src=0x5000, dst=0x9000, size=0x3000)
    record = (await queue.complete(compare)).record
    assert (record.result, record.bytes_completed) == (1, 0x1123)


@pytest.mark.parametrize("status", [4, 0x10, 0x16])
async def test_what_is_no_fault_to_resume_is_told(status: int) -> None:
    queue, portal = driver(block=False)
    portal.records = [bytes([status]) + bytes(31)]
    completion = await queue.complete(Descriptor(opcode=Opcode.MEMMOVE, src=0x5000, dst=0x9000, size=8))
    assert (completion.record.status, completion.faults) == (Status(status), 0)


# -- batches -------------------------------------------------------------------------------------------


async def test_a_batch_is_a_list_of_descriptors_with_records_of_their_own() -> None:
    queue, portal = driver()
    children = [Descriptor(opcode=Opcode.MEMFILL, src=n, dst=0x9000 + 64 * n, size=64) for n in range(3)]
    record, told = await queue.batch(children)
    (raw,) = portal.submitted()
    at, _, count = operands(raw)
    assert (raw[7], count, at % PAGE) == (1, 3, 0)
    listed = [bytes(portal.ram.bytes[at + 64 * n : at + 64 * n + 64]) for n in range(3)]
    assert [child[7] for child in listed] == [4, 4, 4]
    assert [child[4] for child in listed] == [BOF | CRAV | RCR] * 3, "one interrupt for all"
    places = [struct.unpack_from("<Q", child, 8)[0] for child in listed]
    assert [place - places[0] for place in places] == [0, 32, 64]
    assert [each.status for each in told] == [Status.NONE] * 3, "this portal runs no batch"
    assert record.status is Status.SUCCESS
