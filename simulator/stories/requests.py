"""Page requests in groups, and what comes between them and their answers: an end, a full queue, a detach."""

from __future__ import annotations

import trio

from device_sim.core.dsa.device import ENGINES
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
    missing,
    post_fill,
    try_fill,
)
from simulator.stories.devices import TWO, leaves
from simulator.stories.story import SmallStory

BEHIND = AT + SLOT_BYTES
KICKS = 3
_ASLEEP_S = 0.001  # until nothing else can go on
ASKS_ALREADY = {"device_sim": (*TWO["device_sim"], "--device", "1:pri-on")}
ALWAYS_ASKS = {"device_sim": ("--pri-on",)}
FEW_REQUESTS = {"device_sim": ("--pri-capacity", "2")}
ASKS_FOR_ONE = {"device_sim": (*TWO["device_sim"], "--device", "1:pri-on,pri-capacity=1")}


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


async def _beside_a_move(ctx: Context, excerpt: Excerpt) -> None:
    """A device stores to two absent pages at once, while its unit is told to forget a third, three times."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    (third,) = guest.pages(1)
    for _ in excerpt.rounds():
        await guest.fill(third, 64)
        with excerpt:
            async with trio.open_nursery() as nursery:
                for page in (AT, NEXT):
                    nursery.start_soon(guest.fill, page, 64, PATTERN)
                for _ in range(KICKS):
                    await guest.migrate(third)
        await agree(ctx, guest, AT)
        await guest.discard(AT, SLOT_BYTES)


async def _beyond(ctx: Context, excerpt: Excerpt) -> None:
    """A device that can always ask stores by all its engines where no memory is, and by one where some is."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    for _ in excerpt.rounds():
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, BEHIND + PAGE_SIZE - 32)
                for page in range(2, ENGINES + 1):
                    nursery.start_soon(try_fill, guest, BEHIND + page * PAGE_SIZE)
                nursery.start_soon(guest.fill, NEXT, 64, PATTERN)
                await guest.migrate(NEXT)
        await agree(ctx, guest, NEXT)
        await guest.migrate(AT)


async def _few(ctx: Context, excerpt: Excerpt) -> None:
    """One page sleeps while another is asked for again and again, by a device that may ask for two."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    process, hva = guest.machine.process, guest.machine.hva_of(AT)

    async def again() -> None:
        await guest.fill(NEXT, 64, PATTERN)
        await guest.discard(NEXT)
        await guest.fill(NEXT, 64, PATTERN)

    for _ in excerpt.rounds():
        async with missing(process, hva) as uffd:
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.fill, AT, 64, PATTERN)
                    await uffd.next_event()
                    nursery.start_soon(again)
                    await trio.sleep(_ASLEEP_S)
                    await uffd.copy(hva, bytes(PAGE_SIZE))
        ctx.expect(await guest.holds(AT, 64, PATTERN), "the device's store is lost")
        await agree(ctx, guest, NEXT)
        await guest.discard(AT, SLOT_BYTES)


async def _leaves_asleep(ctx: Context, excerpt: Excerpt) -> None:
    """A device is detached while a page that it asked for sleeps for userfaultfd; it wants another (R10)."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    second = await guest.plug(1)
    vfio, hwpt_id = second.plugged.vfio, guest.machine.hwpt_id
    process, hva = guest.machine.process, guest.machine.hva_of(AT)
    for _ in excerpt.rounds():
        uffd = await process.userfaultfd()
        await uffd.register(hva, PAGE_SIZE, "missing")
        with excerpt:
            for page in (AT, NEXT):
                post_fill(second, page)
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
    SmallStory(
        "full-move",
        "the queue of page requests overflows beside migrations",
        _beside_a_move,
        MAY_TAKE,
        faults=("full",),
    ),
    SmallStory("beyond", "stores where no memory is", _beyond, options=ALWAYS_ASKS),
    SmallStory(
        "beyond-full",
        "the same, and the queue of page requests overflows",
        _beyond,
        options=ALWAYS_ASKS,
        faults=("full",),
    ),
    SmallStory("few", "more pages than a device may ask for", _few, MAY_TAKE, FEW_REQUESTS),
    SmallStory("detach-asleep", "a device leaves while its pages sleep", _leaves_asleep, MAY_TAKE, TWO),
    SmallStory(
        "detach-few", "the same, and what it wants waits its turn", _leaves_asleep, MAY_TAKE, ASKS_FOR_ONE
    ),
    SmallStory("detach-asks", "a device that can always ask leaves", leaves, MAY_TAKE, ASKS_ALREADY),
    SmallStory(
        "detach-full",
        "the same, and the queue of page requests overflows",
        leaves,
        MAY_TAKE,
        ASKS_ALREADY,
        faults=("full",),
    ),
)
