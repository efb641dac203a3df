"""The link between driver and silicon, made again: what was made on the old one is gone, all else goes on."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from protocol.errors import UapiError
from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.guest.memory import GuestMemory
from qemu_shim.vmm.machine import Host, connect_host
from tests.integration.fake_silicon import RID, hostile, page_request
from tests.integration.on_ioas import RAM, attach_on_ioas
from tests.integration.test_death import running_dma
from tests.integration.test_iommufd_uapi import ioas_of, paging
from tests.kit.daemons import System, eventually, system, until
from tests.kit.refusals import refused
from tests.kit.vmm import (
    GUEST_START,
    QUEUE_START,
    ProcessCpu,
    Vmm,
    attach_device,
    bare_vm,
    bind_device,
    device_stats,
    nothing_left,
    rigged,
    unit_stats,
)

ROUNDS = 4


def kill_device_sim(victims: System) -> None:
    victims.kill("device_sim")
    victims.socket("device_sim").unlink()


def restart_device_sim(victims: System) -> None:
    kill_device_sim(victims)
    victims.start("device_sim")


async def unit_is_gone(rig: Vmm) -> None:
    """Waits until iommufdd has noticed."""
    _, device = rig.bound

    async def attach() -> int:
        try:
            await device.attach(rig.hwpt_id)
        except UapiError as error:
            return error.errno
        return 0

    await eventually(attach, lambda number: number == errno.ENODEV, "the device is gone")


async def dma_works(host: Host, rig: Vmm) -> None:
    page = rig.memory.allocate(4)
    for n in range(4):
        assert await rig.fill(page + n * PAGE_SIZE) is Status.SUCCESS
    assert (await device_stats(host))["stale_accesses"] == 0
    assert await host.kvmd.violations() + await host.iommufdd.violations() == []


async def test_a_unit_that_is_gone_leaves_no_fd_and_no_memory_in_iommufdd() -> None:
    """Not even until somebody happens to collect garbage."""
    with system() as victims:
        async with connect_host(victims.directory) as host, rigged(host):
            pass
        before = kept(victims)
        for _ in range(ROUNDS):
            restart_device_sim(victims)
            async with connect_host(victims.directory) as host, rigged(host):
                pass
        # Perhaps less: what the first VMM had was still being closed when it was counted.
        until(
            lambda: all(now <= then for now, then in zip(kept(victims), before, strict=True)),
            lambda: f"it had {before}, and keeps {kept(victims)}",
        )


def kept(victims: System) -> tuple[int, int]:
    """fds of iommufdd, and its mappings of units' memory."""
    maps = Path(f"/proc/{victims.pid('iommufdd')}/maps").read_text()
    return victims.fds("iommufdd"), maps.count("/memfd:dmar-") + maps.count("/memfd:unit ")


async def test_device_sim_dies_and_comes_back_and_the_same_iommufdd_drives_it() -> None:
    """It was ENODEV until iommufdd was restarted, too."""
    with system() as victims:
        pid = victims.pid("iommufdd")
        async with connect_host(victims.directory) as host:
            answered = (await host.iommufdd.stats())["responses"]
        for _ in range(ROUNDS):
            async with connect_host(victims.directory) as host:
                async with running_dma(host):
                    restart_device_sim(victims)
                await nothing_left(host)
                stats = await host.iommufdd.stats()
                assert stats["responses"] > answered, "counters go on"
                answered = stats["responses"]
            async with connect_host(victims.directory) as host, rigged(host) as rig:
                await dma_works(host, rig)
        assert victims.pid("iommufdd") == pid


async def test_what_was_made_on_the_lost_link_stays_gone_beside_what_is_made_on_the_new_one() -> None:
    """The requester id is the same, the domain ids are not: nothing of the old device reaches the new."""
    with system() as victims:
        async with connect_host(victims.directory) as host:
            old = await bare_vm(host)
            await attach_device(old)
            restart_device_sim(victims)
            await unit_is_gone(old)
            async with connect_host(victims.directory) as later:
                new = await bare_vm(later)
                await attach_device(new)
                await dma_works(later, new)
                iommu, device = old.bound
                assert old.tdp_fd is not None
                for gone in (
                    device.attach(old.hwpt_id),
                    device.pin(0, PAGE_SIZE),
                    iommu.hwpt_alloc_kvm(old.device_id, old.tdp_fd),
                    device.map_portal(),
                ):
                    with pytest.raises(UapiError, check=lambda error: error.errno == errno.ENODEV):
                        await gone
                with refused(errno.ENODEV, "went with"):
                    await paging(old, await ioas_of(old))
                assert await old.process.move_pages(old.hva, 64 * PAGE_SIZE) >= 0
                await device.detach()
                await dma_works(later, new)
                old.close()
                await eventually(
                    later.iommufdd.stats,
                    lambda s: (len(s["hwpts"]), s["devices_bound"]) == (1, 1),
                    "the old device is closed",
                )
                await dma_works(later, new)
                new.close()
                await nothing_left(later)


@pytest.mark.parametrize("on_demand", [False, True])
async def test_a_new_device_goes_onto_nothing_whose_memory_the_lost_units_had(*, on_demand: bool) -> None:
    """The new unit has none of it; an iommufd goes on, and an IOAS that lent nothing does."""
    with system() as victims:
        async with connect_host(victims.directory) as host:
            rig = await bare_vm(host)
            lent = await attach_on_ioas(rig, on_demand=on_demand)
            iommu, _ = rig.bound
            fresh = await iommu.ioas_alloc(on_demand=on_demand)
            restart_device_sim(victims)
            await unit_is_gone(rig)
            async with connect_host(victims.directory) as later:
                rig.extra += [file for file in (rig.device, rig.portal) if file is not None]
                rig.device = await later.iommufdd.open_device()
                rig.device_id = await rig.device.bind(iommu)
                with refused(errno.ENODEV, "make another"):
                    await rig.device.attach(rig.hwpt_id)
                with refused(errno.ENODEV, "make another"):
                    await iommu.hwpt_alloc(rig.device_id, lent)
                await iommu.ioas_map(fresh, rig.process, rig.hva, RAM, 0)
                rig.hwpt_id = await iommu.hwpt_alloc(rig.device_id, fresh)
                await rig.device.attach(rig.hwpt_id)
                rig.portal = await rig.device.map_portal()
                records = GuestMemory(ProcessCpu(rig.process, 0, rig.hva), QUEUE_START, GUEST_START)
                rig.queue = IdxdWorkQueue(rig.portal, records, block_on_fault=True)
                await rig.queue.enable()
                await dma_works(later, rig)
                assert (await unit_stats(later))["faults_recorded"] == 0
                rig.close()
                await nothing_left(later)


async def test_while_there_is_no_silicon_a_device_cannot_be_opened_and_then_it_can() -> None:
    with system() as victims:
        async with connect_host(victims.directory) as host:
            rig = await bare_vm(host)
            await attach_device(rig)
            kill_device_sim(victims)
            await unit_is_gone(rig)
            for _ in range(3):
                with refused(errno.ENODEV, "no remapping unit"):
                    await host.iommufdd.open_device(0)
            rig.close()
            await nothing_left(host)
        victims.start("device_sim")
        async with connect_host(victims.directory) as host, rigged(host) as rig:
            await dma_works(host, rig)


async def test_a_link_that_fails_while_both_live_is_made_again() -> None:
    """As one ENOMEM on it does; and the unit is programmed afresh."""
    async with hostile() as (fake, rig):
        for n in range(ROUNDS):
            assert fake.link is not None
            fake.send(page_request(0, 7, last=False))
            fake.link.flush()
            fake.link.close()
            await unit_is_gone(rig)
            fake.let_go()
            assert (await rig.host.iommufdd.stats())["partial_held"] == 0
            fake.asked.clear()
            for file in rig.bound:
                file.close()
            rig.close_tdp_fd()
            await eventually(
                rig.host.iommufdd.stats,
                lambda s: (s["hwpts"], s["devices_bound"]) == ([], 0),
                "all is closed",
            )
            await eventually(
                rig.host.kvmd.stats, lambda s: s["vms"][0]["exported_tdps"] == 0, "the TDP FD is released"
            )
            rig.tdp_fd = await rig.vm.create_tdp_fd()
            await bind_device(rig)
            iommu, device = rig.bound
            rig.hwpt_id = await iommu.hwpt_alloc_kvm(rig.device_id, rig.tdp_fd)
            await device.attach(rig.hwpt_id)
            assert fake.asked == ["LINK", "CAPS", "MEMORY_ADD", "UNIT", "MEMORY_ADD", *["FUNCTION"] * 4]
            fake.send(page_request(n * PAGE_SIZE, 7))
            assert (await fake.wait_answers(n + 1))[n:] == [(RID, 7, 0)]


async def test_after_kvmd_died_nothing_is_attached_to_its_table() -> None:
    """R28, also for who comes later."""
    with system({"device_sim": ["--devices", "2"]}) as victims:
        async with connect_host(victims.directory) as host:
            async with running_dma(host) as (rig, _):
                iommu, _ = rig.bound
                second = await host.iommufdd.open_device(1)
                rig.extra.append(second)
                await second.bind(iommu)
                victims.kill("kvmd")
                await eventually(
                    host.iommufdd.stats,
                    lambda s: [hwpt["functions"] for hwpt in s["hwpts"]] == [0],
                    "the device is detached",
                )
                with refused(errno.ENODEV, "KVM is gone"):
                    await second.attach(rig.hwpt_id)
            await eventually(host.iommufdd.stats, lambda s: s["devices_bound"] == 0, "all is closed")
