"""Batches and drains: descriptors that wait for other descriptors, and keep no engine busy meanwhile.

Models [DSA 3.8]: the list is fetched by DMA, its descriptors go to the engines of the batch's group, in
order but not one after the other.  A fence waits for those before it and, if one of them did not succeed,
abandons the rest: they do not run, and have no records.  A page of the list that faults ends the fetching;
what was fetched runs, and the count in the record says where to resume.  A drain waits for what its queue
took before it.

Must hold: a batch has at most WINDOW descriptors in flight, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable

from device_sim.core.dsa.dma import Dma
from device_sim.core.dsa.result import JobResult
from device_sim.core.dsa.wq import Job
from device_sim.core.function import DmaFault
from protocol.flow import Wait
from protocol.hw.dsa import WORK_DESCRIPTOR_SIZE, Descriptor, DrainFlag, Flag, Status
from protocol.units import PAGE_SIZE, Iova

WINDOW = 16
READBACK_BYTES = 1
_FENCE = int(Flag.FENCE)


class Batch:
    """One batch; `stage` gives a descriptor to the engines."""

    def __init__(self, job: Job, dma: Dma, stage: Callable[[Job], None]) -> None:
        self._job = job
        self._dma = dma
        self._stage = stage
        self._children: dict[Job, None] = {}
        self._failed = False
        self._progress: Wait[None] | None = None

    async def run(self) -> JobResult:
        """The batch's record, once every descriptor that was fetched is done."""
        out = JobResult(tell_completed=True)
        try:
            await self._fetch(out)
        except DmaFault as fault:
            out.fault = fault
        await self._at_most(0)
        self._dma.check_aborted()
        if out.fault is not None:
            out.status, out.result = Status.BATCH_PAGE_FAULT, int(self._failed)
        elif self._failed:
            out.status = Status.BATCH_FAIL
        return out

    # awaits: out, child, each offset, fence, fetched: cannot change: this batch's own, fetched once
    async def _fetch(self, out: JobResult) -> None:
        """`out.completed` counts the descriptors handed to the engines."""
        d = self._job.descriptor
        while out.completed < d.size:
            at = Iova(d.src + out.completed * WORK_DESCRIPTOR_SIZE)
            # A page at a time: what is fetched runs while the next page is waited for.
            wanted = min((d.size - out.completed) * WORK_DESCRIPTOR_SIZE, PAGE_SIZE - at % PAGE_SIZE)
            fetched = await self._dma.read_some(at, wanted)
            for offset in range(0, len(fetched), WORK_DESCRIPTOR_SIZE):
                raw = fetched[offset : offset + WORK_DESCRIPTOR_SIZE]
                child = Job(self._job.queue, raw, Descriptor.from_bytes(raw), self._job, out.completed)
                fence = child.flags & _FENCE
                await self._at_most(0 if fence else WINDOW - 1)
                self._dma.check_aborted()
                if self._failed and fence:
                    return
                self._start(child)
                out.completed += 1

    def _start(self, child: Job) -> None:
        self._children[child] = None
        child.done.on_done(lambda done: self._ended(child, done.result()))
        self._stage(child)

    def _ended(self, child: Job, outcome: JobResult) -> None:
        del self._children[child]
        self._failed |= outcome.status is not Status.SUCCESS
        if self._progress is not None:
            self._progress.set(None)
            self._progress = None

    async def _at_most(self, count: int) -> None:
        """Until no more than `count` descriptors are in flight."""
        while len(self._children) > count:
            self._progress = Wait()
            await self._progress


# awaits: job, dma, each earlier, d, each flag: cannot change: who stood before it then, and its descriptor
async def drain(job: Job, dma: Dma) -> JobResult:
    """Once everything its queue took before it is done; then the read-backs."""
    for earlier in list(job.queue.jobs):
        if earlier is job:
            break
        await earlier.done
    d = job.descriptor
    for flag, iova in ((DrainFlag.READBACK1, Iova(d.src)), (DrainFlag.READBACK2, Iova(d.dst))):
        if d.flags & flag:
            try:
                await dma.read(iova, READBACK_BYTES)
            except DmaFault as fault:
                return JobResult(Status.READBACK_FAULT, fault=fault)
    dma.check_aborted()
    return JobResult()
