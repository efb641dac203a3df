"""The author's DMA test on four daemons, with block on fault and without, and the VMM that sets it up."""

from __future__ import annotations

import errno

import pytest

from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE
from qemu_shim.guest.idxd import WQ_SIZE, IdxdWorkQueue
from qemu_shim.vmm.machine import Host, MachineConfig, connect_host, machine
from tests.integration.played import played
from tests.kit.daemons import eventually, system
from tests.kit.refusals import refused
from tests.kit.vmm import nothing_left, unit_stats


@pytest.mark.rfc("RFC-108")
async def test_five_rounds_over_pages_pass_with_at_least_one_page_request(host: Host) -> None:
    assert WQ_SIZE == 16
    before = await unit_stats(host)
    report = await played(host, "dmatest", iterations=5, buf_size=PAGE_SIZE, block_on_fault=1)
    assert report.problems == []
    assert (report.figures["tests"], report.figures["failures"]) == (5, 0)
    assert report.figures["bytes_verified"] == 2 * 5 * PAGE_SIZE
    assert (await unit_stats(host))["page_requests"] > before["page_requests"]


@pytest.mark.rfc("RFC-109")
async def test_without_block_on_fault_a_page_nobody_touched_ends_the_descriptor(host: Host) -> None:
    """The record says where; once the CPU has touched the page the same descriptor passes."""
    async with machine(host, MachineConfig()) as guest:
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=False)
        await queue.enable()
        before = await unit_stats(host)
        page = guest.memory.allocate(2)
        record = await queue.fill(page, 0x1234, 2 * PAGE_SIZE)
        assert record.status is Status.PAGE_FAULT_NOBOF
        assert (int(record.fault_addr), record.bytes_completed) == (int(page), 0)
        assert (await unit_stats(host))["page_requests"] == before["page_requests"]
        await guest.memory.touch([page])
        record = await queue.fill(page, 0x1234, 2 * PAGE_SIZE)
        assert (record.status, record.fault_addr) == (Status.PAGE_FAULT_NOBOF, page + PAGE_SIZE)
        await guest.memory.touch([page + PAGE_SIZE])
        assert (await queue.fill(page, 0x1234, 2 * PAGE_SIZE)).status is Status.SUCCESS


@pytest.mark.defect("B-39")
async def test_a_vmm_closes_its_tdp_fd_whether_it_ends_well_or_half_way(host: Host) -> None:
    """Its process lives on in the series' QEMU, so the next container met EEXIST; here nothing is left."""
    async with machine(host, MachineConfig()) as guest:
        taken = MachineConfig(devices=guest.config.devices)
        with refused(errno.EBUSY):
            async with machine(host, taken):
                pytest.fail("the device is in use")
        with refused(errno.EEXIST):
            await guest.vm.create_tdp_fd()
        await eventually(host.kvmd.stats, lambda s: len(s["vms"]) == 1, "the half-made machine is gone")
    await nothing_left(host)
    async with machine(host, MachineConfig()):
        assert (await host.kvmd.stats())["vm_count"] == 1


async def test_a_device_that_outlives_the_first_is_closed_with_its_machine() -> None:
    with system({"device_sim": ["--devices", "2"]}) as running:
        async with connect_host(running.directory) as host:
            async with machine(host, MachineConfig()) as guest:
                await guest.plug(1)
                await guest.unplug(guest.devices[0])
            await nothing_left(host)
            async with machine(host, MachineConfig(devices=(1, 0))) as guest:
                assert [device.number for device in guest.devices] == [1, 0]
