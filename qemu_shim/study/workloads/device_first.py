"""device-first: the device writes to pages that nobody has touched, and the CPU stores to them afterwards.

A share of the pages may be the CPU's first (`cpu_first`, in per cent): from 0 to 100 it leads from the case
in which knowing what the CPU touched is worth nothing to the one in which it is worth everything.
"""

from __future__ import annotations

from qemu_shim.api import MIB, Context, Param, Scenario


async def play(ctx: Context) -> None:
    guest = await ctx.boot(ram_bytes=ctx.params["ram_mib"] * MIB)
    pages = guest.pages(ctx.params["pages"])
    ctx.chance.shuffle(pages)
    by_cpu = pages[: len(pages) * ctx.params["cpu_first"] // 100]
    await guest.touch(by_cpu)
    await ctx.step("cpu touches its share")
    await guest.fill(pages[0])
    await ctx.step("first dma")
    for gpa in pages[1:]:
        await guest.fill(gpa)
    await ctx.step("dma to every page")
    await guest.touch(pages)
    await ctx.step("cpu touches every page")


WORKLOAD = Scenario(
    name="device-first",
    summary="the device writes first, to all pages but the CPU's share, and the CPU comes after it",
    play=play,
    params={
        "pages": Param(256, 1, 1 << 18, "pages"),
        "cpu_first": Param(0, 0, 100, "per cent of them that the CPU touches before the device"),
        "ram_mib": Param(64, 32, 1 << 20, "MiB of guest memory"),
    },
)
