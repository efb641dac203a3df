"""Silicon that answers nothing: its pages are kept, and nobody but who wants them waits for it."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.machine import Host, connect_host
from tests.kit.daemons import System, eventually, system
from tests.kit.vmm import FILLED, Vmm, attach_device, bare_vm, device_stats, nothing_left


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
