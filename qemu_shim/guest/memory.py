"""Guest RAM as the guest sees it: pages to allocate, bytes to load and store through its vCPU.

Models just enough of a guest kernel's page allocator and direct map.  RAM starts zeroed and the
allocator knows it: a page it hands out has been touched by nobody, so it is absent from the TDP until
somebody touches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from protocol.units import PAGE_SIZE, Gpa

MAX_ACCESS_BYTES = 1 << 16
MAX_BATCH_BYTES = 1 << 20


class CpuAccess(Protocol):
    """A vCPU that executes accesses: (gpa, size) reads, (gpa, bytes) writes."""

    async def access(self, accesses: Sequence[tuple[int, int | bytes]]) -> list[bytes]: ...

    async def store_nothing(self, gpa: int) -> None: ...


class OutOfGuestMemory(Exception):
    """The guest has no page left: give it more RAM."""


class GuestMemory:
    def __init__(self, cpu: CpuAccess, start: Gpa, end: Gpa) -> None:
        self._cpu = cpu
        self._next = start
        self._end = end

    def allocate(self, npages: int, alignment: int = PAGE_SIZE) -> Gpa:
        """Physically contiguous pages nobody touched yet."""
        gpa = Gpa((self._next + alignment - 1) & ~(alignment - 1))
        if gpa + npages * PAGE_SIZE > self._end:
            raise OutOfGuestMemory(f"{npages} pages asked for, RAM ends at gpa {self._end:#x}")
        self._next = Gpa(gpa + npages * PAGE_SIZE)
        return gpa

    async def read(self, gpa: int, size: int) -> bytes:
        parts = []
        for at in range(0, size, MAX_BATCH_BYTES):
            batch = min(size - at, MAX_BATCH_BYTES)
            accesses = [
                (gpa + at + n, min(MAX_ACCESS_BYTES, batch - n)) for n in range(0, batch, MAX_ACCESS_BYTES)
            ]
            parts += await self._cpu.access(accesses)
        return b"".join(parts)

    async def write(self, gpa: int, data: bytes) -> None:
        for at in range(0, len(data), MAX_BATCH_BYTES):
            batch = data[at : at + MAX_BATCH_BYTES]
            accesses = [
                (gpa + at + n, batch[n : n + MAX_ACCESS_BYTES])
                for n in range(0, len(batch), MAX_ACCESS_BYTES)
            ]
            await self._cpu.access(accesses)

    async def touch(self, gpas: Sequence[int]) -> None:
        """Store one byte at each: what makes a page present."""
        for at in range(0, len(gpas), 1024):
            await self._cpu.access([(gpa, b"\x01") for gpa in gpas[at : at + 1024]])

    async def fault_in(self, gpa: int, *, write: bool) -> None:
        """Make a page present, writable if need be, and leave its bytes as they are."""
        if write:
            await self._cpu.store_nothing(gpa)
        else:
            await self._cpu.access([(gpa, 1)])
