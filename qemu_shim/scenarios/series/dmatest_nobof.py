"""dmatest-nobof: the same test where descriptors may not wait for pages (RFC-109).

The host migrates both buffers before each transfer, so that the device finds nothing mapped.  The descriptor
ends in a page fault with address, direction and the bytes done; the driver touches the page, a vCPU's fault
like any other, and submits the rest.  No page request is ever raised.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.hw.dsa import CompletionRecord
from protocol.units import align_up
from qemu_shim.api import PAGE_SIZE, Context, Guest, QueueWish, Scenario
from qemu_shim.guest.idxd import ResumingQueue
from qemu_shim.scenarios.series.dmatest import TEST_PARAMS, dmatest_params, run_threads, tell


@dataclass(slots=True)
class _EvictedFirst:
    """A channel whose buffers the host has just moved."""

    guest: Guest
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
        await self.guest.migrate(first, align_up(gpa + size, PAGE_SIZE) - first)


async def play(ctx: Context) -> None:
    guest = await ctx.boot()
    (queue,) = await guest.devices[0].set_up([QueueWish(block_on_fault=False)])
    async with ctx.counted() as cost:
        channel = _EvictedFirst(guest, ResumingQueue(queue))
        results = await run_threads(guest, [channel], dmatest_params(ctx.params))
    tell(ctx, results)
    faults, requests = cost.dma_faults, cost.io_faults
    ctx.row("descriptors ended by a fault / resumed", f"{faults} / {queue.faults}")
    ctx.figures |= {"faulted_descriptors": faults}
    ctx.expect(faults > 0, "RFC-109: no descriptor ended in a page fault")
    ctx.expect_equal(queue.faults, faults, "descriptors resumed, of those that faulted")
    ctx.expect_equal(requests, 0, "RFC-109: page requests without block on fault")


SCENARIO = Scenario(
    name="dmatest-nobof",
    summary="the same without block on fault: descriptors end in page faults and the driver resumes them",
    tags=("RFC-109",),
    play=play,
    params=TEST_PARAMS,
    designs=("shared",),
)
