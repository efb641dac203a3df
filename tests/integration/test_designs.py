"""Machines of every design on real daemons: the author's DMA test, devices that cannot fault, memory that
comes and goes.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields

import pytest
import trio

from protocol.hw.dsa import Status
from protocol.units import MIB, PAGE_SIZE
from qemu_shim.api import Context
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.scenarios.counters import GAUGES, SOURCES, UNDER_WAY, Counters
from qemu_shim.scenarios.recorder import Recorder
from qemu_shim.scenarios.runner import run_scenario
from qemu_shim.scenarios.scenario import Play, Scenario
from qemu_shim.vmm.designs import DESIGNS, SHARED, Refused
from qemu_shim.vmm.machine import Host, Machine, MachineConfig, connect_host, machine
from tests.integration.played import played
from tests.kit.daemons import system
from tests.kit.refusals import refused
from tests.kit.vmm import FILLED, PATTERN

RAM = 32 * MIB
PLUGGED = 0x1_8000_0000
ON_DEMAND = ("mirror", "notifier")
EVENTUAL = {
    "hwpt.faults.INVALID",
    "hwpt.faults.FAILURE",
    "device.statuses.PAGE_FAULT_NOBOF",
}  # told once there was one


@asynccontextmanager
async def running(host: Host, design: str, **config: int) -> AsyncIterator[tuple[Machine, IdxdWorkQueue]]:
    async with machine(host, MachineConfig(RAM, design=DESIGNS[design], **config)) as guest:  # type: ignore[arg-type]
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True)
        await queue.enable()
        yield guest, queue


@pytest.mark.rfc("RFC-108")
@pytest.mark.parametrize("design", DESIGNS)
async def test_the_dma_test_passes_on_every_design(host: Host, design: str) -> None:
    report = await played(host, "dmatest", design, ram_mib=32)
    assert report.problems == []
    assert (report.figures["tests"], report.figures["failures"]) == (5, 0)
    requests = {"pinned": {0}, "mirror": {3}, "notifier": {1, 2, 3}, "managed": {1}, "shared": {1}}
    assert report.figures["io_faults"] in requests[design], "a note may come after the device"


@pytest.mark.parametrize("design", DESIGNS)
async def test_without_block_on_fault_a_design_plays_or_refuses(host: Host, design: str) -> None:
    """Where the guest's touch of a page does not serve the device, the driver's resuming would not end."""
    report = await played(host, "dmatest", design, ram_mib=32, block_on_fault=0)
    assert report.problems == []
    assert ["block on fault" in why for why in report.ended] == [True] * (design in ON_DEMAND)


@pytest.mark.parametrize("design", DESIGNS)
async def test_memory_that_was_unplugged_is_out_of_the_devices_reach(host: Host, design: str) -> None:
    async with running(host, design) as (guest, queue):
        slot = await guest.add_slot(7, PLUGGED, MIB)
        assert (await queue.fill(slot.gpa, PATTERN, PAGE_SIZE)).status is Status.SUCCESS
        assert await guest.process.read(slot.hva, PAGE_SIZE) == FILLED
        await guest.remove_slot(slot)
        assert (await queue.fill(slot.gpa, PATTERN, PAGE_SIZE)).status is not Status.SUCCESS
        again = await guest.add_slot(7, PLUGGED, MIB)
        assert await guest.memory.read(again.gpa, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert (await queue.fill(again.gpa, PATTERN, PAGE_SIZE)).status is Status.SUCCESS
        assert await guest.memory.read(again.gpa, PAGE_SIZE) == FILLED
        assert await host.kvmd.violations() + await host.iommufdd.violations() == []


@pytest.mark.parametrize("design", DESIGNS)
async def test_a_ballooned_page_is_gone_for_guest_and_device_alike(host: Host, design: str) -> None:
    async with running(host, design) as (guest, queue):
        page = guest.memory.allocate(1)
        assert (await queue.fill(page, PATTERN, PAGE_SIZE)).status is Status.SUCCESS
        if DESIGNS[design].pins:
            with refused(errno.EOPNOTSUPP):
                await guest.discard(page, PAGE_SIZE)
            assert await guest.memory.read(page, PAGE_SIZE) == FILLED
        else:
            await guest.discard(page, PAGE_SIZE)
            target = guest.memory.allocate(1)
            assert (await queue.memmove(target, page, PAGE_SIZE)).status is Status.SUCCESS
            assert await guest.memory.read(target, PAGE_SIZE) == bytes(PAGE_SIZE)


async def test_a_device_that_cannot_fault_is_attached_only_to_memory_that_is_pinned() -> None:
    options = {"device_sim": ["--fault-capability", "none"]}
    with system(options) as alone:
        async with connect_host(alone.directory) as host:
            for design in DESIGNS:
                for pinned in (False, True):
                    if pinned or DESIGNS[design].pins:
                        async with running(host, design, pinned=pinned) as (guest, queue):
                            page = guest.memory.allocate(1)
                            record = await queue.fill(page, PATTERN, PAGE_SIZE)
                            assert record.status is Status.SUCCESS, design
                    else:
                        with pytest.raises(Refused, match="attaching the device") as caught:
                            async with running(host, design, pinned=pinned):
                                pytest.fail(f"{design}: attached")
                        assert caught.value.errno == errno.EINVAL


async def fails(ctx: Context) -> None:
    """In a nursery, as DMA under a storm does."""
    guest = await ctx.boot(ram_bytes=RAM)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.fill, RAM)


async def ballooned(ctx: Context) -> None:
    guest = await ctx.boot(ram_bytes=RAM)
    await guest.discard(RAM // 2)


@pytest.mark.parametrize("play", [fails, ballooned])
async def test_what_fails_in_a_play_is_a_problem_and_what_is_refused_a_refusal(
    host: Host, play: Play
) -> None:
    run = await run_scenario(host, Scenario("w", "", play), DESIGNS["pinned"], 1)
    assert [sample.step for sample in run.samples] == ["start"]
    told = [f"{refusal.what}: {refusal.why[:30]}" for refusal in run.refusals]
    if play is fails:
        assert (run.problems, told) == ([f"fill of gpa {RAM:#x}: PAGE_FAULT_NOBOF at {RAM:#x}"], [])
    else:
        assert (run.problems, told) == ([], ["ballooning: ram_block_discard is disabled:"])


async def told_by_daemons(host: Host) -> set[str]:
    told: set[str] = set()
    for design in (SHARED.name, "mirror"):
        async with running(host, design) as (guest, _):
            recorder = Recorder(host)
            recorder.machines.append(guest)
            told |= set(await recorder.look())
    return told


async def test_every_counter_that_a_sample_is_made_of_is_told_by_a_daemon(host: Host) -> None:
    told = await told_by_daemons(host)
    rows = [*SOURCES.values(), *GAUGES.values(), *UNDER_WAY.values()]
    assert {key.removeprefix("-") for keys in rows for key in keys} - EVENTUAL <= told


# docs/glossary.md: what daemons call by which of its words; `iommu.descriptors` are told by kind.
WORDS = {
    "flush": {"vm.remote_tlb_flush", "vm.tlb_flush"},
    "invalidations": {
        *("hwpt.invalidations", "iommu.hmm_invalidations", "kvmd.memory.hmm_invalidations"),
        *("unit.iotlb_invalidations", "unit.devtlb_invalidations"),
    },
    "descriptors": {"unit.invalidation_descriptors", "device.work_descriptors", "iommu.descriptors"},
    "waits": {"unit.invalidation_waits"},
    "kick": {"iommu.kicks"},
    "message": set(),
}


@pytest.mark.parametrize("word", WORDS)
async def test_daemons_count_under_a_word_of_the_glossary_what_it_means(host: Host, word: str) -> None:
    told = {
        "iommu.descriptors" if key.startswith("iommu.descriptors.") else key
        for key in await told_by_daemons(host)
    }
    assert {key for key in told if word in key} == WORDS[word]


@pytest.mark.parametrize(
    ("unit", "names"),
    [("messages", {"messages", "invalidations"}), ("kicks", {"kicks"}), ("flushes", {"flushes"})],
)
def test_counters_in_a_unit_of_the_glossary_are_what_it_means(unit: str, names: set[str]) -> None:
    assert {each.name for each in fields(Counters) if each.metadata["unit"] == unit} == names
