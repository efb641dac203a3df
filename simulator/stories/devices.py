"""One device more, or one table more, beside what goes on with the first."""

from __future__ import annotations

import errno

import trio

from qemu_shim.api import Context, DmaDevice, Guest
from qemu_shim.vmm.designs import IoasContainer
from simulator.search.excerpt import Excerpt
from simulator.stories.common import (
    AT,
    BEFORE,
    NEXT,
    OVER_TWO,
    OWN_TABLE,
    PAGES,
    PATTERN,
    SLOT_BYTES,
    agree,
    check,
    post_fill,
)
from simulator.stories.story import SmallStory

TWO = {"device_sim": ("--devices", "2")}
TWO_UNITS = {"device_sim": ("--devices", "2", "--units", "2", "--device", "1:unit=1")}
COMPLETES_LATE = {"device_sim": (*TWO["device_sim"], "--invalidate-completion", "late")}
WHILE_IT_FADES = 3  # looks at iommufdd: two time-outs, and it is being taken off the bus
COMPLETES_NEVER = {"device_sim": ("--devices", "2", "--device", "1:invalidate-completion=never")}


async def _two(guest: Guest) -> DmaDevice:
    """A slot for the story, and the second device."""
    await guest.add_slot(SLOT_BYTES, AT)
    return await guest.plug(1)


async def _both(ctx: Context, excerpt: Excerpt) -> None:
    """Two devices have a page cached that goes to another frame, and then one of them is gone (R8)."""
    guest = await ctx.boot_for(PAGES)
    second = await _two(guest)
    for _ in excerpt.rounds():
        await guest.write(AT, BEFORE)
        for device in guest.devices:
            await device.copy(NEXT, AT)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.copy, NEXT, AT)
                nursery.start_soon(second.fill, AT + 64, 64, PATTERN)
                await guest.migrate(AT)
                await guest.migrate(AT)
        ctx.expect_equal(await guest.read(NEXT, 8), BEFORE, "the copy")
        ctx.expect(await second.holds(AT + 64, 64, PATTERN), "the second device's store is lost")
        for device in guest.devices:
            await agree(ctx, guest, AT, device)


async def leaves(ctx: Context, excerpt: Excerpt) -> None:
    """A device is detached with stores of its under way, which need pages, and comes back (R10, R12)."""
    guest = await ctx.boot_for(PAGES)
    second = await _two(guest)
    vfio, hwpt_id = second.plugged.vfio, guest.machine.hwpt_id
    pins = guest.machine.config.design.pins
    for _ in excerpt.rounds():
        await agree(ctx, guest, NEXT)
        with excerpt:
            post_fill(second, AT)
            post_fill(second, OVER_TWO)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, AT + 64, 64, PATTERN)
                nursery.start_soon(guest.write, NEXT + 64, BEFORE)
                nursery.start_soon(vfio.detach)
                await guest.migrate(AT)
            await second.plugged.portal.drain()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vfio.attach, hwpt_id)
                post_fill(second, NEXT)
                await guest.migrate(NEXT)
        await second.plugged.portal.drain()
        await agree(ctx, guest, AT, second)
        ctx.expect(await guest.holds(AT + 64, 64, PATTERN), "the first device's store is lost")
        if not pins:
            await guest.discard(AT, SLOT_BYTES)


async def second_hwpt(guest: Guest, dev_id: int) -> int:
    """On the same IOAS.  A TDP FD has one HWPT."""
    machine = guest.machine
    assert isinstance(machine.container, IoasContainer)
    return await machine.iommu.hwpt_alloc(dev_id, machine.container.ioas_id)


async def _replaced(ctx: Context, excerpt: Excerpt) -> None:
    """A device goes from one HWPT to another of the same memory beside its stores and a change."""
    guest = await ctx.boot_for(PAGES)
    second = await _two(guest)
    vfio, first_id = second.plugged.vfio, guest.machine.hwpt_id
    other_id = await second_hwpt(guest, second.plugged.dev_id)
    pins = guest.machine.config.design.pins
    for _ in excerpt.rounds():
        await guest.fill(AT, 64)
        await vfio.attach(other_id)
        await second.fill(AT, 64)
        with excerpt:
            post_fill(second, AT)
            post_fill(second, NEXT)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, AT + 64, 64, PATTERN)
                nursery.start_soon(guest.migrate, AT)
                await vfio.attach(first_id)
            await second.plugged.portal.drain()
        ctx.expect(await guest.holds(AT + 64, 64, PATTERN), "the first device's store is lost")
        for device in guest.devices:
            await agree(ctx, guest, AT, device)
        if not pins:
            await guest.discard(AT, SLOT_BYTES)
    await vfio.detach()
    await guest.machine.iommu.destroy(other_id)


async def _fades(ctx: Context, excerpt: Excerpt) -> None:
    """One that never completes an invalidation is taken off the bus, and the other goes on (R18)."""
    guest = await ctx.boot_for(PAGES)
    second = await _two(guest)
    for _ in excerpt.rounds():
        await guest.write(AT, BEFORE)
        for device in guest.devices:
            await device.copy(NEXT, AT)
        with excerpt:
            post_fill(second, AT + 64)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.copy, NEXT, AT)
                nursery.start_soon(guest.migrate, AT)
                for _ in range(WHILE_IT_FADES):
                    await check(ctx)
                await guest.migrate(NEXT)
                post_fill(second, AT + 64)
        ctx.expect_equal(await guest.read(AT, 8), BEFORE, "the page that moved")
        await agree(ctx, guest, AT)
        await second.plugged.vfio.detach()
        await ctx.expect_refused("R18: attaching it again", errno.EIO, "off the bus", _again(guest, second))
        break  # there is no second round: it does not come back


async def _again(guest: Guest, device: DmaDevice) -> None:
    await device.plugged.vfio.attach(guest.machine.hwpt_id)


DEVICES = (
    SmallStory("two-devices", "accesses of two devices beside a migration", _both, options=TWO),
    SmallStory("two-units", "the same behind two units", _both, options=TWO_UNITS),
    SmallStory("late", "the same, where invalidations are completed late", _both, options=COMPLETES_LATE),
    SmallStory("detach", "a device leaves beneath its own stores, and comes back", leaves, options=TWO),
    SmallStory("replace", "a device goes from one HWPT to another", _replaced, OWN_TABLE, TWO),
    SmallStory("never", "a device that completes no invalidation", _fades, options=COMPLETES_NEVER),
)
