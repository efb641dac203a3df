"""kill -9 of each daemon under DMA on an IOAS: nobody touches what was given up, the rest ends cleanly."""

from __future__ import annotations

import errno
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio

from protocol.errors import PeerError, UapiError
from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.machine import Host, connect_host
from tests.integration.on_ioas import RAM, attach_on_ioas, hwpt_stats
from tests.kit.daemons import eventually, system
from tests.kit.refusals import may_refuse
from tests.kit.vmm import GUEST_START, Vmm, bare_vm, bind_device, device_stats

ON_DEMAND: dict[str, Any] = {"on_demand": True}
NOTED: dict[str, Any] = {"on_demand": True, "follow": True}
PINNED: dict[str, Any] = {}
WAYS = pytest.mark.parametrize("how", [PINNED, ON_DEMAND, NOTED], ids=["pinned", "mirror", "notifier"])


@asynccontextmanager
async def running_dma(host: Host, how: dict[str, Any]) -> AsyncIterator[Vmm]:
    """A device that fills pages all the time, until it cannot any more."""
    rig = await bare_vm(host, ram=RAM)
    rig.ioas_id = await attach_on_ioas(rig, **how)
    async with trio.open_nursery() as nursery:

        async def fill(worker: int) -> None:
            with suppress(PeerError), may_refuse(errno.ENODEV, errno.EIO):
                while await rig.fill(GUEST_START + worker * PAGE_SIZE) is Status.SUCCESS:
                    await trio.lowlevel.checkpoint()

        for worker in range(3):
            nursery.start_soon(fill, worker)
        await eventually(lambda: device_stats(host), lambda s: s["work_descriptors"] > 50, "DMA is running")
        yield rig
        nursery.cancel_scope.cancel()
    rig.close()


async def all_given_back(host: Host) -> None:
    await eventually(
        host.kvmd.stats,
        lambda s: s["vms"] == [] and not (s["frames"] or s["table_pages"] or s["processes"]),
        "kvmd has given everything back",
    )


async def nothing_kept(host: Host) -> None:
    """But for what the guest's driver reads of its completion records meanwhile."""
    await eventually(
        host.kvmd.stats,
        lambda s: s["frames"] < 8 and not s["memory"]["pinned_pages"],
        "no page is kept for anybody",
    )


@WAYS
async def test_iommufdd_dies_and_the_host_gets_its_pages_back(how: dict[str, Any]) -> None:
    with system() as victims:
        async with connect_host(victims.directory) as host:
            async with running_dma(host, how) as rig:
                victims.kill("iommufdd")
                await rig.process.madvise_dontneed(rig.hva, RAM)
                await nothing_kept(host)
                stats = await device_stats(host)
                assert (stats["stale_accesses"], stats["page_requests_outstanding"]) == (0, 0)
                assert await host.kvmd.violations() == []
            await all_given_back(host)


@WAYS
async def test_kvmd_dies_and_no_device_reaches_anything(how: dict[str, Any]) -> None:
    with system() as victims:
        async with connect_host(victims.directory) as host, running_dma(host, how) as rig:
            mm = rig.process.dup()
            victims.kill("kvmd")
            hwpt = await eventually(
                lambda: hwpt_stats(host), lambda s: not s["functions"], "the device is detached"
            )
            await eventually(
                lambda: hwpt_stats(host), lambda s: s["leaves"] == [0, 0, 0], "nothing is mapped"
            )
            assert hwpt["acked"] <= (await hwpt_stats(host))["iotlb_syncs"]
            iommu, device = rig.bound
            with pytest.raises(UapiError) as caught:
                await iommu.ask(
                    "IOMMU_IOAS_MAP",
                    [mm],
                    flags=7,
                    ioas_id=rig.ioas_id,
                    iova=1 << 32,
                    user_va=rig.hva,
                    length=PAGE_SIZE,
                )
            # a host that went is not asked to pin, and there is none in its place
            assert caught.value.errno == (errno.EOPNOTSUPP if how is PINNED else errno.ENODEV)
            assert await iommu.ioas_unmap(rig.ioas_id, 0, (1 << 64) - 1) == RAM
            await device.detach()
            await iommu.destroy(rig.hwpt_id)
            await iommu.destroy(rig.ioas_id)
            assert (await device_stats(host))["stale_accesses"] == 0


@WAYS
async def test_device_sim_dies_and_nothing_waits_for_it(how: dict[str, Any]) -> None:
    with system() as victims:
        async with connect_host(victims.directory) as host:
            async with running_dma(host, how) as rig:
                victims.kill("device_sim")
                await rig.process.madvise_dontneed(rig.hva, RAM)
                iommu, _ = rig.bound
                assert await iommu.ioas_unmap(rig.ioas_id, 0, RAM) == RAM
                await nothing_kept(host)
            await all_given_back(host)


async def test_the_host_waits_for_a_unit_that_does_not_answer() -> None:
    """The ack comes after the wait descriptor, and no page goes before the ack (I6, I9)."""
    with system() as slow:
        async with connect_host(slow.directory) as host:
            rig = await bare_vm(host, ram=RAM)
            await attach_on_ioas(rig, on_demand=True)
            assert await rig.fill(GUEST_START) is Status.SUCCESS
            frames = (await host.kvmd.stats())["frames"]
            slow.signal("device_sim", signal.SIGSTOP)
            dropped = trio.Event()

            async def drop() -> None:
                await rig.process.madvise_dontneed(rig.hva, RAM)
                dropped.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(drop)
                await eventually(
                    lambda: hwpt_stats(host), lambda s: s["leaves"] == [0, 0, 0], "the entries are cleared"
                )
                for _ in range(20):
                    assert (await host.kvmd.stats())["frames"] == frames
                    assert (await hwpt_stats(host))["acked"] == 0
                assert not dropped.is_set()
                slow.signal("device_sim", signal.SIGCONT)
            assert (await host.kvmd.stats())["frames"] == 0
            assert (await hwpt_stats(host))["acked"] == 1
            rig.close()
            await all_given_back(host)


@WAYS
async def test_the_process_exits_first_and_pinned_pages_go_with_the_iommufd(how: dict[str, Any]) -> None:
    with system() as running:
        async with connect_host(running.directory) as host:
            rig = await bare_vm(host, ram=RAM)
            await attach_on_ioas(rig, **how)
            assert await rig.fill(GUEST_START) is Status.SUCCESS
            rig.vcpu.close()
            rig.vm.close()
            rig.process.close()
            kept = RAM // PAGE_SIZE if how == PINNED else 0
            await eventually(host.kvmd.stats, lambda s: s["frames"] == kept, f"{kept} frames are kept")
            rig.close()
            await all_given_back(host)


async def test_an_hwpt_on_an_ioas_whose_process_has_exited_is_efault(host: Host) -> None:
    """As a driver that asks for pages of a process that is gone [iommufd pages.c, pfn_reader_user_pin]."""
    rig = await bare_vm(host, ram=RAM)
    await bind_device(rig)
    iommu, _ = rig.bound
    mapper = await host.kvmd.start_process()
    hva = await mapper.mmap(4 * PAGE_SIZE)
    ioas = await iommu.ioas_alloc()
    await iommu.ioas_map(ioas, mapper, hva, 4 * PAGE_SIZE, 0)
    mapper.close()
    await eventually(host.kvmd.stats, lambda s: s["processes"] == 1, "the mapping process is gone")
    with pytest.raises(UapiError, match="exited") as caught:
        await iommu.hwpt_alloc(rig.device_id, ioas)
    assert caught.value.errno == errno.EFAULT
    assert (await host.iommufdd.stats())["hwpts"] == []
    assert await iommu.ioas_unmap(ioas, 0, (1 << 64) - 1) == 4 * PAGE_SIZE
    await iommu.hwpt_alloc(rig.device_id, ioas)  # nothing of him is left in it
    rig.close()
    await all_given_back(host)
