"""A device's access beside one thing that the host does to the page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from protocol.units import align_up
from qemu_shim.api import MIB, PAGE_SIZE, Context, Guest
from simulator.search.excerpt import Excerpt
from simulator.stories.common import (
    AFTER,
    AT,
    BEFORE,
    MAY_TAKE,
    NEXT,
    ONE_TABLE,
    PAGES,
    PATTERN,
    SLOT_BYTES,
    agree,
    check,
    come_and_go,
    fill_unrecorded,
    if_it_is_let,
    missing,
    try_fill,
)
from simulator.stories.slots import move
from simulator.stories.story import Play, SmallStory

WIDEST = 48  # bits of an address that four levels translate
HIGH = 1 << WIDEST - 1 | AT  # no canonical address of a CPU

LEAF_BY_LEAF = {"kvmd": ("--zap-batch", "1")}
LOOKS = 2  # at what is mapped, one behind the other: as long as a notifier takes to be told

Change = Callable[[Guest, int], Awaitable[Any]]


def _copy_beside(change: Change, *, may_lose: bool = False) -> Play:
    """A device copies a page that something is done to.  `may_lose`: it may be zeroes behind that."""

    async def play(ctx: Context, excerpt: Excerpt) -> None:
        guest = await ctx.boot_for(PAGES)
        await guest.add_slot(SLOT_BYTES, AT)
        right = (BEFORE, bytes(len(BEFORE))) if may_lose else (BEFORE,)
        for _ in excerpt.rounds():
            await guest.write(AT, BEFORE)
            await guest.copy(NEXT, AT)  # so the device has it cached
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.copy, NEXT, AT)
                    await change(guest, AT)
            seen = await guest.read(NEXT, len(BEFORE))
            ctx.expect(seen in right, f"the copy holds {seen!r}")

    return play


async def _store_beside_discard(ctx: Context, excerpt: Excerpt) -> None:
    """Three times given up beside a device's store, then stored to once more: that must be there."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    for _ in excerpt.rounds():
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, AT)
                for _ in range(3):
                    await guest.discard(AT)
        await guest.fill(AT, pattern=0x5A5A)
        ctx.expect(await guest.holds(AT, PAGE_SIZE, 0x5A5A), "a device's store is lost")
        await guest.discard(AT)


async def _fault_beside_discard(ctx: Context, excerpt: Excerpt) -> None:
    """A device's store to an absent page beside MADV_DONTNEED of it: one fault, one invalidation."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    for _ in excerpt.rounds():
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fill_unrecorded, guest.devices[0], AT)
                await guest.discard(AT)
        await guest.discard(AT)  # if the store was later


def _cpu_beside_device(at: int = AT, maxphyaddr: int = 46, cpu_at: int = 64) -> Play:
    """A vCPU and a device touch one absent page first: both see one page.  `cpu_at`: bytes behind it."""

    async def play(ctx: Context, excerpt: Excerpt) -> None:
        wishes = ctx.sized(PAGES)
        wishes["maxphyaddr"] = maxphyaddr
        guest = await ctx.boot(**wishes)
        await guest.add_slot(SLOT_BYTES, at)
        for _ in excerpt.rounds():
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.fill, at, 64, PATTERN)
                    await guest.write(at + cpu_at, AFTER)
            stored = PATTERN.to_bytes(8, "little")
            ctx.expect_equal(await guest.read(at, 8), stored, "what a CPU sees of the device's store")
            seen = await guest.holds(at + cpu_at, len(AFTER), int.from_bytes(AFTER, "little"))
            ctx.expect(seen, "the device does not see what a CPU stored")
            await guest.discard(at, SLOT_BYTES)

    return play


async def _fork(ctx: Context, excerpt: Excerpt) -> None:
    """What is stored behind a fork is the parent's alone, and what both have is stored to by nobody."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    process, hva = guest.machine.process, guest.machine.hva_of(AT)
    for _ in excerpt.rounds():
        await guest.write(AT, BEFORE.ljust(24, b"\0"))
        await guest.fill(AT + 64, 64)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, AT + 64, 64, PATTERN)
                nursery.start_soon(guest.write, AT + 8, BEFORE)
                child = await process.fork()
        await guest.copy(NEXT, AT)  # so the device may read what it stores to then
        await guest.fill(AT, 8, PATTERN)
        await guest.write(AT + 16, AFTER)
        ctx.expect_equal(await child.read(hva, 8), BEFORE, "I21: what the child has")
        ctx.expect(await child.read(hva + 16, 8) != AFTER, "I21: the child has what its parent stored")
        child.close()
        await agree(ctx, guest, AT)


async def _merge(ctx: Context, excerpt: Excerpt) -> None:
    """Two equal pages become one beside stores to either: none is seen in the other."""
    guest = await ctx.boot_for(PAGES)
    slot = await guest.add_slot(SLOT_BYTES, AT)
    machine = guest.machine
    await machine.process.madvise(slot.hva, slot.size, "mergeable")
    for _ in excerpt.rounds():
        for page in (AT, NEXT):
            await guest.write(page, bytes(128))
            await guest.fill(page + 64, 64)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(machine.process.host_action, "merge", slot.hva, slot.size)
                for _ in range(LOOKS):  # or stores would be there first
                    await machine.process.resident_pages(slot.hva, slot.size)
                nursery.start_soon(guest.fill, AT + 64, 8, PATTERN)
                nursery.start_soon(guest.write, NEXT, BEFORE)
        told = [await guest.read(page, 128) for page in (AT, NEXT)]
        ctx.expect_equal(
            told[0][:8] + told[0][64:72], bytes(8) + PATTERN.to_bytes(8, "little"), "I21: the first page"
        )
        ctx.expect_equal(told[1][:8] + told[1][64:72], BEFORE + bytes(8), "I21: the second page")
        await agree(ctx, guest, AT)


async def _protect(ctx: Context, excerpt: Excerpt) -> None:
    """mprotect takes the right to write and gives it back beside stores, which may fail; what a device may
    read it does not store to."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    process, hva = guest.machine.process, guest.machine.hva_of(AT)
    for _ in excerpt.rounds():
        await guest.fill(AT)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, AT)
                await process.mprotect(hva, PAGE_SIZE, "r")
                await process.mprotect(hva, PAGE_SIZE, "rw")
        await process.mprotect(hva, PAGE_SIZE, "r")
        await guest.copy(NEXT, AT)
        await try_fill(guest, AT)
        await process.mprotect(hva, PAGE_SIZE, "rw")
        await agree(ctx, guest, AT)


async def _huge(ctx: Context, excerpt: Excerpt) -> None:
    """Small pages are put together to a huge one and taken apart again beside copies from them."""
    guest = await ctx.boot_for(PAGES)
    slot = await guest.add_slot(2 * MIB, AT)
    memory = await guest.machine.process.mmap(4 * MIB)
    await move(guest, slot, align_up(memory, 2 * MIB))  # where there is room for a huge page
    for _ in excerpt.rounds():
        await guest.write(AT, BEFORE)
        await guest.migrate(AT)  # alone: the huge page is taken apart, and so is the leaf of whoever has one
        await guest.copy(NEXT, AT)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.copy, NEXT, AT)
                nursery.start_soon(guest.write, AT + 64, AFTER)
                await if_it_is_let(guest.collapse(AT, 2 * MIB))  # of pages that are pinned it is not
                await guest.copy(NEXT, AT)
                await guest.split(AT, 2 * MIB)
        ctx.expect_equal(await guest.read(NEXT, 8), BEFORE, "the copy")
        ctx.expect_equal(await guest.read(AT + 64, 8), AFTER, "a CPU's store")
        await agree(ctx, guest, AT)


async def _two_changes(ctx: Context, excerpt: Excerpt) -> None:
    """The host gives a page up and moves it at once, beside a store: who finds nothing waits all the same."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    for _ in excerpt.rounds():
        await guest.fill(AT, 64)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, AT, 64, PATTERN)
                nursery.start_soon(guest.discard, AT)
                nursery.start_soon(guest.migrate, AT)
                await guest.discard(AT)
        await agree(ctx, guest, AT)
        await guest.discard(AT)


def _all_at_once(more: int) -> Play:
    """Two pages that a device has cached, and some more, move at once, and nothing comes behind that."""

    async def play(ctx: Context, excerpt: Excerpt) -> None:
        guest = await ctx.boot_for(PAGES)
        await guest.add_slot(SLOT_BYTES, AT)
        pages = [AT, NEXT, *guest.pages(more)]
        for _ in excerpt.rounds():
            for page in pages:
                await guest.fill(page, 64)
            with excerpt:
                async with trio.open_nursery() as nursery:
                    for page in pages:
                        nursery.start_soon(guest.migrate, page)
            await agree(ctx, guest, AT)

    return play


async def _fails(ctx: Context, excerpt: Excerpt) -> None:
    """A page's memory fails under stores, which are refused until there is other memory."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    process, hva = guest.machine.process, guest.machine.hva_of(AT)
    for _ in excerpt.rounds():
        await guest.fill(AT, 64)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, AT)
                nursery.start_soon(if_it_is_let, guest.write(AT + 64, AFTER))
                await process.host_action("poison", hva, PAGE_SIZE)
                await check(ctx)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, AT)
                await if_it_is_let(guest.write(AT + 64, AFTER))
        await process.madvise_dontneed(hva, PAGE_SIZE)
        await agree(ctx, guest, AT)
        await guest.discard(AT)


async def _asleep(ctx: Context, excerpt: Excerpt) -> None:
    """Faults of a device and a CPU sleep for userfaultfd, beside changes of what they sleep for."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    process, hva = guest.machine.process, guest.machine.hva_of(AT)

    for _ in excerpt.rounds():
        await guest.fill(NEXT, 64)
        async with missing(process, hva) as uffd:
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(come_and_go, guest, uffd, AT)
                    async with trio.open_nursery() as stores:
                        stores.start_soon(guest.fill, AT + 64, 64, PATTERN)
                        stores.start_soon(guest.write, AT + 8, AFTER)
                    nursery.cancel_scope.cancel()
        await agree(ctx, guest, AT)
        await guest.discard(AT, SLOT_BYTES)


HOST = (
    SmallStory(
        "discard",
        "a copy beside MADV_DONTNEED of its source",
        _copy_beside(Guest.discard, may_lose=True),
        MAY_TAKE,
    ),
    SmallStory("migrate", "a copy beside its source going to another frame", _copy_beside(Guest.migrate)),
    SmallStory("swap", "a copy beside its source going to swap", _copy_beside(Guest.swap_out)),
    SmallStory("hint", "a copy beside its source being made absent, to see", _copy_beside(Guest.numa_hint)),
    SmallStory("age", "a copy beside a look at the accessed bits", _copy_beside(Guest.age)),
    SmallStory(
        "fault", "the first store to a page beside MADV_DONTNEED of it", _fault_beside_discard, MAY_TAKE
    ),
    SmallStory("discards", "a store beside three MADV_DONTNEED", _store_beside_discard, MAY_TAKE),
    SmallStory("two-changes", "a store beside its page's going, and moving, at once", _two_changes, MAY_TAKE),
    SmallStory(
        "batches", "the same, and others have a turn behind each leaf", _two_changes, ONE_TABLE, LEAF_BY_LEAF
    ),
    SmallStory(
        "two-move",
        "two pages move at once, and stores are seen late",
        _all_at_once(0),
        MAY_TAKE,
        faults=("store-buffer:each",),
    ),
    SmallStory("moves", "the same of four", _all_at_once(2), MAY_TAKE, faults=("store-buffer:each",)),
    SmallStory(
        "move-hung",
        "two pages move at once, and two processes hang up on each other",
        _all_at_once(0),
        MAY_TAKE,
        faults=("hangup:each",),
    ),
    SmallStory("poison", "stores beside their page's memory failing", _fails, MAY_TAKE),
    SmallStory("both", "a vCPU and a device touch one page first", _cpu_beside_device(), MAY_TAKE),
    SmallStory(
        "high",
        "pages side by side, where a CPU's own addresses end",
        _cpu_beside_device(HIGH, WIDEST, PAGE_SIZE),
        MAY_TAKE,
        {"kvmd": ("--maxphyaddr", str(WIDEST))},
    ),
    SmallStory("fork", "stores beside fork", _fork),
    SmallStory("merge", "stores to two equal pages beside their becoming one", _merge),
    SmallStory("protect", "a store beside mprotect, there and back", _protect),
    SmallStory("huge", "copies beside pages becoming a huge one and small again", _huge),
    SmallStory("asleep", "faults that wait for userfaultfd beside changes", _asleep, MAY_TAKE),
)
