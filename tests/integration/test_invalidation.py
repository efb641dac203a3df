"""A few sources of invalidation over real daemons: a device in use, an importer beside it that acks late."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
import trio

from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE, WHOLE_SIZE
from qemu_shim.vmm.machine import Host
from tests.kit.vmm import FILLED, PATTERN, Vmm, device_stats, rigged
from tests.kit.wire_importer import WireImporter

WHOLE = (0, WHOLE_SIZE)
RAM = 64 << 20


@dataclass(frozen=True)
class Taking:
    act: Callable[[Vmm, int], Coroutine[Any, Any, Any]]
    told: Callable[[int], tuple[int, int]] = lambda gpa: WHOLE
    after: Status = Status.SUCCESS


SOURCES = {
    "munmap": Taking(
        lambda rig, gpa: rig.process.munmap(rig.hva + gpa, PAGE_SIZE), after=Status.PAGE_FAULT_IR
    ),
    "migrate": Taking(lambda rig, gpa: rig.process.move_pages(rig.hva + gpa, PAGE_SIZE)),
    "balloon": Taking(lambda rig, gpa: rig.process.madvise_dontneed(rig.hva + gpa, PAGE_SIZE)),
    "nx huge pages": Taking(lambda rig, gpa: rig.vm.ioctl("NX_HUGE_PAGES", on=True)),
    "zap gfn range": Taking(
        lambda rig, gpa: rig.vm.ioctl("ZAP_GFN_RANGE", gpa=gpa, size=PAGE_SIZE),
        lambda gpa: (gpa, PAGE_SIZE),
    ),
    "logging on": Taking(
        lambda rig, gpa: rig.vm.set_user_memory_region(0, 0, RAM, rig.hva, 1), lambda gpa: (0, RAM)
    ),
}


@pytest.mark.rfc("RFC-87", "RFC-88", "RFC-94")
@pytest.mark.parametrize("name", SOURCES)
async def test_a_source_tells_importers_and_waits_and_dma_goes_on(host: Host, name: str) -> None:
    source = SOURCES[name]
    async with rigged(host, ram=RAM) as rig:
        assert rig.tdp_fd is not None
        importer = await WireImporter.of(host, rig.tdp_fd)
        await importer.register()
        gpa = rig.memory.allocate(1)
        assert await rig.fill(gpa) is Status.SUCCESS
        importer.ack, over = False, trio.Event()
        frames = (await host.kvmd.stats())["frames"]

        async def act() -> None:
            await source.act(rig, gpa)
            over.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(act)
            await importer.wait_told()
            assert importer.told == [source.told(gpa)]
            assert (await host.kvmd.stats())["frames"] == frames, "given away and somebody may still use it"
            assert not over.is_set()
            importer.ack = True
            importer.ack_all()
        assert await rig.fill(gpa, PATTERN) is source.after
        if source.after is Status.SUCCESS:
            assert await rig.seen_by_process(gpa) == FILLED
        assert await host.kvmd.violations() == []
        assert (await device_stats(host))["stale_accesses"] == 0
        importer.close()
