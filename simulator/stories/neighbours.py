"""What else of a process comes and goes beside a guest: another VM, another slot of a guest_memfd, a pin.

The host changes what all of them show, and who is slow to ack gives them time to come between.
"""

from __future__ import annotations

from functools import partial

import trio

from protocol.uapi import names
from qemu_shim.api import PAGE_SIZE, Context, Guest
from qemu_shim.vmm.kvm_client import Vm
from qemu_shim.vmm.vcpu import Vcpu
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
    agree,
    at_last,
    missing,
    try_fill,
)
from simulator.stories.importers import another_driver
from simulator.stories.machines import NARROW
from simulator.stories.objects import or_gone
from simulator.stories.slots import move
from simulator.stories.story import SmallStory

_SLOT = 8  # and the one behind it: numbers that the machine does not use


async def _vm(ctx: Context, excerpt: Excerpt) -> None:
    """Another VM of the process comes beside a hole in what both show, and goes beside looks at what they
    used."""
    guest = await ctx.boot_for(PAGES)
    process = guest.machine.process
    file = await process.memfd("ram", SLOT_BYTES)
    hva = await process.mmap(SLOT_BYTES, kind="file_shared", file=file)
    await move(guest, await guest.add_slot(SLOT_BYTES, AT), hva)
    ctx.uncounted()
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
                    await uffd.next_event()
                    nursery.start_soon(guest.write, AT + 64, AFTER)
                    await ctx.kill("iommufdd")
                    await process.move_pages(hva + PAGE_SIZE, PAGE_SIZE)
                    await at_last(partial(uffd.copy, hva, BEFORE))
        ctx.expect_equal(await process.read(hva + 64, 8), AFTER, "what a CPU stored")
        break  # there is no second round: nobody starts it again


NEIGHBOURS = (
    SmallStory("vm-comes", "another VM of a process beside a hole in what both show", _vm, ONE_TABLE),
    SmallStory("hole-bound", "a slot of a guest_memfd comes beside a hole in it", _bound, ONE_TABLE),
    SmallStory(
        "pin-dies", "a pin that sleeps while its driver dies", _pin_dies, ("mirror", "notifier", *ONE_TABLE)
    ),
)
