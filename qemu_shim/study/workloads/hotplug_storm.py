"""hotplug-storm: memslots come and go while the device uses another one.

The removal of any slot takes every leaf out of KVM's roots: a vCPU's root is given up and built anew, an
exported one keeps its tables and is filled again by faults.  Who comes first pays, so device and CPU take
turns at it; where the device has a table of its own that no removal touches it pays nothing.  What was
removed must be out of the device's reach, and the other slot's bytes stay what they are.

The rounds are played in order, so that they can be counted; after the last sample slots come and go under DMA
(`storm`).  Counts grow with `rounds` x (`kept` + `plugged`).
"""

from __future__ import annotations

from qemu_shim.api import PAGE_SIZE, Context, Guest, Param, RamSlot, Scenario
from qemu_shim.study.workloads.expected_memory import ExpectedMemory
from qemu_shim.study.workloads.storm import under_dma

KEPT_GPA, PLUGGED_GPA = 0x1_8000_0000, 0x2_0000_0000


def _pages(slot: RamSlot) -> list[int]:
    return list(range(slot.gpa, slot.gpa + slot.size, PAGE_SIZE))


async def play(ctx: Context) -> None:
    guest = await ctx.boot_for(0)
    kept = _pages(await guest.add_slot(ctx.params["kept"] * PAGE_SIZE, KEPT_GPA))
    contents = ExpectedMemory(ctx, guest)
    await contents.device_writes(kept[:1])
    await ctx.step("first dma")
    await contents.cpu_writes(kept[: len(kept) // 2])
    await contents.device_writes(kept[len(kept) // 2 :])
    await _both_read(contents, kept, device_first=True)
    await ctx.step("both use the slot that stays")
    for number in range(1, ctx.params["rounds"] + 1):
        await _round(ctx, guest, contents, kept, number)
    await _storm(ctx, guest, kept)


async def _round(ctx: Context, guest: Guest, contents: ExpectedMemory, kept: list[int], number: int) -> None:
    plugged = await _plug(ctx, guest)
    pages = _pages(plugged)
    await contents.cpu_writes(pages[: len(pages) // 2])
    await contents.device_writes(pages[len(pages) // 2 :])
    await _both_read(contents, pages, device_first=True)
    await ctx.step(f"plugged and used {number}")
    await guest.remove_slot(plugged)
    await ctx.step(f"removed {number}")
    await _both_read(contents, kept, device_first=number % 2 == 1)
    await ctx.step(f"the other slot {number}")
    await ctx.expect_dma_fault(f"round {number}: a write to memory that was removed", guest.fill(pages[0]))
    await ctx.step(f"dma to what was removed {number}")


async def _both_read(contents: ExpectedMemory, pages: list[int], *, device_first: bool) -> None:
    readers = [contents.device_reads, contents.cpu_reads]
    for read in readers if device_first else reversed(readers):
        await read(pages)


async def _plug(ctx: Context, guest: Guest) -> RamSlot:
    return await guest.add_slot(ctx.params["plugged"] * PAGE_SIZE, PLUGGED_GPA)


async def _storm(ctx: Context, guest: Guest, kept: list[int]) -> None:
    async def come_and_go() -> None:
        for _ in range(ctx.params["storm"]):
            plugged = await _plug(ctx, guest)
            await guest.touch(_pages(plugged))
            await guest.remove_slot(plugged)

    await under_dma(ctx, guest, kept, come_and_go)


WORKLOAD = Scenario(
    name="hotplug-storm",
    summary="memslots come and go while the device uses another one",
    play=play,
    params={
        "kept": Param(64, 4, 1 << 16, "pages of the slot that stays"),
        "plugged": Param(32, 4, 1 << 16, "pages of the slot that comes and goes"),
        "rounds": Param(6, 1, 10_000, "times it does so in order, counted"),
        "storm": Param(8, 0, 10_000, "times it does so under DMA, checked and not counted"),
    },
)
