"""A guest's RAM as a bytearray, and a device that copies within it: what guest code is tried against."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protocol.hw.dsa import CompletionRecord, Status
from protocol.units import Gpa
from qemu_shim.guest.memory import GuestMemory

PAGE = 4096
GENSTS, CMD, CMDSTS, SWERR = 0x90, 0xA0, 0xA8, 0xC0
ENABLE_DEVICE, ENABLE_WQ = 1, 6


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

    async def store_nothing(self, gpa: int) -> None:
        self.batches.append([(gpa, b"")])

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
        return self._done(dst, src, size, bytes(self.ram.bytes[src : src + size]))

    async def fill(self, dst: int, pattern: int, size: int) -> CompletionRecord:
        return self._done(dst, pattern, size, (pattern.to_bytes(8, "little") * (size // 8 + 1))[:size])

    def _done(self, dst: int, src: int, size: int, data: bytes) -> CompletionRecord:
        self.moves.append((dst, src, size))
        number = len(self.moves)
        status = self.status(number)
        if status is Status.SUCCESS:
            self.ram.bytes[dst : dst + size] = data
        self.spoil(number)
        return CompletionRecord(status=status)


@dataclass
class FakePortal:
    """The BARs of a device that writes these records, the last again and again, and interrupts."""

    ram: Ram
    log: list[tuple[object, ...]] = field(default_factory=list)
    records: list[bytes] = field(default_factory=lambda: [b"\x01" + bytes(31)])
    retries: int = 0
    errors: dict[int, int] = field(default_factory=dict)  # of commands
    bar: bytearray = field(default_factory=lambda: bytearray(0x1000))

    def __post_init__(self) -> None:
        self.bar[0x38] = 4  # engines
        self.bar[0x60:0x64] = bytes([4, 0, 5, 0])

    async def mmio_read(self, offset: int, size: int) -> bytes:
        return bytes(self.bar[offset : offset + size])

    def mmio_write(self, offset: int, data: bytes) -> None:
        self.bar[offset : offset + len(data)] = data
        if offset == CMD:
            (word,) = struct.unpack("<I", data)
            command = word >> 20 & 31
            self.log.append(("command", command, word & 0xFFFFF))
            assert word >> 31, "the driver sleeps"
            error = self.errors.get(command, 0)
            self.bar[CMDSTS : CMDSTS + 4] = bytes([error, 0, 0, 0])
            if command == ENABLE_DEVICE and not error:
                self.bar[GENSTS] = 1

    def movdir64b(self, wq: int, descriptor: bytes) -> None:
        self.log.append(("movdir64b", wq, descriptor))
        self._complete(descriptor)

    async def enqcmd(self, wq: int, descriptor: bytes) -> bool:
        self.log.append(("enqcmd", wq, descriptor))
        if self.retries:
            self.retries -= 1
            return True
        self._complete(descriptor)
        return False

    def _complete(self, descriptor: bytes) -> None:
        (at,) = struct.unpack_from("<Q", descriptor, 8)
        record = self.records.pop(0) if len(self.records) > 1 else self.records[0]
        self.ram.bytes[at : at + 32] = record

    async def wait_interrupt(self, handle: int) -> None:
        self.log.append(("interrupt", handle))

    @property
    def commands(self) -> list[tuple[object, ...]]:
        return [what[1:] for what in self.log if what[0] == "command"]

    def submitted(self) -> list[bytes]:
        return [
            what[2] for what in self.log if what[0] in ("movdir64b", "enqcmd") and isinstance(what[2], bytes)
        ]
