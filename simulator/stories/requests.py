"""Page requests in groups, and what comes between them and their answers: an end, a full queue, a detach."""

from __future__ import annotations

import trio

from qemu_shim.api import PAGE_SIZE, Context
from simulator.search.excerpt import Excerpt
from simulator.stories.common import (
    AFTER,
    AT,
    MAY_TAKE,
    NEXT,
    OVER_TWO,
    PAGES,
    PATTERN,
    SLOT_BYTES,
    agree,
    post_fill,
    try_fill,
)
from simulator.stories.devices import TWO, leaves
from simulator.stories.story import SmallStory

BEHIND = AT + SLOT_BYTES
_ASLEEP_S = 0.001  # until nothing else can go on
ASKS_ALREADY = {"device_sim": (*TWO["device_sim"], "--device", "1:pri-on")}


async def _across(ctx: Context, excerpt: Excerpt) -> None:
    """A device stores to two absent pages at once, and over the end of their slot, beside a migration."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    for _ in excerpt.rounds():
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, OVER_TWO, 64, PATTERN)
                nursery.start_soon(try_fill, guest, BEHIND - 32)
                await guest.migrate(NEXT)
        ctx.expect(await guest.holds(OVER_TWO, 64, PATTERN), "the device's store is lost")
        await agree(ctx, guest, NEXT)
        await guest.discard(AT, SLOT_BYTES)


async def _leaves_asleep(ctx: Context, excerpt: Excerpt) -> None:
    """A device is detached while pages that it asked for sleep for userfaultfd (R10)."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    second = await guest.plug(1)
    vfio, hwpt_id = second.plugged.vfio, guest.machine.hwpt_id
    process, hva = guest.machine.process, guest.machine.hva_of(AT)
    for _ in excerpt.rounds():
        uffd = await process.userfaultfd()
        await uffd.register(hva, PAGE_SIZE, "missing")
        with excerpt:
            post_fill(second, AT)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vfio.detach)
                nursery.start_soon(guest.write, NEXT, AFTER)
                await trio.sleep(_ASLEEP_S)
                await uffd.copy(hva, bytes(PAGE_SIZE))
        await second.plugged.portal.drain()
        uffd.close()
        await vfio.attach(hwpt_id)
        await agree(ctx, guest, AT, second)
        await guest.discard(AT, SLOT_BYTES)


REQUESTS = (
    SmallStory("across", "stores to two pages at once, and over the end of a slot", _across, MAY_TAKE),
    SmallStory(
        "full", "the same, and the queue of page requests overflows", _across, MAY_TAKE, faults=("full",)
    ),
    SmallStory("detach-asleep", "a device leaves while its pages sleep", _leaves_asleep, MAY_TAKE, TWO),
    SmallStory("detach-asks", "a device that can always ask leaves", leaves, MAY_TAKE, ASKS_ALREADY),
)
