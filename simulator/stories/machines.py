"""Another VM of the process, and another table for a device: made, used, and gone again beside the rest."""

from __future__ import annotations

import errno
from contextlib import suppress
from functools import partial

import trio

from protocol.uapi import names
from qemu_shim.api import PAGE_SIZE, Context, RamSlot, UapiError
from qemu_shim.vmm.designs import IoasContainer
from qemu_shim.vmm.kvm_client import Vm
from qemu_shim.vmm.vcpu import Vcpu
from simulator.search.excerpt import Excerpt
from simulator.stories.common import (
    AFTER,
    AT,
    BEFORE,
    MAY_TAKE,
    NEXT,
    ONE_TABLE,
    PAGES,
    SLOT_BYTES,
    check,
    holds_at_last,
    post_fill,
)
from simulator.stories.devices import TWO
from simulator.stories.slots import ELSEWHERE
from simulator.stories.story import SmallStory

NARROW, WIDER = 46, 50  # of the second VM's guest; the one takes tables of four levels, the other of five
FIVE_LEVELS = {"kvmd": ("--ept-levels", "5", "--maxphyaddr", "52")}


async def _lend(ctx: Context, excerpt: Excerpt) -> None:
    """A VM is made, lends its table to the second device, and ends, its fds closed in any order."""
    guest = await ctx.boot_for(PAGES)
    second = await guest.plug(1)
    machine, vfio = guest.machine, second.plugged.vfio
    await vfio.detach()
    process = machine.process
    hva = await process.mmap(SLOT_BYTES)
    for _ in excerpt.rounds():
        vm = await machine.host.kvmd.create_vm(process)
        vcpu = await vm.create_vcpu(0)
        await vcpu.set_cpuid(NARROW)
        await vm.set_user_memory_region(0, AT, SLOT_BYTES, hva)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run, [("w", AT, BEFORE)])
                container = await machine.config.design.open(vm, process)
                slot = RamSlot(0, AT, SLOT_BYTES, hva)
                hwpt_id = await container.hwpt(machine.iommu, second.plugged.dev_id, [slot])
                await vfio.attach(hwpt_id)
                post_fill(second, AT + 64)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run, [("w", AT, AFTER), ("w", NEXT, AFTER)])
                nursery.start_soon(process.move_pages, hva, PAGE_SIZE)
                container.close()
                vm.close()
                post_fill(second, NEXT)
                await vfio.detach()
                await machine.iommu.destroy(hwpt_id)
                if isinstance(container, IoasContainer):
                    await machine.iommu.destroy(container.ioas_id)
            vcpu.close()
            await second.plugged.portal.drain()
        await process.madvise_dontneed(hva, SLOT_BYTES)


async def _export(ctx: Context, excerpt: Excerpt) -> None:
    """Two ask for one TDP while a vCPU's store sleeps: one gets it, and gives it back (B-02, B-06)."""
    guest = await ctx.boot_for(PAGES)
    machine = guest.machine
    process, kernel = machine.process, machine.host.loop.kernel
    hva = await process.mmap(SLOT_BYTES)
    argp, bitmap = [await process.mmap(PAGE_SIZE) for _ in range(2)]
    uffd = await process.userfaultfd()

    async def served() -> None:
        for _ in range(2):
            await uffd.next_event()
            await uffd.copy(argp, bytes(PAGE_SIZE))

    try:
        for _ in excerpt.rounds():
            vm = await machine.host.kvmd.create_vm(process)
            vcpu, later = [await vm.create_vcpu(number) for number in range(2)]
            await vcpu.set_cpuid(NARROW)
            await vm.set_user_memory_region(0, AT, SLOT_BYTES, hva, names.KVM_MEM_LOG_DIRTY_PAGES)
            await vcpu.run([("w", NEXT, BEFORE)])
            await vm.get_dirty_log(0, bitmap)  # the next store is noticed by D, while none but CPUs store
            await uffd.register(argp, PAGE_SIZE, "missing")
            got: list[int] = []
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(served)
                    async with trio.open_nursery() as asking:
                        for _ in range(2):
                            asking.start_soon(_try_to_export, vm, argp, got)
                        asking.start_soon(vcpu.run, [("w", AT, BEFORE)])
                    nursery.cancel_scope.cancel()
                ctx.expect_equal(len(got), 1, "I10: TDP FDs of one address space")
                await check(ctx)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_run_wider, later)
                    nursery.start_soon(_snoop_no_more, vm)
                    nursery.start_soon(vcpu.run, [("w", AT, BEFORE)])
                    await vm.set_user_memory_region(1, ELSEWHERE, SLOT_BYTES, hva)
                    for fd in got:
                        kernel.close(fd)
                await _export_at_last(ctx, vm, argp)
                await process.mprotect(argp, PAGE_SIZE, "r")
                untold = await holds_at_last(partial(_is_untold, vm, argp))
                ctx.expect(untold, "R13: a TDP FD that cannot be told was made")
                await process.mprotect(argp, PAGE_SIZE, "rw")
                await _export_at_last(ctx, vm, argp)
            await uffd.unregister(argp, PAGE_SIZE)
            await process.madvise_dontneed(argp, PAGE_SIZE)
            for file in (vm, vcpu, later):
                file.close()
    finally:
        uffd.close()


async def _try_to_export(vm: Vm, argp: int, got: list[int]) -> None:
    with suppress(UapiError):
        got.append(await vm.create_tdp_fd(argp=argp))


async def _export_at_last(ctx: Context, vm: Vm, argp: int) -> None:
    """Whoever had it may be on the way out still."""

    async def exports() -> bool:
        got: list[int] = []
        await _try_to_export(vm, argp, got)
        for fd in got:
            vm.loop.kernel.close(fd)
        return bool(got)

    ctx.expect(await holds_at_last(exports), "R13: the TDP cannot be lent again")


async def _is_untold(vm: Vm, argp: int) -> bool:
    """EBUSY: the one before is on its way out."""
    try:
        vm.loop.kernel.close(await vm.create_tdp_fd(argp=argp))
    except UapiError as error:
        return error.errno == errno.EFAULT
    return False


async def _run_wider(vcpu: Vcpu) -> None:
    """It is refused that width while the TDP is lent: its root would be another (B-28)."""
    with suppress(UapiError):
        await vcpu.set_cpuid(WIDER)
        await vcpu.run([("w", AT, BEFORE)])


async def _snoop_no_more(vm: Vm) -> None:
    """So is a device that does not snoop (B-27)."""
    with suppress(UapiError):
        await vm.ioctl("KVM_REGISTER_NONCOHERENT_DMA")
        await vm.ioctl("KVM_UNREGISTER_NONCOHERENT_DMA")


async def _driver_dies(ctx: Context, excerpt: Excerpt) -> None:
    """iommufdd dies beneath a device's stores and changes of what it was lent; its VMM has let go (R28)."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    device, machine = guest.devices[0], guest.machine
    process, hva = machine.process, machine.hva_of(AT)
    for _ in excerpt.rounds():
        await guest.fill(AT, 64)
        await guest.write(NEXT, BEFORE)
        with excerpt:
            post_fill(device, AT)
            post_fill(device, NEXT)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.write, AT + 64, AFTER)
                nursery.start_soon(process.move_pages, hva, SLOT_BYTES)
                nursery.start_soon(ctx.kill, "iommufdd")
                await process.madvise_dontneed(hva, PAGE_SIZE)
        await guest.write(AT, AFTER)
        ctx.expect_equal(await process.read(hva, 8), AFTER, "what a CPU stores behind the driver's death")
        break  # there is no second round: nobody starts it again


async def _hangs_up(ctx: Context, excerpt: Excerpt) -> None:
    """A channel breaks between two that live, beneath a device's stores, a change and a detach (R28)."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    machine, second = guest.machine, await guest.plug(1)
    process, hva = machine.process, machine.hva_of(AT)
    for _ in excerpt.rounds():
        for device in guest.devices:
            await device.fill(AT, 64)
        with excerpt:
            post_fill(guest.devices[0], AT)
            post_fill(second, NEXT)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.write, AT + 64, AFTER)
                nursery.start_soon(process.move_pages, hva, SLOT_BYTES)
                await second.plugged.vfio.detach()
            await process.madvise_dontneed(hva, PAGE_SIZE)
        await second.plugged.portal.drain()
        await second.plugged.vfio.attach(machine.hwpt_id)
        await process.madvise_dontneed(hva, SLOT_BYTES)


async def _hangs_up_on_one(ctx: Context, excerpt: Excerpt) -> None:
    """The same beneath no more than a page that a device has cached, and a detach of another (R28)."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    machine, second = guest.machine, await guest.plug(1)
    process, hva = machine.process, machine.hva_of(AT)
    for _ in excerpt.rounds():
        await guest.fill(AT, 64)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(process.madvise_dontneed, hva, PAGE_SIZE)
                await second.plugged.vfio.detach()
        await second.plugged.vfio.attach(machine.hwpt_id)


MACHINES = (
    SmallStory("lend", "a VM's table is lent to a device, and both end", _lend, options=TWO),
    SmallStory("lend-dies", "the same, and one of the daemons dies", _lend, options=TWO, faults=("sigkill",)),
    SmallStory(
        "lend-hung", "the same, and two hang up on each other", _lend, options=TWO, faults=("hangup",)
    ),
    SmallStory("lend-short", "the same, and there is no memory once", _lend, options=TWO, faults=("enomem",)),
    SmallStory(
        "hang-up", "two hang up on each other, and live", _hangs_up, MAY_TAKE, TWO, faults=("hangup",)
    ),
    SmallStory(
        "hang-up-on-one",
        "the same, and a page that a device has cached goes",
        _hangs_up_on_one,
        MAY_TAKE,
        TWO,
        faults=("hangup",),
    ),
    SmallStory("driver-dies", "iommufdd dies beneath its device", _driver_dies, MAY_TAKE),
    SmallStory("export", "two ask for the TDP of one VM", _export, ONE_TABLE, FIVE_LEVELS),
)
