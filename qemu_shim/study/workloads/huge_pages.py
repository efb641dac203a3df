"""huge-pages: guest memory in pages of 4 KiB, 2 MiB and 1 GiB, put together and taken apart under the guest.

With each size of page CPU and device use as many MiB, and the tables by level say what it takes to map them.
The small pages are then collapsed to huge ones by the host, lose a small page each, are collapsed again and
split, and used each time.  Pinned pages cannot be collapsed: the host refuses, and they are used as they are.

The steps are played in order; after the last sample the host collapses and splits under DMA (`storm`).
Counts grow with `mib` where pages are small and hardly at all where they are huge.
"""

from __future__ import annotations

import errno

from qemu_shim.api import GIB, MIB, PAGE_SIZE, Context, Guest, Param, RamSlot, Scenario
from qemu_shim.study.workloads.expected_memory import ExpectedMemory
from qemu_shim.study.workloads.storm import under_dma

HUGE = 2 * MIB
SLOT_GPAS = {PAGE_SIZE: 0x1_0000_0000, HUGE: 0x1_8000_0000, GIB: 0x2_0000_0000}
NAMES = {PAGE_SIZE: "4K", HUGE: "2M", GIB: "1G"}
PART = 7 * PAGE_SIZE  # of a huge page
SPREAD = 16 * PAGE_SIZE  # from one page to the next of those that are written meanwhile


async def play(ctx: Context) -> None:
    size = ctx.params["mib"] // 2 * HUGE
    guest = await ctx.boot(ram_bytes=HUGE, free_from=MIB)  # so that what is mapped next is aligned
    await guest.fill(guest.pages(1)[0])
    await ctx.step("first dma")
    contents = ExpectedMemory(ctx, guest)
    slots = {}
    for page_size, gpa in SLOT_GPAS.items():
        slots[page_size] = await guest.add_slot(max(size, page_size), gpa, page_size)
        pages = list(range(gpa, gpa + size, PAGE_SIZE))
        await contents.cpu_writes(pages[: len(pages) // 2])
        await contents.device_writes(pages[len(pages) // 2 :])
        await ctx.step(f"{NAMES[page_size]}: each writes its half")
        await _both_read(ctx, contents, pages, NAMES[page_size])
    small = slots[PAGE_SIZE]
    if await _remade(ctx, guest, contents, small):
        await _storm(ctx, guest, small)


async def _both_read(ctx: Context, contents: ExpectedMemory, pages: list[int], what: str) -> None:
    await contents.device_reads(pages)
    await ctx.step(f"{what}: the device reads all")
    await contents.cpu_reads(pages)
    await ctx.step(f"{what}: the cpu reads all")


async def _remade(ctx: Context, guest: Guest, contents: ExpectedMemory, slot: RamSlot) -> bool:
    """Put together, nibbled at, put together again and taken apart; used each time, even if one of them was
    refused and the memory stays as it is.
    """
    pages = list(range(slot.gpa, slot.gpa + slot.size, PAGE_SIZE))
    able = True
    for number, act in enumerate((_collapse, _nibble, _collapse, _split), 1):
        what = f"4K, {number}. {act.__name__.strip('_')}"
        able = able and await act(ctx, guest, contents, slot)
        await ctx.step(what)
        await _both_read(ctx, contents, pages, what)
    return able


async def _collapse(ctx: Context, guest: Guest, contents: ExpectedMemory, slot: RamSlot) -> bool:
    call = guest.collapse(slot.gpa, slot.size)
    done = await ctx.allowed("collapse of guest memory", errno.EAGAIN, call)
    ctx.expect(done in (None, slot.size // HUGE), f"collapse: {done} huge pages")
    return done is not None


async def _nibble(ctx: Context, guest: Guest, contents: ExpectedMemory, slot: RamSlot) -> bool:
    """One small page out of each huge one is given back: who maps the huge one must let go of that part."""
    for gpa in range(slot.gpa, slot.gpa + slot.size, HUGE):
        if not await ctx.offered(guest.discard(gpa + PART, PAGE_SIZE)):
            return False
        contents.zeroed([gpa + PART])
    return True


async def _split(ctx: Context, guest: Guest, contents: ExpectedMemory, slot: RamSlot) -> bool:
    done = await guest.split(slot.gpa, slot.size)
    ctx.expect(done == slot.size // HUGE, f"split: {done} huge pages")
    return True


async def _storm(ctx: Context, guest: Guest, slot: RamSlot) -> None:
    async def put_together_and_take_apart() -> None:
        for _ in range(ctx.params["storm"]):
            await guest.collapse(slot.gpa, slot.size)
            await guest.split(slot.gpa, slot.size)

    spread = range(slot.gpa, slot.gpa + slot.size, SPREAD)
    await under_dma(ctx, guest, spread, put_together_and_take_apart)


WORKLOAD = Scenario(
    name="huge-pages",
    summary="guest memory in pages of 4K, 2M and 1G; collapse and split under the device",
    play=play,
    params={
        "mib": Param(4, 2, 1024, "MiB used with each size of page; whole 2 MiB"),
        "storm": Param(3, 0, 10_000, "times the host does both under DMA, checked and not counted"),
    },
)
