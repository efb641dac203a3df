"""IOMMU_IOAS_MAP_FILE and IOMMU_IOAS_CHANGE_PROCESS, as the kernel's iommufd selftest has them (map_file,
iommufd_change_process), and what the file's users see of it.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest

from protocol.hw.dsa import Status
from protocol.units import MIB, PAGE_SIZE
from qemu_shim.vmm.iommufd_client import Iommu
from qemu_shim.vmm.machine import Host, connect_host
from qemu_shim.vmm.process import MemFd, Process
from tests.integration.on_ioas import RAM, hwpt_stats, on_ioas
from tests.integration.test_iommufd_uapi import GARBAGE
from tests.kit.daemons import eventually, system
from tests.kit.refusals import refused
from tests.kit.vmm import FILLED, Vmm, bind_device, device_stats, vm_only

TOP = (1 << 64) - 1
RW, FIXED = 2 | 4, 1
FILE = 16 * PAGE_SIZE
AT = 1 << 40


@asynccontextmanager
async def filed(host: Host, size: int = FILE) -> AsyncIterator[tuple[Vmm, int, MemFd]]:
    """An IOAS with an HWPT, and a memfd."""
    async with vm_only(host) as rig:
        await bind_device(rig)
        iommu, _ = rig.bound
        ioas = await iommu.ioas_alloc()
        await iommu.hwpt_alloc(rig.device_id, ioas)
        file = await rig.process.memfd("file", size)
        rig.extra.append(file)
        yield rig, ioas, file


# Each row has the faults of those below it, too, as far as they go together.  Objects: 2 an IOAS, 3 its HWPT,
# 4 an IOAS on demand.
REFUSED: list[tuple[dict[str, Any], int]] = [
    ({"flags": 8, "length": TOP, "ioas_id": GARBAGE}, errno.EOPNOTSUPP),
    ({"length": TOP, "flags": 0, "ioas_id": GARBAGE}, errno.EOVERFLOW),
    ({"iova": TOP, "flags": FIXED, "ioas_id": GARBAGE}, errno.EOVERFLOW),
    ({"flags": FIXED, "ioas_id": GARBAGE}, errno.EINVAL),
    ({"ioas_id": GARBAGE, "fd": -1}, errno.ENOENT),
    ({"ioas_id": 3, "fd": -1}, errno.ENOENT),
    ({"ioas_id": 4, "fd": -1}, errno.EOPNOTSUPP),
    ({"fd": -1, "length": 0}, errno.EBADF),
    ({"fd": GARBAGE, "length": 0}, errno.EBADF),
    ({"length": 0, "iova": 1}, errno.EINVAL),
    ({"length": 1, "iova": 1}, errno.EINVAL),
    ({"start": TOP - PAGE_SIZE + 1}, errno.EOVERFLOW),
    ({"start": 1}, errno.EINVAL),
    ({"iova": 1}, errno.EINVAL),
    ({"iova": 0xFEE0_0000}, errno.EINVAL),
    ({"start": FILE}, errno.EINVAL),
    ({"start": FILE - PAGE_SIZE, "length": 2 * PAGE_SIZE}, errno.EINVAL),
    ({"start": 1 << 60}, errno.EINVAL),
]


@pytest.mark.parametrize(("fields", "number"), REFUSED, ids=str)
async def test_a_file_is_refused_in_the_kernels_order_and_leaves_nothing(
    host: Host, fields: dict[str, Any], number: int
) -> None:
    async with filed(host) as (rig, ioas, file):
        iommu, _ = rig.bound
        await iommu.ioas_alloc(on_demand=True)
        usual = {"flags": RW | FIXED, "ioas_id": ioas, "fd": 7, "fd_table": [7], "start": 0, "iova": 0}
        with refused(number):
            await iommu.ask(
                "IOMMU_IOAS_MAP_FILE",
                [rig.process.dup(), file.dup()],
                **{**usual, "length": PAGE_SIZE, **fields},
            )
        assert (await hwpt_stats(host))["leaves"] == [0, 0, 0]
        assert (await host.kvmd.stats())["memory"]["pinned_pages"] == 0
        assert await host.kvmd.violations() == []


async def test_what_is_no_memfd_is_refused(host: Host) -> None:
    async with filed(host) as (rig, ioas, _):
        for fd in (rig.process.dup(), rig.vm.dup()):
            with refused(errno.EINVAL):
                await rig.bound[0].ask(
                    "IOMMU_IOAS_MAP_FILE",
                    [rig.process.dup(), fd],
                    flags=RW,
                    ioas_id=ioas,
                    fd=7,
                    fd_table=[7],
                    start=0,
                    length=PAGE_SIZE,
                )


async def test_device_process_and_file_see_the_same_bytes(host: Host) -> None:
    async with on_ioas(host) as rig:
        iommu, _ = rig.bound
        file = await rig.process.memfd("file", FILE)
        rig.extra.append(file)
        await file.pwrite(5 * PAGE_SIZE, b"written before")
        hva = await rig.process.mmap(FILE, kind="file_shared", file=file)
        assert (
            await iommu.ioas_map_file(rig.ioas_id, rig.process, file, 4 * PAGE_SIZE, 8 * PAGE_SIZE, AT) == AT
        )
        assert (await rig.copy(0x40_0000, AT + PAGE_SIZE)).status is Status.SUCCESS
        assert (await rig.seen_by_process(0x40_0000, 14)) == b"written before"
        assert await rig.fill(AT) is Status.SUCCESS
        assert await file.pread(4 * PAGE_SIZE, PAGE_SIZE) == FILLED
        assert await rig.process.read(hva + 4 * PAGE_SIZE, PAGE_SIZE) == FILLED


async def test_what_is_cut_off_the_file_stays_with_the_device(host: Host) -> None:
    """A pinned page leaves the file and not its frame; nobody else is given it."""
    async with on_ioas(host) as rig:
        iommu, _ = rig.bound
        file = await rig.process.memfd("file", FILE)
        rig.extra.append(file)
        await iommu.ioas_map_file(rig.ioas_id, rig.process, file, 0, FILE, AT)
        await file.truncate(0)
        await file.truncate(FILE)
        assert await rig.fill(AT) is Status.SUCCESS
        assert await file.pread(0, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert (await rig.copy(0x40_0000, AT)).status is Status.SUCCESS
        assert await rig.seen_by_process(0x40_0000) == FILLED
        assert (await device_stats(host))["stale_accesses"] == 0
        assert await host.kvmd.violations() == []
        assert await iommu.ioas_unmap(rig.ioas_id, AT, FILE) == FILE


async def test_a_file_lives_as_long_as_it_is_mapped_and_needs_no_process(host: Host) -> None:
    """An HWPT is made when fd and process are gone: the pages are the file's."""
    async with vm_only(host) as rig:
        await bind_device(rig)
        iommu, _ = rig.bound
        mapper = await host.kvmd.start_process()
        file = await mapper.memfd("file", FILE)
        await file.pwrite(0, b"kept")
        ioas = await iommu.ioas_alloc()
        await iommu.ioas_map_file(ioas, mapper, file, 0, FILE, 0)
        file.close()
        mapper.close()
        await eventually(host.kvmd.stats, lambda s: s["processes"] == 1, "the mapping process is gone")
        assert (await host.kvmd.stats())["frames"] == 1
        await iommu.hwpt_alloc(rig.device_id, ioas)
        assert (await hwpt_stats(host))["leaves"] == [16, 0, 0]
        assert await iommu.ioas_unmap(ioas, 0, TOP) == FILE
        assert (await host.kvmd.stats())["frames"] == 0


async def test_room_for_a_file_is_aligned_to_its_length(host: Host) -> None:
    async with filed(host, 4 * MIB) as (rig, ioas, file):
        iommu, _ = rig.bound
        for start, length in ((PAGE_SIZE, PAGE_SIZE), (PAGE_SIZE, 4 * PAGE_SIZE), (PAGE_SIZE, 2 * MIB)):
            iova = await iommu.ioas_map_file(ioas, rig.process, file, start, length)
            assert iova % length == 0
        other = await iommu.ioas_alloc()
        assert await iommu.ioas_copy(ioas, iova + 8 * PAGE_SIZE, 8 * PAGE_SIZE, other) == 8 * PAGE_SIZE


# -- taking over -----------------------------------------------------------------------------------------


@asynccontextmanager
async def limited(mode: Literal["user", "mm"]) -> AsyncIterator[tuple[Host, Vmm, Iommu, int]]:
    """RLIMIT_MEMLOCK is 16 pages; an IOAS with an HWPT."""
    with system({"kvmd": ["--memlock", "64K"]}) as running:
        async with connect_host(running.directory) as host, vm_only(host) as rig:
            iommu = rig.iommu = await host.iommufdd.open_iommu(rig.process)
            await iommu.set_rlimit_mode(mode)
            device = rig.device = await host.iommufdd.open_device()
            rig.device_id = await device.bind(iommu)
            ioas = await iommu.ioas_alloc()
            await iommu.hwpt_alloc(rig.device_id, ioas)
            yield host, rig, iommu, ioas


async def room_of(iommu: Iommu, ioas: int, process: Process, file: MemFd) -> int:
    """How many pages more `process` may pin, of 16 and not 17."""
    pages = 0
    with refused(errno.ENOMEM, "RLIMIT_MEMLOCK"):
        while True:
            await iommu.ioas_map_file(ioas, process, file, 0, (pages + 1) * PAGE_SIZE, AT)
            pages += 1
            await iommu.ioas_unmap(ioas, AT, pages * PAGE_SIZE)
    return pages


@pytest.mark.parametrize("mode", ["user", "mm"])
async def test_what_is_pinned_is_charged_to_who_takes_over(mode: Literal["user", "mm"]) -> None:
    async with limited(mode) as (host, rig, iommu, ioas):
        heir = await host.kvmd.start_process()
        file = await rig.process.memfd("file", 17 * PAGE_SIZE)
        rig.extra += [heir, file]
        await iommu.ioas_map_file(ioas, rig.process, file, 0, 6 * PAGE_SIZE, 0)
        before = [await room_of(iommu, ioas, process, file) for process in (rig.process, heir)]
        assert before == ([10, 10] if mode == "user" else [10, 16])
        await iommu.change_process(heir)
        after = [await room_of(iommu, ioas, process, file) for process in (rig.process, heir)]
        assert after == ([10, 10] if mode == "user" else [16, 10])
        await iommu.change_process(heir)  # his already
        assert await host.kvmd.violations() == []
        assert await iommu.ioas_unmap(ioas, 0, TOP) == 6 * PAGE_SIZE
        assert await room_of(iommu, ioas, heir, file) == 16


@pytest.mark.parametrize("mode", ["user", "mm"])
async def test_who_has_no_room_takes_nothing_over(mode: Literal["user", "mm"]) -> None:
    """Of two processes' files, the second does not fit: the first stays whose it was.  A user must have room
    for both, the old and the new, as in the kernel."""
    async with limited(mode) as (host, rig, iommu, ioas):
        heir, other = await host.kvmd.start_process(), await host.kvmd.start_process()
        file = await rig.process.memfd("file", 17 * PAGE_SIZE)
        rig.extra += [heir, other, file]
        pages = 9 if mode == "mm" else 5
        await iommu.ioas_map_file(ioas, rig.process, file, 0, pages * PAGE_SIZE, 0)
        await iommu.ioas_map_file(ioas, other, file, 0, 8 * PAGE_SIZE, MIB)
        everybody = (rig.process, other, heir)
        before = [await room_of(iommu, ioas, process, file) for process in everybody]
        with refused(errno.ENOMEM, "RLIMIT_MEMLOCK"):
            await iommu.change_process(heir)
        assert [await room_of(iommu, ioas, process, file) for process in everybody] == before
        assert await host.kvmd.violations() == []


async def test_memory_of_a_process_cannot_be_taken_over(host: Host) -> None:
    async with filed(host) as (rig, ioas, file):
        iommu, _ = rig.bound
        heir = await host.kvmd.start_process()
        rig.extra.append(heir)
        await iommu.change_process(heir)  # there is nothing to take over
        await iommu.ioas_map_file(ioas, rig.process, file, 0, FILE, 0)
        with refused(errno.EOPNOTSUPP):
            await iommu.ask("IOMMU_IOAS_CHANGE_PROCESS", [heir.dup()], reserved=1)
        with refused(errno.EBADF):
            await iommu.ask("IOMMU_IOAS_CHANGE_PROCESS")
        for on_demand in (False, True):
            other = await iommu.ioas_alloc(on_demand=on_demand)
            await iommu.ioas_map(other, rig.process, rig.hva, PAGE_SIZE, 0)
            with refused(errno.EINVAL):
                await iommu.change_process(heir)
            await iommu.ioas_unmap(other, 0, PAGE_SIZE)
            await iommu.change_process(heir)


async def test_the_old_process_exits_and_its_device_goes_on(host: Host) -> None:
    """A VMM that is replaced while the device works; RAM is the file."""
    async with on_ioas(host) as rig:
        iommu, device = rig.bound
        file = await rig.process.memfd("ram", RAM)
        rig.extra.append(file)
        heir = await host.kvmd.start_process()
        rig.extra.append(heir)
        second = await iommu.ioas_alloc()
        await iommu.ioas_map_file(second, rig.process, file, 0, RAM, 0)
        hwpt = await iommu.hwpt_alloc(rig.device_id, second)
        await iommu.ioas_unmap(rig.ioas_id, 0, TOP)
        await rig.vm.set_user_memory_region(0, 0, 0, rig.hva)
        await device.attach(hwpt)
        await iommu.change_process(heir)
        rig.close_vm()
        rig.process.close()
        await eventually(host.kvmd.stats, lambda s: s["processes"] == 1, "the old process is gone")
        assert rig.portal is not None
        assert (await hwpt_stats(host))["leaves"] == [RAM // PAGE_SIZE, 0, 0]
        assert await host.kvmd.violations() == []
        assert await host.iommufdd.violations() == []
