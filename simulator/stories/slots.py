"""A device's access beside a change of the memslots."""

from __future__ import annotations

from dataclasses import replace

import trio

from protocol.uapi import names
from qemu_shim.api import PAGE_SIZE, Context, DmaFailed, Guest, RamSlot
from qemu_shim.vmm.process import Uffd
from simulator.search.excerpt import Excerpt
from simulator.stories.common import (
    AFTER,
    AT,
    BEFORE,
    MAY_TAKE,
    NEXT,
    PAGES,
    PATTERN,
    SLOT_BYTES,
    agree,
    check,
    missing,
    run_store,
    serve_once,
    try_copy,
    try_fill,
)
from simulator.stories.story import Play, SmallStory

ELSEWHERE = AT + 16 * PAGE_SIZE


async def _goes(ctx: Context, excerpt: Excerpt) -> None:
    """A slot is deleted under a device's store: it is stored, or fails, and hurts nobody (R21)."""
    guest = await ctx.boot_for(PAGES)

    async def store() -> None:
        try:
            await guest.fill(AT)
        except DmaFailed:
            ctx.say("the store failed: the slot was gone")

    for _ in excerpt.rounds():
        slot = await guest.add_slot(SLOT_BYTES, AT)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store)
                await guest.remove_slot(slot)


async def move(guest: Guest, slot: RamSlot, hva: int, flags: int = 0) -> RamSlot:
    """The slot is gone, and there again with other memory of the process."""
    machine, moved = guest.machine, replace(slot, hva=hva)
    await machine.container.remove(slot)
    await machine.vm.set_user_memory_region(slot.slot, slot.gpa, 0, 0)
    await machine.container.add(moved)
    await machine.vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, hva, flags)
    machine.slots[machine.slots.index(slot)] = moved
    return moved


async def shift(guest: Guest, slot: RamSlot, gpa: int, flags: int = 0) -> RamSlot:
    """The slot's memory is at another guest address, by one call (KVM_MR_MOVE)."""
    machine, moved = guest.machine, replace(slot, gpa=gpa)
    await machine.container.remove(slot)
    await machine.vm.set_user_memory_region(slot.slot, gpa, slot.size, slot.hva, flags)
    await machine.container.add(moved)
    machine.slots[machine.slots.index(slot)] = moved
    return moved


async def _moves(ctx: Context, excerpt: Excerpt) -> None:
    """A slot gets other memory under stores: those behind it are there alone."""
    guest = await ctx.boot_for(PAGES)
    slot = await guest.add_slot(SLOT_BYTES, AT)
    process, here = guest.machine.process, slot.hva
    there = await process.mmap(SLOT_BYTES)
    for _ in excerpt.rounds():
        await guest.fill(AT, 64)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, AT)
                nursery.start_soon(try_fill, guest, NEXT)
                slot = await move(guest, slot, there)
        await process.write(here, BEFORE)
        await agree(ctx, guest, AT)
        ctx.expect_equal(await process.read(here, 8), BEFORE, "what the slot showed before")
        slot = await move(guest, slot, here)
        for hva in (here, there):
            await process.madvise_dontneed(hva, SLOT_BYTES)


def _asleep(cpl: int = 3, beside: int = 0) -> Play:
    """Faults sleep for userfaultfd while their slot gets other memory, and the same again; stores are
    logged.  `cpl`: of the guest's code, whose accesses KVM makes at 0; `beside`: which of the
    two changes who sleeps is served first."""

    async def play(ctx: Context, excerpt: Excerpt) -> None:
        wishes = ctx.sized(PAGES)
        wishes["vcpus"] = 2
        guest = await ctx.boot(**wishes)
        slot = await guest.add_slot(SLOT_BYTES, AT)
        process, vm, here = guest.machine.process, guest.machine.vm, slot.hva
        there, bitmap = await process.mmap(SLOT_BYTES), await process.mmap(PAGE_SIZE)
        logs = names.KVM_MEM_LOG_DIRTY_PAGES
        await vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, here, logs)

        async def serve(uffd: Uffd) -> None:
            while True:
                await uffd.next_event()
                await serve_once(uffd, here, BEFORE)

        async def store() -> None:
            ran = await run_store(guest, AT + 8, cpl)
            if ran.mmio is not None:
                ctx.say("no slot was there")

        for _ in excerpt.rounds():
            async with missing(process, here) as uffd:
                with excerpt:
                    async with trio.open_nursery() as nursery:
                        async with trio.open_nursery() as stores:
                            stores.start_soon(try_fill, guest, AT)
                            stores.start_soon(store)
                            await uffd.next_event()
                            for number, hva in enumerate((there, here)):
                                if number == beside:
                                    stores.start_soon(serve_once, uffd, here, BEFORE)
                                    nursery.start_soon(serve, uffd)
                                slot = await move(guest, slot, hva, logs)
                        nursery.cancel_scope.cancel()
                await vm.get_dirty_log(slot.slot, bitmap)
            await agree(ctx, guest, AT)
            await vm.get_dirty_log(slot.slot, bitmap)
            for hva in (here, there):
                await process.madvise_dontneed(hva, SLOT_BYTES)

    return play


async def _served_later(ctx: Context, excerpt: Excerpt) -> None:
    """Faults sleep for a VMM that changes other slots before it looks who sleeps: none waits for them."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    process, hva = guest.machine.process, guest.machine.hva_of(AT)
    for _ in excerpt.rounds():
        async with missing(process, hva) as uffd:
            with excerpt:
                async with trio.open_nursery() as stores:
                    stores.start_soon(guest.fill, AT + 64, 64, PATTERN)
                    stores.start_soon(guest.write, AT + 8, AFTER)
                    await guest.remove_slot(await guest.add_slot(SLOT_BYTES, ELSEWHERE))
                    await uffd.next_event()
                    await uffd.copy(hva, BEFORE)
        ctx.expect_equal(await guest.read(AT, 16), BEFORE + AFTER, "the page as it was served, and a store")
        ctx.expect(await guest.holds(AT + 64, 64, PATTERN), "the device's store is lost")
        await agree(ctx, guest, AT)
        await guest.discard(AT, SLOT_BYTES)


async def _another(ctx: Context, excerpt: Excerpt) -> None:
    """While one slot goes, CPUs and a device store to another: no store fails, none is lost (R3, R21)."""
    wishes = ctx.sized(PAGES)
    wishes["vcpus"] = 2
    guest = await ctx.boot(**wishes)
    await guest.add_slot(SLOT_BYTES, ELSEWHERE)
    for _ in excerpt.rounds():
        slot = await guest.add_slot(SLOT_BYTES, AT)
        await guest.write(AT, BEFORE)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, ELSEWHERE, 64, PATTERN)
                nursery.start_soon(
                    guest.cpus[0].access, [(ELSEWHERE + 64, AFTER), (ELSEWHERE + PAGE_SIZE, AFTER)]
                )
                nursery.start_soon(guest.cpus[1].access, [(ELSEWHERE + 72, BEFORE)])
                nursery.start_soon(try_copy, guest, AT, ELSEWHERE)
                await guest.remove_slot(slot)
        ctx.expect(await guest.holds(ELSEWHERE, 64, PATTERN), "the device's store is lost")
        ctx.expect_equal(await guest.read(ELSEWHERE + 64, 16), AFTER + BEFORE, "what the CPUs stored")
        await agree(ctx, guest, ELSEWHERE)
        machine = guest.machine
        if not machine.config.design.pins:
            await guest.discard(ELSEWHERE, SLOT_BYTES)


async def _shifts(ctx: Context, excerpt: Excerpt) -> None:
    """A slot that logs goes to another guest address under stores, where it does not, and comes back."""
    guest = await ctx.boot_for(PAGES)
    slot = await guest.add_slot(SLOT_BYTES, AT)
    machine, logs = guest.machine, names.KVM_MEM_LOG_DIRTY_PAGES
    await machine.vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, slot.hva, logs)
    for _ in excerpt.rounds():
        await guest.fill(AT, 64)
        with excerpt:
            for gpa, flags in ((ELSEWHERE, 0), (AT, logs)):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(try_fill, guest, slot.gpa)
                    nursery.start_soon(_try_write, ctx, guest, slot.gpa + PAGE_SIZE)
                    slot = await shift(guest, slot, gpa, flags)
                await check(ctx)
        await agree(ctx, guest, AT)
        if not machine.config.design.pins:
            await guest.discard(AT, SLOT_BYTES)


async def _try_write(ctx: Context, guest: Guest, gpa: int) -> None:
    try:
        await guest.write(gpa, BEFORE)
    except LookupError:
        ctx.say("no slot was there")


async def _comes(ctx: Context, excerpt: Excerpt) -> None:
    """A slot comes where a CPU and a device find nothing: afterwards both find it."""
    guest = await ctx.boot_for(PAGES)
    for _ in excerpt.rounds():
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_try_write, ctx, guest, AT)
                nursery.start_soon(try_fill, guest, AT)
                slot = await guest.add_slot(SLOT_BYTES, AT)
                await _try_write(ctx, guest, AT)
        await agree(ctx, guest, AT)
        await guest.remove_slot(slot)


SLOTS = (
    SmallStory("slot", "a store beside the deletion of its slot", _goes),
    SmallStory("slot-moves", "stores beside their slot getting other memory", _moves),
    SmallStory("slot-shifts", "stores beside their slot going to another guest address at once", _shifts),
    SmallStory("slot-asleep", "faults that sleep while their slot gets other memory", _asleep(), MAY_TAKE),
    SmallStory("slot-emulated", "the same, a store that KVM makes for the guest", _asleep(cpl=0), MAY_TAKE),
    SmallStory(
        "slot-again", "faults that sleep until their slot gets its own again", _asleep(beside=1), MAY_TAKE
    ),
    SmallStory(
        "slot-first", "faults that sleep until other slots have come and gone", _served_later, MAY_TAKE
    ),
    SmallStory("slot-else", "stores of two vCPUs and a device beside another slot's deletion", _another),
    SmallStory("slot-short", "the same, and there is no memory once", _another, faults=("enomem",)),
    SmallStory("slot-comes", "accesses where nothing is, beside a slot's coming", _comes),
)
