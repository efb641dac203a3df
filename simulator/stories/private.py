"""Pages that turn private, and shared again, under a device and a CPU (R24)."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import trio

from protocol.uapi import names
from qemu_shim.api import PAGE_SIZE, Context, Refused, UapiError
from qemu_shim.vmm.process import Uffd
from simulator.search.excerpt import Excerpt
from simulator.stories.common import (
    AFTER,
    BEFORE,
    ONE_TABLE,
    OWN_TABLE,
    PAGES,
    agree,
    missing,
    serve_once,
    try_copy,
    try_fill,
)
from simulator.stories.story import SmallStory

_TRIES = 3  # to convert what a device has still


async def _converted(ctx: Context, excerpt: Excerpt) -> None:
    """A page turns private and shared again: a device finds the one or the other, or nothing."""
    wishes = ctx.sized(PAGES)
    wishes["private_block"] = PAGE_SIZE
    guest = await ctx.boot(**wishes)
    page, other = guest.pages(2)
    for _ in excerpt.rounds():
        await guest.write(page, BEFORE)
        await guest.copy(other, page)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_copy, guest, other, page)
                nursery.start_soon(try_fill, guest, page + 64)
                nursery.start_soon(guest.write, page + 8, AFTER)
                await guest.machine.convert(page, PAGE_SIZE, private=True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, page + 64)
                nursery.start_soon(guest.write, page + 8, BEFORE)
                await guest.machine.convert(page, PAGE_SIZE, private=False)
        seen = await guest.read(other, 8)
        ctx.expect(seen in (BEFORE, bytes(8)), f"the copy holds {seen!r}")
        await agree(ctx, guest, page)
        await guest.machine.process.write(guest.machine.hva_of(page), bytes(128))


async def _asleep(ctx: Context, excerpt: Excerpt) -> None:
    """Faults sleep for their shared page while it turns private: what they wake up for is nobody's to map."""
    wishes = ctx.sized(PAGES)
    wishes["private_block"] = PAGE_SIZE
    guest = await ctx.boot(**wishes)
    (page,) = guest.pages(1)
    process, hva = guest.machine.process, guest.machine.hva_of(page)

    async def serve(uffd: Uffd) -> None:
        while True:
            await uffd.next_event()
            await serve_once(uffd, hva, BEFORE)

    for _ in excerpt.rounds():
        await process.madvise_dontneed(hva, PAGE_SIZE)
        async with missing(process, hva) as uffd:
            with excerpt:
                async with trio.open_nursery() as nursery:
                    async with trio.open_nursery() as stores:
                        stores.start_soon(try_fill, guest, page + 64)
                        stores.start_soon(guest.write, page + 8, AFTER)
                        await uffd.next_event()
                        stores.start_soon(partial(guest.machine.convert, page, PAGE_SIZE, private=True))
                        stores.start_soon(serve_once, uffd, hva, BEFORE)
                        nursery.start_soon(serve, uffd)
                    nursery.cancel_scope.cancel()
        await guest.write(page, BEFORE)
        await agree(ctx, guest, page)
        await guest.machine.convert(page, PAGE_SIZE, private=False)
        await agree(ctx, guest, page)


async def _hole(ctx: Context, excerpt: Excerpt) -> None:
    """Private pages go by a hole in their file, under stores to them."""
    wishes = ctx.sized(PAGES)
    wishes["private_block"] = PAGE_SIZE
    guest = await ctx.boot(**wishes)
    (page,) = guest.pages(1)
    await guest.machine.convert(page, PAGE_SIZE, private=True)
    slot = guest.machine.slot_of(page)
    assert slot.attributes is not None
    memfd = slot.attributes.memfd
    for _ in excerpt.rounds():
        await guest.fill(page, 64)
        await guest.write(page, BEFORE)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, page + 64, 64)
                nursery.start_soon(guest.write, page + 8, AFTER)
                await memfd.punch_hole(page - slot.gpa, PAGE_SIZE)
        await agree(ctx, guest, page)


async def _unasked(ctx: Context, excerpt: Excerpt) -> None:
    """A VMM that has not taken the shared page from its device, or puts it back too early (I27)."""
    wishes = ctx.sized(PAGES)
    wishes["private_block"] = PAGE_SIZE
    guest = await ctx.boot(**wishes)
    (page,) = guest.pages(1)
    machine, slot = guest.machine, guest.machine.slot_of(page)
    private, offset = names.KVM_MEMORY_ATTRIBUTE_PRIVATE, page - slot.gpa

    async def becomes(attributes: int, tries: int = 1) -> None:
        for _ in range(tries):
            try:
                await machine.vm.set_memory_attributes(page, PAGE_SIZE, attributes)
            except UapiError as refused:
                ctx.say(str(refused))
            else:
                return

    async def taken_and_given() -> None:
        await machine.container.discard(slot, offset, PAGE_SIZE)
        try:
            await machine.container.populate(slot, offset, PAGE_SIZE)
        except Refused as refused:
            ctx.say(str(refused))

    for _ in excerpt.rounds():
        await guest.fill(page, 64)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(becomes, private, _TRIES)
                nursery.start_soon(try_fill, guest, page)
                await taken_and_given()
        await becomes(0)
        with suppress(UapiError, Refused):  # it is there already
            await machine.container.populate(slot, offset, PAGE_SIZE)
        await agree(ctx, guest, page)


PRIVATE = (
    SmallStory("convert", "accesses beside a page's turning private, and back", _converted),
    SmallStory("convert-asleep", "faults that sleep while their page turns private", _asleep, ONE_TABLE),
    SmallStory("hole", "stores to a private page beside a hole", _hole, ONE_TABLE),
    SmallStory("unasked", "a conversion that nobody told the device's table of", _unasked, OWN_TABLE),
)
