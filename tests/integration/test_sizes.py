"""Five levels, huge pages and high memory: what the table looks like, and that DMA goes through it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from protocol.hw.dsa import Status
from protocol.pt.meta import ExportedTdpMeta
from protocol.units import GIB, MIB, PAGE_SIZE, TIB
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.vmm.machine import Host, MachineConfig, connect_host, machine
from tests.kit.daemons import TRUSTING, System, system
from tests.kit.vmm import FILLED, PATTERN, attach_device, nothing_left, rigged, unit_stats, vm_only, vm_stats
from tests.kit.wire_importer import WireImporter

WIDE = {
    "kvmd": [*TRUSTING["kvmd"], "--ept-levels", "5", "--maxphyaddr", "52"],
    "device_sim": ["--levels", "5", "--haw", "52"],
}
BEYOND_48_BITS = 512 * TIB


@pytest.fixture(scope="module")
def wide_system() -> Iterator[System]:
    with system(WIDE) as running:
        yield running


@pytest.fixture
async def wide(wide_system: System) -> AsyncIterator[Host]:
    async with connect_host(wide_system.directory) as connected:
        yield connected
        await nothing_left(connected)


@pytest.mark.rfc("RFC-23")
@pytest.mark.parametrize(("maxphyaddr", "level"), [(46, 4), (48, 4), (49, 5), (52, 5)])
async def test_the_root_has_five_levels_only_for_a_guest_wider_than_48_bits(
    wide: Host, maxphyaddr: int, level: int
) -> None:
    """RFC-23; and DMA works on both."""
    async with rigged(wide, maxphyaddr=maxphyaddr) as rig:
        assert rig.tdp_fd is not None
        importer = await WireImporter.of(wide, rig.tdp_fd)
        assert ExportedTdpMeta.from_bytes(await importer.metadata()).level == level
        importer.close()
        page = rig.memory.allocate(1)
        assert await rig.fill(page) is Status.SUCCESS
        assert await rig.memory.read(page, PAGE_SIZE) == FILLED
        assert await wide.kvmd.violations() == []


async def test_dma_reaches_ram_beyond_48_bits_through_five_levels(wide: Host) -> None:
    async with rigged(wide, maxphyaddr=52) as rig:
        hva = await rig.process.mmap(MIB)
        await rig.vm.set_user_memory_region(1, BEYOND_48_BITS, MIB, hva)
        assert await rig.fill(BEYOND_48_BITS) is Status.SUCCESS
        assert await rig.process.read(hva, PAGE_SIZE) == FILLED
        low = rig.memory.allocate(1)
        assert (await rig.copy(low, BEYOND_48_BITS)).status is Status.SUCCESS
        assert await rig.memory.read(low, PAGE_SIZE) == FILLED


async def test_an_address_beyond_the_table_is_refused_and_not_wrapped(host: Host) -> None:
    async with rigged(host) as rig:
        first = rig.memory.allocate(1)
        assert await rig.fill(first) is Status.SUCCESS
        assert await rig.fill(first + (1 << 48), 0) is not Status.SUCCESS
        assert await rig.seen_by_process(first) == FILLED


@pytest.mark.parametrize(
    ("page_size", "ram", "counts"),
    [(4096, GIB, (2, 0, 0)), (2 * MIB, GIB, (0, 2, 0)), (GIB, 2 * GIB, (0, 0, 1))],
    ids=["4K", "2M", "1G"],
)
async def test_a_fault_maps_a_leaf_of_the_host_pages_size(
    host: Host, page_size: int, ram: int, counts: tuple[int, int, int]
) -> None:
    """RFC-86: one page request for a whole leaf, then none for anything in it."""
    async with rigged(host, ram=ram, page_size=page_size) as rig:
        before = await unit_stats(host)
        page = rig.memory.allocate(1, 2 * MIB) + 17 * PAGE_SIZE
        assert await rig.fill(page) is Status.SUCCESS
        stats = await vm_stats(host)
        assert (stats["pages_4k"], stats["pages_2m"], stats["pages_1g"]) == counts
        first = (await unit_stats(host))["page_requests"] - before["page_requests"]
        assert first == sum(counts)  # the page and the completion record, each its own leaf or one for both
        assert await rig.memory.read(page, PAGE_SIZE) == FILLED
        if page_size > PAGE_SIZE:
            for other in (page + PAGE_SIZE, (page | page_size - 1) + 1 - PAGE_SIZE):
                assert await rig.fill(other, PATTERN) is Status.SUCCESS
                assert await rig.memory.read(other, PAGE_SIZE) == FILLED
            assert (await unit_stats(host))["page_requests"] - before["page_requests"] == first
        assert await host.kvmd.violations() == []


async def test_a_2m_page_is_migrated_under_the_device_and_keeps_its_bytes(host: Host) -> None:
    async with rigged(host, page_size=2 * MIB) as rig:
        page = rig.memory.allocate(1, 2 * MIB)
        assert await rig.fill(page + MIB) is Status.SUCCESS
        assert await rig.process.move_pages(rig.hva + page, 2 * MIB) == 1
        assert await rig.seen_by_process(page + MIB) == FILLED
        assert await rig.fill(page) is Status.SUCCESS
        assert await rig.memory.read(page, PAGE_SIZE) == FILLED
        stats = (await host.device_sim.stats())["devices"]["dsa0"]
        assert stats["stale_accesses"] == 0


@pytest.mark.parametrize("page_size", [4096, 2 * MIB, GIB], ids=["4K", "2M", "1G"])
async def test_ram_above_4_gib_is_reached(host: Host, page_size: int) -> None:
    """2 GiB lie below, the rest from 4 GiB on; between is no RAM."""
    async with machine(host, MachineConfig(ram_bytes=6 * GIB, page_size=page_size)) as guest:
        assert [(slot.gpa, slot.size) for slot in guest.slots] == [(0, 2 * GIB), (4 * GIB, 4 * GIB)]
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True)
        await queue.enable()
        low, high = guest.memory.allocate(1), 8 * GIB - PAGE_SIZE
        assert (await queue.fill(high, PATTERN, PAGE_SIZE)).status is Status.SUCCESS
        assert (await queue.memmove(low, high, PAGE_SIZE)).status is Status.SUCCESS
        assert await guest.memory.read(low, PAGE_SIZE) == FILLED
        assert await guest.memory.read(high, PAGE_SIZE) == FILLED
        assert (await queue.fill(3 * GIB, PATTERN, PAGE_SIZE)).status is Status.PAGE_FAULT_IR
        assert (await queue.memmove(low, 8 * GIB, PAGE_SIZE)).status is Status.PAGE_FAULT_IR
        assert await host.kvmd.violations() == []


async def test_a_device_walks_a_second_vm_after_the_first(host: Host) -> None:
    for pattern in (1, 2):
        async with vm_only(host) as rig:
            await attach_device(rig)
            page = rig.memory.allocate(1)
            assert await rig.memory.read(page, 8) == bytes(8)
            assert await rig.fill(page, pattern) is Status.SUCCESS
            assert await rig.memory.read(page, 8) == pattern.to_bytes(8, "little")
