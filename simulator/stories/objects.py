"""HWPTs, iommufds and attachments that are made and unmade at once, in whatever order a VMM asks for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio

from protocol.errors import PeerError
from qemu_shim.api import PAGE_SIZE, Context, Guest, UapiError
from qemu_shim.vmm.designs import IoasContainer
from qemu_shim.vmm.iommufd_client import Iommu
from simulator.search.excerpt import Excerpt
from simulator.stories.common import (
    ASKED,
    AT,
    BEFORE,
    MAY_TAKE,
    NEXT,
    ONE_TABLE,
    OVER_TWO,
    PAGES,
    SLOT_BYTES,
    agree,
    at_last,
    check,
    if_it_is_let,
    post_fill,
    try_fill,
)
from simulator.stories.devices import TWO, second_hwpt
from simulator.stories.machines import NARROW
from simulator.stories.story import SmallStory

MEANWHILE = 4  # looks at iommufdd, which makes and attaches
VAST, VAST_AT = 1 << 44, 1 << 45  # bytes; no page of all that is there before it is touched

OTHERS = ("mirror", "notifier")  # may have several HWPTs of one memory, and pages that come and go

_NEVER = tuple(word for n in (1, 2, 3) for word in ("--device", f"{n}:invalidate-completion=never"))
NONE_COMPLETES = {"device_sim": ("--devices", "4", *_NEVER)}

Make = Callable[[Iommu, int], Awaitable[int]]  # of an iommufd, for a device of it: an HWPT's id


@asynccontextmanager
async def _another_table(guest: Guest) -> AsyncIterator[Make]:
    """Another VM's, which is in one HWPT at a time, or of an IOAS of its own."""
    machine, design = guest.machine, guest.machine.config.design
    if machine.container.tdp_fd is None:

        async def of_an_ioas(iommu: Iommu, dev_id: int) -> int:
            return await iommu.hwpt_alloc(dev_id, await iommu.ioas_alloc(on_demand=not design.pins))

        yield of_an_ioas
        return
    vm = await machine.host.kvmd.create_vm(machine.process)
    vcpu = await vm.create_vcpu(0)
    await vcpu.set_cpuid(NARROW)
    container = await design.open(vm, machine.process)
    tdp_fd = container.tdp_fd
    assert tdp_fd is not None
    try:
        yield lambda iommu, dev_id: iommu.hwpt_alloc_kvm(dev_id, tdp_fd)
    finally:
        container.close()
        vcpu.close()
        vm.close()


async def _hwpts(ctx: Context, excerpt: Excerpt) -> None:
    """HWPTs of one table are asked for while another is destroyed, and a device is put onto it."""
    guest = await ctx.boot_for(PAGES)
    machine, second = guest.machine, await guest.plug(1)
    vfio, dev_id = second.plugged.vfio, second.plugged.dev_id
    await vfio.detach()
    async with _another_table(guest) as kvms:
        make: Callable[[], Awaitable[int]] = partial(kvms, machine.iommu, dev_id)
        if machine.container.tdp_fd is None:
            make = partial(second_hwpt, guest, dev_id)

        async def one() -> None:
            with suppress(UapiError):
                made.append(await make())

        for _ in excerpt.rounds():
            first, made = await at_last(make), list[int]()
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(if_it_is_let, vfio.attach(first))
                    for _ in range(2):
                        nursery.start_soon(one)
                    await if_it_is_let(machine.iommu.destroy(first))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(one)
                    await vfio.detach()
                    for each in (first, *made):
                        await if_it_is_let(machine.iommu.destroy(each))
            for each in made:
                await if_it_is_let(machine.iommu.destroy(each))


async def _by_half(ctx: Context, excerpt: Excerpt) -> None:
    """An HWPT of two areas is made while the memory of the second goes: if there is none, nothing of the
    first stays pinned for it (I26)."""
    guest = await ctx.boot_for(PAGES)
    machine, second = guest.machine, await guest.plug(1)
    iommu, process = machine.iommu, machine.process
    hva = await process.mmap(SLOT_BYTES)
    for _ in excerpt.rounds():
        ioas_id, made = await iommu.ioas_alloc(), list[int]()
        for part in (0, PAGE_SIZE):
            await iommu.ioas_map(ioas_id, process, hva + part, PAGE_SIZE, AT + part)
        await process.write(hva, BEFORE)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(process.munmap, hva + PAGE_SIZE, PAGE_SIZE)
                with suppress(UapiError):
                    made.append(await iommu.hwpt_alloc(second.plugged.dev_id, ioas_id))
        if not made:
            await check(ctx)
            moved = await process.move_pages(hva, PAGE_SIZE)
            ctx.expect_equal(moved, 1, "I26: pages that move, and no HWPT has them")
        for each in (*made, ioas_id):
            await iommu.destroy(each)
        await process.mmap(PAGE_SIZE, addr=hva + PAGE_SIZE, fixed=True)


async def _iommufd_closes(ctx: Context, excerpt: Excerpt) -> None:
    """An iommufd is closed under the making of an HWPT and under the attaching of its device (R13)."""
    guest = await ctx.boot_for(PAGES)
    machine = guest.machine
    async with _another_table(guest) as make:
        for _ in excerpt.rounds():
            vfio = await at_last(partial(machine.host.iommufdd.open_device, 1))
            iommu = await machine.host.iommufdd.open_iommu(machine.process)
            dev_id = await vfio.bind(iommu)
            hwpt_id = await at_last(partial(make, iommu, dev_id))
            if machine.container.tdp_fd is None:
                await vfio.attach(hwpt_id)
            else:  # the table is in one HWPT at a time
                await iommu.destroy(hwpt_id)
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(or_gone, make(iommu, dev_id))
                    for _ in range(2):
                        nursery.start_soon(or_gone, vfio.attach(hwpt_id))
                    await trio.lowlevel.checkpoint()
                    iommu.close()
                    await or_gone(vfio.attach(hwpt_id))
                vfio.close()


async def or_gone(call: Awaitable[object]) -> None:
    """The file may be closed before it is answered."""
    with suppress(UapiError, PeerError):
        await call


async def _comes_and_fades(ctx: Context, excerpt: Excerpt) -> None:
    """Devices that complete no invalidation are attached under migrations (R18)."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    machine = guest.machine
    coming = [await machine.host.iommufdd.open_device(number) for number in (1, 2, 3)]
    for vfio in coming:
        await vfio.bind(machine.iommu)
    for _ in excerpt.rounds():
        await guest.fill(OVER_TWO, 64)
        with excerpt:
            async with trio.open_nursery() as nursery:
                for vfio in coming:
                    nursery.start_soon(if_it_is_let, vfio.attach(machine.hwpt_id))
                nursery.start_soon(guest.migrate, NEXT)
                await guest.migrate(AT)
        await agree(ctx, guest, AT)
        for vfio in coming:
            vfio.close()
        break  # there is no second round: they do not come back


async def _or_back(ctx: Context, excerpt: Excerpt) -> None:
    """A device is to go to another HWPT where all is pinned, which may fail, and its own is destroyed."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    machine, second = guest.machine, await guest.plug(1)
    process, hva, vfio = machine.process, machine.hva_of(AT), second.plugged.vfio
    for _ in excerpt.rounds():
        other_id = await second_hwpt(guest, second.plugged.dev_id)
        await vfio.attach(other_id)
        await second.fill(AT, 64)
        with excerpt:
            post_fill(second, NEXT)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_destroyed_when_it_can_be, machine.iommu, other_id)
                nursery.start_soon(process.mprotect, hva, PAGE_SIZE, "r")
                await if_it_is_let(vfio.attach(machine.hwpt_id, pinned=True))
                nursery.cancel_scope.cancel()
            await process.mprotect(hva, PAGE_SIZE, "rw")
            await second.plugged.portal.drain()
            await agree(ctx, guest, AT, second)
            await vfio.detach()
        await if_it_is_let(machine.iommu.destroy(other_id))
        await vfio.attach(machine.hwpt_id)
        await guest.discard(AT, SLOT_BYTES)


async def _vast(ctx: Context, excerpt: Excerpt) -> None:
    """More of a process's memory than it has pages is taken from a device that uses both ends of it."""
    guest = await ctx.boot_for(PAGES)
    machine, process = guest.machine, guest.machine.process
    assert isinstance(machine.container, IoasContainer)
    iommu, ioas_id = machine.iommu, machine.container.ioas_id
    hva, last = await process.mmap(VAST), VAST_AT + VAST - PAGE_SIZE
    for _ in excerpt.rounds():
        await iommu.ioas_map(ioas_id, process, hva, VAST, VAST_AT)
        for page in (VAST_AT, last):
            await guest.fill(page, 64)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, last)
                nursery.start_soon(process.move_pages, hva, PAGE_SIZE)
                await iommu.ioas_unmap(ioas_id, VAST_AT, VAST)
        for at in (hva, hva + VAST - PAGE_SIZE):
            await process.madvise_dontneed(at, PAGE_SIZE)


async def _kvm_dies(ctx: Context, excerpt: Excerpt) -> None:
    """kvmd dies under stores, under the making of an HWPT, and while a device waits to be attached (R28)."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    machine, second = guest.machine, await guest.plug(1)
    vfio, made = second.plugged.vfio, list[int]()
    async with _another_table(guest) as make:

        async def one() -> None:
            made.append(await make(machine.iommu, second.plugged.dev_id))

        for _ in excerpt.rounds():
            for device in guest.devices:
                await device.fill(AT, 64)
            with excerpt:
                post_fill(guest.devices[0], AT)
                post_fill(second, NEXT)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(or_gone, vfio.detach())
                    for _ in range(2):
                        nursery.start_soon(or_gone, vfio.attach(machine.hwpt_id))
                    nursery.start_soon(or_gone, one())
                    for _ in range(MEANWHILE):
                        await ctx.host.iommufdd.violations()
                    await ctx.kill("kvmd")
                await second.plugged.portal.drain()
            for each in made:
                await machine.iommu.destroy(each)
            break  # there is no second round: nobody starts it again


async def _kvm_dies_idle(ctx: Context, excerpt: Excerpt) -> None:
    """kvmd dies, and an HWPT of its table that no device is on is destroyed meanwhile (R10, R28)."""
    guest = await ctx.boot_for(PAGES)
    iommu, second = guest.machine.iommu, await guest.plug(1)
    async with _another_table(guest) as make:
        for _ in excerpt.rounds():
            hwpt_id = await make(iommu, second.plugged.dev_id)
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ctx.kill, "kvmd")
                    await or_gone(iommu.destroy(hwpt_id))
            break  # there is no second round: nobody starts it again


async def _destroyed_when_it_can_be(iommu: Iommu, hwpt_id: int) -> None:
    """As long as it takes to move a device: a daemon that stands still may take any time."""
    for _ in range(ASKED):
        await if_it_is_let(iommu.destroy(hwpt_id))


OBJECTS = (
    SmallStory("hwpts", "HWPTs of one table are made and destroyed at once", _hwpts, options=TWO),
    SmallStory(
        "iommufd-closes", "an iommufd is closed under what is made of it", _iommufd_closes, options=TWO
    ),
    SmallStory(
        "never-comes",
        "devices that complete no invalidation are attached",
        _comes_and_fades,
        MAY_TAKE,
        NONE_COMPLETES,
    ),
    SmallStory(
        "never-comes-late",
        "the same, and a message is late",
        _comes_and_fades,
        MAY_TAKE,
        NONE_COMPLETES,
        faults=("delay",),
    ),
    SmallStory("hwpt-by-half", "an HWPT of two areas, of which one goes", _by_half, ("pinned",), TWO),
    SmallStory("or-back", "a device that cannot be moved goes back", _or_back, OTHERS, TWO),
    SmallStory("kvm-dies", "kvmd dies beneath devices and what is made", _kvm_dies, MAY_TAKE, TWO),
    SmallStory("kvm-dies-idle", "kvmd dies while an HWPT is destroyed", _kvm_dies_idle, ONE_TABLE, TWO),
    SmallStory("vast", "an area of 16 TiB is unmapped", _vast, OTHERS),
)
