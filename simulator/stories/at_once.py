"""All at once, and nobody answers: stories small enough for every interleaving to be played.

What the device, the CPU and the host are to do is sent, and lies in their channels when the excerpt opens.
Then the VMM rests until nothing can happen any more (`World.settle`): it polls nothing, asks nothing, and no
step of its own comes between.  So what is searched is the three daemons, and the search comes to an end
(`simulator/exhausted.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from qemu_shim.api import PAGE_SIZE, Context, DmaFailed, Guest, RamSlot
from simulator.search.excerpt import Excerpt
from simulator.stories.common import AFTER, AT, MAY_TAKE, PAGES, PATTERN, SLOT_BYTES, agree, check
from simulator.stories.story import Play, SmallStory
from simulator.world.scheduler import World

_CPU_AT = AT + PAGE_SIZE // 2  # of another piece: neither store is in the other's way
_REST_S = 0.1  # longer than anybody polls, shorter than watchdogs go round
_TURNS = 4  # of the VMM's tasks, until each has sent what it has to

Call = Callable[[], Awaitable[Any]]
Change = Callable[[Guest, RamSlot], Awaitable[Any]]


async def at_once(ctx: Context, excerpt: Excerpt, *calls: Call) -> None:
    """Each of `calls` begins with a request that waits for nothing; what follows comes when all is quiet, and
    the daemons have looked at what was left.
    """
    world: Any = ctx.host.loop.kernel
    scheduler = world.host.scheduler
    assert isinstance(scheduler, World), "a story is played in the simulator"
    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(call)
        for _ in range(_TURNS):
            await trio.lowlevel.checkpoint()
        with excerpt:
            scheduler.settle(_REST_S)
    await check(ctx)


def _beside(change: Change, *, cpu: bool, may_lose: bool = False) -> Play:
    """A device stores to a page that something is done to, and so does a CPU; both have it cached."""

    async def play(ctx: Context, excerpt: Excerpt) -> None:
        guest = await ctx.boot_for(PAGES)
        slot = await guest.add_slot(SLOT_BYTES, AT)
        for _ in excerpt.rounds():
            await guest.fill(AT, 64)
            await guest.write(_CPU_AT, bytes(len(AFTER)))
            stores = [partial(guest.fill, AT, 64, PATTERN)]
            if cpu:
                stores.append(partial(guest.write, _CPU_AT, AFTER))
            await at_once(ctx, excerpt, *stores, partial(change, guest, slot))
            lost = (0, bytes(len(AFTER))) if may_lose else ()
            seen = int.from_bytes(await guest.read(AT, 8), "little")
            ctx.expect(seen in (PATTERN, *lost), f"the device's store is lost: {seen:#x}")
            stored = await guest.read(_CPU_AT, len(AFTER))
            ctx.expect(not cpu or stored in (AFTER, *lost), f"the CPU's store is lost: {stored!r}")
            await agree(ctx, guest, AT)

    return play


def _slot_goes(*, cpu: bool) -> Play:
    """The first thing of a slot's deletion beside stores to it: KVM's slot where the table is KVM's, else
    the mapping for the device.
    """

    async def play(ctx: Context, excerpt: Excerpt) -> None:
        guest = await ctx.boot_for(PAGES)
        machine = guest.machine

        async def fill() -> None:
            try:
                await guest.fill(AT, 64, PATTERN)
            except DmaFailed:
                ctx.say("the device's store failed: the slot was gone")

        async def write() -> None:
            try:
                await guest.write(_CPU_AT, AFTER)
            except LookupError:
                ctx.say("the CPU's store was no memory's: the slot was gone")

        for _ in excerpt.rounds():
            slot = await guest.add_slot(SLOT_BYTES, AT)
            await guest.fill(AT, 64)
            await guest.write(_CPU_AT, bytes(len(AFTER)))
            if machine.container.tdp_fd is None:
                goes = partial(machine.container.remove, slot)
            else:
                goes = partial(machine.vm.set_user_memory_region, slot.slot, slot.gpa, 0, 0)
            await at_once(ctx, excerpt, fill, *([write] if cpu else []), goes)
            await machine.container.add(slot)
            await machine.vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, slot.hva)
            await agree(ctx, guest, AT)
            await guest.remove_slot(slot)

    return play


def _discard(guest: Guest, _: RamSlot) -> Awaitable[Any]:
    return guest.discard(AT)


def _migrate(guest: Guest, _: RamSlot) -> Awaitable[Any]:
    return guest.migrate(AT)


def _swap(guest: Guest, _: RamSlot) -> Awaitable[Any]:
    return guest.swap_out(AT)


def _age(guest: Guest, _: RamSlot) -> Awaitable[Any]:
    return guest.age(AT)


AT_ONCE = (
    SmallStory(
        "two-discard", "a store beside MADV_DONTNEED", _beside(_discard, cpu=False, may_lose=True), MAY_TAKE
    ),
    SmallStory("two-migrate", "a store beside its page going to another frame", _beside(_migrate, cpu=False)),
    SmallStory("two-slot", "a store beside the first step of its slot's deletion", _slot_goes(cpu=False)),
    SmallStory(
        "three-discard", "a vCPU's store as well", _beside(_discard, cpu=True, may_lose=True), MAY_TAKE
    ),
    SmallStory("three-migrate", "a vCPU's store as well", _beside(_migrate, cpu=True)),
    SmallStory("three-slot", "a vCPU's store as well", _slot_goes(cpu=True)),
    SmallStory("three-swap", "two stores beside their page going to swap", _beside(_swap, cpu=True)),
    SmallStory("three-age", "two stores beside a look at the accessed bits", _beside(_age, cpu=True)),
)
