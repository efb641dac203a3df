"""Devices on IOASes, real processes: pinned memory, a mirror, a mirror that follows KVM's notes."""

from __future__ import annotations

import errno

import pytest
import trio

from protocol.errors import UapiError
from protocol.hw.dsa import Status
from protocol.units import MIB, PAGE_SIZE
from qemu_shim.vmm.machine import Host, connect_host
from tests.integration.on_ioas import RAM, attach_on_ioas, hwpt_stats, iommu_stats, noted, on_ioas
from tests.kit.daemons import system
from tests.kit.refusals import refused
from tests.kit.vmm import FILLED, GUEST_START, Vmm, device_stats, nothing_left, vm_only

PAGES = RAM // PAGE_SIZE
HUGE = 2 * MIB


async def no_stale_access(host: Host) -> None:
    assert (await device_stats(host))["stale_accesses"] == 0
    assert await host.kvmd.violations() + await host.iommufdd.violations() == []


# -- pinned ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [PAGE_SIZE, HUGE])
async def test_on_pinned_memory_dma_is_right_without_a_single_io_fault(host: Host, page_size: int) -> None:
    async with on_ioas(host, page_size=page_size) as rig:
        assert (await hwpt_stats(host))["leaves"] == [PAGES, 0, 0] if page_size == PAGE_SIZE else [0, 32, 0]
        before = await iommu_stats(host)
        for n in range(8):
            await rig.memory.write(GUEST_START + n * PAGE_SIZE, bytes([n]) * 16)
            assert await rig.fill(GUEST_START + (8 + n) * PAGE_SIZE) is Status.SUCCESS
            copied = await rig.copy(GUEST_START + (16 + n) * PAGE_SIZE, GUEST_START + n * PAGE_SIZE)
            assert copied.status is Status.SUCCESS
            assert await rig.seen_by_process(GUEST_START + (8 + n) * PAGE_SIZE) == FILLED
            assert await rig.seen_by_process(GUEST_START + (16 + n) * PAGE_SIZE, 16) == bytes([n]) * 16
        after = await iommu_stats(host)
        assert (after["page_requests"], after["hmm_invalidations"]) == (
            before["page_requests"],
            before["hmm_invalidations"],
        )
        assert after["pinned_pages"] == PAGES
        await no_stale_access(host)


async def test_pinned_pages_are_not_swapped_moved_or_merged(host: Host) -> None:
    async with on_ioas(host) as rig:
        for action in ("swap_out", "migrate", "merge"):
            assert await rig.process.host_action(action, rig.hva, RAM) == 0
        assert await rig.fill(GUEST_START) is Status.SUCCESS
        assert await rig.seen_by_process(GUEST_START) == FILLED


async def test_what_the_process_unmaps_stays_the_devices_until_it_is_unmapped_there(host: Host) -> None:
    async with on_ioas(host) as rig:
        assert await rig.fill(GUEST_START) is Status.SUCCESS
        await rig.process.munmap(rig.hva + GUEST_START, 16 * PAGE_SIZE)
        assert (await host.kvmd.stats())["frames"] == PAGES
        assert await rig.fill(GUEST_START) is Status.SUCCESS
        assert await rig.bound[0].ioas_unmap(rig.ioas_id, 0, RAM) == RAM
        assert (await host.kvmd.stats())["frames"] == PAGES - 16
        await no_stale_access(host)


async def test_beyond_the_memlock_limit_nothing_is_pinned_or_mapped() -> None:
    with system({"kvmd": ["--memlock", "1M"]}) as limited:
        async with connect_host(limited.directory) as host, vm_only(host, ram=RAM) as rig:
            with refused(errno.ENOMEM):
                await attach_on_ioas(rig)  # areas first: the HWPT cannot be filled
            iommu, device = rig.bound
            assert (await iommu_stats(host))["hwpts"] == []
            ioas = await iommu.ioas_alloc()
            await device.attach(await iommu.hwpt_alloc(rig.device_id, ioas))
            with refused(errno.ENOMEM):
                await iommu.ioas_map(ioas, rig.process, rig.hva, RAM, 0)
            assert (await iommu_stats(host))["pinned_pages"] == 0
            assert (await hwpt_stats(host))["leaves"] == [0, 0, 0]
            await iommu.ioas_map(ioas, rig.process, rig.hva, MIB, 0)
            await no_stale_access(host)


# -- mirror ------------------------------------------------------------------------------------------


async def test_a_mirror_takes_a_fault_of_the_cpu_and_one_of_the_device_for_each_page(host: Host) -> None:
    async with on_ioas(host, on_demand=True) as rig:
        before = await iommu_stats(host)
        for n in range(8):
            await rig.memory.write(GUEST_START + n * PAGE_SIZE, b"first")
        for n in range(8):
            assert await rig.fill(GUEST_START + n * PAGE_SIZE) is Status.SUCCESS
            assert await rig.fill(GUEST_START + n * PAGE_SIZE) is Status.SUCCESS
        hwpt = await hwpt_stats(host)
        records = hwpt["leaves"][0] - 8  # pages of completion records
        assert hwpt["faults"] == {"SUCCESS": 8 + records}
        assert (await iommu_stats(host))["responses"] - before["responses"] == 8 + records
        vm = (await host.kvmd.stats())["vms"][0]
        assert vm["pages_4k"] == 8
        assert (await iommu_stats(host))["pinned_pages"] == 0
        await no_stale_access(host)


async def test_what_the_host_takes_the_device_asks_for_again_and_gets_what_is_there_now(host: Host) -> None:
    async with on_ioas(host, on_demand=True) as rig:
        at, size = rig.hva + GUEST_START, 16 * PAGE_SIZE
        for change in ("dontneed", "migrate", "swap_out"):
            for n in range(16):
                assert await rig.fill(GUEST_START + n * PAGE_SIZE) is Status.SUCCESS
            before = await hwpt_stats(host)
            if change == "dontneed":
                await rig.process.madvise_dontneed(at, size)
            else:
                assert await rig.process.host_action(change, at, size) == 16
            gone = await hwpt_stats(host)
            assert before["leaves"][0] - gone["leaves"][0] == 16, change
            assert gone["iotlb_syncs"] == gone["acked"] > before["iotlb_syncs"]
            copied = await rig.copy(GUEST_START + 17 * PAGE_SIZE, GUEST_START)
            assert copied.status is Status.SUCCESS
            expected = bytes(PAGE_SIZE) if change == "dontneed" else FILLED
            assert await rig.seen_by_process(GUEST_START + 17 * PAGE_SIZE) == expected, change
        assert (await iommu_stats(host))["io_faults_major"] >= 1
        await no_stale_access(host)


async def test_an_unmapped_process_page_is_invalid_for_the_device(host: Host) -> None:
    async with on_ioas(host, on_demand=True) as rig:
        assert await rig.fill(GUEST_START) is Status.SUCCESS
        await rig.process.munmap(rig.hva + GUEST_START, PAGE_SIZE)
        assert await rig.fill(GUEST_START) is not Status.SUCCESS
        assert await rig.fill(GUEST_START + PAGE_SIZE) is Status.SUCCESS
        assert await rig.fill(RAM) is not Status.SUCCESS  # in no area
        assert (await hwpt_stats(host))["faults"]["INVALID"] == 2
        await no_stale_access(host)


async def test_huge_pages_that_split_and_collapse_under_dma_are_never_stale(host: Host) -> None:
    """Leaves follow the host's pages both ways; every byte is compared while the host is at it."""
    async with on_ioas(host, on_demand=True) as rig:
        at, size = rig.hva + GUEST_START, 2 * HUGE
        await rig.process.madvise(at, size, "hugepage")
        await rig.process.write(at, bytes(range(256)) * 16)
        await rig.process.write(at + HUGE, bytes(8))
        done = False

        async def split_and_collapse() -> None:
            nonlocal done
            for _ in range(12):
                await rig.process.host_action("split", at, HUGE)
                await rig.process.madvise_dontneed(at + 100 * PAGE_SIZE, PAGE_SIZE)
                await rig.process.host_action("collapse", at, HUGE)
            done = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(split_and_collapse)
            copies = 0
            while not done or copies < 20:
                target = GUEST_START + HUGE + (copies % 500) * PAGE_SIZE
                assert (await rig.copy(target, GUEST_START)).status is Status.SUCCESS
                assert await rig.seen_by_process(target) == bytes(range(256)) * 16
                copies += 1
        assert (await rig.copy(GUEST_START + HUGE, GUEST_START)).status is Status.SUCCESS
        assert (await hwpt_stats(host))["leaves"][1] >= 1
        await no_stale_access(host)


async def test_an_area_that_is_unmapped_is_out_of_reach_at_once(host: Host) -> None:
    async with on_ioas(host, on_demand=True) as rig:
        assert await rig.fill(GUEST_START) is Status.SUCCESS
        assert await rig.bound[0].ioas_unmap(rig.ioas_id, 0, RAM) == RAM
        assert (await hwpt_stats(host))["leaves"] == [0, 0, 0]
        await rig.process.madvise_dontneed(rig.hva, RAM)
        assert (await host.kvmd.stats())["frames"] == 0
        await no_stale_access(host)


async def test_a_device_that_cannot_fault_works_on_a_mirror_with_all_of_it_pinned() -> None:
    options = ["--device", "0:fault-capability=none"]
    with system({"device_sim": options}) as weak:
        async with connect_host(weak.directory) as host:
            async with vm_only(host, ram=RAM) as rig:
                with refused(errno.EINVAL, "pinned"):
                    await attach_on_ioas(rig, on_demand=True)
            async with on_ioas(host, on_demand=True, pinned=True) as rig:
                assert (await iommu_stats(host))["pinned_pages"] == PAGES
                assert await rig.fill(GUEST_START) is Status.SUCCESS
                assert await rig.process.host_action("migrate", rig.hva, RAM) == 0
                await rig.process.madvise_dontneed(rig.hva + GUEST_START, RAM - GUEST_START)
                assert await rig.fill(GUEST_START) is Status.SUCCESS
                await rig.bound[1].detach()
                assert (await iommu_stats(host))["pinned_pages"] == 0
            await nothing_left(host)


async def test_a_pinned_range_of_a_mirror_never_asks_again(host: Host) -> None:
    async with on_ioas(host, on_demand=True) as rig:
        device = rig.bound[1]
        await device.pin(GUEST_START, 4 * PAGE_SIZE)
        await rig.fill(GUEST_START + 8 * PAGE_SIZE)  # and its completion record's page
        before = (await iommu_stats(host))["page_requests"]
        await rig.process.madvise_dontneed(rig.hva + GUEST_START, 4 * PAGE_SIZE)
        for n in range(4):
            assert await rig.fill(GUEST_START + n * PAGE_SIZE) is Status.SUCCESS
        assert (await iommu_stats(host))["page_requests"] == before
        await device.unpin(GUEST_START, 4 * PAGE_SIZE)
        assert (await iommu_stats(host))["pinned_pages"] == 0
        with pytest.raises(UapiError):
            await device.pin(RAM, PAGE_SIZE)
        await no_stale_access(host)


# -- notes -------------------------------------------------------------------------------------------


async def touch(rig: Vmm, pages: int) -> None:
    for n in range(pages):
        await rig.memory.write(GUEST_START + n * PAGE_SIZE, b"first")


async def test_what_the_cpu_touched_first_the_device_need_not_ask_for(host: Host) -> None:
    async with on_ioas(host, on_demand=True, follow=True) as rig:
        start = await iommu_stats(host)
        await rig.fill(GUEST_START + 64 * PAGE_SIZE)  # the completion record's page
        await touch(rig, 16)
        before = (await noted(host, start))["page_requests"]
        for n in range(16):
            assert await rig.fill(GUEST_START + n * PAGE_SIZE) is Status.SUCCESS
        after = await iommu_stats(host)
        assert after["page_requests"] == before
        assert after["notes_mapped"] == start["notes_mapped"] + 16
        await no_stale_access(host)


async def test_where_the_device_is_first_notes_save_nothing(host: Host) -> None:
    async with on_ioas(host, on_demand=True, follow=True) as rig:
        before = await iommu_stats(host)
        for n in range(16):
            assert await rig.fill(GUEST_START + n * PAGE_SIZE) is Status.SUCCESS
        await touch(rig, 16)
        after = await noted(host, before)
        assert after["page_requests"] - before["page_requests"] >= 16
        assert after["notes"] - before["notes"] == 16
        assert after["notes_mapped"] == before["notes_mapped"]


async def test_a_vm_that_is_gone_leaves_a_mirror_that_faults(host: Host) -> None:
    async with on_ioas(host, on_demand=True, follow=True) as rig:
        rig.close_vm()
        assert await rig.fill(GUEST_START) is Status.SUCCESS
