"""kill -9 of each process while DMA runs: nobody touches what was given up, and the rest ends cleanly."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from protocol.errors import PeerError, UapiError
from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.machine import Host, connect_host
from tests.integration.played import played
from tests.kit.daemons import BIN, System, eventually, system
from tests.kit.refusals import may_refuse
from tests.kit.vmm import (
    Vmm,
    attach_device,
    bare_vm,
    bind_device,
    device_stats,
    nothing_left,
    unit_stats,
)

TWO_DEVICES = {"device_sim": ["--devices", "2"]}


@asynccontextmanager
async def running_dma(host: Host) -> AsyncIterator[tuple[Vmm, int]]:
    """A rig whose device copies all the time, until it cannot any more; (rig, the page it writes)."""
    rig = await bare_vm(host)
    await attach_device(rig)
    page = rig.memory.allocate(8)
    async with trio.open_nursery() as nursery:

        async def copy(worker: int) -> None:
            with suppress(PeerError), may_refuse(errno.ENODEV, errno.EIO):
                while (await rig.copy(page + worker * PAGE_SIZE, page)).status is Status.SUCCESS:
                    await trio.lowlevel.checkpoint()

        for worker in range(1, 4):
            nursery.start_soon(copy, worker)
        await eventually(lambda: device_stats(host), lambda s: s["work_descriptors"] > 50, "DMA is running")
        yield rig, page
        nursery.cancel_scope.cancel()
        rig.close()


async def test_kill_iommufdd_and_the_device_stops_and_kvmd_gets_everything_back() -> None:
    with system() as victims:
        async with connect_host(victims.directory) as host:
            async with running_dma(host) as (rig, page):
                victims.kill("iommufdd")
                await eventually(
                    host.kvmd.stats, lambda s: s["vms"][0]["importers"] == 0, "the importer is forgotten"
                )
                before = await device_stats(host)
                assert await rig.process.move_pages(rig.hva + page, 8 * PAGE_SIZE) >= 1
                after = await device_stats(host)
                assert after["statuses"]["SUCCESS"] == before["statuses"]["SUCCESS"]
                assert (after["stale_accesses"], after["page_requests_outstanding"]) == (0, 0)
                assert await host.kvmd.violations() == []
                await rig.memory.write(page, b"the vCPU runs on")
            await eventually(
                host.kvmd.stats,
                lambda s: s["vms"] == [] and not (s["frames"] or s["table_pages"]),
                "kvmd has given everything back",
            )


async def test_kvmd_frees_nothing_before_a_walker_nobody_answers_for_is_gone() -> None:
    """device_sim is stopped, so it still holds the lease when iommufdd is dead (R28)."""
    with system() as victims:
        async with connect_host(victims.directory) as host:
            rig = await bare_vm(host)
            await attach_device(rig)
            page = rig.memory.allocate(1)
            assert await rig.fill(page) is Status.SUCCESS
            victims.signal("device_sim", signal.SIGSTOP)
            victims.kill("iommufdd")
            frames = (await host.kvmd.stats())["frames"]
            dropped = trio.Event()

            async def drop() -> None:
                await rig.process.madvise_dontneed(rig.hva, 64 << 20)
                dropped.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(drop)
                await eventually(
                    host.kvmd.stats, lambda s: s["vms"][0]["pages_4k"] == 0, "kvmd has cleared the entries"
                )
                for _ in range(20):
                    stats = await host.kvmd.stats()
                    assert (stats["frames"], stats["vms"][0]["importers"]) == (frames, 1)
                assert not dropped.is_set()
                victims.signal("device_sim", signal.SIGCONT)
            assert (await host.kvmd.stats())["frames"] == 0
            assert (await device_stats(host))["stale_accesses"] == 0
            rig.close()
            await eventually(host.kvmd.stats, lambda s: s["vms"] == [], "the VM is destroyed")


async def test_a_new_iommufdd_takes_over_the_unit_of_a_dead_one() -> None:
    with system() as victims:
        async with connect_host(victims.directory) as host, running_dma(host):
            victims.kill("iommufdd")
        victims.socket("iommufdd").unlink()
        victims.start("iommufdd")
        async with connect_host(victims.directory) as host:
            assert (await played(host, "dmatest")).problems == []
            await nothing_left(host)


async def test_kill_device_sim_and_the_others_go_on_without_it() -> None:
    with system() as victims:
        async with connect_host(victims.directory) as host:
            async with running_dma(host) as (rig, page):
                iommu, device = rig.bound
                assert rig.tdp_fd is not None
                victims.kill("device_sim")
                assert await rig.process.move_pages(rig.hva + page, 8 * PAGE_SIZE) >= 1
                assert await host.kvmd.violations() == []
                await rig.memory.write(page, b"the vCPU runs on")
                await device.detach()
                with pytest.raises(UapiError) as refused:
                    await device.attach(rig.hwpt_id)
                assert refused.value.errno == errno.ENODEV
                await iommu.destroy(rig.hwpt_id)
                with pytest.raises(UapiError) as refused:
                    await iommu.hwpt_alloc_kvm(rig.device_id, rig.tdp_fd)
                assert refused.value.errno == errno.ENODEV
            await nothing_left(host)


async def test_kill_device_sim_and_closing_everything_leaves_nothing() -> None:
    with system() as victims:
        async with connect_host(victims.directory) as host:
            async with running_dma(host):
                victims.kill("device_sim")
            await nothing_left(host)


async def test_kill_kvmd_and_its_devices_are_detached() -> None:
    with system(TWO_DEVICES) as victims:
        async with connect_host(victims.directory) as host:
            async with running_dma(host) as (rig, _):
                assert rig.iommu is not None
                second = await host.iommufdd.open_device(1)
                rig.extra.append(second)
                await second.bind(rig.iommu)
                await second.attach(rig.hwpt_id)
                victims.kill("kvmd")
                await eventually(
                    host.iommufdd.stats,
                    lambda s: [hwpt["functions"] for hwpt in s["hwpts"]] == [0],
                    "both devices are detached",
                )
                before = await device_stats(host)
                await trio.sleep(0.05)
                after = await device_stats(host)
                assert after["statuses"]["SUCCESS"] == before["statuses"]["SUCCESS"]
                assert (after["stale_accesses"], after["page_requests_outstanding"]) == (0, 0)
                await rig.iommu.destroy(rig.hwpt_id)
            await eventually(
                host.iommufdd.stats, lambda s: s["hwpts"] == [] and s["devices_bound"] == 0, "all is closed"
            )
            assert (await unit_stats(host))["faults_lost"] == 0


@pytest.mark.parametrize("attempt", range(3))
async def test_kill_kvmd_while_every_fd_closes(attempt: int) -> None:
    with system(TWO_DEVICES) as victims:
        async with connect_host(victims.directory) as host:
            async with running_dma(host) as (rig, _):
                assert rig.iommu is not None
                second = await host.iommufdd.open_device(1)
                rig.extra.append(second)
                await second.bind(rig.iommu)
                await second.attach(rig.hwpt_id)
                if attempt == 1:
                    rig.close()
                victims.signal("kvmd", signal.SIGKILL)
                if attempt == 2:
                    rig.close()
            victims.kill("kvmd")
            await eventually(
                host.iommufdd.stats, lambda s: s["hwpts"] == [] and s["devices_bound"] == 0, "all is closed"
            )


@pytest.mark.rfc("RFC-42")
async def test_without_kvmd_an_alloc_is_eopnotsupp() -> None:
    """KVM is not loaded."""
    with system() as victims:
        async with connect_host(victims.directory) as host:
            rig = await bare_vm(host)
            rig.tdp_fd = await rig.vm.create_tdp_fd()
            await bind_device(rig)
            iommu, _ = rig.bound
            victims.kill("kvmd")
            with pytest.raises(UapiError) as refused:
                await iommu.hwpt_alloc_kvm(rig.device_id, rig.tdp_fd)
            assert refused.value.errno == errno.EOPNOTSUPP
            rig.close()


async def test_a_vmm_that_ends_in_an_error_has_no_fd_of_its_host_left(shared_system: System) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(ExceptionGroup):
        async with connect_host(shared_system.directory):
            raise LookupError("the scenario's")
    assert sorted(os.listdir("/proc/self/fd")) == before


def start_vmm(running: System, *arguments: str) -> subprocess.Popen[bytes]:
    command = [str(BIN / "qemu-shim"), "run", "--attach", str(running.directory), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


@pytest.mark.rfc("RFC-103")
@pytest.mark.parametrize("name", ["unmap", "dmatest"])
async def test_kill_the_vmm_and_the_daemons_forget_it(host: Host, shared_system: System, name: str) -> None:
    """RFC-103: the kernel closes its fds in whatever order; the next VMM finds everything free."""
    many = {"unmap": ["--rounds", "100000"], "dmatest": ["--iterations", "1000000"]}[name]
    before = await device_stats(host)
    vmm = start_vmm(shared_system, name, *many)
    try:
        await eventually(
            lambda: device_stats(host),
            lambda s: s["work_descriptors"] > before["work_descriptors"] + 20,
            "DMA is running",
        )
    finally:
        vmm.kill()
        vmm.wait()
    await nothing_left(host)
    after = await device_stats(host)
    assert after["stale_accesses"] == before["stale_accesses"]
    assert after["page_requests_outstanding"] == 0
    assert (await played(host, "sharing")).problems == []
