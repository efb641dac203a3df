"""streaming: CPU and device sweep through more memory than the host has, and the host swaps.

Window after window is written by one of the two and read by the other, in turns.  Then the host, which has
frames for `room` per cent, ages everything and swaps out what was used longest ago.  The next sweep reads
each window before it writes it, so every page comes from swap.  A design that pins all memory does not
start: the host has not got it.  Counts grow with `pages` and `sweeps`, ageing with `pages` / `window`.
"""

from __future__ import annotations

from qemu_shim.api import DRIVER_PAGES, PAGE_SIZE, Context, Guest, Param, Scenario
from qemu_shim.study.workloads.expected_memory import ExpectedMemory
from qemu_shim.study.workloads.host_memory import OPTIONS, Reclaim, chunks, crowded


async def play(ctx: Context) -> None:
    limit = max(ctx.params["pages"] * ctx.params["room"] // 100, ctx.params["window"])
    async with crowded(ctx, limit + ctx.params["window"] + DRIVER_PAGES):
        await _sweep_all(ctx, await ctx.boot_for(ctx.params["pages"]), limit)


async def _sweep_all(ctx: Context, guest: Guest, limit: int) -> None:
    pages, window = ctx.params["pages"], ctx.params["window"]
    every = guest.pages(pages)
    windows = [every[at : at + window] for at in range(0, pages, window)]
    over = chunks(guest, every[0], pages * PAGE_SIZE, window)
    reclaim = Reclaim(ctx, over, limit)
    contents = ExpectedMemory(ctx, guest)
    await contents.device_writes(every[:1])
    await ctx.step("first dma")
    for sweep in range(ctx.params["sweeps"]):
        for number, some in enumerate(windows):
            await _use(contents, some, device_writes=(number + sweep) % 2 == 0, old=sweep > 0)
            resident = await reclaim.balance()
            ctx.expect(resident <= limit, f"{resident} pages are resident, {limit} may be")
        await ctx.step(f"sweep {sweep + 1}")
    for some in windows:
        await contents.cpu_reads(some)
        await reclaim.balance()
    await ctx.step("cpu reads everything")


async def _use(contents: ExpectedMemory, some: list[int], *, device_writes: bool, old: bool) -> None:
    """Who writes reads first what was there."""
    if device_writes:
        if old:
            await contents.device_reads(some)
        await contents.device_writes(some)
        await contents.cpu_reads(some)
    else:
        if old:
            await contents.cpu_reads(some)
        await contents.cpu_writes(some)
        await contents.device_reads(some)


WORKLOAD = Scenario(
    name="streaming",
    summary="CPU and device sweep through more memory than the host has frames for",
    play=play,
    params={
        "pages": Param(512, 64, 1 << 17, "pages that are swept through"),
        "room": Param(50, 5, 95, "per cent of them that the host has frames for"),
        "window": Param(32, 8, 512, "pages that are used between two looks of the host"),
        "sweeps": Param(2, 1, 1000, "times all pages are written"),
    },
    options=OPTIONS,
)
