"""Importers of a TDP FD: whose faults they may bring, what a slow one holds up, how they are forgotten."""

from __future__ import annotations

import errno
import os

import pytest
import trio

from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE, WHOLE_SIZE
from qemu_shim.vmm.machine import Host
from tests.kit.daemons import eventually
from tests.kit.refusals import refused
from tests.kit.vmm import bind_device, nothing_left, rigged, vm_only, vm_stats
from tests.kit.wire_importer import WireImporter


@pytest.mark.rfc("RFC-75")
@pytest.mark.defect("B-38")
async def test_an_hwpt_made_by_another_process_is_einval_and_not_a_dead_one(host: Host) -> None:
    """B-38: it was made, and every fault on it failed."""
    async with vm_only(host) as rig:
        rig.tdp_fd = await rig.vm.create_tdp_fd()
        other = await host.kvmd.start_process()
        rig.extra.append(other)
        iommu = await host.iommufdd.open_iommu(other)
        device = await host.iommufdd.open_device(0)
        rig.extra += [iommu, device]
        device_id = await device.bind(iommu)
        with refused(errno.EINVAL, "process"):
            await iommu.hwpt_alloc_kvm(device_id, rig.tdp_fd)
        assert (await vm_stats(host))["importers"] == 0
        device.close()
        await eventually(host.iommufdd.stats, lambda s: s["devices_bound"] == 0, "unbound")
        await bind_device(rig, 1)
        await rig.bound[0].hwpt_alloc_kvm(rig.device_id, rig.tdp_fd)


@pytest.mark.defect("B-26")
async def test_an_importer_that_does_not_ack_holds_up_what_it_was_told_of_and_nothing_else(
    host: Host,
) -> None:
    """B-26: it was called under the lock of the whole MMU, and waited for there."""
    async with rigged(host) as rig:
        assert rig.tdp_fd is not None
        pages = rig.memory.allocate(4)
        await rig.memory.write(pages, b"first")
        slow = await WireImporter.of(host, rig.tdp_fd)
        await slow.register()
        slow.ack = False
        dropped = trio.Event()

        async def drop() -> None:
            await rig.process.madvise_dontneed(rig.hva + pages, PAGE_SIZE)
            dropped.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drop)
            await slow.wait_told()
            await rig.memory.write(pages + PAGE_SIZE, b"a vCPU")
            assert await rig.fill(pages + 2 * PAGE_SIZE) is Status.SUCCESS
            assert (await host.iommufdd.stats())["hwpts"][0]["invalidations"] == 1
            assert not dropped.is_set()
            assert (await host.kvmd.violations()) == []
            slow.ack_all()
        assert dropped.is_set()
        slow.close()
    await nothing_left(host)


@pytest.mark.rfc("RFC-106")
async def test_an_importer_put_without_unregistering_is_forgotten_and_never_called_again(host: Host) -> None:
    async with vm_only(host) as rig:
        rig.tdp_fd = await rig.vm.create_tdp_fd()
        gone, stays = [await WireImporter.of(host, rig.tdp_fd) for _ in range(2)]
        await gone.channel.ask("TDP_UNREGISTER_IMPORTER")  # of what was never registered
        await gone.register("gone")
        await stays.register("stays")
        os.close(rig.tdp_fd)
        rig.tdp_fd = None
        gone.close()
        await eventually(lambda: vm_stats(host), lambda s: s["importers"] == 1, "forgotten")
        page = rig.memory.allocate(1)
        await rig.memory.write(page, b"x")
        await rig.process.madvise_dontneed(rig.hva + page, PAGE_SIZE)
        assert (gone.told, stays.told) == ([], [(0, WHOLE_SIZE)])
        stays.close()
    await nothing_left(host)


@pytest.mark.rfc("RFC-101")
@pytest.mark.defect("B-10")
async def test_destroying_an_hwpt_while_the_host_takes_pages_away_is_safe(host: Host) -> None:
    """B-10: a flush met a domain that was freed; here it is acked by whoever is still there."""
    async with rigged(host) as rig:
        iommu, device = rig.bound
        pages = rig.memory.allocate(8)
        done = trio.Event()

        async def take_away() -> None:
            while not done.is_set():
                for n in range(8):
                    await rig.memory.write(pages + n * PAGE_SIZE, b"again")
                await rig.process.madvise_dontneed(rig.hva + pages, 8 * PAGE_SIZE)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_away)
            for _ in range(30):
                await device.detach()
                await iommu.destroy(rig.hwpt_id)
                assert rig.tdp_fd is not None
                rig.hwpt_id = await iommu.hwpt_alloc_kvm(rig.device_id, rig.tdp_fd)
                await device.attach(rig.hwpt_id)
                assert await rig.fill(pages) is Status.SUCCESS
            done.set()
        assert await host.kvmd.violations() == []
        assert (await vm_stats(host))["importers"] == 1
