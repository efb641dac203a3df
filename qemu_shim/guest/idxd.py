"""The guest's DSA driver: one work queue, descriptors in, completion records and interrupts out.

Models the kernel's idxd as a DMA engine [idxd dma.c] with the RFC author's change, block on fault set
in every descriptor when the queue allows it [RFC 00/42].  The completion records lie in memory the
driver got zeroed and does not touch, so their page is absent until the device writes the first record:
that write raises a page request.
"""

from __future__ import annotations

from typing import Protocol

from protocol.hw.dsa import COMPLETION_SIZE, CompletionRecord, Descriptor, Flag, Opcode
from protocol.units import PAGE_SIZE, Gpa, Iova
from qemu_shim.guest.memory import GuestMemory

WQ = 0
WQ_SIZE = 16  # as the RFC's author had it


class DsaPortal(Protocol):
    """The device's BAR, mapped into the guest."""

    async def configure(self, wq: int, *, size: int, dedicated: bool, block_on_fault: bool) -> None: ...
    async def disable(self, wq: int) -> None: ...
    def movdir64b(self, wq: int, descriptor: bytes) -> None: ...
    async def wait_interrupt(self, handle: int) -> None: ...


class IdxdWorkQueue:
    """A dedicated work queue.  Each descriptor in flight has a slot: its completion record and interrupt
    handle.
    """

    def __init__(self, portal: DsaPortal, memory: GuestMemory, *, block_on_fault: bool) -> None:
        self.block_on_fault = block_on_fault
        self._portal = portal
        self._memory = memory
        pages = (WQ_SIZE * COMPLETION_SIZE + PAGE_SIZE - 1) // PAGE_SIZE
        self._records = memory.allocate(pages)
        self._free = list(range(WQ_SIZE))

    async def enable(self) -> None:
        if not self.block_on_fault:
            await self._memory.touch([self._records])  # or the record could not be written
        await self._portal.configure(WQ, size=WQ_SIZE, dedicated=True, block_on_fault=self.block_on_fault)

    async def disable(self) -> None:
        await self._portal.disable(WQ)

    @property
    def record_page(self) -> Gpa:
        return self._records

    async def memmove(self, dst: int, src: int, size: int) -> CompletionRecord:
        return await self.run(Opcode.MEMMOVE, src=src, dst=dst, size=size)

    async def fill(self, dst: int, pattern: int, size: int) -> CompletionRecord:
        return await self.run(Opcode.MEMFILL, src=pattern, dst=dst, size=size)

    async def run(self, opcode: Opcode, *, src: int, dst: int, size: int) -> CompletionRecord:
        """Submit one descriptor and sleep until its interrupt; the record the device wrote."""
        assert self._free, f"more than {WQ_SIZE} descriptors in flight"
        slot = self._free.pop()
        record = self._records + slot * COMPLETION_SIZE
        flags = Flag.CRAV | Flag.RCR | Flag.RCI
        if self.block_on_fault:
            flags |= Flag.BOF
        descriptor = Descriptor(
            opcode=opcode,
            flags=flags,
            completion_addr=Iova(record),
            src=src,
            dst=dst,
            size=size,
            int_handle=slot,
        )
        self._portal.movdir64b(WQ, descriptor.to_bytes())
        await self._portal.wait_interrupt(slot)
        raw = await self._memory.read(record, COMPLETION_SIZE)
        await self._memory.write(record, bytes(COMPLETION_SIZE))  # zero again for whoever is next
        self._free.append(slot)
        return CompletionRecord.from_bytes(raw)
