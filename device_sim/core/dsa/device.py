"""A DSA as its driver sees it: portals, commands, interrupts, software errors.

Models [DSA 3, 9]: queues and engines are put into groups while the device is disabled; commands enable,
disable, drain, abort and reset the device or a queue, one at a time, and may take as long as descriptors wait
for pages.  GENCAP, WQCAP and OPCAP say what there is; the rest is refused as hardware without it refuses it.

Must hold: a queue takes descriptors only while it and the device are enabled; after a reset nothing of
an earlier life is left in a queue.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from device_sim.core.dsa.engine import EngineGroup
from device_sim.core.dsa.rules import RULES
from device_sim.core.dsa.runner import Runner
from device_sim.core.dsa.wq import Job, WorkQueue
from device_sim.core.function import Function
from protocol.flow import Flow
from protocol.hw.dsa import Descriptor
from protocol.hw.dsa_regs import (
    GENCTRL_SWERR_INT,
    MISC_VECTOR,
    Cause,
    Command,
    CommandError,
    CommandStatus,
    CommandWord,
    GenCap,
    OtherError,
    SoftwareError,
    State,
    WqCap,
    WqCfg,
    WqState,
)

WORK_QUEUES = 8
TOTAL_WQ_SIZE = 128
GROUPS = 4
ENGINES = 4
QUEUES_OF_AN_OPERAND = 16
GENCAP = GenCap(
    block_on_fault=True,
    overlap_copy=True,
    cache_control_mem=True,
    cache_control_cache=True,
    cmd_cap=True,
    drain_readback=True,
    max_xfer_shift=21,
    max_batch_shift=10,
    config_en=True,
)
WQCAP = WqCap(
    total_wq_size=TOTAL_WQ_SIZE, num_wqs=WORK_QUEUES, shared_mode=True, dedicated_mode=True, occupancy=True
)
OPCAP = sum(1 << opcode for opcode in RULES)

Run = Coroutine[Any, None, CommandError]


class Dsa:
    """`spawn` starts a flow, `interrupt(vector)` raises an MSI-X interrupt."""

    def __init__(
        self, function: Function, spawn: Callable[[Flow[None]], None], interrupt: Callable[[int], None]
    ) -> None:
        self.function = function
        self.runner = Runner(function, spawn, interrupt, self.report)
        self.counters = self.runner.counters
        self.queues = [WorkQueue(n) for n in range(WORK_QUEUES)]
        self.state = State.DISABLED
        self.genctrl = 0
        self.intcause = Cause(0)
        self.command_status = CommandStatus()
        self.software_error = SoftwareError()
        # a mask of queues and one of engines, a group
        self.group_queues = [0] * GROUPS
        self.group_engines = [0] * GROUPS
        self._spawn = spawn
        self._interrupt = interrupt

    # -- portals ---------------------------------------------------------------------------------------

    def movdir64b(self, wq: int, raw: bytes) -> None:
        """A posted write of a descriptor: discarded and not told of, but for a full queue [DSA 5.3]."""
        queue = self._enabled_queue(wq)
        if queue is None or not queue.config.dedicated:
            return
        if queue.has_room(limited=False):
            self._take(queue, raw)
        else:
            self.report(SoftwareError(wq_idx_valid=True, wq_idx=wq, error=OtherError.QUEUE_FULL))

    def enqcmd(self, wq: int, raw: bytes, *, limited: bool) -> bool:
        """ENQCMD; True: not taken, retry.  `limited`: through the portal that respects the threshold."""
        queue = self._enabled_queue(wq)
        if queue is None or queue.config.dedicated or not queue.has_room(limited=limited):
            return True
        self._take(queue, raw)
        return False

    def _enabled_queue(self, wq: int) -> WorkQueue | None:
        return self.queues[wq] if wq < WORK_QUEUES and self.queues[wq].enabled else None

    def _take(self, queue: WorkQueue, raw: bytes) -> None:
        queue.take(Job(queue, raw, Descriptor.from_bytes(raw)))
        assert queue.group is not None, "an enabled queue has a group"
        queue.group.kick()

    def report(self, error: SoftwareError) -> None:
        """The first error stays until software has read it."""
        self.counters.software_errors += 1
        if self.software_error.valid:
            self.software_error = replace(self.software_error, overflow=True)
            return
        self.software_error = replace(error, valid=True)
        if self.genctrl & GENCTRL_SWERR_INT:
            self._raise(Cause.SWERR)

    def _raise(self, cause: Cause) -> None:
        self.intcause |= cause
        self._interrupt(MISC_VECTOR)

    # -- commands --------------------------------------------------------------------------------------

    def write_command(self, word: CommandWord) -> None:
        """While a command is active a software error: software must wait for it."""
        if self.command_status.active:
            self.report(SoftwareError(error=OtherError.COMMAND_ACTIVE))
            return
        self.command_status = CommandStatus(active=True)
        self._spawn(self._command(word))

    async def _command(self, word: CommandWord) -> None:
        run = _COMMANDS.get(word.command)
        # await: run, word: cannot change: one command at a time, a word written meanwhile is an error
        error = CommandError.INVAL_CMD if run is None else await run(self, word.operand)
        self.command_status = CommandStatus(error=error)
        if word.interrupt:
            self._raise(Cause.CMD)

    async def _enable_device(self, operand: int) -> CommandError:
        if self.state is not State.DISABLED:
            return CommandError.DEV_ENABLED
        if not self.function.dma_enabled:
            return CommandError.BUSMASTER_EN
        if sum(queue.config.size for queue in self.queues) > TOTAL_WQ_SIZE:
            return CommandError.WQ_SIZE_ERANGE
        problem = self._group_problem()
        if problem is not None:
            return problem
        for queues, engines in zip(self.group_queues, self.group_engines, strict=True):
            members = [queue for queue in self.queues if queues >> queue.index & 1]
            group = EngineGroup(members, engines.bit_count(), self.runner.run, self._spawn)
            for queue in members:
                queue.group = group
        self.state = State.ENABLED
        return CommandError.SUCCESS

    def _group_problem(self) -> CommandError | None:
        """Each queue with a size is in one group, no other queue in any, each engine in at most one; and no
        group has the one without the other.
        """
        queues = engines = 0
        for wqs, own in zip(self.group_queues, self.group_engines, strict=True):
            if bool(wqs) != bool(own):
                return CommandError.GRP_CONFIG
            if wqs & queues:
                return CommandError.GRP_CONFIG2
            if own & engines or own >> ENGINES:
                return CommandError.GRP_CONFIG3
            queues, engines = queues | wqs, engines | own
        sized = sum(1 << queue.index for queue in self.queues if queue.config.size)
        return CommandError.GRP_CONFIG2 if queues != sized else None

    # awaits: asked: cannot change: one command at a time; a reset beside it waits for the same descriptors,
    # one after the other, and ends after it
    async def _disable_device(self, operand: int) -> CommandError:
        if self.state is not State.ENABLED:
            return CommandError.DIS_DEV_EN
        self.state = State.DRAIN
        await self._close(self.queues)
        self.state = State.DISABLED
        return CommandError.SUCCESS

    async def _drain_all(self, operand: int) -> CommandError:
        for queue in self.queues:
            await queue.drained()
        return CommandError.SUCCESS

    async def _abort_all(self, operand: int) -> CommandError:
        self.abort()
        return await self._drain_all(operand)

    async def _reset_device(self, operand: int) -> CommandError:
        await self.reset()
        return CommandError.SUCCESS

    async def _enable_wq(self, operand: int) -> CommandError:
        if self.state is not State.ENABLED:
            return CommandError.DEV_NOTEN
        if operand >= WORK_QUEUES:
            return CommandError.INVAL_WQIDX
        return self.queues[operand].enable(GENCAP.max_xfer_shift, GENCAP.max_batch_shift)

    # awaits: asked: cannot change: as in `_disable_device`
    async def _disable_wq(self, operand: int) -> CommandError:
        queues = self._named(operand)
        if isinstance(queues, CommandError):
            return queues
        await self._close(queues)
        return CommandError.SUCCESS

    # awaits: asked, each queue: cannot change: as in `_disable_device`
    async def _drain_wq(self, operand: int) -> CommandError:
        queues = self._named(operand)
        if isinstance(queues, CommandError):
            return queues
        for queue in queues:
            await queue.drained()
        return CommandError.SUCCESS

    async def _abort_wq(self, operand: int) -> CommandError:
        queues = self._named(operand)
        if isinstance(queues, CommandError):
            return queues
        for queue in queues:
            queue.abort()
        return await self._drain_wq(operand)

    # awaits: asked, queues: cannot change: as in `_disable_device`
    async def _reset_wq(self, operand: int) -> CommandError:
        queues = self._named(operand)
        if isinstance(queues, CommandError):
            return queues
        for queue in queues:
            queue.abort()
        await self._close(queues)
        for queue in queues:
            queue.config = WqCfg(size=queue.config.size)
        return CommandError.SUCCESS

    def _named(self, operand: int) -> list[WorkQueue] | CommandError:
        """The queues of an operand: sixteen bits, and which sixteen."""
        if self.state is not State.ENABLED:
            return CommandError.DEV_NOT_EN
        mask = (operand & (1 << QUEUES_OF_AN_OPERAND) - 1) << (
            QUEUES_OF_AN_OPERAND * (operand >> QUEUES_OF_AN_OPERAND)
        )
        if not mask or mask >> WORK_QUEUES:
            return CommandError.INVAL_WQIDX
        named = [queue for queue in self.queues if mask >> queue.index & 1]
        return named if all(queue.enabled for queue in named) else CommandError.DEV_NOT_EN

    # awaits: each queue, queue: cannot change: the device has them for good; what is not DISABLED takes
    # nothing
    async def _close(self, queues: list[WorkQueue]) -> None:
        """Nothing more is taken; returns once what was taken is done."""
        for queue in queues:
            if queue.enabled:
                queue.state = WqState.BUSY
        for queue in queues:
            await queue.drained()
            queue.state = WqState.DISABLED

    # -- the end of a life -----------------------------------------------------------------------------

    def abort(self) -> None:
        for queue in self.queues:
            queue.abort()

    def abandon(self) -> None:
        """The guest or the remapping unit's driver is gone: nothing is taken, what is here ends silently."""
        for queue in self.queues:
            if queue.enabled:
                queue.state = WqState.BUSY
        self.abort()

    async def reset(self) -> None:
        """As it was made, once what runs has ended."""
        self.abandon()
        self.state = State.DRAIN
        await self._close(self.queues)
        self.state = State.DISABLED
        self.genctrl, self.intcause = 0, Cause(0)
        self.software_error, self.command_status = SoftwareError(), CommandStatus()
        self.group_queues, self.group_engines = [0] * GROUPS, [0] * GROUPS
        for queue in self.queues:
            queue.config, queue.group = WqCfg(), None


_COMMANDS: dict[int, Callable[[Dsa, int], Run]] = {
    Command.ENABLE_DEVICE: Dsa._enable_device,
    Command.DISABLE_DEVICE: Dsa._disable_device,
    Command.DRAIN_ALL: Dsa._drain_all,
    Command.ABORT_ALL: Dsa._abort_all,
    Command.RESET_DEVICE: Dsa._reset_device,
    Command.ENABLE_WQ: Dsa._enable_wq,
    Command.DISABLE_WQ: Dsa._disable_wq,
    Command.DRAIN_WQ: Dsa._drain_wq,
    Command.ABORT_WQ: Dsa._abort_wq,
    Command.RESET_WQ: Dsa._reset_wq,
}
CMDCAP = sum(1 << command for command in _COMMANDS)
