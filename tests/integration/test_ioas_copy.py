"""IOMMU_IOAS_COPY as the kernel's iommufd selftest has it: copy_area, user_copy; and under DMA."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from protocol.hw.dsa import Status
from protocol.units import GIB, PAGE_SIZE
from qemu_shim.vmm.machine import Host, connect_host
from tests.integration.on_ioas import RAM, hwpt_stats, on_ioas
from tests.integration.test_iommufd_uapi import GARBAGE
from tests.kit.daemons import system
from tests.kit.refusals import refused
from tests.kit.vmm import FILLED, GUEST_START, bind_device, device_stats, vm_only

TOP = (1 << 64) - 1
RW, FIXED = 2 | 4, 1

# Each row has the faults of those below it, too, as far as they go together.  Object 2 is the source, 3 the
# destination, 4 on demand.
REFUSED: list[tuple[dict[str, Any], int]] = [
    ({"flags": 8, "length": TOP, "src_ioas_id": GARBAGE}, errno.EOPNOTSUPP),
    ({"length": TOP, "flags": 0, "src_ioas_id": GARBAGE}, errno.EOVERFLOW),
    ({"src_iova": TOP, "flags": 0}, errno.EOVERFLOW),
    ({"dst_iova": TOP, "flags": 0}, errno.EOVERFLOW),
    ({"flags": FIXED, "src_ioas_id": GARBAGE}, errno.EINVAL),
    ({"flags": FIXED | 2, "src_ioas_id": GARBAGE}, errno.EOPNOTSUPP),  # write-only: a departure
    ({"src_ioas_id": GARBAGE, "dst_ioas_id": GARBAGE, "length": 0}, errno.ENOENT),
    ({"src_ioas_id": 4, "dst_ioas_id": GARBAGE, "length": 0}, errno.EOPNOTSUPP),
    ({"length": 0, "dst_ioas_id": GARBAGE}, errno.EINVAL),
    ({"src_iova": TOP - 1, "length": 2 * PAGE_SIZE, "dst_ioas_id": GARBAGE}, errno.EOVERFLOW),
    ({"src_iova": 3 * PAGE_SIZE, "length": 2 * PAGE_SIZE, "dst_ioas_id": GARBAGE}, errno.ENOENT),
    ({"dst_ioas_id": GARBAGE, "length": 1}, errno.ENOENT),
    ({"dst_ioas_id": 1, "length": 1}, errno.ENOENT),
    ({"dst_ioas_id": 4, "length": 1}, errno.EOPNOTSUPP),
    ({"length": 1, "dst_iova": 1}, errno.EINVAL),
    ({"dst_iova": 1}, errno.EINVAL),
    ({"dst_iova": 0xFEE0_0000}, errno.EINVAL),
    ({"dst_ioas_id": 2, "src_iova": 6 * PAGE_SIZE}, errno.EEXIST),
    ({"src_iova": 6 * PAGE_SIZE}, errno.EPERM),  # mapped to be read
]


@pytest.mark.parametrize(("fields", "number"), REFUSED, ids=str)
async def test_a_copy_is_refused_in_the_kernels_order_and_leaves_nothing(
    host: Host, fields: dict[str, Any], number: int
) -> None:
    async with vm_only(host) as rig:
        await bind_device(rig)
        iommu, _ = rig.bound
        src, dst, _ = [await iommu.ioas_alloc(on_demand=on_demand) for on_demand in (False, False, True)]
        await iommu.hwpt_alloc(rig.device_id, dst)
        await iommu.ioas_map(src, rig.process, rig.hva, 4 * PAGE_SIZE, 0)
        await iommu.ioas_map(src, rig.process, rig.hva, PAGE_SIZE, 6 * PAGE_SIZE, writable=False)
        usual = {"flags": RW | FIXED, "src_ioas_id": src, "dst_ioas_id": dst, "src_iova": 0}
        with refused(number):
            await iommu.ask("IOMMU_IOAS_COPY", **{**usual, "length": PAGE_SIZE, **fields})
        assert (await hwpt_stats(host))["leaves"] == [0, 0, 0]
        assert (await host.iommufdd.stats())["pinned_pages"] == 0


async def test_areas_are_copied_within_an_ioas_and_to_another(host: Host) -> None:
    async with vm_only(host) as rig:
        await bind_device(rig)
        iommu, _ = rig.bound
        src, dst = await iommu.ioas_alloc(), await iommu.ioas_alloc()
        await iommu.hwpt_alloc(rig.device_id, dst)
        await iommu.ioas_map(src, rig.process, rig.hva, PAGE_SIZE, 0)
        assert await iommu.ioas_copy(src, 0, PAGE_SIZE, src, PAGE_SIZE) == PAGE_SIZE
        assert await iommu.ioas_copy(src, 0, 2 * PAGE_SIZE, dst, 0) == 0
        assert (await hwpt_stats(host))["leaves"] == [2, 0, 0]
        assert (await host.iommufdd.stats())["pinned_pages"] == 1, "it is one page"
        assert await iommu.ioas_copy(src, 0, PAGE_SIZE, dst) == 2 * PAGE_SIZE
        assert await iommu.ioas_unmap(src, 0, TOP) == 2 * PAGE_SIZE
        await iommu.destroy(src)
        assert (await hwpt_stats(host))["leaves"] == [3, 0, 0]
        assert await iommu.ioas_unmap(dst, 0, TOP) == 3 * PAGE_SIZE
        assert (await host.iommufdd.stats())["pinned_pages"] == 0
        assert (await host.kvmd.stats())["memory"]["pinned_pages"] == 0


async def test_a_copy_is_charged_once() -> None:
    """As many pages as RLIMIT_MEMLOCK allows, in two tables."""
    with system({"kvmd": ["--memlock", "64K"]}) as running:
        async with connect_host(running.directory) as host, vm_only(host) as rig:
            await bind_device(rig)
            iommu, _ = rig.bound
            src, dst = await iommu.ioas_alloc(), await iommu.ioas_alloc()
            for ioas in (src, dst):
                await iommu.hwpt_alloc(rig.device_id, ioas)
            await iommu.ioas_map(src, rig.process, rig.hva, 16 * PAGE_SIZE, 0)
            await iommu.ioas_copy(src, 0, 16 * PAGE_SIZE, dst, GIB)
            with refused(errno.ENOMEM, "RLIMIT_MEMLOCK"):
                await iommu.ioas_map(src, rig.process, rig.hva, PAGE_SIZE, GIB)


async def test_a_device_goes_on_through_a_copy_when_the_source_is_gone(host: Host) -> None:
    """The frame it reaches is the process's, and stays, whatever becomes of the IOAS it was copied from."""
    async with on_ioas(host) as rig:
        iommu, device = rig.bound
        dst = await iommu.ioas_alloc()
        await iommu.ioas_copy(rig.ioas_id, 0, RAM, dst, 0)
        old, rig.hwpt_id = rig.hwpt_id, await iommu.hwpt_alloc(rig.device_id, dst)
        await device.attach(rig.hwpt_id)
        await iommu.destroy(old)
        await iommu.ioas_unmap(rig.ioas_id, 0, TOP)
        await iommu.destroy(rig.ioas_id)
        assert await rig.fill(GUEST_START) is Status.SUCCESS
        assert await rig.seen_by_process(GUEST_START) == FILLED
        await rig.process.madvise_dontneed(rig.hva + GUEST_START, RAM - GUEST_START)
        assert await rig.fill(GUEST_START) is Status.SUCCESS
        assert (await device_stats(host))["stale_accesses"] == 0
        assert await host.kvmd.violations() == []
        assert (await host.iommufdd.violations()) == []
