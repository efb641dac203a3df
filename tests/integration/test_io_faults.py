"""IO page faults one by one: what each maps, what the other side then finds, and what is refused."""

from __future__ import annotations

import errno

import pytest

from protocol.hw.dsa import Status
from protocol.kernel.linux import LINUX
from protocol.units import MIB, PAGE_SIZE
from qemu_shim.vmm.machine import Host
from tests.kit.refusals import refused
from tests.kit.vmm import FILLED, GUEST_START, Vmm, rigged, unit_stats, vm_only, vm_stats
from tests.kit.wire_importer import WireImporter

READ_ONLY = 2  # KVM_MEM_READONLY
NOWHERE = 3 << 30


async def page_requests(host: Host) -> int:
    count: int = (await unit_stats(host))["page_requests"]
    return count


async def refused_faults(host: Host) -> int:
    (hwpt,) = (await host.iommufdd.stats())["hwpts"]
    return sum(count for code, count in hwpt["faults"].items() if code != "SUCCESS")


async def warm(rig: Vmm) -> None:
    """The page of completion records is faulted in, so that later counts are of what is tested."""
    assert await rig.fill(rig.memory.allocate(1)) is Status.SUCCESS


@pytest.mark.rfc("RFC-67")
async def test_a_read_of_ram_nobody_touched_is_faulted_in_and_reads_zeroes(host: Host) -> None:
    async with rigged(host) as rig:
        await warm(rig)
        src, dst = rig.memory.allocate(2), rig.memory.allocate(1)
        assert await rig.fill(dst) is Status.SUCCESS
        before, mapped = await page_requests(host), (await vm_stats(host))["pages_4k"]
        assert (await rig.copy(dst, src)).status is Status.SUCCESS
        assert await page_requests(host) == before + 1
        assert (await vm_stats(host))["pages_4k"] == mapped + 1
        assert await rig.seen_by_process(dst) == bytes(PAGE_SIZE)
        assert await refused_faults(host) == 0


@pytest.mark.rfc("RFC-68")
async def test_a_write_to_ram_nobody_touched_is_seen_by_the_guest(host: Host) -> None:
    async with rigged(host) as rig:
        page = rig.memory.allocate(1)
        assert await rig.fill(page) is Status.SUCCESS
        assert await rig.memory.read(page, PAGE_SIZE) == FILLED
        before = await page_requests(host)
        assert await rig.fill(page, 1) is Status.SUCCESS
        assert await page_requests(host) == before, "the entry is writable"
        assert await rig.memory.read(page, 8) == (1).to_bytes(8, "little")


@pytest.mark.rfc("RFC-69")
async def test_what_a_vcpu_touched_first_takes_no_page_request(host: Host) -> None:
    async with rigged(host) as rig:
        await warm(rig)
        pages = rig.memory.allocate(8)
        await rig.memory.touch([pages + n * PAGE_SIZE for n in range(8)])
        before = await page_requests(host)
        for n in range(7):
            assert (await rig.copy(pages + n * PAGE_SIZE, pages + 7 * PAGE_SIZE)).status is Status.SUCCESS
        assert await page_requests(host) == before


@pytest.mark.rfc("RFC-70")
async def test_what_a_device_faulted_in_first_takes_no_ept_violation(host: Host) -> None:
    async with rigged(host) as rig:
        pages = rig.memory.allocate(8)
        for n in range(8):
            assert await rig.fill(pages + n * PAGE_SIZE) is Status.SUCCESS
        before = (await vm_stats(host))["ept_violations"]
        assert await rig.memory.read(pages, 8 * PAGE_SIZE) == 8 * FILLED
        await rig.memory.write(pages, b"written by the guest")
        assert (await vm_stats(host))["ept_violations"] == before


@pytest.mark.rfc("RFC-71")
async def test_a_fault_without_a_slot_is_refused_and_maps_nothing(host: Host) -> None:
    async with rigged(host) as rig:
        await warm(rig)
        before = await vm_stats(host)
        assert await rig.fill(NOWHERE) is Status.PAGE_FAULT_IR
        assert (await rig.copy(rig.memory.allocate(1), NOWHERE)).status is Status.PAGE_FAULT_IR
        assert await refused_faults(host) >= 2
        after = await vm_stats(host)
        assert after["pages_4k"] - before["pages_4k"] <= 1, "only the copy's destination"
        assert after["table_pages"] == before["table_pages"]
        assert await rig.fill(rig.memory.allocate(1)) is Status.SUCCESS, "the function's requests go on"


@pytest.mark.rfc("RFC-72")
@pytest.mark.parametrize("read_first", [True, False])
async def test_a_read_only_slot_can_be_read_and_not_written(host: Host, read_first: bool) -> None:
    async with rigged(host) as rig:
        await warm(rig)
        hva = await rig.process.mmap(MIB)
        await rig.process.write(hva, FILLED)
        await rig.vm.set_user_memory_region(1, NOWHERE, MIB, hva, READ_ONLY)
        dst = rig.memory.allocate(1)
        if not read_first:
            assert await rig.fill(NOWHERE, 0) is Status.PAGE_FAULT_IR
            assert await refused_faults(host) == 1
        assert (await rig.copy(dst, NOWHERE)).status is Status.SUCCESS
        assert await rig.seen_by_process(dst) == FILLED
        assert await rig.fill(NOWHERE, 0) is Status.PAGE_FAULT_IR, "what was read is mapped without W"
        assert await rig.process.read(hva, PAGE_SIZE) == FILLED
        assert await host.kvmd.violations() == []


@pytest.mark.rfc("RFC-74", "RFC-75")
async def test_a_fault_for_nothing_or_for_another_process_is_einval(host: Host) -> None:
    """An importer names the process whose HWPT it serves, as domain->mm does."""
    async with vm_only(host) as rig:
        other = await host.kvmd.start_process()
        rig.extra.append(other)
        rig.tdp_fd = await rig.vm.create_tdp_fd()
        importer = await WireImporter.of(host, rig.tdp_fd)
        gfn = GUEST_START // PAGE_SIZE
        own, foreign = LINUX.cookie_of(rig.process._fd), LINUX.cookie_of(other._fd)
        cases = [(own, {}), (foreign, {"read": True}), (foreign, {"write": True}), (0, {"read": True})]
        for mm, rights in cases:
            access = {"read": False, "write": False, "exec": False} | rights
            with refused(errno.EINVAL):
                await importer.channel.ask("TDP_FAULT", {"mm": mm, "gfn": gfn, **access})
        assert (await vm_stats(host))["pages_4k"] == 0
        access = {"read": True, "write": False, "exec": False}
        await importer.channel.ask("TDP_FAULT", {"mm": own, "gfn": gfn, **access})
        assert (await vm_stats(host))["pages_4k"] == 1
        importer.close()


async def test_a_poisoned_page_is_refused_alone_and_its_frame_goes_back_in_the_end(host: Host) -> None:
    """It was Failure, which stops the function's page requests for good; the frame was lost to the host."""
    async with rigged(host) as rig:
        bad, good = rig.memory.allocate(2), rig.memory.allocate(2)
        assert await rig.fill(bad) is Status.SUCCESS
        await rig.process.host_action("poison", rig.hva + bad, PAGE_SIZE)
        assert await rig.fill(bad) is Status.PAGE_FAULT_IR
        (hwpt,) = (await host.iommufdd.stats())["hwpts"]
        assert hwpt["faults"]["INVALID"] >= 1
        assert "FAILURE" not in hwpt["faults"]
        for n in range(2):
            assert await rig.fill(good + n * PAGE_SIZE) is Status.SUCCESS, "page requests are on"
        assert await host.kvmd.violations() == []
