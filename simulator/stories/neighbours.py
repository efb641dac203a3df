"""What else of a process comes and goes beside a guest: another VM, another slot of a guest_memfd, pins.

The host changes what all of them show, and who is slow to ack gives them time to come between.
"""

from __future__ import annotations

from functools import partial

import trio

from protocol.uapi import names
from qemu_shim.api import PAGE_SIZE, Context, Guest, UapiError
from qemu_shim.vmm.kvm_client import Vm
from qemu_shim.vmm.vcpu import Vcpu
from simulator.faults.plan import STOPS_S
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
    fill_unrecorded,
    if_it_is_let,
    missing,
    try_fill,
)
from simulator.stories.devices import TWO
from simulator.stories.importers import another_driver
from simulator.stories.machines import NARROW
from simulator.stories.objects import or_gone
from simulator.stories.slots import move
from simulator.stories.story import SmallStory

LOW = 4 * PAGE_SIZE  # in a file, and an address of the process
_HEARD_S = 2 * max(STOPS_S.values())  # of a death, by all, however late the last message before it was
FIVE_PAGES = {"kvmd": ("--memlock", "20K")}  # may be pinned, by all processes of the user
_SLOT = 8  # and the one behind it: numbers that the machine does not use


async def _vm(ctx: Context, excerpt: Excerpt) -> None:
    """Another VM of the process comes beside a hole in what both show, and goes beside looks at what they
    used."""
    guest = await ctx.boot_for(PAGES)
    process = guest.machine.process
    file = await process.memfd("ram", SLOT_BYTES)
    hva = await process.mmap(SLOT_BYTES, kind="file_shared", file=file)
    await move(guest, await guest.add_slot(SLOT_BYTES, AT), hva)
    async with another_driver(ctx, guest) as driver:
        for _ in excerpt.rounds():
            for page in (AT, NEXT):
                await guest.write(page, AFTER)
                await guest.fill(page + 64, 64)
                driver.look(page)
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(file.punch_hole, 0, PAGE_SIZE)
                    nursery.start_soon(guest.fill, NEXT + 64, 64, PATTERN)
                    vm, vcpu = await _another_vm(guest, hva)
                    await vcpu.run([("w", AT, BEFORE), ("w", NEXT, BEFORE)])
                driver.look(AT)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.age, AT, SLOT_BYTES)
                    nursery.start_soon(guest.write, AT, AFTER)
                    vm.close()
                    vcpu.close()
                    await guest.age(AT)
            ctx.expect(await guest.holds(NEXT + 64, 64, PATTERN), "the device's store is lost")
            await agree(ctx, guest, AT)
    file.close()


async def _another_vm(guest: Guest, hva: int) -> tuple[Vm, Vcpu]:
    """Of the guest's process, with the same memory."""
    vm = await guest.machine.host.kvmd.create_vm(guest.machine.process)
    vcpu = await vm.create_vcpu(0)
    await vcpu.set_cpuid(NARROW)
    await vm.set_user_memory_region(0, AT, SLOT_BYTES, hva)
    return vm, vcpu


async def _bound(ctx: Context, excerpt: Excerpt) -> None:
    """A slot comes with pages of a guest_memfd beside a hole over them and over those of another slot."""
    wishes = ctx.sized(PAGES)
    wishes["private_block"] = PAGE_SIZE
    guest = await ctx.boot(**wishes)
    vm, flags = guest.machine.vm, names.KVM_MEM_GUEST_MEMFD
    hva, memfd = await guest.machine.process.mmap(SLOT_BYTES), await vm.create_guest_memfd(SLOT_BYTES)
    await vm.set_user_memory_region2(_SLOT, AT, PAGE_SIZE, hva, flags, guest_memfd=memfd)
    await vm.set_memory_attributes(AT, SLOT_BYTES, names.KVM_MEMORY_ATTRIBUTE_PRIVATE)

    async def comes() -> None:
        there = hva + PAGE_SIZE
        await vm.set_user_memory_region2(
            _SLOT + 1, NEXT, PAGE_SIZE, there, flags, guest_memfd=memfd, guest_memfd_offset=PAGE_SIZE
        )
        await guest.write(NEXT, AFTER)

    async with another_driver(ctx, guest) as driver:
        for _ in excerpt.rounds():
            await guest.write(AT, BEFORE)
            await guest.fill(AT + 64, 64)
            driver.look(AT)
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(comes)
                    nursery.start_soon(try_fill, guest, AT + 64)
                    await memfd.punch_hole(0, SLOT_BYTES)
            for page in (AT, NEXT):
                await agree(ctx, guest, page)
            await vm.set_user_memory_region2(_SLOT + 1, NEXT, 0, 0)
    memfd.close()


async def _pin_dies(ctx: Context, excerpt: Excerpt) -> None:
    """A pin sleeps for its page while iommufdd, which asked for it, dies (R26)."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    process, vfio = guest.machine.process, guest.machine.device
    hva = guest.machine.hva_of(AT)
    for _ in excerpt.rounds():
        await guest.fill(NEXT, 64)
        async with missing(process, hva) as uffd:
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(or_gone, vfio.pin(AT, SLOT_BYTES))
                    nursery.start_soon(guest.write, AT + 64, AFTER)
                    await uffd.next_event()
                    await ctx.kill("iommufdd")
                    await process.move_pages(hva + PAGE_SIZE, PAGE_SIZE)
                    await at_last(partial(uffd.copy, hva, BEFORE))
        ctx.expect_equal(await process.read(hva + 64, 8), AFTER, "what a CPU stored")
        await trio.sleep(_HEARD_S)
        break  # there is no second round: nobody starts it again


async def _by_offset(ctx: Context, excerpt: Excerpt) -> None:
    """Pages of a file turn private that another device has by their offset, beside those at the address of
    that number, which it has not (I27)."""
    wishes = ctx.sized(PAGES)
    wishes["private_block"] = PAGE_SIZE
    guest = await ctx.boot(**wishes)
    machine, second = guest.machine, await guest.plug(1)
    process, iommu, flags = machine.process, machine.iommu, names.KVM_MEM_GUEST_MEMFD
    file = await process.memfd("ram", LOW + PAGE_SIZE)
    hva = await process.mmap(PAGE_SIZE, kind="file_shared", file=file, offset=LOW)
    memfd = await machine.vm.create_guest_memfd(SLOT_BYTES)
    for number, at in enumerate((hva, await process.mmap(PAGE_SIZE, addr=LOW))):
        part = number * PAGE_SIZE
        await machine.vm.set_user_memory_region2(
            _SLOT + number, AT + part, PAGE_SIZE, at, flags, guest_memfd=memfd, guest_memfd_offset=part
        )
    ioas_id = await iommu.ioas_alloc()
    for ram in machine.slots:  # for what it tells of its descriptors' ends
        await iommu.ioas_map(ioas_id, process, ram.hva, ram.size, ram.gpa)
    hwpt_id = await iommu.hwpt_alloc(second.plugged.dev_id, ioas_id)
    await second.plugged.vfio.attach(hwpt_id)
    turns = machine.vm.set_memory_attributes

    async def has() -> None:
        await iommu.ioas_map_file(ioas_id, process, file, LOW, PAGE_SIZE, AT)

    for _ in excerpt.rounds():
        await has()
        await guest.write(AT, BEFORE)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, second, AT)
                nursery.start_soon(if_it_is_let, turns(AT, PAGE_SIZE, names.KVM_MEMORY_ATTRIBUTE_PRIVATE))
                try:
                    await turns(NEXT, PAGE_SIZE, names.KVM_MEMORY_ATTRIBUTE_PRIVATE)
                except UapiError as refused:
                    ctx.expect(False, f"I27: what no device has does not turn private: {refused}")
                await iommu.ioas_unmap(ioas_id, AT, PAGE_SIZE)
                await if_it_is_let(has())
        await turns(AT, SLOT_BYTES, 0)
        await if_it_is_let(has())
        await agree(ctx, guest, AT, second)
        await iommu.ioas_unmap(ioas_id, AT, PAGE_SIZE)
    await second.plugged.vfio.detach()
    for each in (hwpt_id, ioas_id):
        await iommu.destroy(each)
    for each_file in (memfd, file):
        each_file.close()


async def _heir(ctx: Context, excerpt: Excerpt) -> None:
    """Another process takes over what a device has of a file, whoever paid for it, beside the device's
    stores; and when there is not room for all of it, nothing has changed (I6)."""
    guest = await ctx.boot_for(PAGES)
    machine, second = guest.machine, await guest.plug(1)
    process, iommu = machine.process, machine.iommu
    heir, other = [await machine.host.kvmd.start_process() for _ in range(2)]
    file, ioas_id = await process.memfd("ram", 2 * SLOT_BYTES), await iommu.ioas_alloc()
    for _ in excerpt.rounds():
        for payer, part in ((process, 0), (other, PAGE_SIZE)):
            await iommu.ioas_map_file(ioas_id, payer, file, part, PAGE_SIZE, AT + part)
        hwpt_id = await iommu.hwpt_alloc(second.plugged.dev_id, ioas_id)
        await second.plugged.vfio.attach(hwpt_id)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fill_unrecorded, second, AT)
                nursery.start_soon(fill_unrecorded, second, NEXT)
                await iommu.change_process(heir)
        await iommu.ioas_map_file(ioas_id, other, file, SLOT_BYTES, SLOT_BYTES, AT + SLOT_BYTES)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fill_unrecorded, second, AT)
                try:
                    await iommu.change_process(process)
                    ctx.expect(False, "I6: what is taken over is more than may be locked")
                except UapiError as refused:
                    ctx.say(str(refused))
        stored = PATTERN.to_bytes(8, "little")
        ctx.expect_equal(await file.pread(0, 8), stored, "what a device stored")
        await file.pwrite(0, AFTER)
        await second.plugged.vfio.detach()
        await iommu.destroy(hwpt_id)
        await iommu.ioas_unmap(ioas_id, AT, 2 * SLOT_BYTES)
        await iommu.change_process(process)  # and nobody is kept for what he had mapped
    for each_file in (heir, other, file):
        each_file.close()


NEIGHBOURS = (
    SmallStory("vm-comes", "another VM of a process beside a hole in what both show", _vm, ONE_TABLE),
    SmallStory("hole-bound", "a slot of a guest_memfd comes beside a hole in it", _bound, ONE_TABLE),
    SmallStory("pin-dies", "a pin that sleeps while its driver dies", _pin_dies, MAY_TAKE),
    SmallStory(
        "heir", "another process pays for a file's pages, if it may", _heir, ONE_TABLE, {**TWO, **FIVE_PAGES}
    ),
    SmallStory("by-offset", "pages of a file that a device has turn private", _by_offset, options=TWO),
)
