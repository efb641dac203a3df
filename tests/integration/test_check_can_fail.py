"""The check of I6 sees a frame touched after it was given up: shown on a kvmd that does not wait for acks.

iommufdd is stopped, so an invalidation cannot reach the device, which holds the translation.  The host
migrates the page; the device writes again.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import trio

from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.machine import connect_host
from tests.kit.daemons import System, eventually, system
from tests.kit.vmm import FILLED, device_stats, rigged

WITHOUT_ACK = {"kvmd": "remote-acks-not-awaited"}


@pytest.fixture(scope="module")
def broken() -> Iterator[System]:
    with system(planted=WITHOUT_ACK) as running:
        yield running


@pytest.fixture(scope="module")
def right() -> Iterator[System]:
    with system() as running:
        yield running


@pytest.mark.parametrize("change", ["migrate", "drop", "unmap"])
async def test_a_kvmd_that_does_not_wait_for_acks_is_caught(broken: System, change: str) -> None:
    async with connect_host(broken.directory) as host, rigged(host) as rig:
        page = rig.memory.allocate(1)
        assert await rig.fill(page) is Status.SUCCESS
        before = await device_stats(host)
        broken.signal("iommufdd", signal.SIGSTOP)
        hva = rig.hva + page
        if change == "migrate":
            assert await rig.process.move_pages(hva, PAGE_SIZE) == 1
        elif change == "drop":
            await rig.process.madvise_dontneed(hva, PAGE_SIZE)
        else:
            await rig.process.munmap(hva, PAGE_SIZE)
        assert await rig.fill(page, 0x6666) is Status.SUCCESS
        stats = await device_stats(host)
        assert stats["stale_accesses"] > before["stale_accesses"]
        assert any(note.startswith("I6: pfn") and "written" in note for note in stats["stale_notes"])
        if change == "migrate":
            assert await rig.seen_by_process(page) == FILLED  # the second write went astray
        broken.signal("iommufdd", signal.SIGCONT)


@pytest.mark.parametrize("change", ["migrate", "drop", "unmap", "slot"])
async def test_the_same_story_with_the_real_kvmd_finds_nothing(right: System, change: str) -> None:
    async with connect_host(right.directory) as host, rigged(host) as rig:
        page = rig.memory.allocate(1)
        assert await rig.fill(page) is Status.SUCCESS
        right.signal("iommufdd", signal.SIGSTOP)
        hva, changed = rig.hva + page, trio.Event()
        flushes = (await host.kvmd.stats())["vms"][0]["remote_tlb_flush"]

        async def take_away() -> None:
            if change == "migrate":
                assert await rig.process.move_pages(hva, PAGE_SIZE) == 1
            elif change == "drop":
                await rig.process.madvise_dontneed(hva, PAGE_SIZE)
            elif change == "unmap":
                await rig.process.munmap(hva, PAGE_SIZE)
            else:
                await rig.vm.set_user_memory_region(0, 0, 0, 0)
            changed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_away)
            await eventually(
                host.kvmd.stats,
                lambda s: s["vms"][0]["remote_tlb_flush"] > flushes,
                "kvmd tells importers",
            )
            frames = (await host.kvmd.stats())["frames"]
            for _ in range(5):
                assert await rig.fill(page, 0x6666) is Status.SUCCESS
            assert not changed.is_set()
            assert (await host.kvmd.stats())["frames"] == frames
            assert (await device_stats(host))["stale_accesses"] == 0
            right.signal("iommufdd", signal.SIGCONT)
        assert (await device_stats(host))["stale_accesses"] == 0
        if change == "migrate":
            assert await rig.seen_by_process(page) == (0x6666).to_bytes(8, "little") * (PAGE_SIZE // 8)
        assert await host.kvmd.violations() == []
