"""Silicon that answers nothing: its pages are kept, and nobody but who wants them waits for it."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio

from protocol.hw.dsa import Status
from protocol.units import MIB, PAGE_SIZE
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.guest import DmaFailed, Guest
from qemu_shim.scenarios.runner import run_scenario
from qemu_shim.scenarios.scenario import Play, Scenario
from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.machine import Host, connect_host
from tests.kit.daemons import System, eventually, system
from tests.kit.vmm import FILLED, Vmm, attach_device, bare_vm, device_stats, nothing_left

RAM = 64 * MIB


@asynccontextmanager
async def stopped_silicon() -> AsyncIterator[tuple[System, Host, Vmm, int, trio.Event]]:
    """The host takes a page from a device whose silicon is stopped; the event says that it has it."""
    with system() as daemons:
        async with connect_host(daemons.directory) as host, trio.open_nursery() as nursery:
            rig = await bare_vm(host)
            await attach_device(rig)
            page = rig.memory.allocate(1)
            assert await rig.fill(page) is Status.SUCCESS
            taken = trio.Event()

            async def take() -> None:
                assert await rig.process.move_pages(rig.hva + page, PAGE_SIZE) == 1
                taken.set()

            daemons.signal("device_sim", signal.SIGSTOP)
            nursery.start_soon(take)
            await eventually(
                host.kvmd.stats, lambda stats: stats["vms"][0]["pages_4k"] < 2, "kvmd has cleared the entry"
            )
            yield daemons, host, rig, page, taken


async def test_pages_of_silicon_that_is_stopped_are_kept_and_kvm_serves_everybody_else() -> None:
    async with stopped_silicon() as (daemons, host, rig, page, taken):
        kept = (await host.kvmd.stats())["frames"]
        other = await bare_vm(host)
        theirs = other.memory.allocate(2)
        await other.memory.write(theirs, b"a VM without a device")
        assert await other.process.move_pages(other.hva + theirs, PAGE_SIZE) == 1
        assert await other.memory.read(theirs, 7) == b"a VM wi"
        other.close()
        await eventually(host.kvmd.stats, lambda stats: stats["vm_count"] == 1, "the other VM is gone")
        await rig.memory.write(rig.memory.allocate(1), b"another page of the same VM")
        assert (await host.kvmd.stats())["frames"] >= kept, "the page that is taken stays where it is"
        assert await host.kvmd.violations() + await host.iommufdd.violations() == []
        assert not taken.is_set()
        daemons.signal("device_sim", signal.SIGCONT)
        await taken.wait()
        assert await rig.seen_by_process(page) == FILLED
        assert (await device_stats(host))["stale_accesses"] == 0
        rig.close()
        await nothing_left(host)


@pytest.mark.parametrize("dies", ["device_sim", "iommufdd"])
async def test_who_waits_for_it_does_not_wait_for_the_dead(dies: str) -> None:
    """With iommufdd the silicon must let go itself (R28): it goes on to do that."""
    async with stopped_silicon() as (daemons, host, rig, page, taken):
        assert not taken.is_set()
        daemons.kill(dies)
        if dies == "iommufdd":
            daemons.signal("device_sim", signal.SIGCONT)
        await taken.wait()
        assert await rig.seen_by_process(page) == FILLED
        assert await host.kvmd.violations() == []
        rig.close()
        await eventually(
            host.kvmd.stats, lambda s: not (s["vm_count"] or s["frames"] or s["table_pages"]), "all is free"
        )


# -- whatever the design -----------------------------------------------------------------------------------


async def play_on(design: str, daemons: System, play: Play) -> None:
    async with connect_host(daemons.directory) as host:
        run = await run_scenario(host, Scenario("quarantine", "", play), DESIGNS[design])
        assert run.problems == []
        await nothing_left(host)


async def attempt(guest: Guest, gpa: int) -> None:
    """It ends with nothing done, or not at all."""
    with suppress(DmaFailed):
        await guest.fill(gpa)


@pytest.mark.parametrize("design", DESIGNS)
async def test_a_device_that_completes_no_invalidation_is_blocked_and_kvm_goes_on(design: str) -> None:
    """R18 on every design, by what takes memory from each of them: its slot goes."""

    async def play(ctx: Context) -> None:
        guest = await ctx.boot(ram_bytes=RAM)
        slot = await guest.add_slot(MIB)
        await guest.fill(slot.gpa, pattern=7)
        await guest.remove_slot(slot)  # not before the device is off the bus, and not never
        before = await device_stats(ctx.host)
        async with trio.open_nursery() as nursery:
            for gpa in (slot.gpa, *guest.pages(1)):
                nursery.start_soon(attempt, guest, gpa)
            after = await eventually(
                partial(device_stats, ctx.host),
                lambda now: now["work_descriptors"] >= before["work_descriptors"] + 2,
                "the device has run both",
            )
            nursery.cancel_scope.cancel()
        assert after["bytes_moved"] == before["bytes_moved"]
        assert after["stale_accesses"] == 0
        (page,) = guest.pages(1)
        await guest.write(page, b"the vCPU runs on")
        assert await guest.read(page, 3) == b"the"

    with system({"device_sim": ["--invalidate-completion=never"]}) as daemons:
        await play_on(design, daemons, play)
        assert "taken off the bus" in daemons.log("iommufdd")


@pytest.mark.parametrize("design", DESIGNS)
async def test_memory_of_silicon_that_is_stopped_is_kept_on_every_design(design: str) -> None:
    with system() as daemons:

        async def play(ctx: Context) -> None:
            guest = await ctx.boot(ram_bytes=RAM)
            slot = await guest.add_slot(MIB)
            await guest.fill(slot.gpa, pattern=7)
            frames = (await ctx.host.kvmd.stats())["frames"]
            gone = trio.Event()

            async def remove() -> None:
                await guest.remove_slot(slot)
                gone.set()

            async with trio.open_nursery() as nursery:
                daemons.signal("device_sim", signal.SIGSTOP)
                nursery.start_soon(remove)
                other = await bare_vm(ctx.host)
                theirs = other.memory.allocate(1)
                await other.memory.write(theirs, b"a VM without a device")
                other.close()
                await eventually(ctx.host.kvmd.stats, lambda now: now["vm_count"] == 1, "it is gone")
                assert (await ctx.host.kvmd.stats())["frames"] >= frames
                assert not gone.is_set()
                daemons.signal("device_sim", signal.SIGCONT)
            assert (await device_stats(ctx.host))["stale_accesses"] == 0

        await play_on(design, daemons, play)
