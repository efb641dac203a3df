"""Devices behind units of other makes: each is refused a table that its unit cannot walk, or works on it."""

from __future__ import annotations

import trio

from qemu_shim.api import Context, Guest, UapiError
from simulator.search.excerpt import Excerpt
from simulator.stories.common import AT, MAY_TAKE, ONE_TABLE, PAGES, PATTERN, SLOT_BYTES, agree
from simulator.stories.machines import NARROW, WIDER
from simulator.stories.story import Play, SmallStory

_EACH_BEHIND_ITS_OWN = tuple(word for n in (1, 2, 3) for word in ("--device", f"{n}:unit={n}"))
_FOUR = ("--units", "4", "--devices", "4", *_EACH_BEHIND_ITS_OWN)
LACKING = {
    "device_sim": (
        *(*_FOUR, "--unit", "1:no-walk-coherency"),
        *("--unit", "2:max-page=4K", "--unit", "3:caching-mode"),
    )
}
NARROWER = {
    "kvmd": ("--ept-levels", "5", "--maxphyaddr", "52"),
    "device_sim": (
        *(*_FOUR, "--levels", "5", "--unit", "1:levels=4,mgaw=57"),
        *("--unit", "2:mgaw=48", "--unit", "3:no-snoop-control"),
    ),
}
STORES, MOVES = 4, 3  # one store behind the other, of each of two: one of them may be the one between
ONE_BY_ONE = {"device_sim": ("--descriptors-at-once", "1")}


async def _refetches(ctx: Context, excerpt: Excerpt) -> None:
    """A page moves again and again under a device's stores: between two descriptors of one submission the
    device may ask for what it has just lost (R7).
    """
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)

    async def stores() -> None:
        for _ in range(STORES):
            await guest.fill(AT + 64, 64)

    for _ in excerpt.rounds():
        await guest.fill(AT, 64)
        with excerpt:
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(stores)
                for _ in range(MOVES):
                    await guest.migrate(AT)
        await agree(ctx, guest, AT)


async def _comes_and_goes(ctx: Context, guest: Guest, number: int) -> None:
    """One that works on the guest's table sees what the others see."""
    try:
        plugged = await guest.machine.plug(number)
    except UapiError as refused:
        ctx.say(f"device {number}: {refused}")
    else:
        await guest.machine.unplug(plugged)


def _others(maxphyaddr: int) -> Play:
    """They come beside a store and a migration, one after the other (R15, R16)."""

    async def play(ctx: Context, excerpt: Excerpt) -> None:
        wishes = ctx.sized(PAGES)
        wishes["maxphyaddr"] = maxphyaddr
        guest = await ctx.boot(**wishes)
        await guest.add_slot(SLOT_BYTES, AT)

        async def at_once() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, AT, 64, PATTERN)
                nursery.start_soon(guest.migrate, AT)
                for number in (1, 2, 3):
                    await _comes_and_goes(ctx, guest, number)

        await at_once()  # who comes first finds tables and queues that nobody has used yet
        for _ in excerpt.rounds():
            with excerpt:
                await at_once()
            await agree(ctx, guest, AT)

    return play


OTHER_MAKES = (
    SmallStory("units", "devices behind units that lack something", _others(NARROW), options=LACKING),
    SmallStory("units-narrow", "the same, by the width of addresses", _others(WIDER), ONE_TABLE, NARROWER),
    SmallStory(
        "refetch", "stores beside migrations, one descriptor at a time", _refetches, MAY_TAKE, ONE_BY_ONE
    ),
)
