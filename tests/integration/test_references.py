"""Who keeps what alive: fds are references, and the last close, in whatever process, ends the object."""

from __future__ import annotations

import errno
import os

import pytest
import trio

from protocol.errors import PeerError, UapiError
from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.machine import Host
from tests.integration.plain import Plain
from tests.kit.daemons import System, eventually
from tests.kit.vmm import (
    FILLED,
    QUEUE_START,
    device_stats,
    nothing_left,
    rigged,
    unit_stats,
    vm_only,
    vm_stats,
)
from tests.kit.wire_importer import WireImporter


@pytest.mark.rfc("RFC-57")
async def test_an_hwpt_keeps_vm_and_root_after_every_fd_of_the_user_is_closed(
    shared_system: System, host: Host
) -> None:
    async with rigged(host) as rig:
        page = rig.memory.allocate(2)
        assert await rig.fill(page) is Status.SUCCESS
        rig.close_tdp_fd()
        rig.close_vm()
        before = await unit_stats(host)
        assert await rig.fill(page + PAGE_SIZE) is Status.SUCCESS
        assert (await unit_stats(host))["page_requests"] == before["page_requests"] + 1
        assert await rig.seen_by_process(page + PAGE_SIZE) == FILLED
        admin = Plain.connect(shared_system.admin)
        (stats,) = admin.ask("STATS")[0]["vms"]
        admin.close()
        assert (stats["exported_tdps"], stats["importers"]) == (1, 1)
        assert await host.kvmd.violations() == []


async def test_the_host_can_still_take_pages_when_only_the_hwpt_holds_the_vm(host: Host) -> None:
    async with rigged(host) as rig:
        page = rig.memory.allocate(1)
        assert await rig.fill(page) is Status.SUCCESS
        rig.close_tdp_fd()
        rig.close_vm()
        await rig.process.madvise_dontneed(rig.hva + page, PAGE_SIZE)
        assert await rig.fill(page, 0) is Status.SUCCESS
        assert await rig.seen_by_process(page) == bytes(PAGE_SIZE)
        assert (await device_stats(host))["stale_accesses"] == 0


async def test_the_last_close_destroys_the_vm_and_no_earlier_one(host: Host) -> None:
    async with rigged(host) as rig:
        iommu, device = rig.bound
        closes = [rig.vcpu.close, rig.vm.close, rig.close_tdp_fd]
        for close in closes:
            assert (await host.kvmd.stats())["vm_count"] == 1
            close()
        await device.detach()
        assert (await host.kvmd.stats())["vm_count"] == 1
        await iommu.destroy(rig.hwpt_id)
        await eventually(
            host.kvmd.stats, lambda s: (s["vms"], s["table_pages"]) == ([], 0), "the VM is destroyed"
        )
        assert (await host.kvmd.stats())["processes"] == 1


async def test_a_vcpu_fd_alone_keeps_its_vm_running(host: Host) -> None:
    async with vm_only(host) as rig:
        rig.vm.close()
        page = rig.memory.allocate(1)
        await rig.memory.write(page, b"alive")
        assert await rig.memory.read(page, 5) == b"alive"


@pytest.mark.rfc("RFC-06", "RFC-07", "RFC-08")
async def test_a_tdp_fd_is_taken_while_an_hwpt_holds_it_and_free_after_its_release(host: Host) -> None:
    async with rigged(host) as rig:
        iommu, device = rig.bound
        for closed in (False, True):
            if closed:
                rig.close_tdp_fd()
            with pytest.raises(UapiError) as refused:
                await rig.vm.create_tdp_fd()
            assert refused.value.errno == errno.EEXIST
        await device.detach()
        await iommu.destroy(rig.hwpt_id)
        await eventually(
            host.kvmd.stats, lambda s: s["vms"][0]["exported_tdps"] == 0, "the TDP FD is released"
        )
        rig.tdp_fd = await rig.vm.create_tdp_fd()


@pytest.mark.rfc("RFC-06", "RFC-08")
async def test_every_copy_of_a_tdp_fd_counts(host: Host) -> None:
    async with vm_only(host) as rig:
        first = await rig.vm.create_tdp_fd()
        second = os.dup(first)
        os.close(first)
        with pytest.raises(UapiError) as refused:
            await rig.vm.create_tdp_fd()
        assert refused.value.errno == errno.EEXIST
        os.close(second)
        await eventually(host.kvmd.stats, lambda s: s["vms"][0]["exported_tdps"] == 0, "released")


@pytest.mark.rfc("RFC-102")
async def test_a_released_root_stays_the_vcpus(host: Host) -> None:
    async with vm_only(host) as rig:
        page = rig.memory.allocate(1)
        await rig.memory.write(page, b"before")
        os.close(await rig.vm.create_tdp_fd())
        await eventually(host.kvmd.stats, lambda s: s["vms"][0]["exported_tdps"] == 0, "released")
        before = await vm_stats(host)
        assert await rig.memory.read(page, 6) == b"before"
        assert (await vm_stats(host))["ept_violations"] == before["ept_violations"]


@pytest.mark.rfc("RFC-76", "RFC-103")
@pytest.mark.defect("B-19")
async def test_after_the_process_exited_no_dma_reaches_its_frames_and_they_are_free(host: Host) -> None:
    """RFC-76, RFC-103: the mm goes first, the device is still attached and copies on."""
    async with rigged(host) as rig:
        assert rig.queue is not None
        pages = rig.memory.allocate(8)
        for n in range(8):
            assert await rig.fill(pages + n * PAGE_SIZE) is Status.SUCCESS

        async def copy_until_told_otherwise(worker: int) -> None:
            try:
                while (await rig.copy(pages + worker * PAGE_SIZE, pages)).status is Status.SUCCESS:
                    pass
            except (PeerError, UapiError):  # the completion record cannot be read any more
                pass

        async with trio.open_nursery() as nursery:
            for worker in range(1, 5):
                nursery.start_soon(copy_until_told_otherwise, worker)
            before = await device_stats(host)
            await eventually(
                lambda: device_stats(host),
                lambda s: s["work_descriptors"] > before["work_descriptors"] + 20,
                "DMA is running",
            )
            rig.process.close()
            await eventually(host.kvmd.stats, lambda s: s["frames"] == 0, "the process's frames are free")
        after = await device_stats(host)
        assert after["stale_accesses"] == 0
        assert (await host.kvmd.stats())["vm_count"]
        assert rig.portal is not None
        await rig.portal.drain()
        assert (await host.kvmd.stats())["frames"] == 0


@pytest.mark.rfc("RFC-76")
async def test_a_fault_for_an_exited_process_is_refused(host: Host) -> None:
    async with rigged(host) as rig:
        await host.kvmd.stats()
        rig.process.close()
        await eventually(host.kvmd.stats, lambda s: s["processes"] == 0, "the process has exited")
        assert rig.queue is not None
        assert rig.portal is not None
        before = await device_stats(host)
        async with trio.open_nursery() as nursery:

            async def fill() -> None:
                try:
                    await rig.fill(QUEUE_START + 4 * PAGE_SIZE)
                except (PeerError, UapiError):
                    return
                pytest.fail("the record of a process that is gone was read")

            nursery.start_soon(fill)
        await rig.portal.drain()
        hwpt = (await host.iommufdd.stats())["hwpts"][0]
        assert (hwpt["faults"].get("SUCCESS", 0), hwpt["faults"]["FAILURE"]) == (0, 1)
        after = await device_stats(host)
        assert after["statuses"].get("SUCCESS", 0) == before["statuses"].get("SUCCESS", 0)
        assert after["page_requests_outstanding"] == 0
        assert (await host.kvmd.stats())["frames"] == 0


async def test_an_importer_keeps_no_reference_but_its_lease_keeps_the_table(host: Host) -> None:
    async with vm_only(host) as rig:
        tdp_fd = await rig.vm.create_tdp_fd()
        importer = await WireImporter.of(host, tdp_fd)
        try:
            await importer.register()
            os.close(tdp_fd)
            importer.channel.close()
            with pytest.raises(UapiError) as refused:
                await rig.vm.create_tdp_fd()
            assert refused.value.errno == errno.EEXIST
            importer.end_lease()
            await eventually(host.kvmd.stats, lambda s: s["vms"][0]["exported_tdps"] == 0, "released")
        finally:
            importer.close()


async def test_a_table_waits_for_the_lease_of_an_importer_that_registered_as_it_went(host: Host) -> None:
    async with vm_only(host) as rig:
        tdp_fd = await rig.vm.create_tdp_fd()
        first, second = [await WireImporter.of(host, tdp_fd) for _ in range(2)]
        try:
            await first.register("first")
            os.close(tdp_fd)
            await second.register("second")
            first.close()
            await eventually(host.kvmd.stats, lambda s: s["vms"][0]["importers"] == 1, "the first is gone")
            with pytest.raises(UapiError) as refused:
                await rig.vm.create_tdp_fd()
            assert refused.value.errno == errno.EEXIST
            second.close()
            await eventually(host.kvmd.stats, lambda s: s["vms"][0]["exported_tdps"] == 0, "released")
        finally:
            second.close()


async def test_detach_and_attach_again_walk_the_same_root(host: Host) -> None:
    async with rigged(host) as rig:
        _, device = rig.bound
        page = rig.memory.allocate(1)
        assert await rig.fill(page) is Status.SUCCESS
        for _ in range(5):
            await device.detach()
            await device.attach(rig.hwpt_id)
        before = await unit_stats(host)
        assert await rig.fill(page, 7) is Status.SUCCESS
        assert (await unit_stats(host))["page_requests"] == before["page_requests"]


async def test_a_detached_device_reaches_nothing(host: Host) -> None:
    """RFC-100."""
    async with rigged(host) as rig:
        _, device = rig.bound
        page = rig.memory.allocate(1)
        assert await rig.fill(page) is Status.SUCCESS
        await device.detach()
        before = await device_stats(host)
        with trio.move_on_after(0):
            await rig.fill(page, 0)
        assert rig.portal is not None
        await rig.portal.drain()
        assert await rig.seen_by_process(page) == FILLED
        after = await device_stats(host)
        assert after["statuses"]["SUCCESS"] == before["statuses"]["SUCCESS"]
        assert after["page_requests_outstanding"] == 0


async def test_closing_everything_at_once_in_any_order_leaves_nothing(host: Host) -> None:
    for order in range(6):
        async with rigged(host) as rig:
            assert await rig.fill(rig.memory.allocate(1)) is Status.SUCCESS
            iommu, device = rig.bound
            assert rig.portal is not None
            closes = [iommu.close, device.close, rig.portal.close, rig.process.close, rig.close_vm]
            for close in closes[order % 5 :] + closes[: order % 5]:
                close()
        await nothing_left(host)


async def test_process_vm_and_importer_ending_together_leave_nothing(host: Host) -> None:
    """The exit waits for an ack that never comes, the VM for the lease: both go on at the same moment."""
    for order in range(2):
        async with vm_only(host) as rig:
            rig.tdp_fd = await rig.vm.create_tdp_fd()
            importer = await WireImporter.of(host, rig.tdp_fd)
            await importer.register()
            importer.ack = False
            await rig.memory.touch([rig.memory.allocate(1)])
            rig.process.close()
            await importer.wait_told()
            rig.close()
            assert (await host.kvmd.stats())["frames"] == 1
            if order:
                importer.end_lease()
            importer.close()
