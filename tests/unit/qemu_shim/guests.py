"""A guest's RAM as a bytearray, and a device that copies within it: what guest code is tried against."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protocol.hw.dsa import CompletionRecord, Status
from protocol.units import Gpa
from qemu_shim.guest.memory import GuestMemory

PAGE = 4096


class Ram:
    """A vCPU before `size` bytes of RAM."""

    def __init__(self, size: int = 64 * PAGE) -> None:
        self.bytes = bytearray(size)
        self.batches: list[list[tuple[int, int | bytes]]] = []

    async def access(self, accesses: Sequence[tuple[int, int | bytes]]) -> list[bytes]:
        self.batches.append(list(accesses))
        reads = []
        for gpa, what in accesses:
            if isinstance(what, bytes):
                assert gpa + len(what) <= len(self.bytes)
                self.bytes[gpa : gpa + len(what)] = what
            else:
                reads.append(bytes(self.bytes[gpa : gpa + what]))
        return reads

    def memory(self, start: int = PAGE) -> GuestMemory:
        return GuestMemory(self, Gpa(start), Gpa(len(self.bytes)))


@dataclass
class CopyChannel:
    """A DMA channel that copies, then lets `spoil(number)` do its worst to the RAM."""

    ram: Ram
    spoil: Callable[[int], None] = lambda number: None
    status: Callable[[int], Status] = lambda number: Status.SUCCESS
    moves: list[tuple[int, int, int]] = field(default_factory=list)

    async def memmove(self, dst: int, src: int, size: int) -> CompletionRecord:
        self.moves.append((dst, src, size))
        number = len(self.moves)
        status = self.status(number)
        if status is Status.SUCCESS:
            self.ram.bytes[dst : dst + size] = self.ram.bytes[src : src + size]
        self.spoil(number)
        return CompletionRecord(status=status)


@dataclass
class FakePortal:
    """The BAR of a device that writes a record of these 32 bytes and interrupts."""

    ram: Ram
    log: list[tuple[object, ...]] = field(default_factory=list)
    record: bytes = b"\x01" + bytes(31)

    async def configure(self, wq: int, *, size: int, dedicated: bool, block_on_fault: bool) -> None:
        self.log.append(("configure", wq, size, dedicated, block_on_fault))

    async def disable(self, wq: int) -> None:
        self.log.append(("disable", wq))

    def movdir64b(self, wq: int, descriptor: bytes) -> None:
        self.log.append(("movdir64b", wq, descriptor))
        (at,) = struct.unpack_from("<Q", descriptor, 8)
        self.ram.bytes[at : at + 32] = self.record

    async def wait_interrupt(self, handle: int) -> None:
        self.log.append(("interrupt", handle))
