"""A bug of ours while a group is handled: the device gets its answer, the daemon's status tells of it."""

from __future__ import annotations

import sys
from pathlib import Path

from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.daemons import DaemonSpec
from qemu_shim.vmm.machine import connect_host
from tests.integration import iommufdd_with_bug
from tests.kit.daemons import System, short_directory
from tests.kit.vmm import attach_device, bare_vm, device_stats, nothing_left


class Planted(System):
    """iommufdd is the program with the bug."""

    def argv(self, spec: DaemonSpec) -> list[str]:
        usual = super().argv(spec)
        program = [sys.executable, str(Path(iommufdd_with_bug.__file__))]
        return [*program, *usual[1:]] if spec.name == "iommufdd" else usual


async def test_the_group_is_answered_failure_the_device_detaches_and_the_status_is_1() -> None:
    with short_directory() as directory:
        planted = Planted(directory)
        try:
            planted.start()
            async with connect_host(directory) as host:
                rig = await bare_vm(host)
                await attach_device(rig)
                assert rig.queue is not None
                assert await rig.fill(rig.memory.allocate(1)) is Status.SUCCESS
                # Three pages of one group, the bug at the second; its record's page is there already.
                at = (iommufdd_with_bug.BUG_AT_GFN - 1) * PAGE_SIZE
                record = await rig.queue.fill(at, 1, 3 * PAGE_SIZE)
                assert record.status is not Status.SUCCESS
                stats = await host.iommufdd.stats()
                assert stats["responses"] == (await device_stats(host))["page_request_groups"]
                assert (await device_stats(host))["page_requests_outstanding"] == 0
                await rig.bound[1].detach()
                rig.close()
                await nothing_left(host)
            statuses = planted.stop()
            assert statuses == {"iommufdd": 1, "device_sim": 0, "kvmd": 0}
            assert "I8 planted" in planted.log("iommufdd")
        finally:
            planted.stop()
