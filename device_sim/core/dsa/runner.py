"""One descriptor from an engine to its completion record.

Models [DSA 3]: check, run, record, interrupt.  The record is written by DMA, its status byte last; what
cannot be answered in a record goes to the software error register.  So every descriptor a queue took ends
in exactly one of: a record, a software error, nothing because it asked for none and did not fail, or nothing
because it was aborted.  Of a translation that failed both are told [DSA table 5-6].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from device_sim.core.dsa.batch import Batch, drain
from device_sim.core.dsa.delta import DeltaError
from device_sim.core.dsa.dma import Aborted, Dma
from device_sim.core.dsa.operations import OPERATIONS
from device_sim.core.dsa.result import FAULT_ADDR_MASK, JobResult
from device_sim.core.dsa.rules import refusal, valid_handle
from device_sim.core.dsa.wq import Job
from device_sim.core.function import DmaFault, FaultCause, Function
from protocol.flow import Flow
from protocol.hw.dsa import COMPLETION_SIZE, Descriptor, Flag, Opcode, Status
from protocol.hw.dsa_regs import SoftwareError
from protocol.units import PAGE_SHIFT, PAGE_SIZE, Iova, align_up

_STATUS_OF = {
    FaultCause.ABSENT: Status.PAGE_FAULT_NOBOF,
    FaultCause.INVALID: Status.PAGE_FAULT_IR,
    FaultCause.ERROR: Status.TRANSLATION_FAIL,
}
_NOT_FAILED = (Status.SUCCESS, Status.SUCCESS_PREDICATE, Status.BATCH_FAIL)  # [DSA 5.8.1]
_BOF, _CRAV, _RCR, _RCI = int(Flag.BOF), int(Flag.CRAV), int(Flag.RCR), int(Flag.RCI)


@dataclass(slots=True)
class DsaCounters:
    descriptors: int = 0
    bytes_moved: int = 0
    pages_moved: int = 0  # of each descriptor what its bytes fill, begun ones too
    software_errors: int = 0
    aborted: int = 0
    statuses: Counter[Status] = field(default_factory=Counter)


class Runner:
    """`interrupt(handle)` raises a completion interrupt, `report` records a software error."""

    def __init__(
        self,
        function: Function,
        spawn: Callable[[Flow[None]], None],
        interrupt: Callable[[int], None],
        report: Callable[[SoftwareError], None],
    ) -> None:
        self.counters = DsaCounters()
        self._function = function
        self._spawn = spawn
        self._interrupt = interrupt
        self._report = report

    async def run(self, job: Job) -> None:
        """An engine's turn.  Batches and drains leave the engine at once: they wait for others."""
        self.counters.descriptors += 1
        d = job.descriptor
        dma = self._dma(job)
        refused = refusal(job)
        if refused is not None:
            await self._finish(job, refused)
        elif d.opcode == Opcode.BATCH:
            dma = self._control(job)
            group = job.queue.group
            assert group is not None, "a queue that takes descriptors has a group"
            self._spawn(self._coordinate(job, Batch(job, dma, group.stage).run()))
        elif d.opcode == Opcode.DRAIN:
            self._spawn(self._coordinate(job, drain(job, self._control(job))))
        else:
            await self._finish(job, await self._execute(dma, d))

    def _dma(self, job: Job) -> Dma:
        block = bool(job.flags & _BOF) and job.queue.config.block_on_fault
        return Dma(self._function, job, block=block)

    def _control(self, job: Job) -> Dma:
        """For batch lists, read-backs and completion records: they block on fault, whatever descriptor and
        queue say of it [DSA 8.1.3]; but a device may tolerate faults on data alone [RFC 00/42].
        """
        return Dma(self._function, job, block=self._function.traits.control_faults)

    async def _coordinate(self, job: Job, flow: Flow[JobResult]) -> None:
        try:
            # await: job: cannot change: taken from its queue, and nobody else ends it
            outcome = await flow
        except Aborted:
            outcome = JobResult()
        await self._finish(job, outcome)

    async def _execute(self, dma: Dma, d: Descriptor) -> JobResult:
        out = JobResult()
        try:
            dma.check_aborted()
            # await: out: cannot change: this descriptor's own
            await OPERATIONS[d.opcode](dma, d, out)
        except DmaFault as fault:
            out.fault = fault
            out.status = _STATUS_OF[fault.why]
        except DeltaError as error:
            out.status = error.status
        except Aborted:
            pass
        self.counters.bytes_moved += out.completed
        self.counters.pages_moved += align_up(out.completed, PAGE_SIZE) >> PAGE_SHIFT
        return out

    async def _finish(self, job: Job, out: JobResult) -> None:
        failed = out.status not in _NOT_FAILED
        dma = self._control(job)  # what faulted in the operation is nothing to the record
        try:
            dma.check_aborted()
            if job.flags & _RCR or failed:
                # await: job, out: cannot change: over but for its record
                await self._write_record(job, dma, out)
            self.counters.statuses[out.status] += 1
            if job.flags & _RCI and valid_handle(job):
                self._interrupt(job.descriptor.int_handle)
        except Aborted:
            self.counters.aborted += 1
        if job.batch is None:
            del job.queue.jobs[job]
        job.done.set(out)

    async def _write_record(self, job: Job, dma: Dma, out: JobResult) -> None:
        at = job.descriptor.completion_addr
        nowhere = not job.flags & _CRAV or at % COMPLETION_SIZE != 0
        if nowhere or out.status is Status.TRANSLATION_FAIL:
            self._tell(job, out.status, out, out.fault)
        if nowhere:
            return
        record = out.record().to_bytes()
        try:
            # The record is 32-byte aligned: one page, so one look-up covers both stores.
            # await: at, dma, job, out, record: cannot change: made and addressed; `reach` found the page in
            # this turn
            await dma.reach(0, len(record), (at, True))
            dma.store(Iova(at + 1), record[1:])
            dma.store(at, record[:1])
        except DmaFault as fault:
            self._tell(job, Status.CR_TRANSLATION_FAULT, out, fault)

    def _tell(self, job: Job, error: Status, out: JobResult, fault: DmaFault | None) -> None:
        """A software error: of what its record does not tell, or tells too."""
        d = job.descriptor
        self._report(
            SoftwareError(
                desc_valid=True,
                wq_idx_valid=True,
                batch=job.batch is not None,
                fault_rw=fault is not None and fault.write,
                priv=d.priv,
                error=error,
                wq_idx=job.queue.index,
                operation=d.opcode,
                pasid=d.pasid,
                batch_idx=job.batch_index,
                invalid_flags=int.from_bytes(out.specific[:4], "little")
                if error is Status.INVALID_FLAGS
                else 0,
                fault_addr=Iova(0 if fault is None else fault.iova & FAULT_ADDR_MASK),
            )
        )
