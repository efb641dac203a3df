"""A work queue: its configuration registers, the descriptors it holds, and whom it lets in.

Models a WQCFG [DSA 9] and the queue behind it.  A dedicated queue takes posted writes and drops what does
not fit; a shared one takes ENQCMD and says "retry", through its limited portal already when `threshold`
descriptors are there.  `jobs` are all that were taken and are not done, oldest first: their number is the
occupancy; `waiting` are those that no engine has taken up.  A descriptor counts against its queue from
submission until its completion record is written; its `done` is set once, when nothing of it is left in the
device.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Protocol

from device_sim.core.dsa.result import JobResult
from protocol.flow import Wait
from protocol.hw.dsa import Descriptor
from protocol.hw.dsa_regs import CommandError, WqCfg, WqState


class Engines(Protocol):
    """What a queue needs of the group it is in."""

    def kick(self) -> None: ...
    def stage(self, job: Job) -> None: ...


@dataclass(slots=True, eq=False)
class Job:
    queue: WorkQueue
    raw: bytes
    descriptor: Descriptor
    batch: Job | None = None
    batch_index: int = 0
    dropped: bool = False
    done: Wait[JobResult] = field(default_factory=Wait)
    flags: int = field(init=False)  # the descriptor's: to ask an IntFlag costs twenty times as much

    def __post_init__(self) -> None:
        self.flags = int(self.descriptor.flags)

    @property
    def aborted(self) -> bool:
        """It ends without a record, an interrupt or an error; a batch's end is that of its descriptors."""
        return self.dropped or (self.batch is not None and self.batch.dropped)


class WorkQueue:
    def __init__(self, index: int) -> None:
        self.index = index
        self.config = WqCfg()
        self.state = WqState.DISABLED
        self.group: Engines | None = None  # while the device is enabled
        self.jobs: dict[Job, None] = {}
        self.waiting: deque[Job] = deque()

    @property
    def enabled(self) -> bool:
        return self.state is WqState.ENABLED

    @property
    def registers(self) -> WqCfg:
        """What software reads."""
        if not self.jobs and self.state is WqState.DISABLED:
            return self.config  # which says so
        return replace(self.config, occupancy=len(self.jobs), state=self.state)

    def write_registers(self, raw: bytes, *, size_too: bool) -> None:
        """Software writes the queue's registers; ignored while it is enabled, and its size by `size_too`."""
        if self.state is not WqState.DISABLED:
            return
        written = WqCfg.from_bytes(raw)
        size = written.size if size_too else self.config.size
        if (written.size, written.occupancy, written.state) != (size, 0, WqState.DISABLED):
            written = replace(written, size=size, occupancy=0, state=WqState.DISABLED)
        self.config = written

    def enable(self, max_xfer_shift: int, max_batch_shift: int) -> CommandError:
        config = self.config
        if self.state is not WqState.DISABLED:
            return CommandError.WQ_ENABLED
        if self.group is None or not config.size:
            return CommandError.WQ_SIZE
        if not config.dedicated and not 0 < config.threshold <= config.size:
            return CommandError.WQ_SIZE
        if config.pasid_enable:
            return CommandError.PASID_EN  # the function has no PASID
        if not 0 < config.max_batch_shift <= max_batch_shift:
            return CommandError.MAX_BATCH_SIZE
        if config.max_xfer_shift > max_xfer_shift:
            return CommandError.MAX_XFER_SIZE
        self.state = WqState.ENABLED
        return CommandError.SUCCESS

    def has_room(self, *, limited: bool) -> bool:
        config = self.config
        limit = config.threshold if limited and not config.dedicated else config.size
        return len(self.jobs) < limit

    def take(self, job: Job) -> None:
        self.jobs[job] = None
        self.waiting.append(job)

    async def drained(self) -> None:
        """Returns once everything that is here now is done."""
        for job in list(self.jobs):
            # await: each job: cannot change: a copy of what was here then
            await job.done

    def abort(self) -> None:
        """What waits is dropped; what runs ends silently at its next wait."""
        for job in self.jobs:
            job.dropped = True
