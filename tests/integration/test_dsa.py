"""The DSA behind real daemons: the author's test with and without block on fault, queues that stay apart."""

from __future__ import annotations

import signal
import struct

import pytest
import trio

from protocol.errors import UapiError
from protocol.hw.dsa import Descriptor, Opcode, Status
from protocol.hw.dsa_regs import TABLE_UNIT, WQCFG_BYTES, WQCFG_TABLE, DsaReg, OtherError, State, WqCfg
from protocol.units import GIB, PAGE_SIZE
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.scenarios.measure import Report
from qemu_shim.vmm.device_client import Portal
from qemu_shim.vmm.machine import Host, Machine, MachineConfig, connect_host, machine
from tests.integration.played import played
from tests.kit.daemons import system
from tests.kit.vmm import device_stats, unit_stats
from tests.patience import PATIENCE_S

PATTERN = 0x1122_3344_5566_7788


async def play(host: Host, name: str, **params: int) -> Report:
    report = await played(host, name, **params)
    assert report.problems == []
    return report


async def queue_of(guest: Machine, *, block: bool, size: int = 16, dedicated: bool = True) -> IdxdWorkQueue:
    queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=block, size=size, dedicated=dedicated)
    await queue.enable()
    return queue


# -- the author's test ---------------------------------------------------------------------------------


@pytest.mark.rfc("RFC-108")
async def test_five_iterations_of_4096_bytes_pass_with_at_least_one_page_request(host: Host) -> None:
    report = await play(host, "dmatest", iterations=5, buf_size=4096, alignment=12)
    assert (report.figures["tests"], report.figures["failures"]) == (5, 0)
    assert report.figures["bytes_verified"] == 5 * 2 * 4096
    assert report.figures["io_faults"] >= 1


@pytest.mark.rfc("RFC-108")
@pytest.mark.parametrize(
    "params",
    [
        {"norandom": 0, "iterations": 30, "buf_size": 16384, "alignment": -1},
        {"norandom": 0, "iterations": 30, "buf_size": 16384, "alignment": 6, "transfer_size": 300},
        {"memset": 1, "norandom": 0, "iterations": 20, "buf_size": 16384},
        {"threads_per_chan": 4, "channels": 3, "iterations": 5},
        {"block_on_fault": 0},
    ],
    ids=str,
)
async def test_it_passes_however_it_is_parametrised(host: Host, params: dict[str, int]) -> None:
    report = await play(host, "dmatest", **params)
    threads = params.get("threads_per_chan", 1) * params.get("channels", 1)
    assert report.figures["tests"] == threads * params.get("iterations", 5)
    assert sum(", 0 failures " in line for line in report.lines) == threads


@pytest.mark.rfc("RFC-109")
@pytest.mark.parametrize("memset", [0, 1])
async def test_without_block_on_fault_descriptors_end_in_faults_and_are_resumed(
    host: Host, memset: int
) -> None:
    """Each buffer of two pages was moved by the host: two faults for the target, and for a source."""
    report = await play(host, "dmatest-nobof", iterations=6, buf_size=8192, memset=memset)
    assert report.figures["io_faults"] == 0
    assert report.figures["faulted_descriptors"] == 6 * (2 if memset else 4)


@pytest.mark.rfc("RFC-109")
async def test_a_descriptor_that_may_not_block_ends_with_the_faults_address_and_direction(host: Host) -> None:
    async with machine(host, MachineConfig(ram_bytes=GIB)) as guest:
        queue = await queue_of(guest, block=False)
        src, dst = guest.memory.allocate(1), guest.memory.allocate(2)
        await guest.memory.touch([src])
        before = await unit_stats(host)
        record = await queue.memmove(dst + 64, src, 256)
        assert (record.status, record.write_fault) == (Status.PAGE_FAULT_NOBOF, True)
        assert (int(record.fault_addr), record.bytes_completed) == (dst, 0)
        await guest.memory.touch([dst])
        record = await queue.fill(dst, PATTERN, 2 * PAGE_SIZE)
        assert (record.fault_addr, record.bytes_completed) == (dst + PAGE_SIZE, PAGE_SIZE)
        after = await unit_stats(host)
        assert after["page_requests"] == before["page_requests"]


@pytest.mark.parametrize("devices", [1, 4])
async def test_every_operation_is_what_it_is_worked_out_to_be(host: Host, devices: int) -> None:
    report = await play(host, "dsa-ops", devices=devices)
    assert report.figures["operations"] == devices * 3 * 10


async def test_figures_are_of_all_devices_a_scenario_has(host: Host) -> None:
    """As the page requests of their unit are, which does not know them apart."""

    async def groups() -> list[int]:
        devices = (await host.device_sim.stats())["devices"].values()
        return [device["page_request_groups"] for device in devices]

    before = await groups()
    report = await play(host, "dsa-ops", devices=4)
    grown = [now - then for now, then in zip(await groups(), before, strict=True)]
    assert len(grown) == 4
    assert min(grown) > 0
    assert report.figures["io_groups"] == sum(grown) <= report.figures["io_faults"]


# -- queues --------------------------------------------------------------------------------------------


async def test_a_queue_whose_page_requests_nobody_answers_stops_no_other() -> None:
    """The driver is stopped: what blocks waits, what is mapped is copied by the other group's engines."""
    with system() as running:
        async with (
            connect_host(running.directory) as host,
            machine(host, MachineConfig(ram_bytes=GIB)) as guest,
        ):
            queues = [
                IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=block, wq=n)
                for n, block in enumerate((True, False))
            ]
            await queues[0].device.set_up([[queues[0].config], [queues[1].config]])
            for queue in queues:
                await queue.enable()
            await guest.memory.touch([queues[0].record_page])
            absent, src, dst = (guest.memory.allocate(16) for _ in range(3))
            await guest.memory.write(src, bytes(range(256)))
            await guest.memory.touch([dst])
            ended: list[Status] = []

            async def fill(page: int) -> None:
                ended.append((await queues[0].fill(absent + page * PAGE_SIZE, PATTERN, 64)).status)

            running.signal("iommufdd", signal.SIGSTOP)
            async with trio.open_nursery() as nursery:
                for page in range(8):
                    nursery.start_soon(fill, page)
                for _ in range(20):
                    assert (await queues[1].memmove(dst, src, 256)).status is Status.SUCCESS
                assert ended == []
                running.signal("iommufdd", signal.SIGCONT)
            assert ended == [Status.SUCCESS] * 8
            assert await guest.memory.read(dst, 256) == bytes(range(256))


async def test_a_shared_queue_takes_more_than_it_holds_by_being_asked_again(host: Host) -> None:
    async with machine(host, MachineConfig(ram_bytes=GIB)) as guest:
        queue = await queue_of(guest, block=True, size=4, dedicated=False)
        before = await device_stats(host)
        descriptor = Descriptor(opcode=Opcode.NOOP).to_bytes()
        base = guest.memory.allocate(8)
        waiting = [Descriptor(opcode=Opcode.MEMFILL, dst=base + n * PAGE_SIZE, size=8) for n in range(4)]
        async with trio.open_nursery() as nursery:
            for each in waiting:
                nursery.start_soon(queue.submit, each)
        assert [await guest.portal.enqcmd(0, descriptor) for _ in range(20)] == [False] * 20
        device = await device_stats(host)
        assert device["software_errors"] == before["software_errors"]


async def test_a_dedicated_queue_that_overflows_tells_it_in_the_software_error_register(host: Host) -> None:
    async with machine(host, MachineConfig(ram_bytes=GIB)) as guest:
        queue = await queue_of(guest, block=True, size=2)
        before = await device_stats(host)
        absent = guest.memory.allocate(16)
        for n in range(12):
            raw = struct.pack("<IIQQQI28x", 0, 2 | 4 << 24, 0, 1, absent + n * PAGE_SIZE, 8)
            guest.portal.movdir64b(0, raw)
        await guest.portal.drain()
        error = await queue.device.take_software_error()
        assert (error.valid, error.overflow, error.error) == (True, True, OtherError.QUEUE_FULL)
        assert not (await queue.device.take_software_error()).valid
        device = await device_stats(host)
        lost = device["software_errors"] - before["software_errors"]
        assert 2 <= lost <= 10
        assert device["work_descriptors"] - before["work_descriptors"] == 12 - lost


async def size_of_queue_0(portal: Portal) -> int:
    """As a driver would read it back: the table of queues is where OFFSETS says."""
    offsets = int.from_bytes(await portal.mmio_read(DsaReg.OFFSETS, 16), "little")
    config = await portal.mmio_read(WQCFG_TABLE.get(offsets) * TABLE_UNIT, WQCFG_BYTES)
    return WqCfg.from_bytes(config).size


async def test_whoever_maps_the_registers_next_finds_the_device_as_it_was_made(host: Host) -> None:
    async with machine(host, MachineConfig(ram_bytes=GIB)) as guest:
        queue = await queue_of(guest, block=True)
        guest.portal.movdir64b(0, struct.pack("<II56x", 0, 0x7F << 24))
        assert await queue.device.state() is State.ENABLED
        guest.portal.close()
        with trio.fail_after(PATIENCE_S):
            while True:
                try:
                    portal = await guest.device.map_portal()
                    break
                except UapiError:  # the old mapping is not gone yet
                    await trio.sleep(0.01)
        again = IdxdWorkQueue(portal, guest.memory, block_on_fault=True)
        assert await again.device.state() is State.DISABLED
        assert await size_of_queue_0(portal) == 0
        assert not (await again.device.take_software_error()).valid
        await again.enable()
        assert (await again.fill(guest.memory.allocate(1), PATTERN, 64)).status is Status.SUCCESS
        portal.close()
