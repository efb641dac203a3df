"""A root of the IOMMU's own, end to end: iommufdd's KVM HWPT as it is, another root behind its TDP FD."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from protocol.hw.dsa import Status
from protocol.rpc.channel import Body
from protocol.uapi import names
from protocol.units import GIB, MIB, PAGE_SIZE, Gpa
from qemu_shim.vmm.inspector import Inspector
from qemu_shim.vmm.machine import Host
from tests.kit.daemons import eventually
from tests.kit.refusals import refused
from tests.kit.vmm import FILLED, Vmm, attach_device, unit_stats, vm_only, vm_stats
from tests.oracle.dump import Dump

LOG = names.KVM_MEM_LOG_DIRTY_PAGES
FAR = 1 << 33  # where no other slot is
OWNERS = ("cpu", "iommu", "shared")


@asynccontextmanager
async def attached(host: Host, *, own: bool = True, **config: Any) -> AsyncIterator[Vmm]:
    """A VM with device 0 attached, by default to a root of its own; every check holds at its end.  What only
    the device touches, records, is faulted in."""
    async with vm_only(host, **config) as rig:
        if own:
            await rig.vm.enable_cap(names.KVM_CAP_TDP_FD_OWN_ROOT)
        await attach_device(rig)
        assert await rig.fill(rig.memory.allocate(1)) is Status.SUCCESS
        yield rig
        assert await host.kvmd.violations() == []


class Since:
    """How far counters have come since."""

    def __init__(self, host: Host, vm: Body, unit: Body) -> None:
        self._host, self._vm, self._unit = host, vm, unit

    @classmethod
    async def now(cls, host: Host) -> Since:
        return cls(host, await vm_stats(host), await unit_stats(host))

    async def told(self) -> Body:
        """EPT violations resolved, faults of the device resolved, page requests, invalidation descriptors."""
        vm, unit = await vm_stats(self._host), await unit_stats(self._host)
        found = {name: vm[name] - self._vm[name] for name in ("pf_fixed", "io_pf_fixed")}
        return found | {
            name: unit[name] - self._unit[name] for name in ("page_requests", "invalidation_descriptors")
        }


NOTHING = {"pf_fixed": 0, "io_pf_fixed": 0, "page_requests": 0, "invalidation_descriptors": 0}


async def cpu_writes(rig: Vmm, pages: list[Gpa]) -> None:
    ran = await rig.vcpu.run([("w", page, b"cpu") for page in pages])
    assert ran.done, ran


async def device_writes(rig: Vmm, pages: list[Gpa]) -> None:
    for page in pages:
        assert await rig.fill(page) is Status.SUCCESS


def allocate(rig: Vmm, count: int, align: int = MIB) -> list[Gpa]:
    first = rig.memory.allocate(count, align)
    return [Gpa(first + number * PAGE_SIZE) for number in range(count)]


async def dirty(rig: Vmm, buffer: int) -> set[int]:
    await rig.vm.get_dirty_log(0, buffer)
    bits = int.from_bytes(await rig.process.read(buffer, GIB // PAGE_SIZE // 8), "little")
    return {page for page in range(bits.bit_length()) if bits >> page & 1}


async def log_slot_0(rig: Vmm, *, on: bool = True) -> None:
    await rig.vm.set_user_memory_region(0, 0, GIB, rig.hva, LOG if on else 0)


# -- the capability ------------------------------------------------------------------------------------------


async def test_the_capability_is_said_by_the_vm_and_comes_before_the_tdp_fd(host: Host) -> None:
    async with vm_only(host) as rig:
        cap = names.KVM_CAP_TDP_FD_OWN_ROOT
        assert await rig.vm.check_extension(cap) == 1
        for args, flags in (((1,), 0), ((0, 0, 0, 7), 0), ((), 1)):
            with refused(errno.EINVAL):
                await rig.vm.enable_cap(cap, *args, flags=flags)
        await rig.vm.enable_cap(cap, 0, 0, 0, 0)
        await rig.vm.enable_cap(cap)
        rig.tdp_fd = await rig.vm.create_tdp_fd()
        with refused(errno.EINVAL):
            await rig.vm.enable_cap(cap)


# -- one fault a page, two tables ----------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False], ids=["managed", "shared"])
@pytest.mark.parametrize("cpu_first", [True, False], ids=["cpu", "device"])
async def test_each_page_is_faulted_in_once_whoever_comes_first(
    host: Host, cpu_first: bool, own: bool
) -> None:
    async with attached(host, own=own) as rig:
        pages, since = allocate(rig, 64), await Since.now(host)
        if cpu_first:
            await cpu_writes(rig, pages)
        await device_writes(rig, pages)
        if not cpu_first:
            await cpu_writes(rig, pages)
        by_device = 0 if cpu_first else 64
        assert await since.told() == {
            "pf_fixed": 64 - by_device,
            "io_pf_fixed": by_device,
            "page_requests": by_device,
            "invalidation_descriptors": 0,
        }
        expected = FILLED if cpu_first else b"cpu" + FILLED[3:]
        assert await rig.seen_by_process(pages[-1]) == expected


async def test_tables_are_paid_for_twice_and_told_by_owner_and_level(host: Host) -> None:
    """Where a shared table is paid for once."""
    paid = {}
    for own in (True, False):
        async with attached(host, own=own) as rig:
            await cpu_writes(rig, allocate(rig, 3 * 512, 2 * MIB))
            stats = await vm_stats(host)
            by_owner = {
                owner: [stats.get(f"table_pages.{owner}.{level}", 0) for level in range(1, 5)]
                for owner in OWNERS
            }
            paid[own] = by_owner
            assert stats["table_pages"] == sum(map(sum, by_owner.values()))
    assert paid[True]["cpu"] == paid[True]["iommu"] == paid[False]["shared"]
    assert paid[True]["shared"] == paid[False]["cpu"] == paid[False]["iommu"] == [0] * 4


async def test_the_exported_root_is_the_one_to_inspect_and_to_dump(host: Host, tmp_path: Path) -> None:
    async with attached(host) as rig:
        pages = allocate(rig, 8)
        await device_writes(rig, pages)
        await rig.vm.page_track_add(pages[0])
        inspector = Inspector(host.kvmd.channel)
        vm = await inspector.vm(rig.vm)
        (lent,) = vm["exported"]
        assert {root["hpa"]: root["owner"] for root in vm["roots"]}[lent["root_hpa"]] == "iommu"
        assert sorted(root["owner"] for root in vm["roots"]) == ["cpu", "iommu"]
        found = await inspector.gpa(rig.vm, pages[0])
        assert found["root_hpa"] == lent["root_hpa"]
        await inspector.dump(tmp_path, rig.vm)
        dump = Dump(tmp_path)
        assert dump.mismatches() == []
        assert dump.document["root_hpa"] == lent["root_hpa"]
        writable = {probe["gpa"] for probe in dump.document["probes"] if probe["writable"]}
        assert set(pages) <= writable, "tracking protects it from CPUs alone"


# -- what costs a device nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [PAGE_SIZE, 2 * MIB], ids=["4K", "2M"])
async def test_logging_costs_no_io_page_fault_and_tells_every_dma_write(host: Host, page_size: int) -> None:
    async with attached(host, page_size=page_size) as rig:
        buffer = await rig.process.mmap(MIB)
        pages = allocate(rig, 16, 2 * MIB)
        await device_writes(rig, pages)
        since = await Since.now(host)
        await log_slot_0(rig)
        for _ in range(3):
            assert {page >> 12 for page in pages} <= await dirty(rig, buffer)
            await device_writes(rig, pages)
        await log_slot_0(rig, on=False)
        await device_writes(rig, pages)
        assert await since.told() == NOTHING


async def test_the_same_with_a_shared_root_costs_a_fault_a_page_and_round(host: Host) -> None:
    """What the role bit is worth."""
    async with attached(host, own=False) as rig:
        buffer = await rig.process.mmap(MIB)
        pages = allocate(rig, 16)
        await device_writes(rig, pages)
        since = await Since.now(host)
        await log_slot_0(rig)
        for _ in range(3):
            await device_writes(rig, pages)
            assert {page >> 12 for page in pages} <= await dirty(rig, buffer)
        told = await since.told()
        assert told["page_requests"] == told["io_pf_fixed"] == 3 * (len(pages) + 1), "and its records"
        assert told["invalidation_descriptors"] > 0


async def test_a_page_of_the_devices_that_the_host_takes_while_it_is_logged_is_told(host: Host) -> None:
    async with attached(host) as rig:
        buffer = await rig.process.mmap(MIB)
        (page,) = allocate(rig, 1)
        await device_writes(rig, [page])
        await log_slot_0(rig)
        await dirty(rig, buffer)
        await device_writes(rig, [page])
        await rig.process.move_pages(rig.hva + page, PAGE_SIZE)
        assert page >> 12 in await dirty(rig, buffer)
        assert page >> 12 not in await dirty(rig, buffer)
        await device_writes(rig, [page])
        assert page >> 12 in await dirty(rig, buffer)


async def test_another_slots_deletion_takes_nothing_from_a_device(host: Host) -> None:
    async with attached(host) as rig:
        pages = allocate(rig, 16)
        await device_writes(rig, pages)
        since = await Since.now(host)
        for number in range(4):
            await rig.vm.set_user_memory_region(5, FAR, MIB, rig.hva + number * MIB)
            await rig.vm.set_user_memory_region(5, FAR, 0, 0)
        await device_writes(rig, pages)
        assert await since.told() == NOTHING
        await rig.vm.set_user_memory_region(5, FAR, MIB, rig.hva)
        await device_writes(rig, [Gpa(FAR)])
        await rig.vm.set_user_memory_region(5, FAR, 0, 0)
        assert await rig.fill(FAR) is not Status.SUCCESS
        told = await since.told()
        assert told["invalidation_descriptors"] > 0, "its own leaf was taken"
        await device_writes(rig, pages)
        assert (await since.told())["io_pf_fixed"] == told["io_pf_fixed"] == 1


async def test_ageing_and_tracking_tell_no_importer(host: Host) -> None:
    async with attached(host) as rig:
        pages = allocate(rig, 16)
        await device_writes(rig, pages)
        since = await Since.now(host)
        assert await rig.process.host_action("age", rig.hva + pages[0], 16 * PAGE_SIZE) == 1
        assert await rig.process.host_action("age", rig.hva + pages[0], 16 * PAGE_SIZE) == 0
        await rig.vm.page_track_add(pages[3])
        await device_writes(rig, pages)
        assert await since.told() == NOTHING


async def test_what_the_host_takes_away_is_taken_from_both(host: Host) -> None:
    async with attached(host) as rig:
        pages = allocate(rig, 8)
        await device_writes(rig, pages)
        since = await Since.now(host)
        await rig.process.madvise_dontneed(rig.hva + pages[0], 8 * PAGE_SIZE)
        await device_writes(rig, pages)
        await cpu_writes(rig, pages)
        told = await since.told()
        assert (told["io_pf_fixed"], told["pf_fixed"], told["page_requests"]) == (8, 0, 8)
        assert told["invalidation_descriptors"] > 0


async def test_a_tdp_fd_that_is_closed_leaves_the_cpus_table_alone(host: Host) -> None:
    async with vm_only(host) as rig:
        await rig.vm.enable_cap(names.KVM_CAP_TDP_FD_OWN_ROOT)
        await attach_device(rig)
        pages = allocate(rig, 8)
        await device_writes(rig, pages)
        iommu, device = rig.bound
        await device.detach()
        await iommu.destroy(rig.hwpt_id)
        rig.close_tdp_fd()
        inspector = Inspector(host.kvmd.channel)
        await eventually(
            lambda: inspector.vm(rig.vm),
            lambda vm: [root["owner"] for root in vm["roots"]] == ["cpu"],
            "the IOMMU's root is taken apart",
        )
        since = await Since.now(host)
        await cpu_writes(rig, pages)
        assert (await since.told())["pf_fixed"] == 0
        assert await host.kvmd.violations() == []
