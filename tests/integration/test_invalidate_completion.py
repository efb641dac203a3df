"""A device that completes invalidations of its device TLB late, or never: between real daemons.

The host takes a page away that such a device has in its TLB.  Who answers for the device must not let go of
the page while the device can reach it (I6), and must not hold the host up for ever either.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE, Gpa
from qemu_shim.vmm.machine import connect_host
from tests.integration.test_units import another, queue_of
from tests.kit.daemons import Options, System, eventually, short_directory
from tests.kit.refusals import refused
from tests.kit.vmm import FILLED, Vmm, attach_device, bare_vm, device_stats, nothing_left

NEVER = "--invalidate-completion=never"


@asynccontextmanager
async def attached(
    *silicon: str, planted: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[System, Vmm]]:
    """A VM with device 0 on its HWPT, on silicon of that kind."""
    settings: Options = {"device_sim": silicon}
    with short_directory() as directory:
        made = System(directory, settings, planted)
        try:
            made.start()
            async with connect_host(directory) as host:
                rig = await bare_vm(host)
                await attach_device(rig)
                yield made, rig
                rig.close()
                await nothing_left(host)
            assert set(made.stop().values()) == {0}
        finally:
            made.stop()


async def take_away(rig: Vmm, change: str, page: int) -> None:
    if change == "migrate":
        assert await rig.process.move_pages(rig.hva + page, PAGE_SIZE) == 1
    elif change == "drop":
        await rig.process.madvise_dontneed(rig.hva + page, PAGE_SIZE)
    elif change == "unmap":
        await rig.process.munmap(rig.hva + page, PAGE_SIZE)
    else:
        await rig.vm.set_user_memory_region(0, 0, 0, 0)


async def try_to_write(rig: Vmm, page: Gpa) -> None:
    """Nothing of it arrives, not even a completion record."""
    before = await device_stats(rig.host)

    async def run() -> dict[str, Any]:
        return await device_stats(rig.host)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.fill, page, 0x6666)
        now = await eventually(
            run, lambda stats: stats["work_descriptors"] > before["work_descriptors"], "the device has run it"
        )
        nursery.cancel_scope.cancel()
    assert now["bytes_moved"] == before["bytes_moved"]
    assert now["stale_accesses"] == 0


@pytest.mark.parametrize("change", ["migrate", "drop", "unmap", "slot"])
async def test_a_device_that_never_completes_is_off_the_bus_before_the_page_is_given_up(change: str) -> None:
    async with attached(NEVER) as (made, rig):
        page = rig.memory.allocate(1)
        assert await rig.fill(page) is Status.SUCCESS
        await take_away(rig, change, page)
        await try_to_write(rig, page)
        if change == "migrate":
            assert await rig.seen_by_process(page) == FILLED
        assert "taken off the bus" in made.log("iommufdd")
        assert await rig.host.kvmd.violations() == []
        assert await rig.host.iommufdd.violations() == []
        _, device = rig.bound
        await device.detach()
        with refused(errno.EIO, "off the bus"):
            await device.attach(rig.hwpt_id)


async def test_an_iommufdd_that_takes_a_time_out_for_an_ack_is_caught() -> None:
    """Planted: the device writes to the frame its page no longer has."""
    async with attached(NEVER, planted={"iommufdd": "R18-time-out-is-an-ack"}) as (_, rig):
        page = rig.memory.allocate(1)
        assert await rig.fill(page) is Status.SUCCESS
        await take_away(rig, "migrate", page)
        assert await rig.fill(page, 0x6666) is Status.SUCCESS
        stats = await device_stats(rig.host)
        assert stats["stale_accesses"] > 0
        assert any(note.startswith("I6: pfn") and "written" in note for note in stats["stale_notes"])
        assert await rig.seen_by_process(page) == FILLED


async def test_a_device_that_is_late_is_asked_again_and_goes_on() -> None:
    async with attached("--invalidate-completion=late") as (made, rig):
        page = rig.memory.allocate(1)
        for _ in range(6):
            assert await rig.fill(page) is Status.SUCCESS
            await take_away(rig, "migrate", page)
            assert await rig.seen_by_process(page) == FILLED
        assert (await device_stats(rig.host))["stale_accesses"] == 0
        assert "taken off the bus" not in made.log("iommufdd")


async def test_another_device_of_the_same_hwpt_goes_on() -> None:
    async with attached("--devices", "2", "--device", "0:invalidate-completion=never") as (_, rig):
        second, _ = await another(rig, 1)
        await second.attach(rig.hwpt_id)
        queue = await queue_of(rig, second, 64 * PAGE_SIZE)
        page = rig.memory.allocate(1)
        assert await rig.fill(page) is Status.SUCCESS
        for _ in range(3):
            assert (await queue.fill(page, 0x7777, PAGE_SIZE)).status is Status.SUCCESS
            await take_away(rig, "migrate", page)
        for number in (0, 1):
            assert (await device_stats(rig.host, number))["stale_accesses"] == 0
        assert await rig.host.kvmd.violations() == []
