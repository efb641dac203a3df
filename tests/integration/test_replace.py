"""Attach of an attached device: to a KVM HWPT and away from it, page requests with it, a group as one."""

from __future__ import annotations

import errno

import pytest
import trio

from protocol.errors import UapiError
from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.machine import Host, connect_host
from tests.integration.played import played
from tests.integration.test_iommufd_uapi import ioas_of, paging
from tests.kit.daemons import eventually, system
from tests.kit.refusals import refused
from tests.kit.vmm import Vmm, attach_device, bare_vm, device_stats, rigged, unit_stats, vm_stats


async def fill_reaches_nothing(host: Host, rig: Vmm, gpa: int) -> None:
    """A descriptor is submitted: not even its completion record can be written."""
    before = await device_stats(host)
    with trio.move_on_after(0):
        await rig.fill(gpa, 0)
    assert rig.portal is not None
    await rig.portal.drain()
    after = await device_stats(host)
    assert after["statuses"].get("SUCCESS", 0) == before["statuses"].get("SUCCESS", 0)
    assert after["page_request_groups"] == before["page_request_groups"], "page requests are off"


@pytest.mark.rfc("RFC-107")
@pytest.mark.defect("B-12")
async def test_replacing_switches_page_requests_off_and_on_with_the_hwpt(host: Host) -> None:
    """B-12: away from KVM they stayed on, to KVM they stayed off and the first absent page was a fault."""
    async with rigged(host) as rig:
        iommu, device = rig.bound
        other = await paging(rig, await ioas_of(rig))
        page = rig.memory.allocate(8)
        for n in range(3):
            assert await rig.fill(page + n * PAGE_SIZE) is Status.SUCCESS
            with pytest.raises(UapiError) as busy:
                await iommu.destroy(rig.hwpt_id)
            assert busy.value.errno == errno.EBUSY
            await device.attach(other)
            stats = {hwpt["did"]: hwpt["functions"] for hwpt in (await host.iommufdd.stats())["hwpts"]}
            assert sorted(stats.values()) == [0, 1]
            assert rig.queue is not None
            await fill_reaches_nothing(host, rig, page + n * PAGE_SIZE)
            rig.queue._free = list(range(16))  # what was submitted is lost
            await device.attach(rig.hwpt_id)
        before = await unit_stats(host)
        assert await rig.fill(page + 5 * PAGE_SIZE) is Status.SUCCESS
        assert (await unit_stats(host))["page_requests"] == before["page_requests"] + 1
        assert await host.kvmd.violations() == []


@pytest.mark.rfc("RFC-107")
async def test_a_device_that_starts_on_an_ioas_asks_for_pages_once_it_is_on_kvm(host: Host) -> None:
    async with rigged(host) as rig:
        _, device = rig.bound
        await device.detach()
        await device.attach(await paging(rig, await ioas_of(rig)))
        assert rig.queue is not None
        await fill_reaches_nothing(host, rig, rig.memory.allocate(1))
        rig.queue._free = list(range(16))
        await device.attach(rig.hwpt_id)
        assert await rig.fill(rig.memory.allocate(1)) is Status.SUCCESS


@pytest.mark.rfc("RFC-107")
async def test_replacing_under_running_dma_leaves_no_group_unanswered_and_nothing_stale(host: Host) -> None:
    async with rigged(host) as rig:
        _, device = rig.bound
        other = await paging(rig, await ioas_of(rig))
        pages = rig.memory.allocate(64)

        async def write(worker: int) -> None:
            for n in range(1000):
                await rig.fill(pages + (worker * 16 + n % 16) * PAGE_SIZE, n)

        async with trio.open_nursery() as nursery:
            for worker in range(4):
                nursery.start_soon(write, worker)
            for _ in range(20):
                await device.attach(other)
                await rig.process.madvise_dontneed(rig.hva + pages, 64 * PAGE_SIZE)
                await device.attach(rig.hwpt_id)
            nursery.cancel_scope.cancel()
        assert rig.portal is not None
        await rig.portal.drain()
        stats = await device_stats(host)
        assert (stats["stale_accesses"], stats["page_requests_outstanding"]) == (0, 0)
        assert (await host.iommufdd.stats())["partial_held"] == 0
        assert await host.kvmd.violations() == []


GROUP = {"device_sim": ["--devices", "3", "--device", "1:group=0"]}


@pytest.mark.rfc("RFC-59", "RFC-66", "RFC-107")
async def test_devices_of_a_group_are_on_one_hwpt_and_are_replaced_together() -> None:
    with system(GROUP) as made:
        async with connect_host(made.directory) as host:
            rig = await bare_vm(host)
            await attach_device(rig)
            iommu, first = rig.bound
            other = await paging(rig, await ioas_of(rig))
            foreign = await host.iommufdd.open_iommu(rig.process)
            second, third = await host.iommufdd.open_device(1), await host.iommufdd.open_device(2)
            rig.extra += [foreign, second, third]
            with refused(errno.EBUSY, "another iommufd"):
                await second.bind(foreign)
            await second.bind(iommu)
            await third.bind(iommu)
            with refused(errno.EINVAL, "one for all"):
                await second.attach(other)
            await third.attach(other)
            await second.attach(rig.hwpt_id)
            await first.detach()
            with refused(errno.EBUSY):
                await iommu.destroy(rig.hwpt_id)
            await first.attach(rig.hwpt_id)
            await second.attach(other)
            functions = [hwpt["functions"] for hwpt in (await host.iommufdd.stats())["hwpts"]]
            assert functions == [0, 3]
            await iommu.destroy(rig.hwpt_id)
            rig.close()


async def test_the_usual_job_runs_after_a_replacement_and_every_object_is_given_back(host: Host) -> None:
    async with rigged(host) as rig:
        _, device = rig.bound
        await device.attach(await paging(rig, await ioas_of(rig)))
        before = await vm_stats(host)
        assert before["importers"] == 1, "the KVM HWPT still hears of flushes"
    await eventually(host.iommufdd.stats, lambda s: s["hwpts"] == [], "all HWPTs are gone")
    assert (await played(host, "dmatest")).problems == []
