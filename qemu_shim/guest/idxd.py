"""The guest's DSA driver: work queues, completion records, interrupts, and what is left after a fault.

Models the kernel's idxd as a DMA engine [idxd dma.c] with the RFC author's change, block on fault set in
every descriptor that may have it when the queue allows it [RFC 00/42].  The completion records lie in memory
the driver got zeroed and does not touch, so their page is absent until the device writes the first record:
that write raises a page request.  Without block on fault the driver touches that page itself; what else
faults ends a descriptor, of which it submits the rest (`complete`).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, replace

from protocol.errors import UapiError
from protocol.hw.dsa import (
    COMPLETION_SIZE,
    NEVER_BLOCK,
    NO_FLAGS,
    OP_SPECIFIC_SIZE,
    WORK_DESCRIPTOR_SIZE,
    CompletionRecord,
    Descriptor,
    Flag,
    Opcode,
    Status,
)
from protocol.hw.dsa_regs import (
    Command,
    State,
    WqCfg,
)
from protocol.units import PAGE_SIZE, Gpa, Iova, align_up
from qemu_shim.guest.idxd_device import DsaPortal, IdxdDevice
from qemu_shim.guest.memory import GuestMemory
from qemu_shim.guest.resume import rest_of

WQ = 0
WQ_SIZE = 16  # as the RFC's author had it
ENQCMDS_RETRIES = 32
MAX_BATCH_SHIFT = 5  # the driver's defaults
MAX_XFER_SHIFT = 21
HANDLES_OF_A_QUEUE = 128  # interrupt handles: 1 + 128 * queue + slot


@dataclass(frozen=True, slots=True)
class Completion:
    """How a descriptor ended after so many faults; offsets in the record count from its beginning."""

    record: CompletionRecord
    faults: int


class IdxdWorkQueue:
    """A work queue as the driver has it: any descriptor of the device's (`protocol/hw/dsa.py`).

    Each descriptor in flight has a slot: its completion record and interrupt handle.
    """

    def __init__(
        self,
        portal: DsaPortal,
        memory: GuestMemory,
        *,
        block_on_fault: bool,
        wq: int = WQ,
        size: int = WQ_SIZE,
        dedicated: bool = True,
    ) -> None:
        self.block_on_fault = block_on_fault
        self.device = IdxdDevice(portal)
        self.faults = 0  # descriptors that ended in a fault and were resumed
        self._portal = portal
        self._memory = memory
        self._wq = wq
        self._size = size
        self._dedicated = dedicated
        self._records = memory.allocate(_pages(size * COMPLETION_SIZE))
        self._free = list(range(size))

    @property
    def config(self) -> WqCfg:
        """As the device's registers have it."""
        return WqCfg(
            size=self._size,
            threshold=0 if self._dedicated else self._size,
            dedicated=self._dedicated,
            block_on_fault=self.block_on_fault,
            max_xfer_shift=MAX_XFER_SHIFT,
            max_batch_shift=MAX_BATCH_SHIFT,
        )

    @property
    def record_page(self) -> Gpa:
        """Where its completion records lie."""
        return self._records

    async def enable(self) -> None:
        """Enable the queue; a device that nobody has set up becomes this queue's alone."""
        if not self.block_on_fault:
            await self._memory.touch([self._records])  # so that nothing at all is asked for
        if await self.device.state() is State.DISABLED:
            await self.device.set_up([[None] * self._wq + [self.config]])
        else:
            await self.device.write_queue(self._wq, self.config)
        await self.device.command(Command.ENABLE_WQ, self._wq)

    async def disable(self) -> None:
        """It takes no descriptor any more; those it has are executed."""
        await self.device.command(Command.DISABLE_WQ, 1 << self._wq)

    # -- descriptors -----------------------------------------------------------------------------------

    async def memmove(self, dst: int, src: int, size: int) -> CompletionRecord:
        """The device copies; the record it wrote, whatever it says."""
        return await self.run(Opcode.MEMMOVE, src=src, dst=dst, size=size)

    async def fill(self, dst: int, pattern: int, size: int) -> CompletionRecord:
        """The device writes `pattern`, 8 bytes, over and over; the record it wrote."""
        return await self.run(Opcode.MEMFILL, src=pattern, dst=dst, size=size)

    async def run(
        self,
        opcode: int,
        *,
        src: int = 0,
        dst: int = 0,
        size: int = 0,
        flags: Flag = NO_FLAGS,
        op_specific: bytes = bytes(OP_SPECIFIC_SIZE),
    ) -> CompletionRecord:
        """Submit one descriptor and sleep until its interrupt; the record the device wrote."""
        return await self.submit(
            Descriptor(opcode=opcode, flags=flags, src=src, dst=dst, size=size, op_specific=op_specific)
        )

    async def submit(self, descriptor: Descriptor) -> CompletionRecord:
        """The same for a descriptor that lacks its record, interrupt and block on fault."""
        assert self._free, f"more than {self._size} descriptors in flight"
        slot = self._free.pop()
        record = self._records + slot * COMPLETION_SIZE
        handle = 1 + self._wq * HANDLES_OF_A_QUEUE + slot
        flags = descriptor.flags | Flag.CRAV | Flag.RCR | Flag.RCI
        flags |= self._blocking(descriptor)
        raw = replace(descriptor, flags=flags, completion_addr=Iova(record), int_handle=handle).to_bytes()
        if self._dedicated:
            self._portal.movdir64b(self._wq, raw)
        else:
            await self._enqcmd(raw, slot)
        await self._portal.wait_interrupt(handle)
        written = await self._memory.read(record, COMPLETION_SIZE)
        await self._memory.write(record, bytes(COMPLETION_SIZE))  # zero again for whoever is next
        self._free.append(slot)
        return CompletionRecord.from_bytes(written)

    def _blocking(self, descriptor: Descriptor) -> Flag:
        return Flag.BOF if self.block_on_fault and descriptor.opcode not in NEVER_BLOCK else NO_FLAGS

    async def _enqcmd(self, raw: bytes, slot: int) -> None:
        for _ in range(ENQCMDS_RETRIES):
            if not await self._portal.enqcmd(self._wq, raw):
                return
        self._free.append(slot)
        raise UapiError(errno.EAGAIN, f"ENQCMD: queue {self._wq} said retry {ENQCMDS_RETRIES} times")

    async def complete(self, descriptor: Descriptor) -> Completion:
        """Submit it, and after each page fault its rest, the page touched."""
        whole, faults, before = descriptor, 0, 0
        while True:
            record = await self.submit(descriptor)
            if record.status is not Status.PAGE_FAULT_NOBOF:
                break
            faults += 1
            await self._memory.fault_in(record.fault_addr, write=record.write_fault)
            rest = rest_of(descriptor, record)
            before += descriptor.size - rest.size
            descriptor = rest
        self.faults += faults
        if whole.opcode in (Opcode.COMPARE, Opcode.COMPVAL) and record.result:
            record = replace(record, bytes_completed=record.bytes_completed + before)
        return Completion(record, faults)

    async def batch(self, children: Sequence[Descriptor]) -> tuple[CompletionRecord, list[CompletionRecord]]:
        """Run them as one batch; the batch's record, and theirs (status NONE: abandoned behind a fence)."""
        listed = self._memory.allocate(_pages(len(children) * WORK_DESCRIPTOR_SIZE))
        records_size = len(children) * COMPLETION_SIZE
        records = self._memory.allocate(_pages(records_size))
        await self._memory.write(records, bytes(records_size))
        raw = [
            replace(
                child,
                flags=child.flags | Flag.CRAV | Flag.RCR | self._blocking(child),
                completion_addr=Iova(records + n * COMPLETION_SIZE),
            ).to_bytes()
            for n, child in enumerate(children)
        ]
        await self._memory.write(listed, b"".join(raw))
        record = await self.run(Opcode.BATCH, src=listed, size=len(children))
        written = await self._memory.read(records, records_size)
        return record, [
            CompletionRecord.from_bytes(written[at : at + COMPLETION_SIZE])
            for at in range(0, records_size, COMPLETION_SIZE)
        ]


def _pages(size: int) -> int:
    return align_up(size, PAGE_SIZE) // PAGE_SIZE


class ResumingQueue:
    """A queue as a DMA channel that resumes what faults."""

    def __init__(self, queue: IdxdWorkQueue) -> None:
        self._queue = queue

    async def memmove(self, dst: int, src: int, size: int) -> CompletionRecord:
        descriptor = Descriptor(opcode=Opcode.MEMMOVE, src=src, dst=dst, size=size)
        return (await self._queue.complete(descriptor)).record

    async def fill(self, dst: int, pattern: int, size: int) -> CompletionRecord:
        descriptor = Descriptor(opcode=Opcode.MEMFILL, src=pattern, dst=dst, size=size)
        return (await self._queue.complete(descriptor)).record
