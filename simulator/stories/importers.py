"""Two importers of one TDP FD, of which one acks late, faults in for another, or goes (I11, I13, I15)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress

import trio

from protocol.pt.meta import ExportedTdpMeta
from protocol.uapi import names
from qemu_shim.api import MIB, PAGE_SIZE, Context, Guest, UapiError
from qemu_shim.vmm.daemons import IMPORTERS
from qemu_shim.vmm.process import Process
from simulator.search.excerpt import Excerpt
from simulator.stories.common import (
    AFTER,
    ASKED,
    AT,
    BEFORE,
    NEXT,
    ONE_TABLE,
    PAGES,
    PATTERN,
    SLOT_BYTES,
    agree,
    if_it_is_let,
)
from simulator.stories.machines import NARROW
from simulator.stories.story import SmallStory
from simulator.world.other_driver import OtherDriver
from simulator.world.system import PLACES

OTHER_TABLE = AT + 2 * MIB  # translated by another one than AT
_WALKS_S = 0.001  # behind its driver's end: longer than whoever is busy, if he waits for nothing


def _imports(ctx: Context, tdp_fd: int, name: str) -> Awaitable[OtherDriver]:
    return OtherDriver.of(ctx.host.loop, IMPORTERS.path(PLACES), tdp_fd, name)


@asynccontextmanager
async def _importing(ctx: Context, guest: Guest) -> AsyncIterator[OtherDriver]:
    """Another driver has the guest's table, and acks while it serves."""
    tdp_fd = guest.machine.container.tdp_fd
    assert tdp_fd is not None
    driver = await _imports(ctx, tdp_fd, "other")
    await driver.register(await driver.metadata())
    try:
        yield driver
    finally:
        driver.hang_up()
        driver.let_go()


@asynccontextmanager
async def _serving(driver: OtherDriver) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.serve)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def another_driver(ctx: Context, guest: Guest) -> AsyncIterator[OtherDriver]:
    """It serves all the time."""
    async with _importing(ctx, guest) as driver, _serving(driver):
        yield driver


async def _two(ctx: Context, excerpt: Excerpt) -> None:
    """Pages that both have cached go to other frames beside a device's store."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    async with another_driver(ctx, guest) as driver:
        for _ in excerpt.rounds():
            for page in (AT, NEXT):
                await guest.fill(page, 64)
                driver.look(page)
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.fill, AT, 64, PATTERN)
                    nursery.start_soon(guest.migrate, NEXT)
                    await guest.migrate(AT)
                    driver.look(AT)
                    await guest.migrate(AT)
            ctx.expect(await guest.holds(AT, 64, PATTERN), "the device's store is lost")
            await agree(ctx, guest, AT)
            await guest.discard(AT, SLOT_BYTES)


async def _forks(ctx: Context, excerpt: Excerpt) -> None:
    """A driver faults a page in for the VM's process and for its child, which has another one (B-38)."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    process = guest.machine.process
    async with another_driver(ctx, guest) as driver:
        for _ in excerpt.rounds():
            await guest.write(AT, BEFORE)
            with excerpt:
                child = await process.fork()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.fill, AT, 64, PATTERN)
                    for each in (process, child):
                        nursery.start_soon(_faults_in, driver, each)
                    await guest.migrate(AT)
            ctx.expect(await guest.holds(AT, 64, PATTERN), "the device's store is lost")
            child.close()
            await agree(ctx, guest, AT)
            await guest.discard(AT, SLOT_BYTES)


async def _faults_in(driver: OtherDriver, process: Process) -> None:
    await if_it_is_let(driver.fault_in(AT, process.number))
    driver.look(AT)


async def _slow(ctx: Context, excerpt: Excerpt) -> None:
    """An importer takes its time to forget a page that moves: nobody else waits for it but who needs that."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(SLOT_BYTES, AT)
    async with _importing(ctx, guest) as driver:
        for _ in excerpt.rounds():
            async with _serving(driver):
                await guest.fill(AT, 64)
            driver.look(AT)
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.migrate, AT)
                    await guest.write(NEXT, BEFORE)
                    await guest.fill(NEXT + 64, 64, PATTERN)
                    nursery.start_soon(guest.fill, AT, 64, PATTERN)
                    async with _serving(driver):
                        await guest.migrate(AT)
            ctx.expect(await guest.holds(NEXT + 64, 64, PATTERN), "the device's store is lost")
            async with _serving(driver):
                await agree(ctx, guest, AT)
                await guest.discard(AT, SLOT_BYTES)


async def _huge(ctx: Context, excerpt: Excerpt) -> None:
    """A huge leaf takes the place of a table that both point to, beside other flushes (R5)."""
    guest = await ctx.boot_for(PAGES)
    await guest.add_slot(2 * MIB, AT, 2 * MIB)
    logged = await guest.add_slot(SLOT_BYTES, OTHER_TABLE)
    machine, vm = guest.machine, guest.machine.vm
    hva, bitmap = machine.hva_of(AT), await machine.process.mmap(PAGE_SIZE)
    logs = names.KVM_MEM_LOG_DIRTY_PAGES
    await vm.set_user_memory_region(logged.slot, logged.gpa, logged.size, logged.hva, logs)
    async with another_driver(ctx, guest) as driver:
        for _ in excerpt.rounds():
            await machine.device.pin(AT, PAGE_SIZE)  # by itself, so what is there is a table
            await machine.device.unpin(AT, PAGE_SIZE)
            for page in (AT, OTHER_TABLE):
                await guest.fill(page, 64)
                driver.look(page)
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.fill, AT + 64, 64, PATTERN)
                    nursery.start_soon(guest.fill, NEXT, 64, PATTERN)  # finds nothing there
                    for _ in range(2):
                        await guest.write(OTHER_TABLE, BEFORE)
                        await vm.get_dirty_log(logged.slot, bitmap)
                    driver.look(AT)
            for page in (AT + 64, NEXT):
                ctx.expect(await guest.holds(page, 64, PATTERN), "the device's store is lost")
            await agree(ctx, guest, AT)
            for access in ("r", "rw"):  # nobody has it mapped any more, and it stays where it is
                await machine.process.mprotect(hva, 2 * MIB, access)
            await vm.get_dirty_log(logged.slot, bitmap)


async def _dies(driver: OtherDriver) -> None:
    driver.hang_up()
    await _walks_on(driver, 2)


async def _comes_and_leaves(driver: OtherDriver, meta: ExportedTdpMeta) -> None:
    await driver.register(meta)
    driver.look(NEXT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.unregister)
        await _walks_on(driver, 4)


async def _walks_on(driver: OtherDriver, looks: int) -> None:
    for _ in range(looks):
        await trio.sleep(_WALKS_S)
        for page in (AT, NEXT):
            driver.look(page)
    driver.let_go()


async def _is_late(driver: OtherDriver, meta: ExportedTdpMeta) -> None:
    """It asks until it is refused, and then for more."""
    with suppress(UapiError):
        for _ in range(ASKED):
            await driver.metadata()
            await trio.sleep(_WALKS_S / 2)
    await if_it_is_let(driver.register(meta))
    driver.hang_up()
    driver.let_go()


async def _end(ctx: Context, excerpt: Excerpt) -> None:
    """Of three importers of a VM's table one dies, one comes and leaves, one comes too late."""
    guest = await ctx.boot_for(PAGES)
    machine, process = guest.machine, guest.machine.process
    hva = await process.mmap(SLOT_BYTES)
    for _ in excerpt.rounds():
        vm = await machine.host.kvmd.create_vm(process)
        vcpu = await vm.create_vcpu(0)
        await vcpu.set_cpuid(NARROW)
        await vm.set_user_memory_region(0, AT, SLOT_BYTES, hva)
        container = await machine.config.design.open(vm, process)
        assert container.tdp_fd is not None
        first, second, third = [await _imports(ctx, container.tdp_fd, name) for name in "123"]
        meta = await first.metadata()
        await first.register(meta)
        await vcpu.run([("w", AT, BEFORE), ("w", NEXT, BEFORE)])
        first.look(AT)
        try:
            with excerpt:
                async with trio.open_nursery() as serving:
                    for driver in (first, second):
                        serving.start_soon(driver.serve)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(process.move_pages, hva, PAGE_SIZE)
                        nursery.start_soon(_dies, first)
                        nursery.start_soon(_is_late, third, meta)
                        await trio.lowlevel.checkpoint()
                        container.close()
                        nursery.start_soon(if_it_is_let, _comes_and_leaves(second, meta))
                        await vcpu.run([("w", AT, AFTER)])
                        await process.move_pages(hva, PAGE_SIZE)
                        vm.close()
                        vcpu.close()
                    serving.cancel_scope.cancel()
        finally:
            for driver in (first, second, third):
                driver.hang_up()
                driver.let_go()
        await process.madvise_dontneed(hva, SLOT_BYTES)


IMPORTED = (
    SmallStory("importers", "pages that another driver has cached too move", _two, ONE_TABLE),
    SmallStory("importers-fork", "another driver faults in for two processes", _forks, ONE_TABLE),
    SmallStory("importers-slow", "a page moves, and who has it cached is slow to ack", _slow, ONE_TABLE),
    SmallStory("importers-huge", "a huge leaf comes where both know a table", _huge, ONE_TABLE),
    SmallStory("importers-end", "a VM ends beneath importers that die, leave and come", _end, ONE_TABLE),
)
