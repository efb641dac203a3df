"""IOMMU_OPTION as the kernel's selftest has it (global_options, ioas_option_huge_pages), and what it does."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest

from protocol.units import MIB, PAGE_SIZE
from qemu_shim.vmm.iommufd_client import Iommu
from qemu_shim.vmm.machine import Host, connect_host
from tests.integration.on_ioas import hwpt_stats
from tests.integration.test_iommufd_uapi import GARBAGE
from tests.kit.daemons import system
from tests.kit.refusals import refused
from tests.kit.vmm import bind_device, nothing_left, vm_only

SET, GET = 0, 1
RLIMIT_MODE, HUGE_PAGES = 0, 1


async def option(iommu: Iommu, **fields: Any) -> int:
    value: int = (await iommu.ask("IOMMU_OPTION", **fields)).body["val64"]
    return value


@asynccontextmanager
async def nothing_yet(host: Host) -> AsyncIterator[Iommu]:
    """An iommufd without any object."""
    process = await host.kvmd.start_process()
    iommu = await host.iommufdd.open_iommu(process)
    yield iommu
    iommu.close()
    process.close()
    await nothing_left(host)


async def test_rlimit_mode_is_user_at_first_and_is_set_and_read(host: Host) -> None:
    async with nothing_yet(host) as iommu:
        mode = {"option_id": RLIMIT_MODE}
        assert await option(iommu, **mode, option_op=GET, val64=1) == 0
        for value in (1, 0, 1):
            assert await option(iommu, **mode, option_op=SET, val64=value) == value
            with refused(errno.EINVAL, "0 or 1"):
                await option(iommu, **mode, option_op=SET, val64=2)
            assert await option(iommu, **mode, option_op=GET) == value
        for op in (GET, SET):
            with refused(errno.ENOENT):
                await option(iommu, option_id=HUGE_PAGES, option_op=op)


# Each row has the faults of those below it, too, as far as they go together.
REFUSED: list[tuple[dict[str, int], int]] = [
    ({"option_id": GARBAGE, "reserved": 1, "option_op": 2}, errno.EOPNOTSUPP),
    ({"option_id": 2}, errno.EOPNOTSUPP),
    ({"object_id": 1, "option_op": GET}, errno.EOPNOTSUPP),
    ({"object_id": 1, "val64": 2}, errno.EOPNOTSUPP),
    ({"option_op": 2, "val64": 2}, errno.EOPNOTSUPP),
    ({"val64": 2}, errno.EBUSY),
    ({"val64": 1}, errno.EBUSY),
    ({"option_id": HUGE_PAGES, "object_id": GARBAGE, "option_op": 2}, errno.ENOENT),
    ({"option_id": HUGE_PAGES, "object_id": 2, "option_op": 2, "val64": 2}, errno.EOPNOTSUPP),
    ({"option_id": HUGE_PAGES, "object_id": 2, "val64": 2}, errno.EINVAL),
]


@pytest.mark.parametrize(("fields", "number"), REFUSED, ids=str)
async def test_an_option_is_refused_in_the_kernels_order(
    host: Host, fields: dict[str, int], number: int
) -> None:
    async with vm_only(host) as rig:
        await bind_device(rig)  # object 1
        assert await rig.bound[0].ioas_alloc() == 2
        with refused(number):
            await option(rig.bound[0], **{"option_id": RLIMIT_MODE, "option_op": SET, **fields})


async def test_huge_pages_are_on_at_first_and_are_set_and_read(host: Host) -> None:
    async with nothing_yet(host) as iommu:
        huge = {"option_id": HUGE_PAGES, "object_id": await iommu.ioas_alloc()}
        assert await option(iommu, **huge, option_op=GET, val64=3) == 1
        assert await option(iommu, **huge, option_op=SET, val64=0) == 0
        assert await option(iommu, **huge, option_op=GET, val64=3) == 0
        with refused(errno.EINVAL):
            await option(iommu, **huge, option_op=SET, val64=2)
        assert await option(iommu, **huge, option_op=SET, val64=1) == 1


@pytest.mark.parametrize("on_demand", [False, True], ids=["pinned", "on demand"])
async def test_without_huge_pages_a_huge_page_has_small_leaves(host: Host, on_demand: bool) -> None:
    async with vm_only(host, page_size=2 * MIB) as rig:
        await bind_device(rig)
        iommu, device = rig.bound
        ioas = await iommu.ioas_alloc(on_demand=on_demand)
        await iommu.set_huge_pages(ioas, on=False)
        await iommu.ioas_map(ioas, rig.process, rig.hva, 4 * MIB, 0)
        await iommu.set_huge_pages(ioas, on=True)  # there is no HWPT yet
        await iommu.set_huge_pages(ioas, on=False)
        hwpt = await iommu.hwpt_alloc(rig.device_id, ioas)
        await device.attach(hwpt)
        if on_demand:
            await device.pin(0, 4 * MIB)
        assert (await hwpt_stats(host))["leaves"] == [1024, 0, 0]
        await iommu.set_huge_pages(ioas, on=False)  # as it is
        await iommu.set_huge_pages(ioas, on=True)
        with refused(errno.EINVAL, "large pages"):
            await iommu.set_huge_pages(ioas, on=False)
        await iommu.ioas_map(ioas, rig.process, rig.hva + 8 * MIB, 2 * MIB, 8 * MIB)
        assert (await hwpt_stats(host))["leaves"] == [1024, int(not on_demand), 0]
        await iommu.ioas_unmap(ioas, 0, (1 << 64) - 1)
        await iommu.set_huge_pages(ioas, on=False)  # there is no area any more


@pytest.mark.parametrize(("mode", "second"), [("user", errno.ENOMEM), ("mm", 0)])
async def test_two_processes_share_the_limit_of_their_user_or_have_one_each(
    mode: Literal["user", "mm"], second: int
) -> None:
    """Both pin three quarters of RLIMIT_MEMLOCK."""
    with system({"kvmd": ["--memlock", "64K"], "device_sim": ["--devices", "3"]}) as running:
        async with connect_host(running.directory) as host, vm_only(host) as rig:
            await bind_device(rig)
            for number, expected in enumerate((0, second)):
                process = await host.kvmd.start_process()
                iommu = await host.iommufdd.open_iommu(process)
                await iommu.set_rlimit_mode(mode)
                device = await host.iommufdd.open_device(1 + number)
                rig.extra += [process, iommu, device]
                ioas = await iommu.ioas_alloc()
                await iommu.hwpt_alloc(await device.bind(iommu), ioas)
                hva = await process.mmap(16 * PAGE_SIZE)
                if expected:
                    with refused(expected, "the user has 16 pages pinned, of 16"):
                        await iommu.ioas_map(ioas, process, hva, 12 * PAGE_SIZE, 0)
                else:
                    await iommu.ioas_map(ioas, process, hva, 12 * PAGE_SIZE, 0)
                    with refused(errno.ENOMEM, "RLIMIT_MEMLOCK"):
                        await iommu.ioas_map(ioas, process, hva, 5 * PAGE_SIZE, MIB)
            assert await host.kvmd.violations() == []
