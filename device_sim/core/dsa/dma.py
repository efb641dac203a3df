"""Memory as one descriptor may use it: blocking on faults or not, piece by piece, and not after an abort.

Models the path from an engine to its function's translations [DSA 3]: an operand is reached from its front
as far as it is translated; with block on fault the rest is asked for and waited for, without, the access ends
in a fault whose address and direction go into the completion record.  Between two waits nothing is
invalidated, so what was reached may be used until the next `await`.
"""

from __future__ import annotations

from dataclasses import replace

from device_sim.core.dsa.wq import Job
from device_sim.core.function import DmaFault, DmaRange, Function
from protocol.units import PAGE_SHIFT, PAGE_SIZE, Iova


class Aborted(Exception):
    """The descriptor is to end without a trace."""


def _first_page(dma: DmaRange) -> DmaRange:
    return replace(dma, size=min(dma.size, PAGE_SIZE - dma.iova % PAGE_SIZE))


def _is_at(fault: DmaFault, dma: DmaRange) -> bool:
    return fault.write == dma.write and fault.iova >> PAGE_SHIFT == dma.iova >> PAGE_SHIFT


class Dma:
    def __init__(self, function: Function, job: Job, *, block: bool) -> None:
        self.function = function
        self.block = block
        self._job = job
        self._fault: DmaFault | None = None  # somewhere ahead

    async def reach(self, done: int, size: int, *operands: tuple[Iova, bool]) -> int:
        """How many bytes from `done` on all operands, (iova, write) each, are accessible: one at least.

        Raises DmaFault for the first byte that is not.
        """
        ranges = [DmaRange(Iova(iova + done), size - done, write) for iova, write in operands]
        return await self.reach_ranges(ranges)

    # awaits: ranges, dma: cannot change: addresses; where they lead is looked up after each sleep
    async def reach_ranges(self, ranges: list[DmaRange]) -> int:
        while not (count := self._accessible(ranges)):
            if self._fault is not None:
                # Pages before the one that faulted may have been translated on the way to it, others not.
                ranges = [_first_page(dma) for dma in ranges]
                if any(_is_at(self._fault, dma) for dma in ranges):
                    raise self._fault
            try:
                await self.function.make_accessible(ranges, block=self.block)
            except DmaFault as fault:
                self._fault = fault
            self.check_aborted()
        return count

    def _accessible(self, ranges: list[DmaRange]) -> int:
        return min(self.function.accessible(dma) for dma in ranges)

    def check_aborted(self) -> None:
        if self._job.aborted:
            raise Aborted

    # awaits: done, parts: cannot change: bytes as they were when each piece was reached
    async def read(self, iova: Iova, size: int) -> bytes:
        """All of it, as it was when each piece was reached."""
        parts: list[bytes] = []
        done = 0
        while done < size:
            parts.append(await self.read_some(Iova(iova + done), size - done))
            done += len(parts[-1])
        return b"".join(parts)

    async def read_some(self, iova: Iova, size: int) -> bytes:
        """What can be read from the front, one byte at least."""
        return self.load(iova, await self.reach(0, size, (iova, False)))

    # awaits: done: cannot change: bytes that are stored
    async def write(self, iova: Iova, data: bytes) -> None:
        done = 0
        while done < len(data):
            count = await self.reach(done, len(data), (iova, True))
            self.store(Iova(iova + done), data[done : done + count])
            done += count

    def load(self, iova: Iova, size: int) -> bytes:
        """What was reached."""
        data = self.function.read(iova, size)
        assert data is not None, f"iova {iova:#x} was reached and is not translated"
        return data

    def store(self, iova: Iova, data: bytes) -> None:
        stored = self.function.write(iova, data)
        assert stored, f"iova {iova:#x} was reached and is not translated"
