"""What comes of a descriptor: its completion record in the making.

Models the completion record [DSA 8.2] while an operation runs: how far it got is kept true at every wait, so
that a fault in the middle leaves a record from which software can resume.
"""

from __future__ import annotations

from dataclasses import dataclass

from device_sim.core.function import DmaFault
from protocol.hw.dsa import CR_SPECIFIC_SIZE, CompletionRecord, Status
from protocol.units import Iova

FAULT_ADDR_MASK = (1 << 64) - 1
NOTHING_SPECIFIC = bytes(CR_SPECIFIC_SIZE)


@dataclass(slots=True)
class JobResult:
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
            fault_addr=Iova(0 if fault is None else fault.iova & FAULT_ADDR_MASK),
            op_specific=self.specific,
        )
