"""Areas of an IOAS, and slots, by what they show: whose memory, with which rights, which part of it."""

from __future__ import annotations

from contextlib import nullcontext, suppress

import trio

from protocol.uapi import names
from qemu_shim.api import PAGE_SIZE, Context, UapiError
from qemu_shim.vmm.designs import IoasContainer
from qemu_shim.vmm.process import Process
from simulator.search.excerpt import Excerpt
from simulator.stories.common import (
    AFTER,
    AT,
    BEFORE,
    NEXT,
    OWN_TABLE,
    PAGES,
    PATTERN,
    SLOT_BYTES,
    agree,
    check,
    if_it_is_let,
    try_copy,
    try_fill,
)
from simulator.stories.devices import TWO
from simulator.stories.slots import ELSEWHERE
from simulator.stories.story import SmallStory

_SLOT = 8  # a number that the machine does not use
_BEHIND = AT + SLOT_BYTES
_TO_READ = ELSEWHERE + SLOT_BYTES


async def _owners(ctx: Context, excerpt: Excerpt) -> None:
    """A device is to have memory of two processes, at one address in both; on demand it has the VMM's
    alone."""
    guest = await ctx.boot_for(PAGES)
    machine = guest.machine
    assert isinstance(machine.container, IoasContainer)
    iommu, ioas_id, mine = machine.iommu, machine.container.ioas_id, machine.process
    other = await machine.host.kvmd.start_process()
    hva = await mine.mmap(SLOT_BYTES)
    await other.mmap(SLOT_BYTES, addr=hva)
    places = list(zip((AT, ELSEWHERE), (other, mine), (BEFORE, AFTER), guest.pages(2), strict=True))

    async def shown(at: int, process: Process, copied: int) -> None:
        on_demand = not machine.config.design.pins
        with suppress(UapiError) if process is other and on_demand else nullcontext():
            await iommu.ioas_map(ioas_id, process, hva, SLOT_BYTES, at)
            there.append(at)
        await try_copy(guest, copied, at)

    for _ in excerpt.rounds():
        there = list[int]()
        for _, process, said, _ in places:
            for page in (hva, hva + PAGE_SIZE):
                await process.write(page, said)
        with excerpt:
            async with trio.open_nursery() as nursery:
                for at, process, _, copied in places:
                    nursery.start_soon(shown, at, process, copied)
                    nursery.start_soon(process.move_pages, hva, PAGE_SIZE)
        for at, process, said, copied in places:
            if at in there:
                whose = "its VMM" if process is mine else "another process"
                for page in (at, at + PAGE_SIZE):  # the device asks for the second one now
                    await guest.copy(copied, page)
                    seen = await guest.read(copied, len(said))
                    ctx.expect_equal(seen, said, f"I28: what a device reads of {whose}")
                await iommu.ioas_unmap(ioas_id, at, SLOT_BYTES)
    other.close()


async def _read_only(ctx: Context, excerpt: Excerpt) -> None:
    """A device and a CPU store to memory that is shown to be read, by an area or by a slot."""
    guest = await ctx.boot_for(PAGES)
    machine, process, (copied,) = guest.machine, guest.machine.process, guest.pages(1)
    hva = await process.mmap(SLOT_BYTES)

    async def try_write() -> None:
        with suppress(LookupError):  # as where nothing is
            await guest.write(AT + 8, AFTER)

    for _ in excerpt.rounds():
        for page in (hva, hva + PAGE_SIZE):
            await process.write(page, BEFORE)
        if isinstance(machine.container, IoasContainer):
            ioas_id = machine.container.ioas_id
            await machine.iommu.ioas_map(ioas_id, process, hva, SLOT_BYTES, AT, writable=False)
        else:
            await machine.vm.set_user_memory_region(_SLOT, AT, SLOT_BYTES, hva, names.KVM_MEM_READONLY)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, AT)
                nursery.start_soon(try_copy, guest, copied, AT)
                nursery.start_soon(try_write)
                await process.move_pages(hva, PAGE_SIZE)
        ctx.expect_equal(await process.read(hva, 16), BEFORE + bytes(8), "I21: what is shown to be read")
        for page in (AT, NEXT):  # the device asks for the second one now
            await guest.copy(copied, page)
            ctx.expect_equal(await guest.read(copied, 8), BEFORE, "what a device reads there")
        if isinstance(machine.container, IoasContainer):
            await machine.iommu.ioas_unmap(machine.container.ioas_id, AT, SLOT_BYTES)
        else:
            await machine.vm.set_user_memory_region(_SLOT, AT, 0, hva)


async def _copied(ctx: Context, excerpt: Excerpt) -> None:
    """A page from the middle of an area is copied, and two side by side of two areas to another IOAS, where
    another device stores; copies go beside stores by what is left.  What is to be read is not copied to be
    stored to."""
    guest = await ctx.boot_for(PAGES)
    machine, second, rams = guest.machine, await guest.plug(1), list(guest.machine.slots)
    for at in (AT, _BEHIND):
        await guest.add_slot(SLOT_BYTES, at)
    assert isinstance(machine.container, IoasContainer)
    iommu, ioas_id, other_id = machine.iommu, machine.container.ioas_id, await machine.iommu.ioas_alloc()
    for ram in rams:  # for what it tells of its descriptors' ends
        await iommu.ioas_copy(ioas_id, ram.gpa, ram.size, other_id, ram.gpa)
    hwpt_id = await iommu.hwpt_alloc(second.plugged.dev_id, other_id)
    await second.plugged.vfio.attach(hwpt_id)
    to_read = await machine.process.mmap(PAGE_SIZE)
    await iommu.ioas_map(ioas_id, machine.process, to_read, PAGE_SIZE, _TO_READ, writable=False)
    first = guest.devices[0]
    stores = [(first, ELSEWHERE, NEXT, 64), (second, AT, NEXT, 128), (second, NEXT, _BEHIND, 128)]
    for _ in excerpt.rounds():
        for page in (AT, NEXT, _BEHIND):
            await guest.write(page, bytes(256))
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, NEXT, 64, PATTERN)
                nursery.start_soon(iommu.ioas_copy, ioas_id, NEXT, PAGE_SIZE, ioas_id, ELSEWHERE)
                nursery.start_soon(if_it_is_let, iommu.ioas_copy(ioas_id, _TO_READ, PAGE_SIZE, ioas_id))
                await iommu.ioas_copy(ioas_id, NEXT, SLOT_BYTES, other_id, AT)
            async with trio.open_nursery() as nursery:
                for device, at, _, inside in stores:
                    nursery.start_soon(device.fill, at + inside, 64, PATTERN)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, NEXT + 192, 64, PATTERN)
                nursery.start_soon(iommu.ioas_unmap, ioas_id, ELSEWHERE, PAGE_SIZE)
                await iommu.ioas_unmap(other_id, AT, SLOT_BYTES)
            await check(ctx)
        for _, at, shows, inside in stores:
            seen = await guest.read(shows + inside, 8)
            ctx.expect_equal(seen, PATTERN.to_bytes(8, "little"), f"I28: what was stored at {at:#x}")
        ctx.expect_equal(await guest.read(AT, 256), bytes(256), "I28: where nobody stored")
        await agree(ctx, guest, NEXT)
    await second.plugged.vfio.detach()
    for each in (hwpt_id, other_id):
        await iommu.destroy(each)


AREAS = (
    SmallStory("owners", "a device has memory of two processes", _owners, OWN_TABLE),
    SmallStory("read-only", "stores to memory that is shown to be read", _read_only),
    SmallStory("copied", "pages from the middle of areas are copied", _copied, ("pinned",), TWO),
)
