"""Pages that are pinned for a device, and given up again, beside what the host does to them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from qemu_shim.api import PAGE_SIZE, Context, Guest
from qemu_shim.vmm.designs import IoasContainer
from simulator.search.excerpt import Excerpt
from simulator.stories.common import (
    AFTER,
    AT,
    BEFORE,
    MAY_TAKE,
    NEXT,
    ONE_TABLE,
    OWN_TABLE,
    PAGES,
    PATTERN,
    SLOT_BYTES,
    agree,
    at_last,
    check,
    come_and_go,
    if_it_is_let,
    missing,
    try_fill,
)
from simulator.stories.devices import TWO
from simulator.stories.slots import ELSEWHERE, move
from simulator.stories.story import Play, SmallStory


async def _pin_and_unpin(guest: Guest) -> None:
    vfio = guest.machine.device
    await vfio.pin(AT, PAGE_SIZE)
    await guest.fill(AT + 64, 64, PATTERN)
    await vfio.unpin(AT, PAGE_SIZE)


async def _dropped(guest: Guest) -> None:
    """As any process may, whatever a VMM would refuse."""
    machine = guest.machine
    await machine.process.madvise_dontneed(machine.hva_of(AT), PAGE_SIZE)


async def _migrated(guest: Guest) -> None:
    await guest.migrate(AT)


async def _forked(guest: Guest) -> None:
    child = await guest.machine.process.fork()
    await guest.write(AT + 8, AFTER)
    child.close()


async def _swapped(guest: Guest) -> None:
    await guest.swap_out(AT)


def _pinned_beside(*changes: Callable[[Guest], Awaitable[Any]]) -> Play:
    async def play(ctx: Context, excerpt: Excerpt) -> None:
        guest = await ctx.boot_for(PAGES)
        await guest.add_slot(SLOT_BYTES, AT)
        for _ in excerpt.rounds():
            await guest.write(AT, BEFORE)
            await guest.copy(NEXT, AT)
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_pin_and_unpin, guest)
                    nursery.start_soon(guest.copy, NEXT, AT)
                    for change in changes:
                        await change(guest)
            await agree(ctx, guest, AT)
            await guest.machine.device.pin(AT, PAGE_SIZE)
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.fill, AT, 64, PATTERN)
                    nursery.start_soon(guest.machine.device.unpin, AT, PAGE_SIZE)
                    for change in changes:
                        await change(guest)
            await agree(ctx, guest, AT)
            ctx.expect_equal(await guest.migrate(AT), 1, "I6: pages that move when nobody has one pinned")
            await guest.discard(AT, SLOT_BYTES)

    return play


async def _twice(ctx: Context, excerpt: Excerpt) -> None:
    """Two devices have one page pinned, which the process gives up meanwhile, and unpin it one by one."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    await guest.plug(1)
    for _ in excerpt.rounds():
        await guest.write(AT, BEFORE)
        with excerpt:
            async with trio.open_nursery() as nursery:
                for device in guest.devices:
                    nursery.start_soon(device.plugged.vfio.pin, AT, PAGE_SIZE)
                nursery.start_soon(try_fill, guest, AT + 64)
                await _dropped(guest)
                await guest.write(AT, AFTER)
            await check(ctx)
            async with trio.open_nursery() as nursery:
                for device in guest.devices:
                    nursery.start_soon(device.plugged.vfio.unpin, AT, PAGE_SIZE)
                nursery.start_soon(try_fill, guest, AT + 64)
                await _dropped(guest)
        for device in guest.devices:
            await agree(ctx, guest, AT, device)
        await guest.discard(AT, SLOT_BYTES)


async def _shown_twice(ctx: Context, excerpt: Excerpt) -> None:
    """A device has pages at two places, of which one is taken from it beside stores by the other."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    machine = guest.machine
    assert isinstance(machine.container, IoasContainer)
    ioas_id = machine.container.ioas_id
    for _ in excerpt.rounds():
        await machine.iommu.ioas_copy(ioas_id, AT, SLOT_BYTES, ioas_id, ELSEWHERE)
        await guest.fill(ELSEWHERE, 64)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, AT, 64, PATTERN)
                nursery.start_soon(try_fill, guest, ELSEWHERE + 64)
                nursery.start_soon(guest.migrate, AT)
                await machine.iommu.ioas_unmap(ioas_id, ELSEWHERE, SLOT_BYTES)
                await guest.migrate(AT)
            await check(ctx)
        await agree(ctx, guest, AT)


async def _asleep(ctx: Context, excerpt: Excerpt) -> None:
    """A pin sleeps for its page, which is given and taken meanwhile."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    process, hva = guest.machine.process, guest.machine.hva_of(AT)

    for _ in excerpt.rounds():
        await guest.fill(NEXT, 64)
        async with missing(process, hva) as uffd:
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(come_and_go, guest, uffd, AT)
                    async with trio.open_nursery() as accesses:
                        accesses.start_soon(_pin_and_unpin, guest)
                        accesses.start_soon(guest.write, AT + 8, AFTER)
                    nursery.cancel_scope.cancel()
        await agree(ctx, guest, AT)
        await guest.discard(AT, SLOT_BYTES)


async def _slot_goes(ctx: Context, excerpt: Excerpt) -> None:
    """The slot of a page that is pinned, or being pinned, goes, and the pin alone holds its frame (R21)."""
    guest = await ctx.boot_for(PAGES)
    vfio = guest.machine.device
    for _ in excerpt.rounds():
        slot = await guest.add_slot(SLOT_BYTES, AT)
        await guest.fill(AT, 64)
        await vfio.pin(AT, PAGE_SIZE)
        await _dropped(guest)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(if_it_is_let, vfio.pin(NEXT, PAGE_SIZE))
                nursery.start_soon(try_fill, guest, AT)
                await guest.remove_slot(slot)
        for page in (AT, NEXT):
            await if_it_is_let(vfio.unpin(page, PAGE_SIZE))


async def _slot_moves_asleep(ctx: Context, excerpt: Excerpt) -> None:
    """A pin sleeps for its page while its slot gets other memory (R1)."""
    guest = await ctx.boot_for(PAGES)
    slot = await guest.add_slot(SLOT_BYTES, AT)
    process, vfio, here = guest.machine.process, guest.machine.device, slot.hva
    there = await process.mmap(SLOT_BYTES)

    async def pin(until: trio.CancelScope) -> None:
        await if_it_is_let(vfio.pin(AT, PAGE_SIZE))
        until.cancel()  # where it was refused at once nobody sleeps

    for _ in excerpt.rounds():
        async with missing(process, here) as uffd:
            with excerpt:
                async with trio.open_nursery() as nursery:
                    with trio.CancelScope() as asleep:
                        nursery.start_soon(pin, asleep)
                        await uffd.next_event()
                    nursery.start_soon(at_last, partial(uffd.copy, here, BEFORE))
                    slot = await move(guest, slot, there)
                await check(ctx)
        await if_it_is_let(vfio.unpin(AT, PAGE_SIZE))
        await agree(ctx, guest, AT)
        slot = await move(guest, slot, here)
        for hva in (here, there):
            await process.madvise_dontneed(hva, SLOT_BYTES)


async def _to_be_read(ctx: Context, excerpt: Excerpt) -> None:
    """What a device has pinned to be read alone its process has from before a fork, or never stored to, and
    stores to then (R22)."""
    guest = await ctx.boot_for(PAGES)
    machine = guest.machine
    assert isinstance(machine.container, IoasContainer)
    process, ioas_id = machine.process, machine.container.ioas_id
    copied, hva = guest.pages(1)[0], await process.mmap(SLOT_BYTES)

    async def pinned() -> None:
        await machine.iommu.ioas_map(ioas_id, process, hva, SLOT_BYTES, AT, writable=False)
        if not machine.config.design.pins:
            await machine.device.pin(AT, SLOT_BYTES)

    for _ in excerpt.rounds():
        await process.write(hva, BEFORE)
        child = await process.fork()
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(process.write, hva + 8, AFTER)
                nursery.start_soon(process.move_pages, hva, PAGE_SIZE)
                await pinned()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.copy, copied, NEXT)
                for page in (hva, hva + PAGE_SIZE):
                    await process.write(page, AFTER)
        for page in (AT, NEXT):
            await guest.copy(copied, page)
            ctx.expect_equal(await guest.read(copied, 8), AFTER, "R22: what a device has pinned to read it")
        ctx.expect_equal(await child.read(hva, 8), BEFORE, "I21: what the child has")
        child.close()
        await machine.iommu.ioas_unmap(ioas_id, AT, SLOT_BYTES)
        await process.madvise_dontneed(hva, SLOT_BYTES)


async def _everything(ctx: Context, excerpt: Excerpt) -> None:
    """A device has all memory pinned: that of a slot which comes from the start, none of one that goes."""
    guest = await ctx.boot_for(PAGES)
    machine, second = guest.machine, await guest.plug(1)
    vfio = second.plugged.vfio
    await vfio.detach()
    await vfio.attach(machine.hwpt_id, pinned=True)
    for _ in excerpt.rounds():
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, AT)
                slot = await guest.add_slot(SLOT_BYTES, AT)
                nursery.start_soon(try_fill, second, AT)
                await guest.write(NEXT, BEFORE)
                await guest.migrate(NEXT)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, second, AT)
                nursery.start_soon(if_it_is_let, machine.process.move_pages(slot.hva, PAGE_SIZE))
                await guest.remove_slot(slot)
    await vfio.detach()
    await vfio.attach(machine.hwpt_id)


PINS = (
    SmallStory(
        "pin", "a pin, and its end, beside a migration", _pinned_beside(_migrated, _migrated), MAY_TAKE
    ),
    SmallStory("pin-drop", "a pin beside MADV_DONTNEED", _pinned_beside(_dropped, _dropped), MAY_TAKE),
    SmallStory("pin-fork", "a pin beside fork, and a store behind it", _pinned_beside(_forked), MAY_TAKE),
    SmallStory("pin-swap", "a pin beside swapping out", _pinned_beside(_swapped, _swapped), MAY_TAKE),
    SmallStory("pin-asleep", "a pin that waits for userfaultfd", _asleep, MAY_TAKE),
    SmallStory("pin-moves", "a pin that waits while its slot moves", _slot_moves_asleep, ONE_TABLE),
    SmallStory("pin-twice", "two pins of a page that its process gives up", _twice, MAY_TAKE, TWO),
    SmallStory("shown-twice", "pages at two places, one of which goes", _shown_twice, ("pinned",)),
    SmallStory("pin-read", "pins to read what others have too", _to_be_read, OWN_TABLE),
    SmallStory("pin-all", "a slot comes, and goes, under who pins everything", _everything, ONE_TABLE, TWO),
    SmallStory("pin-slot", "pins beside their slot's deletion", _slot_goes, MAY_TAKE),
)
