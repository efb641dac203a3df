"""IOMMU_IOAS_* row by row: the errnos of the kernel, in its order."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from protocol.errors import UapiError
from protocol.units import GIB, PAGE_SIZE
from qemu_shim.vmm.machine import Host
from tests.integration.on_ioas import hwpt_stats
from tests.integration.test_iommufd_uapi import GARBAGE
from tests.kit.refusals import refused
from tests.kit.vmm import Vmm, bind_device, vm_only

TOP = (1 << 64) - 1
RW = 2 | 4
FIXED = 1
MESSAGES = 0xFEE0_0000


@asynccontextmanager
async def bound(host: Host, *, on_demand: bool = False) -> AsyncIterator[tuple[Vmm, int]]:
    """A device on an HWPT of an empty IOAS."""
    async with vm_only(host) as rig:
        await bind_device(rig)
        iommu, device = rig.bound
        ioas = await iommu.ioas_alloc(on_demand=on_demand)
        await device.attach(await iommu.hwpt_alloc(rig.device_id, ioas))
        yield rig, ioas


async def ask_map(rig: Vmm, ioas: int, **changed: Any) -> None:
    body = {"flags": RW | FIXED, "ioas_id": ioas, "user_va": rig.hva, "length": PAGE_SIZE, "iova": 0}
    await rig.bound[0].ask("IOMMU_IOAS_MAP", [rig.process.dup()], **{**body, **changed})


# Each row has the faults of those below it, too, as far as they go together.
MAP: list[tuple[dict[str, Any], int]] = [
    ({"flags": 8, "iova": TOP, "ioas_id": GARBAGE}, errno.EOPNOTSUPP),
    ({"reserved": 1, "iova": TOP, "flags": 0}, errno.EOPNOTSUPP),
    ({"iova": TOP, "flags": FIXED, "ioas_id": GARBAGE}, errno.EOVERFLOW),
    ({"length": TOP, "flags": FIXED, "ioas_id": GARBAGE}, errno.EOVERFLOW),
    ({"flags": FIXED, "ioas_id": GARBAGE}, errno.EINVAL),
    ({"flags": FIXED | 2, "ioas_id": GARBAGE}, errno.EOPNOTSUPP),  # write-only: a departure
    ({"ioas_id": GARBAGE, "length": 0}, errno.ENOENT),
    ({"length": 0, "iova": 2 * PAGE_SIZE}, errno.EINVAL),
    ({"length": 1, "iova": 2 * PAGE_SIZE}, errno.EINVAL),
    ({"iova": 1}, errno.EINVAL),
    ({"user_va": 1}, errno.EINVAL),
    ({"user_va": TOP - PAGE_SIZE + 1}, errno.EOVERFLOW),
    ({"iova": TOP - PAGE_SIZE + 1, "length": 2 * PAGE_SIZE}, errno.EOVERFLOW),
    ({"iova": MESSAGES}, errno.EINVAL),
    ({"iova": MESSAGES - PAGE_SIZE, "length": 2 * PAGE_SIZE}, errno.EINVAL),
    ({"iova": 1 << 48}, errno.EINVAL),
    ({"iova": 2 * PAGE_SIZE}, errno.EEXIST),
    ({"iova": PAGE_SIZE, "length": 2 * PAGE_SIZE, "user_va": 0}, errno.EEXIST),
    ({"flags": RW, "length": 1 << 48}, errno.ENOSPC),
    ({"user_va": 1 << 56}, errno.EFAULT),
    ({"user_va": 1 << 57}, errno.EFAULT),
]


@pytest.mark.parametrize(("changed", "number"), MAP, ids=str)
async def test_a_map_is_refused_in_the_kernels_order_and_leaves_nothing(
    host: Host, changed: dict[str, Any], number: int
) -> None:
    async with bound(host) as (rig, ioas):
        await ask_map(rig, ioas, iova=2 * PAGE_SIZE)
        with refused(number):
            await ask_map(rig, ioas, **changed)
        assert (await hwpt_stats(host))["leaves"] == [1, 0, 0]
        assert (await host.iommufdd.stats())["pinned_pages"] == 1


UNMAP: list[tuple[dict[str, int], int, int]] = [
    ({"ioas_id": GARBAGE, "length": 0}, errno.ENOENT, 3),
    ({"iova": 0, "length": 0}, errno.EINVAL, 3),
    ({"iova": TOP, "length": 1}, errno.EOVERFLOW, 3),
    ({"iova": PAGE_SIZE, "length": TOP}, errno.EOVERFLOW, 3),
    ({"iova": PAGE_SIZE, "length": TOP - 1}, errno.EOVERFLOW, 3),
    ({"iova": 64 * PAGE_SIZE, "length": PAGE_SIZE}, errno.ENOENT, 3),
    ({"iova": 0, "length": 3 * PAGE_SIZE}, errno.ENOENT, 2),  # cuts the second area, the first is gone
    ({"iova": PAGE_SIZE, "length": PAGE_SIZE}, errno.ENOENT, 3),
    ({"iova": 0, "length": 4 * PAGE_SIZE}, 0, 1),
    ({"iova": 0, "length": TOP}, 0, 0),
]


@pytest.mark.parametrize(("changed", "number", "left"), UNMAP, ids=str)
async def test_an_unmap_takes_whole_areas_or_says_why_not(
    host: Host, changed: dict[str, int], number: int, left: int
) -> None:
    async with bound(host) as (rig, ioas):
        iommu, _ = rig.bound
        for n in (0, 2, 4):
            await iommu.ioas_map(ioas, rig.process, rig.hva + n * PAGE_SIZE, 2 * PAGE_SIZE, n * PAGE_SIZE)
        body = {"ioas_id": ioas, "iova": 0, **changed}
        if number:
            with refused(number):
                await iommu.ask("IOMMU_IOAS_UNMAP", **body)  # type: ignore[arg-type]
        else:
            unmapped = await iommu.ioas_unmap(ioas, body["iova"], body["length"])
            assert unmapped == (3 - left) * 2 * PAGE_SIZE
        assert (await hwpt_stats(host))["leaves"] == [2 * left, 0, 0]
        assert (await host.iommufdd.stats())["pinned_pages"] == 2 * left
        assert await iommu.ioas_unmap(ioas, 0, TOP) == 2 * left * PAGE_SIZE
        assert await iommu.ioas_unmap(ioas, 0, TOP) == 0


async def test_room_is_found_from_below_aligned_as_the_memory_is(host: Host) -> None:
    async with bound(host) as (rig, ioas):
        iommu, _ = rig.bound
        assert rig.hva % (1 << 21) == 0
        found = [
            await iommu.ioas_map(ioas, rig.process, rig.hva + at, size)
            for at, size in ((0, PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE), (0, 1 << 21), (PAGE_SIZE, 1 << 21))
        ]
        assert found == [PAGE_SIZE, 2 * PAGE_SIZE, 1 << 21, 1 << 22]


async def test_ranges_leave_out_interrupts_and_what_no_hwpt_reaches(host: Host) -> None:
    async with vm_only(host) as rig:
        await bind_device(rig)
        iommu, _ = rig.bound
        ioas = await iommu.ioas_alloc()
        assert await iommu.iova_ranges(ioas) == [(0, MESSAGES - 1), (MESSAGES + (1 << 20), TOP)]
        hwpt = await iommu.hwpt_alloc(rig.device_id, ioas)
        assert (await iommu.iova_ranges(ioas))[1] == (MESSAGES + (1 << 20), (1 << 48) - 1)
        await iommu.destroy(hwpt)
        assert (await iommu.iova_ranges(ioas))[1][1] == TOP
        reply = (await iommu.ask("IOMMU_IOAS_IOVA_RANGES", ioas_id=ioas, num_iovas=1)).body
        assert (reply["num_iovas"], len(reply["allowed_iovas"]), reply["truncated"]) == (2, 1, True)
        assert reply["out_iova_alignment"] == PAGE_SIZE
        for changed, number in (
            ({"reserved": 1, "ioas_id": GARBAGE}, errno.EOPNOTSUPP),
            ({"ioas_id": GARBAGE}, errno.ENOENT),
            ({"ioas_id": rig.device_id}, errno.ENOENT),
        ):
            with refused(number):
                await iommu.ask("IOMMU_IOAS_IOVA_RANGES", **changed)  # type: ignore[arg-type]


async def test_following_a_vm_needs_an_ioas_on_demand_and_a_vm_and_happens_once(host: Host) -> None:
    async with bound(host, on_demand=True) as (rig, ioas):
        iommu, _ = rig.bound
        pinned = await iommu.ioas_alloc()
        with refused(errno.EINVAL, "on demand"):
            await iommu.follow_kvm(pinned, rig.vm)
        with refused(errno.EINVAL):
            await iommu.ask("IOMMU_IOAS_FOLLOW_KVM", [rig.process.dup()], ioas_id=ioas)
        with refused(errno.EBADF):
            await iommu.ask("IOMMU_IOAS_FOLLOW_KVM", ioas_id=ioas)
        with refused(errno.EOPNOTSUPP):
            await iommu.ask("IOMMU_IOAS_FOLLOW_KVM", [rig.vm.dup()], ioas_id=GARBAGE, reserved=1)
        with refused(errno.ENOENT):
            await iommu.ask("IOMMU_IOAS_FOLLOW_KVM", [rig.vm.dup()], ioas_id=GARBAGE)
        await iommu.follow_kvm(ioas, rig.vm)
        with refused(errno.EBUSY):
            await iommu.follow_kvm(ioas, rig.vm)


@pytest.mark.parametrize("on_demand", [False, True], ids=["pinned", "on demand"])
async def test_an_ioas_maps_any_process_and_one_on_demand_the_first(host: Host, on_demand: bool) -> None:
    async with bound(host, on_demand=on_demand) as (rig, ioas):
        iommu, _ = rig.bound
        other = await host.kvmd.start_process()
        rig.extra.append(other)
        hva = await other.mmap(PAGE_SIZE)
        await iommu.ioas_map(ioas, rig.process, rig.hva, PAGE_SIZE, 0)
        if on_demand:
            with refused(errno.EINVAL, "another process"):
                await iommu.ioas_map(ioas, other, hva, PAGE_SIZE, PAGE_SIZE)
        else:
            await iommu.ioas_map(ioas, other, hva, PAGE_SIZE, PAGE_SIZE)
            assert (await hwpt_stats(host))["leaves"] == [2, 0, 0]
        with refused(errno.EBADF):
            await iommu.ask("IOMMU_IOAS_MAP", flags=RW, ioas_id=ioas, user_va=rig.hva, length=PAGE_SIZE)


async def test_memory_is_in_one_area_of_an_ioas_on_demand(host: Host) -> None:
    async with bound(host, on_demand=True) as (rig, ioas):
        iommu, _ = rig.bound
        await iommu.ioas_map(ioas, rig.process, rig.hva, 2 * PAGE_SIZE, 0)
        with refused(errno.EEXIST):
            await iommu.ioas_map(ioas, rig.process, rig.hva + PAGE_SIZE, 2 * PAGE_SIZE, GIB)
        await iommu.ioas_unmap(ioas, 0, 2 * PAGE_SIZE)
        await iommu.ioas_map(ioas, rig.process, rig.hva + PAGE_SIZE, 2 * PAGE_SIZE, GIB)


async def test_an_ioas_is_alloced_with_known_flags_alone_and_goes_with_its_areas(host: Host) -> None:
    async with bound(host) as (rig, ioas):
        iommu, _ = rig.bound
        for flags in (2, 3, 1 << 31):
            with refused(errno.EOPNOTSUPP):
                await iommu.ask("IOMMU_IOAS_ALLOC", flags=flags)
        other = await iommu.ioas_alloc(on_demand=True)
        await iommu.ioas_map(other, rig.process, rig.hva, PAGE_SIZE, 0)
        await iommu.destroy(other)
        with pytest.raises(UapiError):
            await iommu.iova_ranges(other)
        with refused(errno.EBUSY):
            await iommu.destroy(ioas)
