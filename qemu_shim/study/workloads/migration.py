"""migration: pre-copy over several rounds while CPU and device write.

After each round every page that was written since the last one must be reported dirty, which the workload,
who knows what it wrote, checks page by page (`pages_missed`).  With KVM's log on the device's table each page
costs the device one IO page fault a round, by write protection.  Where no log sees the device's stores, all
it may write counts in each round: no faults, and everything is sent again.  The copy must be equal at last.

The writes of a round come before its report, the CPU's first, so that nothing depends on who is faster.
Counts grow with `rounds` x `pages` x (`cpu_writes` + `device_writes`).
"""

from __future__ import annotations

from protocol.units import align_up
from qemu_shim.api import MIB, PAGE_SIZE, Context, Migrator, Param, Scenario
from qemu_shim.study.workloads.expected_memory import ExpectedMemory

SLOT_GPA = 0x1_8000_0000


async def play(ctx: Context) -> None:
    page_size = 2 * MIB if ctx.params["huge"] else PAGE_SIZE
    size = align_up(ctx.params["pages"] * PAGE_SIZE, page_size)
    guest = await ctx.boot_for(0)
    slot = await guest.add_slot(size, SLOT_GPA, page_size)
    pages = list(range(SLOT_GPA, SLOT_GPA + size, PAGE_SIZE))
    contents = ExpectedMemory(ctx, guest)
    await contents.device_writes(pages[:1])
    await ctx.step("first dma")
    await contents.cpu_writes(pages)
    await contents.device_writes(pages)  # what faults from here on is logging
    await ctx.step("both write everything")
    migrator = await guest.log_dirty(slot)
    await migrator.send(range(migrator.pages))
    await ctx.step("logged, and all sent")
    for number in range(1, ctx.params["rounds"] + 1):
        await _round(ctx, contents, migrator, pages)
        await ctx.step(f"round {number}")
    await _round(ctx, contents, migrator, pages)
    await ctx.step("last round")
    await _check(ctx, contents, migrator, pages)


async def _round(ctx: Context, contents: ExpectedMemory, migrator: Migrator, pages: list[int]) -> None:
    by_cpu = _some(ctx, pages, ctx.params["cpu_writes"])
    by_device = _some(ctx, pages, ctx.params["device_writes"])
    await contents.cpu_writes(by_cpu)
    await contents.device_writes(by_device)
    written = {(gpa - pages[0]) // PAGE_SIZE for gpa in by_cpu + by_device}
    reported = await migrator.dirty()
    missed = sorted(written - reported)
    ctx.count("pages_written", len(written))
    ctx.count("pages_reported", len(reported))
    ctx.count("pages_missed", len(missed))
    ctx.expect(not missed, f"written while logged and not reported: pages {missed[:8]} of {len(missed)}")
    await migrator.send(sorted(reported))


def _some(ctx: Context, pages: list[int], per_cent: int) -> list[int]:
    return sorted(ctx.chance.sample(pages, len(pages) * per_cent // 100))


async def _check(ctx: Context, contents: ExpectedMemory, migrator: Migrator, pages: list[int]) -> None:
    """What the target has is what was written last, and what the guest still reads."""
    await contents.cpu_reads(pages)
    differ = await migrator.differences()
    ctx.expect(not differ, f"{len(differ)} pages of the copy differ: {differ[:8]}")


WORKLOAD = Scenario(
    name="migration",
    summary="pre-copy while CPU and device write: what is reported dirty, what it costs, an equal copy",
    play=play,
    params={
        "pages": Param(256, 16, 1 << 16, "pages that are migrated"),
        "huge": Param(0, 0, 1, "1: on host pages of 2 MiB, and as many pages as fill them"),
        "rounds": Param(4, 1, 1000, "rounds between the first and the last"),
        "cpu_writes": Param(12, 0, 100, "per cent of the pages that the CPU writes in a round"),
        "device_writes": Param(12, 0, 100, "per cent of the pages that the device writes in a round"),
    },
)
