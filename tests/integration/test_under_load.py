"""Faults and invalidations both ways at once, and the scenarios with heavier parameters."""

from __future__ import annotations

from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio

from protocol.errors import UapiError
from protocol.hw.dsa import Status
from protocol.units import GIB, PAGE_SIZE
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.guest.memory import GuestMemory
from qemu_shim.vmm.machine import FIRST_FREE_GPA, GuestCpu, Host
from tests.integration.played import played
from tests.kit.vmm import Vmm, attach_device, device_stats, vm_only, vm_stats
from tests.patience import PATIENCE_S

DEVICES = 4
STREAMS = 4  # on each device
PAGES = 24
ROUNDS = 40


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("unmap", {"pages": 64, "rounds": 30, "workers": 16}),
        ("unmap", {"pages": 1, "rounds": 60, "workers": 16}),
        ("unmap", {"pages": 512, "rounds": 4, "workers": 2}),
        ("sharing", {"pages": 1024}),
        ("dmatest", {"iterations": 20, "buf_size": 1 << 21}),
        ("dmatest", {"iterations": 500, "buf_size": 64}),
        ("dmatest", {"ram_mib": 1 << 20}),
    ],
    ids=str,
)
async def test_a_heavier_scenario_holds(host: Host, name: str, params: dict[str, int]) -> None:
    report = await played(host, name, **params)
    assert report.problems == []
    assert report.figures["io_faults"] > 0


def difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    return {key: after[key] - before[key] for key in after}


async def all_stats(host: Host) -> dict[str, Any]:
    silicon = await host.device_sim.stats()
    groups = sum(device["page_request_groups"] for device in silicon["devices"].values())
    stale = sum(device["stale_accesses"] for device in silicon["devices"].values())
    outstanding = sum(device["page_requests_outstanding"] for device in silicon["devices"].values())
    iommu = await host.iommufdd.stats()
    return {
        "groups": groups,
        "stale": stale,
        "outstanding": outstanding,
        "requests": silicon["unit"]["page_requests"],
        "dropped": silicon["unit"]["page_requests_dropped"],
        "received": iommu["page_requests"],
        "responses": iommu["responses"],
        "held": iommu["partial_held"],
    }


class Storm:
    """DMA from several devices of one VM, a vCPU that touches the same pages, and a host that takes them."""

    def __init__(self, rig: Vmm, queues: list[IdxdWorkQueue]) -> None:
        self.rig = rig
        self.queues = queues
        self.base = rig.memory.allocate(PAGES)
        self.running = True
        self.statuses: Counter[Status] = Counter()

    def page(self, n: int) -> int:
        return self.base + n % PAGES * PAGE_SIZE

    async def dma(self, queue: IdxdWorkQueue, seed: int) -> None:
        n = seed
        while self.running:
            n += 7
            if n % 3:
                record = await queue.memmove(self.page(n), self.page(n + 5), PAGE_SIZE)
            else:
                record = await queue.fill(self.page(n), n, 3 * PAGE_SIZE if n % PAGES < PAGES - 3 else 64)
            self.statuses[record.status] += 1
            await trio.lowlevel.checkpoint()

    async def touch(self) -> None:
        n = 0
        while self.running:
            n += 11
            await self.rig.memory.touch([self.page(n + i) for i in range(4)])
            await trio.lowlevel.checkpoint()

    async def take_away(self) -> None:
        """The host's rounds, several changes of them at once."""
        process, hva, size = self.rig.process, self.rig.hva + self.base, PAGES * PAGE_SIZE
        half = size // 2
        for number in range(ROUNDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(process.move_pages, hva, size)
                nursery.start_soon(process.madvise_dontneed, hva, half)
                nursery.start_soon(process.move_pages, hva + half, half)
                if number % 4 == 0:
                    nursery.start_soon(process.madvise_dontneed, hva + half - PAGE_SIZE, 2 * PAGE_SIZE)
        self.running = False


async def add_queue(stack: AsyncExitStack, rig: Vmm, number: int) -> IdxdWorkQueue:
    """Another device on the VM's HWPT; its completion records have memory of their own."""
    assert rig.iommu is not None
    device = await rig.host.iommufdd.open_device(number)
    stack.callback(device.close)
    await device.bind(rig.iommu)
    await device.attach(rig.hwpt_id)
    portal = await device.map_portal()
    stack.callback(portal.close)
    start = FIRST_FREE_GPA + (number << 20)
    vcpu = await rig.vm.create_vcpu(number)
    stack.callback(vcpu.close)
    await vcpu.set_cpuid(46)
    records = GuestMemory(GuestCpu(vcpu), type(FIRST_FREE_GPA)(start), rig.memory._next)
    queue = IdxdWorkQueue(portal, records, block_on_fault=True)
    await queue.enable()
    stack.push_async_callback(portal.drain)
    return queue


async def test_streams_of_dma_and_a_changing_host_at_once(host: Host) -> None:
    """Every group answered once, no stale access, and kvmd's own check finds nothing."""
    before = await all_stats(host)
    async with vm_only(host, ram=GIB) as rig, AsyncExitStack() as stack:
        await attach_device(rig)
        assert rig.queue is not None
        queues = [rig.queue]
        for number in range(1, DEVICES):
            queues.append(await add_queue(stack, rig, number))
        storm = Storm(rig, queues)
        async with trio.open_nursery() as nursery:
            for number, queue in enumerate(queues):
                for stream in range(STREAMS):
                    nursery.start_soon(storm.dma, queue, 5 * number + stream)
            nursery.start_soon(storm.touch)
            nursery.start_soon(storm.take_away)
        assert rig.portal is not None
        await rig.portal.drain()
        after = await all_stats(host)
        assert await host.kvmd.violations() == []
        vm = await vm_stats(host)
        assert vm["io_pf_taken"] > 0
        assert vm["io_pf_failed"] == 0
        assert vm["remote_tlb_flush"] >= ROUNDS
        assert vm["table_pages_held"] == 0
    assert set(storm.statuses) == {Status.SUCCESS}, storm.statuses
    seen = difference(after, before)
    assert seen["groups"] == seen["responses"] > 0
    assert seen["requests"] == seen["received"] >= seen["groups"]
    assert (after["outstanding"], after["held"]) == (0, 0)
    assert (seen["stale"], seen["dropped"]) == (0, 0)


async def test_devices_come_and_go_while_the_others_copy_on(host: Host) -> None:
    before = await all_stats(host)
    async with vm_only(host) as rig:
        await attach_device(rig)
        page = rig.memory.allocate(2)
        done = False

        async def come_and_go(number: int) -> None:
            nonlocal done
            for _ in range(15):
                async with AsyncExitStack() as stack:
                    queue = await add_queue_without_vcpu(stack, rig, number)
                    assert (await queue.fill(page + PAGE_SIZE, number, 64)).status is Status.SUCCESS
            done = number == 3

        async def copy() -> None:
            while not done:
                assert await rig.fill(page) is Status.SUCCESS
                await rig.process.move_pages(rig.hva + page, 2 * PAGE_SIZE)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(copy)
            nursery.start_soon(come_and_go, 3)
        assert rig.portal is not None
        await rig.portal.drain()
        seen = difference(await all_stats(host), before)
        assert seen["groups"] == seen["responses"]
        assert (seen["stale"], seen["outstanding"], seen["held"]) == (0, 0, 0)
        assert (await device_stats(host))["page_requests_outstanding"] == 0
        assert await host.kvmd.violations() == []


async def add_queue_without_vcpu(stack: AsyncExitStack, rig: Vmm, number: int) -> IdxdWorkQueue:
    assert rig.iommu is not None
    assert rig.queue is not None
    device = await open_when_free(rig.host, number)
    stack.callback(device.close)
    await device.bind(rig.iommu)
    await device.attach(rig.hwpt_id)
    portal = await device.map_portal()
    stack.callback(portal.close)
    queue = IdxdWorkQueue(portal, rig.queue._memory, block_on_fault=True)
    await queue.enable()
    return queue


async def open_when_free(host: Host, number: int) -> Any:
    """The device closed a moment ago is detached first: until then opening it is EBUSY."""
    with trio.fail_after(PATIENCE_S):
        while True:
            try:
                return await host.iommufdd.open_device(number)
            except UapiError:
                await trio.sleep(0.001)
