"""A channel between two daemons breaks, and both live: neither waits for the other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.machine import connect_host
from tests.kit.vmm import attach_device, bare_vm, device_stats, nothing_left
from tests.patience import PATIENCE_S
from tests.torture.calls import Fault
from tests.torture.daemons import SPECS, Spawner, StruckDaemons


@pytest.fixture
def daemons() -> Iterator[StruckDaemons]:
    spawner = Spawner()
    with tempfile.TemporaryDirectory(prefix="it-") as directory:
        made = StruckDaemons(spawner, Path(directory))
        made.start(*SPECS)
        yield made
        assert not any(made.stop().values())
    spawner.close()


@pytest.mark.parametrize("fault", [Fault.HALF_READ, Fault.HALF_WRITE])
async def test_kvm_that_hangs_up_on_its_importer_gets_the_lease_it_waits_for(
    daemons: StruckDaemons, fault: Fault
) -> None:
    """In the middle of an invalidation: a vCPU's fault on the page waits for its end (I5)."""
    async with connect_host(daemons.directory) as host:
        rig = await bare_vm(host)
        await attach_device(rig)
        page = rig.memory.allocate(1)
        assert await rig.fill(page) is Status.SUCCESS
        order = daemons.orders["iommufdd"]
        with trio.fail_after(PATIENCE_S):
            order.give(fault, 1)
            assert await rig.process.move_pages(rig.hva + page, PAGE_SIZE) == 1
            order.withdraw()
            assert order.met == "recvmsg"
            await rig.memory.write(page, b"the vCPU runs on")
        assert (await device_stats(host))["stale_accesses"] == 0
        assert await host.kvmd.violations() + await host.iommufdd.violations() == []
        rig.close()
        await nothing_left(host)
