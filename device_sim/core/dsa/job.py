"""A descriptor on its way through the device, and what comes of it.

Models the entry of a work queue, or of a batch [DSA 3]: it is counted against its queue from submission
until its completion record is written.  `done` is set once, when nothing of it is left in the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from device_sim.core.dsa.wq import WorkQueue
from device_sim.core.function import DmaFault
from protocol.flow import Wait
from protocol.hw.dsa import CR_SPECIFIC_SIZE, CompletionRecord, Descriptor, Status
from protocol.units import Iova

ADDRESS_MASK = (1 << 64) - 1
NOTHING_SPECIFIC = bytes(CR_SPECIFIC_SIZE)


@dataclass(slots=True)
class Outcome:
    """The completion record in the making.  `completed` is how far it got, whatever comes of it."""

    status: Status = Status.SUCCESS
    result: int = 0
    completed: int = 0
    tell_completed: bool = False  # also in a record of success
    fault: DmaFault | None = None
    specific: bytes = NOTHING_SPECIFIC

    def record(self) -> CompletionRecord:
        fault = self.fault
        told = self.tell_completed or self.status is not Status.SUCCESS
        return CompletionRecord(
            status=self.status,
            write_fault=fault is not None and fault.write,
            result=self.result,
            bytes_completed=self.completed if told else 0,
            fault_addr=Iova(0 if fault is None else fault.iova & ADDRESS_MASK),
            op_specific=self.specific,
        )


@dataclass(slots=True, eq=False)
class Job:
    queue: WorkQueue
    raw: bytes
    descriptor: Descriptor
    batch: Job | None = None
    batch_index: int = 0
    dropped: bool = False
    done: Wait[Outcome] = field(default_factory=Wait)
    flags: int = field(init=False)  # the descriptor's: to ask an IntFlag costs twenty times as much

    def __post_init__(self) -> None:
        self.flags = int(self.descriptor.flags)

    @property
    def aborted(self) -> bool:
        """It ends without a record, an interrupt or an error; a batch's end is that of its descriptors."""
        return self.dropped or (self.batch is not None and self.batch.dropped)
