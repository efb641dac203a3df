"""IOMMU_IOAS_ALLOW_IOVAS as the kernel's iommufd selftest has it: area_auto_iova, area_allowed."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest

from protocol.units import MIB, PAGE_SIZE
from qemu_shim.vmm.machine import Host
from tests.integration.test_iommufd_uapi import GARBAGE
from tests.kit.refusals import refused
from tests.kit.vmm import bind_device, vm_only

TOP = (1 << 64) - 1
MESSAGES = 0xFEE0_0000


def span(first: int, last: int) -> bytes:
    return struct.pack("<QQ", first, last)


# Each row has the faults of those below it, too, as far as they go together.
REFUSED: list[tuple[dict[str, Any], int]] = [
    ({"reserved": 1, "ioas_id": GARBAGE}, errno.EOPNOTSUPP),
    ({"ioas_id": GARBAGE, "num_iovas": 1}, errno.ENOENT),
    ({"num_iovas": 1, "allowed_iovas": None}, errno.EFAULT),
    ({"num_iovas": 1, "allowed_iovas": span(2, 1)[:15]}, errno.EFAULT),
    ({"num_iovas": 2, "allowed_iovas": span(2, 1)}, errno.EINVAL),  # the first is looked at first
    ({"num_iovas": 2, "allowed_iovas": span(1, 2)}, errno.EFAULT),
    ({"num_iovas": 1, "allowed_iovas": span(7, 7)}, errno.EINVAL),  # as the kernel has it: one byte is none
    ({"num_iovas": 2, "allowed_iovas": span(0, 9) + span(9, 12)}, errno.EINVAL),
    ({"num_iovas": 2, "allowed_iovas": span(0, TOP) + span(9, 12)}, errno.EINVAL),
    ({"num_iovas": 2, "allowed_iovas": span(0, 9) + span(10, MESSAGES)}, errno.EADDRINUSE),
    ({"num_iovas": 1, "allowed_iovas": span(0, 1 << 48)}, errno.EADDRINUSE),
]


@pytest.mark.parametrize(("fields", "number"), REFUSED, ids=str)
async def test_ranges_are_refused_in_the_kernels_order_and_nothing_changes(
    host: Host, fields: dict[str, Any], number: int
) -> None:
    async with vm_only(host) as rig:
        await bind_device(rig)
        iommu, _ = rig.bound
        ioas = await iommu.ioas_alloc()
        await iommu.hwpt_alloc(rig.device_id, ioas)
        await iommu.allow_iovas(ioas, [(MIB, 2 * MIB - 1)])
        with refused(number):
            await iommu.ask("IOMMU_IOAS_ALLOW_IOVAS", **{"ioas_id": ioas, **fields})
        assert await iommu.ioas_map(ioas, rig.process, rig.hva + PAGE_SIZE, PAGE_SIZE) == MIB


async def test_iovas_are_aligned_and_found_in_what_is_allowed(host: Host) -> None:
    async with vm_only(host) as rig:
        await bind_device(rig)
        iommu, _ = rig.bound
        ioas = await iommu.ioas_alloc()
        await iommu.hwpt_alloc(rig.device_id, ioas)
        whole = await iommu.iova_ranges(ioas)
        for allowed in ([], [(200 * PAGE_SIZE, 600 * PAGE_SIZE - 1)]):
            await iommu.allow_iovas(ioas, allowed)
            assert await iommu.iova_ranges(ioas) == whole  # it narrows nothing but what is chosen for him
            first, last = allowed[0] if allowed else (PAGE_SIZE, TOP)
            for pages in range(1, 11):
                length = pages * PAGE_SIZE
                iova = await iommu.ioas_map(ioas, rig.process, rig.hva, length)
                assert iova % (length & -length) == 0
                assert first <= iova <= iova + length - 1 <= last
            await iommu.ioas_map(ioas, rig.process, rig.hva, PAGE_SIZE, 1 << 40)  # where he says: anywhere
            await iommu.ioas_unmap(ioas, 0, TOP)
        with refused(errno.ENOSPC, "no room"):
            await iommu.ioas_map(ioas, rig.process, rig.hva, 401 * PAGE_SIZE)
        await iommu.allow_iovas(ioas, [])
        await iommu.ioas_map(ioas, rig.process, rig.hva, 401 * PAGE_SIZE)


async def test_an_hwpt_that_would_narrow_what_is_allowed_is_eaddrinuse(host: Host) -> None:
    """It must stay available as long as it is on the list."""
    async with vm_only(host) as rig:
        await bind_device(rig)
        iommu, _ = rig.bound
        ioas = await iommu.ioas_alloc()
        await iommu.allow_iovas(ioas, [(1 << 47, 1 << 48)])
        with refused(errno.EADDRINUSE, "stay available"):
            await iommu.hwpt_alloc(rig.device_id, ioas)
        assert (await iommu.iova_ranges(ioas))[-1][1] == TOP
        await iommu.allow_iovas(ioas, [(1 << 47, (1 << 48) - 1)])
        await iommu.hwpt_alloc(rig.device_id, ioas)
