"""overcommit: two VMs with a device each on a host whose frames do not hold both.

They are busy in turns: CPU and device of one read and write all of its memory, window after window, while
the other sleeps.  After each window the host makes room by age alone; nobody tells it who is idle.  Of a
design that pins, one VM comes up and the second does not.  Counts grow with `pages` and `turns`.
"""

from __future__ import annotations

from qemu_shim.api import DRIVER_PAGES, KERNEL_BYTES, PAGE_SIZE, Context, Guest, Param, Scenario
from qemu_shim.study.workloads.expected_memory import ExpectedMemory
from qemu_shim.study.workloads.host_memory import OPTIONS, Chunk, Reclaim, chunks, crowded

VMS = 2


async def play(ctx: Context) -> None:
    each = ctx.sized(ctx.params["pages"])
    limit = each["ram_bytes"] // PAGE_SIZE * ctx.params["room"] // 100
    async with crowded(ctx, limit + ctx.params["window"] + VMS * DRIVER_PAGES):
        await _take_turns(ctx, await ctx.boot_all(*[each] * VMS), limit)


async def _take_turns(ctx: Context, guests: list[Guest], limit: int) -> None:
    owned = [guest.pages(ctx.params["pages"]) for guest in guests]
    contents = [ExpectedMemory(ctx, guest) for guest in guests]
    reclaim = Reclaim(ctx, [chunk for guest in guests for chunk in _chunks(ctx, guest)], limit)
    for held, pages in zip(contents, owned, strict=True):
        await held.device_writes(pages[:1])
    await ctx.step("first dma")
    for guest in guests:
        for some in _windows(ctx, list(range(0, KERNEL_BYTES, PAGE_SIZE))):
            await guest.touch(some)
            await reclaim.balance()
    await ctx.step("kernels boot")
    for turn in range(ctx.params["turns"]):
        busy = turn % VMS
        for some in _windows(ctx, owned[busy]):
            if turn >= VMS:
                await contents[busy].device_reads(some)
            await contents[busy].device_writes(some[: len(some) // 2])
            await contents[busy].cpu_writes(some[len(some) // 2 :])
            resident = await reclaim.balance()
            ctx.expect(resident <= limit, f"{resident} pages are resident, {limit} may be")
        await ctx.step(f"turn {turn + 1}: vm {busy}")
    for held, pages in zip(contents, owned, strict=True):
        for some in _windows(ctx, pages):
            await held.cpu_reads(some)
            await reclaim.balance()
    await ctx.step("both read everything")


def _chunks(ctx: Context, guest: Guest) -> list[Chunk]:
    ram_bytes = ctx.sized(ctx.params["pages"])["ram_bytes"]
    return chunks(guest, 0, ram_bytes, ctx.params["window"])


def _windows(ctx: Context, pages: list[int]) -> list[list[int]]:
    window = ctx.params["window"]
    return [pages[at : at + window] for at in range(0, len(pages), window)]


WORKLOAD = Scenario(
    name="overcommit",
    summary="two VMs, two devices, and frames for little more than one of them",
    play=play,
    params={
        "pages": Param(256, 32, 1 << 16, "pages that each VM uses"),
        "room": Param(110, 105, 190, "per cent of one VM's memory that the host has for both"),
        "window": Param(32, 8, 512, "pages that are used between two looks of the host"),
        "turns": Param(4, VMS, 1000, "times a VM is busy while the other sleeps"),
    },
    options={**OPTIONS, "device_sim": ("--devices", str(VMS))},
)
