"""Stores beside the dirty log: whoever migrates a page by what KVM reports has it as it is (R19)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import trio

from protocol.uapi import names
from qemu_shim.api import MIB, PAGE_SIZE, Context, Guest, Migrator, RamSlot
from qemu_shim.vmm.migrator import MANUAL_PROTECT
from simulator.search.excerpt import Excerpt
from simulator.stories.common import (
    AFTER,
    AT,
    BEFORE,
    NEXT,
    ONE_TABLE,
    PAGES,
    PATTERN,
    SLOT_BYTES,
    check,
    try_fill,
)
from simulator.stories.story import Play, SmallStory

WATCHED = frozenset({0, 1})  # pages of the slot: those that are stored to
RING_BYTES = 16384
CLOCKS = 32  # stored to three times each: more than the 64 entries that KVM keeps of a ring
WITHOUT_PML = {"kvmd": ("--no-pml",)}  # a ring may be as small as a page


@dataclass(slots=True)
class _Target:
    """Where the pages are sent to."""

    guest: Guest
    slot: RamSlot
    migrator: Migrator
    copy: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    async def of(cls, guest: Guest, slot: RamSlot) -> _Target:
        bitmap = await guest.machine.process.mmap(PAGE_SIZE)
        await guest.machine.vm.enable_cap(names.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL_PROTECT)
        return cls(guest, slot, Migrator(guest.machine, slot, bitmap))

    async def log(self, *, on: bool) -> None:
        flags = names.KVM_MEM_LOG_DIRTY_PAGES if on else 0
        slot = self.slot
        await self.guest.machine.vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, slot.hva, flags)

    async def send(self, pages: set[int]) -> None:
        for page in pages & WATCHED:
            self.copy[page] = await self._now(page)

    async def check(self, ctx: Context) -> None:
        """What is reported last is sent, and then all is there."""
        await self.send(await self.migrator.dirty())
        for page in WATCHED:
            now = await self._now(page)
            ctx.expect(self.copy[page] == now, f"I25: page {page} is not at the target as it is here")

    async def _now(self, page: int) -> bytes:
        return await self.guest.machine.process.read(self.slot.hva + page * PAGE_SIZE, PAGE_SIZE)


def _logged(*, ring_bytes: int = 0, page_size: int = PAGE_SIZE) -> Play:
    async def play(ctx: Context, excerpt: Excerpt) -> None:
        wishes = ctx.sized(PAGES)
        wishes["dirty_ring_bytes"] = ring_bytes
        guest = await ctx.boot(**wishes)
        slot = await guest.add_slot(max(SLOT_BYTES, page_size), AT, page_size)
        target = await _Target.of(guest, slot)
        for _ in excerpt.rounds():
            await guest.write(NEXT, BEFORE)
            await guest.fill(AT, 64)
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.fill, AT, 64, PATTERN)
                    nursery.start_soon(guest.write, NEXT, AFTER)
                    await target.log(on=True)
                    await target.send({*WATCHED})
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.fill, NEXT + 64, 64, PATTERN)
                    nursery.start_soon(guest.write, AT + 128, AFTER)
                    await target.send(await target.migrator.dirty())
            await target.check(ctx)
            await guest.fill(AT, 64, PATTERN)
            await guest.write(NEXT, BEFORE)
            await target.check(ctx)
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.fill, AT, 64)
                    nursery.start_soon(guest.write, AT + 128, BEFORE)
                    await target.log(on=False)

    return play


async def _ring_outlives_its_slot(ctx: Context, excerpt: Excerpt) -> None:
    """A slot is made anew, smaller, while pages of it are in the ring: what it has no more is nothing to log,
    and keeps nothing else from being logged.
    """
    wishes = ctx.sized(PAGES)
    wishes["dirty_ring_bytes"] = RING_BYTES
    guest = await ctx.boot(**wishes)
    slot = await guest.add_slot(SLOT_BYTES, AT)
    vm, small = guest.machine.vm, replace(slot, size=PAGE_SIZE)
    target, large = await _Target.of(guest, small), await _Target.of(guest, slot)
    for _ in excerpt.rounds():
        await target.send({*WATCHED})
        await large.log(on=True)
        await guest.write(NEXT, BEFORE)
        await vm.set_user_memory_region(slot.slot, slot.gpa, 0, slot.hva)
        await target.log(on=True)
        await guest.write(AT, BEFORE)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.write, AT + 64, AFTER)
                await target.send(await target.migrator.dirty())
        await target.check(ctx)
        await guest.write(AT + 128, AFTER)
        await target.check(ctx)
        await vm.set_user_memory_region(slot.slot, slot.gpa, 0, slot.hva)
        await large.log(on=False)


async def _ring_runs_over(ctx: Context, excerpt: Excerpt) -> None:
    """Of two vCPUs nobody reads one's ring, which is full.  KVM goes on storing for it, as user space asks
    it to, and these pages are in the bitmap."""
    wishes = ctx.sized(PAGES)
    wishes["vcpus"], wishes["dirty_ring_bytes"] = 2, PAGE_SIZE
    guest = await ctx.boot(**wishes)
    target = await _Target.of(guest, await guest.add_slot(SLOT_BYTES, AT))
    await target.log(on=True)
    machine, vcpu = guest.machine, guest.machine.vcpus[1]
    del machine.rings[1]
    await vcpu.run([("stos", AT, 0, PAGE_SIZE)], 0)  # byte by byte, until the guest may not be entered
    for _ in range(CLOCKS):
        await vcpu.set_msr(names.MSR_KVM_WALL_CLOCK_NEW, AT)
    for _ in excerpt.rounds():
        await guest.fill(AT, 64)
        await target.send({*WATCHED})
        await target.migrator.dirty()
        await target.send({*WATCHED})
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, AT, 64, PATTERN)
                nursery.start_soon(vcpu.set_msr, names.MSR_KVM_WALL_CLOCK_NEW, NEXT)
                await target.send(await target.migrator.dirty())
        await target.check(ctx)
        await guest.write(NEXT + 64, BEFORE)
        await target.check(ctx)


async def _tracked(ctx: Context, excerpt: Excerpt) -> None:
    """KVM has a vCPU's stores to a page emulated while it is tracked, and the log has them all the same."""
    guest = await ctx.boot_for(PAGES)
    slot = await guest.add_slot(SLOT_BYTES, AT)
    target, vm = await _Target.of(guest, slot), guest.machine.vm
    for _ in excerpt.rounds():
        await guest.fill(AT, 64)
        await target.log(on=True)
        await target.send({*WATCHED})
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, AT)
                nursery.start_soon(guest.write, AT + 64, AFTER)
                await vm.page_track_add(AT)
                await target.send(await target.migrator.dirty())
                await guest.write(AT + 128, AFTER)
                await guest.migrate(AT)
                await guest.read(AT, 8)  # comes back as a page to be read
                await check(ctx)
                await try_fill(guest, AT)
        await target.check(ctx)
        await guest.write(AT + 128, BEFORE)
        await target.check(ctx)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.write, AT + 64, BEFORE)
                nursery.start_soon(try_fill, guest, AT)
                await vm.page_track_remove(AT)
        await guest.fill(AT, 64, PATTERN)
        await target.check(ctx)
        await target.log(on=False)


LOGS = (
    SmallStory("log", "stores beside dirty logging by bitmap, from its begin to its end", _logged()),
    SmallStory("ring", "the same, a vCPU's stores by a ring", _logged(ring_bytes=RING_BYTES)),
    SmallStory(
        "ring-shrinks",
        "a slot is made anew, smaller, while its pages are in the ring",
        _ring_outlives_its_slot,
    ),
    SmallStory("log-huge", "the same in a huge page, which is taken apart", _logged(page_size=2 * MIB)),
    SmallStory(
        "log-short", "the same, and there is no memory once", _logged(page_size=2 * MIB), faults=("enomem",)
    ),
    SmallStory(
        "ring-full", "KVM's stores for a vCPU whose ring is full", _ring_runs_over, options=WITHOUT_PML
    ),
    SmallStory("track", "stores to a page that is tracked, and logged", _tracked, ONE_TABLE),
)
