"""A DSA-like accelerator: work queues, engines, descriptors, completion records.

Models [DSA 8] as far as the kernel's dmatest drives it: dedicated and shared work queues of a given
size, engines that each run one descriptor at a time, block on fault allowed per queue and asked per
descriptor, memory move and fill, completion records written by DMA as well, status byte last, and an
interrupt if asked for.

Departures: a move that overlaps is made when all of it is translated, others piece by piece; batches
and the remaining operations come later, and are answered as bad opcodes until then.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from device_sim.core.function import DmaFault, DmaRange, Function
from protocol.flow import Flow, Wait
from protocol.hw import dsa
from protocol.hw.dsa import CompletionRecord, Descriptor, Flag, Opcode, Status
from protocol.units import Iova

MAX_WORK_QUEUES = 8
MAX_WQ_SIZE = 128
ENGINES = 4
MAX_TRANSFER = 1 << 21
FILL_PATTERN_BYTES = 8


@dataclass(slots=True)
class WorkQueue:
    """One WQCFG [DSA 8.3]: `occupancy` counts descriptors from submission to completion."""

    size: int
    dedicated: bool
    block_on_fault: bool
    enabled: bool = True
    occupancy: int = 0


@dataclass(slots=True)
class _Job:
    queue: WorkQueue
    raw: bytes


@dataclass(slots=True)
class _Outcome:
    status: Status
    completed: int = 0
    fault: DmaFault | None = None


@dataclass(slots=True)
class Counters:
    descriptors: int = 0
    bytes_moved: int = 0
    software_errors: int = 0  # SWERR: a descriptor or record that could not even be answered
    statuses: Counter[Status] = field(default_factory=Counter)


class Dsa:
    """`spawn` starts a flow, `interrupt(handle)` raises a completion interrupt."""

    def __init__(
        self, function: Function, spawn: Callable[[Flow[None]], None], interrupt: Callable[[int], None]
    ) -> None:
        self.function = function
        self.counters = Counters()
        self.queues: dict[int, WorkQueue] = {}
        self._spawn = spawn
        self._interrupt = interrupt
        self._jobs: deque[_Job] = deque()
        self._running = 0
        self._idle: list[Wait[None]] = []

    # -- configuration ---------------------------------------------------------------------------------

    def configure(self, wq: int, queue: WorkQueue) -> str | None:
        """Set up and enable a work queue; what stands in the way, or None."""
        if not 0 <= wq < MAX_WORK_QUEUES:
            return f"work queue {wq}: there are {MAX_WORK_QUEUES}"
        if not 0 < queue.size <= MAX_WQ_SIZE:
            return f"work queue size {queue.size}: 1..{MAX_WQ_SIZE}"
        old = self.queues.get(wq)
        if old is not None and old.enabled:
            return f"work queue {wq} is enabled"
        self.queues[wq] = queue
        return None

    def disable(self, wq: int) -> bool:
        """No new descriptors; those queued still run.  False if there is no such enabled queue."""
        queue = self.queues.get(wq)
        if queue is None or not queue.enabled:
            return False
        queue.enabled = False
        return True

    async def drain(self) -> None:
        """Returns once nothing is queued or running."""
        while self._jobs or self._running:
            wait: Wait[None] = Wait()
            self._idle.append(wait)
            await wait

    def abandon(self) -> None:
        """Reset: what is queued is dropped, what runs finds its DMA refused."""
        for job in self._jobs:
            job.queue.occupancy -= 1
        self._jobs.clear()
        for queue in self.queues.values():
            queue.enabled = False

    # -- submission ------------------------------------------------------------------------------------

    def submit(self, wq: int, raw: bytes) -> bool:
        """MOVDIR64B or ENQCMD to a portal.  False: not accepted (ENQCMD's retry; for a dedicated queue an
        error).
        """
        queue = self.queues.get(wq)
        if queue is None or not queue.enabled or queue.occupancy >= queue.size:
            if queue is None or not queue.enabled or queue.dedicated:
                self.counters.software_errors += 1
            return False
        queue.occupancy += 1
        self._jobs.append(_Job(queue, raw))
        if self._running < ENGINES:
            self._running += 1
            self._spawn(self._engine())
        return True

    async def _engine(self) -> None:
        while self._jobs:
            job = self._jobs.popleft()
            await self._run(job)
            job.queue.occupancy -= 1
        self._running -= 1
        if not self._running:
            idle, self._idle = self._idle, []
            for wait in idle:
                wait.set(None)

    # -- one descriptor --------------------------------------------------------------------------------

    async def _run(self, job: _Job) -> None:
        self.counters.descriptors += 1
        descriptor = Descriptor.from_bytes(job.raw)
        block = job.queue.block_on_fault and Flag.BOF in descriptor.flags
        status = _check(job, descriptor)
        if status is not None:
            outcome = _Outcome(status)
        else:
            outcome = await self._execute(descriptor, block)
        self.counters.statuses[outcome.status] += 1
        if Flag.RCR in descriptor.flags or outcome.status is not Status.SUCCESS:
            await self._write_record(descriptor, outcome, block)
        if Flag.RCI in descriptor.flags:
            self._interrupt(descriptor.int_handle)

    async def _execute(self, descriptor: Descriptor, block: bool) -> _Outcome:
        outcome = _Outcome(Status.SUCCESS)
        try:
            if descriptor.opcode == Opcode.MEMMOVE:
                await self._move(descriptor, block, outcome)
            elif descriptor.opcode == Opcode.MEMFILL:
                await self._fill(descriptor, block, outcome)
        except DmaFault as fault:
            outcome.fault = fault
            outcome.status = Status.PAGE_FAULT_IR if fault.requested else Status.PAGE_FAULT_NOBOF
        self.counters.bytes_moved += outcome.completed
        return outcome

    async def _move(self, descriptor: Descriptor, block: bool, outcome: _Outcome) -> None:
        src, dst, size = descriptor.src, descriptor.dst, descriptor.size
        if src < dst + size and dst < src + size:
            await self._move_overlapping(descriptor, block)
            outcome.completed = size
            return
        while True:
            outcome.completed += self.function.copy(
                src + outcome.completed, dst + outcome.completed, size - outcome.completed
            )
            rest = size - outcome.completed
            if not rest:
                return
            ranges = [
                DmaRange(src + outcome.completed, rest, False),
                DmaRange(dst + outcome.completed, rest, True),
            ]
            try:
                await self.function.make_accessible(ranges, block=block)
            except DmaFault:
                # Pages before the one that faults may have been translated on the way to it.
                outcome.completed += self.function.copy(
                    src + outcome.completed, dst + outcome.completed, rest
                )
                raise

    async def _move_overlapping(self, descriptor: Descriptor, block: bool) -> None:
        src, dst, size = descriptor.src, descriptor.dst, descriptor.size
        while True:
            data = self.function.read(src, size)
            if data is not None and self.function.write(dst, data):
                return
            ranges = [DmaRange(src, size, False), DmaRange(dst, size, True)]
            await self.function.make_accessible(ranges, block=block)

    async def _fill(self, descriptor: Descriptor, block: bool, outcome: _Outcome) -> None:
        dst, size = descriptor.dst, descriptor.size
        pattern = descriptor.src.to_bytes(FILL_PATTERN_BYTES, "little")
        data = (pattern * (size // FILL_PATTERN_BYTES + 1))[:size]
        while not self.function.write(dst, data):
            await self.function.make_accessible([DmaRange(dst, size, True)], block=block)
        outcome.completed = size

    async def _write_record(self, descriptor: Descriptor, outcome: _Outcome, block: bool) -> None:
        """By DMA, the status byte last; a record that cannot be written is a software error."""
        if Flag.CRAV not in descriptor.flags or descriptor.completion_addr % dsa.COMPLETION_SIZE:
            self.counters.software_errors += 1
            return
        fault = outcome.fault
        record = CompletionRecord(
            status=outcome.status,
            write_fault=fault is not None and fault.write,
            bytes_completed=outcome.completed if outcome.status is not Status.SUCCESS else 0,
            fault_addr=Iova(0) if fault is None else fault.iova,
        ).to_bytes()
        at = descriptor.completion_addr
        try:
            # The record is 32-byte aligned: one page, so one look-up covers both stores.
            while not self.function.write(at + 1, record[1:]):
                await self.function.make_accessible([DmaRange(at, len(record), True)], block=block)
            self.function.write(at, record[:1])
        except DmaFault:
            self.counters.software_errors += 1


def _check(job: _Job, descriptor: Descriptor) -> Status | None:
    """What is wrong with a descriptor before it runs [DSA 8.2], or None."""
    moves = descriptor.opcode in (Opcode.MEMMOVE, Opcode.MEMFILL)
    if descriptor.opcode != Opcode.NOOP and not moves:
        return Status.BAD_OPCODE
    if dsa.reserved_violation(job.raw):
        return Status.NOZERO_RESERVED
    wants_record = Flag.RCR in descriptor.flags
    if wants_record and Flag.CRAV not in descriptor.flags:
        return Status.INVALID_FLAGS
    if Flag.BOF in descriptor.flags and not job.queue.block_on_fault:
        return Status.INVALID_FLAGS
    if Flag.CRAV in descriptor.flags and descriptor.completion_addr % dsa.COMPLETION_SIZE:
        return Status.CR_ALIGN
    if moves and not 0 < descriptor.size <= MAX_TRANSFER:
        return Status.TRANSFER_SIZE
    return None
