"""What a process asks for of the memory behind a slot, beside a device's stores: of its mappings, of the file
they show, of who is asked before a store.

A device that stores meanwhile may be refused, where there is no memory for a while.  What it stored behind
the call it did not store to what was there before.
"""

from __future__ import annotations

import trio

from qemu_shim.api import PAGE_SIZE, Context
from qemu_shim.vmm.process import MemFd, Process
from simulator.search.excerpt import Excerpt
from simulator.stories.common import (
    AT,
    MAY_TAKE,
    NEXT,
    PAGES,
    PATTERN,
    SLOT_BYTES,
    agree,
    try_fill,
)
from simulator.stories.slots import move
from simulator.stories.story import SmallStory

LOOKED_AT = 64  # bytes of a page


async def _moves(ctx: Context, excerpt: Excerpt) -> None:
    """mremap takes a page to another address, where nobody stores to it, and there is a new one in its place;
    munmap takes that, and there is another."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    process, hva = guest.machine.process, guest.machine.hva_of(AT)
    room = await process.mmap(PAGE_SIZE)
    for _ in excerpt.rounds():
        await guest.fill(AT, LOOKED_AT)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, AT)
                await process.mremap(hva, PAGE_SIZE, PAGE_SIZE, room)
                moved = await process.read(room, LOOKED_AT)
                await process.mmap(PAGE_SIZE, addr=hva, fixed=True)
        ctx.expect_equal(await process.read(room, LOOKED_AT), moved, "I11: a page that has moved")
        await agree(ctx, guest, AT)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, AT)
                await process.munmap(hva, PAGE_SIZE)
                await process.mmap(PAGE_SIZE, addr=hva, fixed=True)
        await agree(ctx, guest, AT)


async def _protected(ctx: Context, excerpt: Excerpt) -> None:
    """A userfaultfd takes the right to write, and no store is seen until it gives it back."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    process, hva = guest.machine.process, guest.machine.hva_of(AT)
    for _ in excerpt.rounds():
        await guest.fill(AT, LOOKED_AT)
        uffd = await process.userfaultfd()
        await uffd.register(hva, PAGE_SIZE, "wp")
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, AT, LOOKED_AT, PATTERN)
                await uffd.writeprotect(hva, PAGE_SIZE, True)
                seen = await process.read(hva, LOOKED_AT)
                ctx.expect_equal(await process.read(hva, LOOKED_AT), seen, "I21: a page that is protected")
                await uffd.writeprotect(hva, PAGE_SIZE, False)
        ctx.expect(await guest.holds(AT, LOOKED_AT, PATTERN), "a device's store is lost")
        await uffd.unregister(hva, PAGE_SIZE)
        uffd.close()
        await agree(ctx, guest, AT)


async def _free(ctx: Context, excerpt: Excerpt) -> None:
    """MADV_FREE gives a page up until the next store, MADV_PAGEOUT takes it if there was none."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    process, hva = guest.machine.process, guest.machine.hva_of(AT)
    for _ in excerpt.rounds():
        await guest.fill(AT, LOOKED_AT)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, AT, LOOKED_AT, PATTERN)
                await process.madvise(hva, PAGE_SIZE, "free")
                await process.madvise(hva, PAGE_SIZE, "pageout")
        await guest.fill(AT, 8, PATTERN)
        ctx.expect(await guest.holds(AT, 8, PATTERN), "a device's store is lost")
        await agree(ctx, guest, AT)


async def _agrees(ctx: Context, process: Process, hva: int, file: MemFd, offset: int) -> None:
    ctx.expect_equal(
        await process.read(hva, LOOKED_AT),
        await file.pread(offset, LOOKED_AT),
        "I11: what a process has of its file",
    )


async def _shrinks(ctx: Context, excerpt: Excerpt) -> None:
    """The file behind a slot loses a page by ftruncate, and has a new one there; then by MADV_REMOVE."""
    guest = await ctx.boot_for(PAGES)
    slot = await guest.add_slot(SLOT_BYTES, AT)
    process, own = guest.machine.process, slot.hva
    file = await process.memfd("ram", SLOT_BYTES)
    hva = await process.mmap(SLOT_BYTES, kind="file_shared", file=file)
    slot = await move(guest, slot, hva)
    for _ in excerpt.rounds():
        for page in (AT, NEXT):
            await guest.fill(page, LOOKED_AT)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, NEXT)
                await file.truncate(PAGE_SIZE)
                await file.truncate(SLOT_BYTES)
        await _agrees(ctx, process, hva + PAGE_SIZE, file, PAGE_SIZE)
        await agree(ctx, guest, NEXT)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, AT, LOOKED_AT, PATTERN)
                await process.madvise(hva, PAGE_SIZE, "remove")
        await _agrees(ctx, process, hva, file, 0)
        await agree(ctx, guest, AT)
    await move(guest, slot, own)
    file.close()


MAPPINGS = (
    SmallStory("remap", "stores beside mremap, and munmap, of their page", _moves, MAY_TAKE),
    SmallStory("write-protect", "a store beside a userfaultfd's write-protection", _protected, MAY_TAKE),
    SmallStory("free", "a store beside MADV_FREE and MADV_PAGEOUT", _free, MAY_TAKE),
    SmallStory("truncate", "stores beside their file's losing pages", _shrinks, MAY_TAKE),
)
