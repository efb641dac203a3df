"""boot-touch: the guest's CPU touches its memory as a kernel that boots does, then the device uses it.

The case the series is made for: "natural CPU touches will usually make the page present before an IO happens"
[RFC review].  The device reads and writes what the CPU touched, and last some pages that nobody has.
"""

from __future__ import annotations

from qemu_shim.api import MIB, Context, Param, Scenario


async def play(ctx: Context) -> None:
    guest = await ctx.boot(ram_bytes=ctx.params["ram_mib"] * MIB)
    pages = guest.pages(ctx.params["pages"])
    untouched = guest.pages(ctx.params["untouched"])
    await guest.touch(pages)
    await ctx.step("cpu touches")
    await guest.fill(pages[0])
    await ctx.step("first dma")
    order = pages[1:]
    ctx.chance.shuffle(order)
    for gpa in order:
        await guest.fill(gpa)
    await ctx.step("dma to what the cpu touched")
    for gpa in untouched:
        await guest.fill(gpa)
    await ctx.step("dma to what nobody touched")
    await guest.touch(pages + untouched)
    await ctx.step("cpu again")


WORKLOAD = Scenario(
    name="boot-touch",
    summary="the CPU touches its memory first, then the device uses it",
    play=play,
    params={
        "pages": Param(256, 1, 1 << 18, "pages the CPU touches first"),
        "untouched": Param(32, 0, 1 << 18, "pages that only the device touches, after that"),
        "ram_mib": Param(64, 32, 1 << 20, "MiB of guest memory"),
    },
)
