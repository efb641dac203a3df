"""What is behind a slot, got at by other ways than the slot's: through its file, by whoever fills what is
missing, at an address where a process has a guest_memfd, in the limit of each process.

A device stores meanwhile.  Whoever looks finds what was stored last, and zeroes where nobody stored.
"""

from __future__ import annotations

from functools import partial

import trio

from protocol.uapi import names
from qemu_shim.api import PAGE_SIZE, Context, UapiError
from qemu_shim.vmm.process import Process
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
    at_last,
    missing,
    try_fill,
)
from simulator.stories.devices import TWO
from simulator.stories.mappings import LOOKED_AT
from simulator.stories.slots import move
from simulator.stories.story import SmallStory

THERE = AT + LOOKED_AT  # where a device stores, and
WRITTEN_AT = 2 * LOOKED_AT  # in the page, a process
STORED = PATTERN.to_bytes(8, "little")
_SLOT = 120


async def _by_file(ctx: Context, excerpt: Excerpt) -> None:
    """A process reads and writes the file behind a slot, while the page moves, and when it is swapped out."""
    guest = await ctx.boot_for(PAGES)
    slot = await guest.add_slot(SLOT_BYTES, AT)
    process, own = guest.machine.process, slot.hva
    file = await process.memfd("ram", SLOT_BYTES)
    slot = await move(guest, slot, await process.mmap(SLOT_BYTES, kind="file_shared", file=file))
    for _ in excerpt.rounds():
        await guest.fill(AT)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, THERE, LOOKED_AT, PATTERN)
                nursery.start_soon(file.pwrite, WRITTEN_AT, AFTER)
                await guest.migrate(AT)
                seen = await file.pread(0, LOOKED_AT)
        ctx.expect_equal(seen, bytes(LOOKED_AT), "I11: what nobody stored to")
        await guest.swap_out(AT)
        found = await file.pread(LOOKED_AT, LOOKED_AT + len(AFTER))
        ctx.expect_equal(found, STORED * (LOOKED_AT // 8) + AFTER, "I11: what a process reads of its file")
        ctx.expect_equal(
            await guest.read(AT + WRITTEN_AT, len(AFTER)), AFTER, "I11: what a process wrote to it"
        )
        await agree(ctx, guest, AT)
    await move(guest, slot, own)
    file.close()


async def _zeroes(ctx: Context, excerpt: Excerpt) -> None:
    """What is missing is filled with zeroes beneath a device's store to one of two pages; who reads the other
    finds zeroes still."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    process, hva = guest.machine.process, guest.machine.hva_of(AT)
    for _ in excerpt.rounds():
        await process.madvise_dontneed(hva, SLOT_BYTES)
        async with missing(process, hva) as uffd:
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.fill, THERE, LOOKED_AT, PATTERN)
                    nursery.start_soon(guest.read, NEXT, len(AFTER))
                    await uffd.next_event()
                    await at_last(partial(uffd.zeropage, hva, PAGE_SIZE))
        ctx.expect(await guest.holds(THERE, LOOKED_AT, PATTERN), "the device's store is lost")
        for zeroes in (AT, NEXT + LOOKED_AT):
            ctx.expect_equal(await guest.read(zeroes, 8), bytes(8), "I21: what nobody stored to")
        await agree(ctx, guest, AT)


async def _mapped(ctx: Context, excerpt: Excerpt) -> None:
    """A process has a slot's guest_memfd at an address, and stores there beside a hole in it."""
    guest = await ctx.boot_for(PAGES)
    machine = guest.machine
    memfd = await machine.vm.create_guest_memfd(
        SLOT_BYTES, names.GUEST_MEMFD_FLAG_MMAP | names.GUEST_MEMFD_FLAG_INIT_SHARED
    )
    hva = await machine.process.mmap(SLOT_BYTES, kind="file_shared", file=memfd)
    await machine.vm.set_user_memory_region2(
        _SLOT, AT, SLOT_BYTES, hva, names.KVM_MEM_GUEST_MEMFD, guest_memfd=memfd
    )
    for _ in excerpt.rounds():
        for page in (AT, NEXT):
            await guest.fill(page)
        await machine.process.write(hva, BEFORE)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, THERE)
                nursery.start_soon(machine.process.write, hva + WRITTEN_AT, AFTER)
                await memfd.punch_hole(0, PAGE_SIZE)
        for at, shown in ((hva, AT), (hva + PAGE_SIZE, NEXT)):
            await agree(ctx, guest, shown)
            seen = await machine.process.read(at, 8)
            ctx.expect_equal(seen, STORED, "I11: what a process has of a guest_memfd")
    await machine.vm.set_user_memory_region2(_SLOT, AT, 0, 0)
    await machine.process.munmap(hva, SLOT_BYTES)
    memfd.close()


async def _payers(ctx: Context, excerpt: Excerpt) -> None:
    """Two processes pay for as much as each may pin, each in its own limit, and for no more (I6)."""
    guest = await ctx.boot_for(PAGES)
    machine = guest.machine
    process, other = machine.process, await machine.host.kvmd.start_process()
    file = await process.memfd("ram", 2 * SLOT_BYTES)
    iommu = await machine.host.iommufdd.open_iommu(process)
    await iommu.set_rlimit_mode("mm")
    vfio = await machine.host.iommufdd.open_device(1)
    ioas_id = await iommu.ioas_alloc()
    hwpt_id = await iommu.hwpt_alloc(await vfio.bind(iommu), ioas_id)
    await vfio.attach(hwpt_id)

    async def pins(payer: Process, part: int) -> None:
        await iommu.ioas_map_file(ioas_id, payer, file, part, SLOT_BYTES, AT + part)

    for _ in excerpt.rounds():
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pins, process, 0)
                await pins(other, SLOT_BYTES)
        for payer in (process, other):
            try:
                await iommu.ioas_map_file(ioas_id, payer, file, 0, SLOT_BYTES, AT + 4 * SLOT_BYTES)
                ctx.expect(False, "I6: what is pinned is more than may be locked")
            except UapiError as refused:
                ctx.say(str(refused))
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(iommu.ioas_unmap, ioas_id, AT, SLOT_BYTES)
                await iommu.ioas_unmap(ioas_id, AT + SLOT_BYTES, SLOT_BYTES)
    await vfio.detach()
    for each in (hwpt_id, ioas_id):
        await iommu.destroy(each)
    for each_file in (vfio, iommu, other, file):
        each_file.close()


CONTENTS = (
    SmallStory("by-file", "pread and pwrite of a slot's file beside its page's moving", _by_file, MAY_TAKE),
    SmallStory("zeroes", "a store beside UFFDIO_ZEROPAGE", _zeroes, MAY_TAKE),
    SmallStory("gmem-mapped", "a hole in a guest_memfd that a process has mapped", _mapped, ONE_TABLE),
    SmallStory(
        "payers",
        "two processes pin to their own limits",
        _payers,
        ONE_TABLE,
        {**TWO, "kvmd": ("--memlock", "12K")},
    ),
)
