"""iommufdd's CHECK asks kvmd about every leaf: what a frame tag cannot see any more, it says.

A device that walks a stale entry after the frame was given to somebody else finds a tag that fits, for it
looks the tag up when it walks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.hw.dsa import Status
from protocol.units import MIB, PAGE_SIZE
from qemu_shim.vmm.daemons import DaemonSpec
from qemu_shim.vmm.machine import Host, connect_host
from tests.integration.on_ioas import on_ioas
from tests.kit.daemons import System, short_directory
from tests.kit.vmm import GUEST_START, Vmm, device_stats

KEEPS = Path(__file__).with_name("iommufdd_that_keeps.py")
AT = GUEST_START
SECRET = b"somebody else's" + bytes(PAGE_SIZE - 15)


class Keeps(System):
    def argv(self, spec: DaemonSpec) -> list[str]:
        usual = super().argv(spec)
        return [sys.executable, str(KEEPS), *usual[1:]] if spec.name == "iommufdd" else usual


@pytest.fixture(scope="module")
def broken() -> Iterator[System]:
    with short_directory() as directory:
        made = Keeps(directory)
        try:
            made.start()
            yield made
            made.check_stop()
        finally:
            made.stop()


async def another_takes_the_frame(rig: Vmm, size: int = 4 * MIB) -> None:
    secret = await rig.process.mmap(size)
    for at in range(0, size, PAGE_SIZE):
        await rig.process.write(secret + at, SECRET)


async def read_by_the_device(rig: Vmm) -> bytes:
    assert (await rig.copy(AT + 64 * PAGE_SIZE, AT)).status is Status.SUCCESS
    return await rig.seen_by_process(AT + 64 * PAGE_SIZE)


@pytest.mark.parametrize("pinned", [False, True])
async def test_an_entry_of_a_frame_that_is_somebody_elses_is_said(broken: System, pinned: bool) -> None:
    async with connect_host(broken.directory) as host, on_ioas(host, on_demand=True) as rig:
        _, device = rig.bound
        assert await rig.fill(AT) is Status.SUCCESS
        if pinned:
            await device.pin(AT, PAGE_SIZE)
        assert await host.iommufdd.violations() == []
        await rig.process.madvise_dontneed(rig.hva + AT, PAGE_SIZE)
        if pinned:
            await device.unpin(AT, PAGE_SIZE)
        await another_takes_the_frame(rig)
        assert await read_by_the_device(rig) == SECRET
        assert (await device_stats(host))["stale_accesses"] == 0, "the tag fits"
        found = await host.iommufdd.violations()
        assert any(f"iova {AT:#x} -> " in each and each.startswith("I28: ") for each in found)


@pytest.mark.parametrize("pinned", [False, True])
async def test_the_same_story_with_the_real_iommufdd_finds_nothing(host: Host, pinned: bool) -> None:
    async with on_ioas(host, on_demand=True) as rig:
        _, device = rig.bound
        assert await rig.fill(AT) is Status.SUCCESS
        if pinned:
            await device.pin(AT, PAGE_SIZE)
        await rig.process.madvise_dontneed(rig.hva + AT, PAGE_SIZE)
        if pinned:
            await device.unpin(AT, PAGE_SIZE)
        await another_takes_the_frame(rig)
        assert await read_by_the_device(rig) == bytes(PAGE_SIZE)
        assert await host.iommufdd.violations() == []


@pytest.mark.parametrize("page_size", [PAGE_SIZE, 2 * MIB])
async def test_a_pinned_ioas_is_what_kvmd_has_pinned(host: Host, page_size: int) -> None:
    async with on_ioas(host, page_size=page_size) as rig:
        assert await rig.fill(AT) is Status.SUCCESS
        await rig.process.madvise_dontneed(rig.hva, 64 * MIB)
        assert await host.iommufdd.violations() == []


async def test_a_process_that_is_gone_leaves_nothing_to_compare(host: Host) -> None:
    async with on_ioas(host, on_demand=True) as rig:
        await rig.bound[1].pin(AT, PAGE_SIZE)
        rig.close_vm()
        rig.process.close()
        assert await host.iommufdd.violations() == []
