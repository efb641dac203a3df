"""Pinning from end to end: scenarios, who may pin, what ends a pin, and what an attach costs that cannot."""

from __future__ import annotations

import errno

import pytest

from protocol.errors import UapiError
from protocol.hw.dsa import Status
from protocol.units import MIB, PAGE_SIZE
from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.vmm.machine import Host, connect_host
from tests.integration.played import played
from tests.integration.test_units import alloc, another, queue_of, with_silicon
from tests.kit.daemons import eventually, system
from tests.kit.refusals import refused
from tests.kit.vmm import GUEST_START, bare_vm, device_stats, vm_stats
from tests.kit.wire_importer import WireImporter

RAM = 40 * MIB
PAGES = RAM // PAGE_SIZE
NONE = ("--fault-capability", "none")


@pytest.mark.parametrize("name", ["partial-iopf", "pinned"])
async def test_the_note_s_two_devices_work_while_the_host_does_what_it_likes(name: str) -> None:
    with system(SCENARIOS[name].options) as made:
        async with connect_host(made.directory) as host:
            report = await played(host, name)
    assert report.problems == []
    assert report.figures["failures"] == 0
    assert report.figures["records_lost_pinned"] == 0


async def test_an_importer_pins_what_it_registered_for_and_its_pins_end_with_its_lease(host: Host) -> None:
    rig = await bare_vm(host, ram=RAM)
    rig.tdp_fd = await rig.vm.create_tdp_fd()
    importer = await WireImporter.of(host, rig.tdp_fd)
    for op, body in (("TDP_PIN", {"gfn": 1, "npages": 1}), ("TDP_PIN_ALL", {})):
        with refused(errno.EINVAL, "registered"):
            await importer.channel.ask(op, body)
    await importer.register()
    pinned = (await importer.channel.ask("TDP_PIN", {"gfn": 1, "npages": 4})).body
    await importer.channel.ask("TDP_PIN", {"gfn": 4, "npages": 1})
    assert (await importer.channel.ask("TDP_UNPIN", pinned)).body == {"pages": 4}
    assert (await vm_stats(host))["pinned_pages"] == 1
    with refused(errno.EINVAL, "none of that name"):
        await importer.channel.ask("TDP_UNPIN", pinned)
    await importer.channel.ask("TDP_PIN_ALL", {})
    assert (await vm_stats(host))["pinned_pages"] == PAGES
    importer.channel.close()
    await rig.process.move_pages(rig.hva + PAGE_SIZE, PAGE_SIZE)
    assert (await vm_stats(host))["pinned_pages"] == PAGES  # somebody may still walk
    importer.close()
    await eventually(
        lambda: vm_stats(host), lambda vm: vm["pinned_pages"] == 0, "the pins went with the lease"
    )
    assert await rig.process.move_pages(rig.hva + PAGE_SIZE, PAGE_SIZE) == 1
    assert await host.kvmd.violations() == []
    rig.close()


async def test_an_attach_that_cannot_pin_everything_fails_and_leaves_the_device_off() -> None:
    async with with_silicon(*NONE, kvmd=("--memlock", "1M"), ram=RAM) as rig:
        hwpt = await alloc(rig)
        _, device = rig.bound
        with refused(errno.ENOMEM, "pinned"):
            await device.attach(hwpt, pinned=True)
        assert (await vm_stats(rig.host))["pinned_pages"] == 0
        assert [found["functions"] for found in (await rig.host.iommufdd.stats())["hwpts"]] == [0]


async def test_a_slot_that_cannot_be_pinned_is_not_added_while_a_device_needs_it() -> None:
    async with with_silicon(*NONE, kvmd=("--memlock", "40M"), ram=RAM) as rig:
        await rig.bound[1].attach(await alloc(rig), pinned=True)
        hva = await rig.process.mmap(MIB)
        with refused(errno.ENOMEM, "pinned"):
            await rig.vm.set_user_memory_region(7, 0x1_0000_0000, MIB, hva)
        await rig.bound[1].detach()
        await rig.vm.set_user_memory_region(7, 0x1_0000_0000, MIB, hva)
        assert (await vm_stats(rig.host))["pinned_pages"] == 0


async def test_what_a_driver_pinned_ends_with_the_attachment_and_wrong_ranges_are_refused() -> None:
    trust = ("--fault-policy", "trust")
    async with with_silicon("--fault-capability", "partial", iommufdd=trust, ram=RAM) as rig:
        hwpt = await alloc(rig)
        _, device = rig.bound
        with refused(errno.EINVAL, "no HWPT"):
            await device.pin(0, PAGE_SIZE)
        await device.attach(hwpt)
        for iova, size in ((1, PAGE_SIZE), (0, 1), (0, 0), (1 << 60, PAGE_SIZE), (1 << 40, PAGE_SIZE)):
            with refused(errno.EINVAL, "pin of"):
                await device.pin(iova, size)
        await device.pin(GUEST_START, 2 * PAGE_SIZE)
        await device.pin(GUEST_START, PAGE_SIZE)
        with refused(errno.EINVAL, "no such range"):
            await device.unpin(GUEST_START + PAGE_SIZE, PAGE_SIZE)
        await device.unpin(GUEST_START, 2 * PAGE_SIZE)
        assert (await vm_stats(rig.host))["pinned_pages"] == 1
        with pytest.raises(UapiError) as caught:
            await rig.vm.page_track_add(GUEST_START)
        assert caught.value.errno == errno.EBUSY
        await device.detach()
        assert (await vm_stats(rig.host))["pinned_pages"] == 0


async def test_a_partial_device_asks_for_data_and_loses_a_record_it_finds_absent() -> None:
    """Status 0x1A, in the software error register: the record could not say it."""
    trust = ("--fault-policy", "trust")
    async with with_silicon("--fault-capability", "partial", iommufdd=trust, ram=RAM) as rig:
        await rig.bound[1].attach(await alloc(rig))
        queue = await queue_of(rig, rig.bound[1], 0)
        assert (await queue.fill(GUEST_START, 0x55, PAGE_SIZE)).status is Status.NONE
        assert (await device_stats(rig.host))["software_errors"] == 1
        assert await rig.process.read(rig.hva + GUEST_START, 1) == b"\x55"
        await rig.bound[1].pin(queue.record_page, PAGE_SIZE)
        assert (await queue.fill(GUEST_START, 0x66, PAGE_SIZE)).status is Status.SUCCESS
        assert (await device_stats(rig.host))["software_errors"] == 1


@pytest.mark.parametrize("design", ["shared", "mirror"])
async def test_an_unpin_takes_back_what_that_device_pinned_and_nothing_of_another(design: str) -> None:
    """The first device's pins went with the memslot, or the area; the second pinned there since."""
    start, size = GUEST_START, 4 * PAGE_SIZE
    async with with_silicon("--devices", "2", ram=RAM) as rig:
        iommu, first = rig.bound
        second, _ = await another(rig, 1)
        if design == "mirror":
            ioas = await iommu.ioas_alloc(on_demand=True)
            await iommu.ioas_map(ioas, rig.process, rig.hva, RAM, 0)
            hwpt = await iommu.hwpt_alloc(rig.device_id, ioas)
        else:
            hwpt = await alloc(rig)
        await first.attach(hwpt)
        await second.attach(hwpt)
        await first.pin(start, size)
        if design == "mirror":
            await iommu.ioas_unmap(ioas, 0, RAM)
            await iommu.ioas_map(ioas, rig.process, rig.hva, RAM, 0)
        else:
            await rig.vm.set_user_memory_region(0, 0, 0, 0)
            await rig.vm.set_user_memory_region(0, 0, RAM, rig.hva)
        assert await rig.process.move_pages(rig.hva + start, size) == 4  # nothing of them is pinned
        await second.pin(start, size)
        await first.unpin(start, size)
        assert await rig.process.move_pages(rig.hva + start, size) == 0
        await second.unpin(start, size)
        assert await rig.process.move_pages(rig.hva + start, size) == 4
        assert await rig.host.kvmd.violations() == []
