"""The stage most scenarios share: a machine, one work queue of its device, and what every run ends with.

A step's cost is the difference of all counters over it, whoever keeps them: `async with stage.counted()`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from protocol.hw.dsa import Status
from protocol.rpc.channel import Body
from protocol.units import PAGE_SIZE
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.counters import Counters
from qemu_shim.scenarios.measure import Report, check_system, fill_table, snapshot
from qemu_shim.vmm.inspector import Inspector
from qemu_shim.vmm.machine import Host, Machine, MachineConfig, machine

PATTERN = 0x1122_3344_5566_7788
FILLED = PATTERN.to_bytes(8, "little") * (PAGE_SIZE // 8)


@dataclass(slots=True)
class Stage:
    host: Host
    guest: Machine
    queue: IdxdWorkQueue
    report: Report

    async def fill(self, gpa: int, pattern: int = PATTERN, size: int = PAGE_SIZE) -> Status:
        """The device writes."""
        return (await self.queue.fill(gpa, pattern, size)).status

    async def copy(self, dst: int, src: int, size: int = PAGE_SIZE) -> Status:
        """The device reads and writes."""
        return (await self.queue.memmove(dst, src, size)).status

    @asynccontextmanager
    async def counted(self) -> AsyncIterator[Counters]:
        """What the counters grow by; known when it is over."""
        cost, before = Counters(), await snapshot(self.host)
        yield cost
        cost.take((await snapshot(self.host)).since(before))

    async def inspect(self) -> Body:
        """The machine's VM: slots, roots, counters."""
        return await Inspector(self.host.kvmd.channel).vm(self.guest.vm)

    async def walks(self, gpa: int) -> Body:
        """The entries on the way to `gpa` and where each walker ends."""
        return await Inspector(self.host.kvmd.channel).gpa(self.guest.vm, gpa)


@asynccontextmanager
async def staged(ctx: Context, config: MachineConfig, report: Report | None = None) -> AsyncIterator[Stage]:
    """Completion records lie in a page that is present, so that counts are of the story alone.  `report`: of
    a part of the scenario.
    """
    host, report = ctx.host, report or ctx.report
    async with machine(host, config) as guest:
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True)
        await queue.enable()
        await guest.memory.touch([queue.record_page])
        before = await snapshot(host)
        yield Stage(host, guest, queue, report)
        await guest.portal.drain()
        after = await snapshot(host)
        await check_system(host, report)
    report.expect(after.since(before).stale_accesses == 0, "I6: a stale access")
    fill_table(report, before, after)
