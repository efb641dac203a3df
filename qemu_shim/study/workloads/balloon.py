"""balloon: the guest gives pages back, the VMM drops them, and the guest takes them again for CPU and device.

A page that was given back is read by whoever uses it next, and reads as zeroes; then it is written.  Half of
the balloon is used by the device, half by the CPU.  Where memory is pinned nothing can be given back, so the
VMM leaves the balloon alone and the pages keep what they hold [QEMU hw/virtio]: that is a refusal, and the
use goes on.  Counts grow with `pages` and `rounds`.
"""

from __future__ import annotations

from qemu_shim.api import PAGE_SIZE, Context, Guest, Param, Scenario
from qemu_shim.study.workloads.expected_memory import ExpectedMemory


async def play(ctx: Context) -> None:
    pages = ctx.params["pages"]
    guest = await ctx.boot_for(pages)
    contents = ExpectedMemory(ctx, guest)
    every = guest.pages(pages)
    await contents.device_writes(every[:1])
    await ctx.step("first dma")
    await contents.device_writes(every[1 : pages // 2])
    await ctx.step("device writes")
    await contents.cpu_writes(every[pages // 2 :])
    await ctx.step("cpu writes")
    inflatable = True
    for number in range(1, ctx.params["rounds"] + 1):
        start = ctx.chance.randrange(pages - _ballooned(ctx) + 1)
        taken = every[start : start + _ballooned(ctx)]
        if inflatable:
            inflatable = await _inflate(ctx, guest, contents, taken)
            await ctx.step(f"inflated {number}")
        await _use(ctx, contents, taken, number)
    await contents.device_reads(every)
    await contents.cpu_reads(every)
    await ctx.step("both read everything")


async def _inflate(ctx: Context, guest: Guest, contents: ExpectedMemory, taken: list[int]) -> bool:
    given = await ctx.offered(guest.discard(taken[0], len(taken) * PAGE_SIZE))
    if given:
        contents.zeroed(taken)
    left = await guest.resident_pages(taken[0], len(taken) * PAGE_SIZE)
    ctx.expect(left == (0 if given else len(taken)), f"{left} of {len(taken)} pages are still there")
    return given


async def _use(ctx: Context, contents: ExpectedMemory, taken: list[int], number: int) -> None:
    half = len(taken) // 2
    await contents.device_reads(taken[:half])
    await contents.device_writes(taken[:half])
    await ctx.step(f"used by the device {number}")
    await contents.cpu_reads(taken[half:])
    await contents.cpu_writes(taken[half:])
    await ctx.step(f"used by the cpu {number}")


def _ballooned(ctx: Context) -> int:
    return max(ctx.params["pages"] * ctx.params["share"] // 100, 2)


WORKLOAD = Scenario(
    name="balloon",
    summary="the guest gives pages back and takes them again, for device and CPU",
    play=play,
    params={
        "pages": Param(256, 8, 1 << 18, "pages in use before the balloon is inflated"),
        "share": Param(50, 1, 100, "per cent of them that go into the balloon"),
        "rounds": Param(3, 1, 1000, "times it is inflated and deflated"),
    },
)
