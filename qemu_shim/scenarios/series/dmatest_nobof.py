"""dmatest-nobof: the same test where descriptors may not wait for pages (RFC-109).

The host migrates both buffers before each transfer, so that the device finds nothing mapped.  The descriptor
ends in a page fault with address, direction and the bytes done; the driver touches the page, a vCPU's fault
like any other, and submits the rest.  No page request is ever raised.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.hw.dsa import CompletionRecord
from protocol.units import GIB, PAGE_SIZE, align_up
from qemu_shim.guest.idxd import IdxdWorkQueue, ResumingQueue
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.measure import check_system, fill_table, snapshot
from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.scenarios.series.dmatest import TEST_PARAMS, dmatest_params, run_threads, tell
from qemu_shim.vmm.designs import SHARED
from qemu_shim.vmm.machine import Machine, MachineConfig, machine


@dataclass(slots=True)
class _EvictedFirst:
    """A channel whose buffers the host has just moved."""

    guest: Machine
    channel: ResumingQueue

    async def memmove(self, dst: int, src: int, size: int) -> CompletionRecord:
        await self._evict(src, size)
        await self._evict(dst, size)
        return await self.channel.memmove(dst, src, size)

    async def fill(self, dst: int, pattern: int, size: int) -> CompletionRecord:
        await self._evict(dst, size)
        return await self.channel.fill(dst, pattern, size)

    async def _evict(self, gpa: int, size: int) -> None:
        first = gpa - gpa % PAGE_SIZE
        pages = align_up(gpa + size, PAGE_SIZE) - first
        await self.guest.process.move_pages(self.guest.hva_of(first), pages)


async def play(ctx: Context) -> None:
    host, params, report = ctx.host, ctx.params, ctx.report
    async with machine(host, MachineConfig(ram_bytes=GIB)) as guest:
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=False)
        await queue.enable()
        before = await snapshot(host)
        results = await run_threads(
            guest, [_EvictedFirst(guest, ResumingQueue(queue))], dmatest_params(params)
        )
        await queue.disable()
        after = await snapshot(host)
        await check_system(host, report)
    tell(report, results)
    faults = after.since(before).dma_faults
    report.rows.append(("descriptors ended by a fault / resumed", f"{faults} / {queue.faults}"))
    fill_table(report, before, after)
    report.figures |= {"faulted_descriptors": faults}
    report.expect(faults > 0, "RFC-109: no descriptor ended in a page fault")
    report.expect(faults == queue.faults, f"{faults} descriptors faulted, {queue.faults} were resumed")
    requests = report.figures["io_faults"]
    report.expect(requests == 0, f"RFC-109: {requests} page requests without block on fault")


SCENARIO = Scenario(
    name="dmatest-nobof",
    summary="the same without block on fault: descriptors end in page faults and the driver resumes them",
    tags=("RFC-109",),
    play=play,
    params=TEST_PARAMS,
    designs=(SHARED.name,),
)
