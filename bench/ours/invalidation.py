"""Ours: invalidations through the three daemons to the last acknowledgement, all on one core.

The guest's device fills a page, then the VMM gives that page up (MADV_DONTNEED): kvmd takes the leaf out
and tells the importer, whose driver invalidates in the unit and in the device and waits.  kvmd's answer
comes after the last of them, so that what the VMM waits for is what counts.  Frame tags, a debug aid,
are off.

    python -m bench.ours.invalidation COUNT
"""

from __future__ import annotations

import json
import sys
from time import perf_counter_ns

import trio

from bench.ours.fault import HANDLE, UNTAGGED, fill
from bench.timing import percentiles, require_one_core
from protocol.daemon import configure_log
from protocol.units import GIB, PAGE_SIZE
from qemu_shim.guest.idxd import WQ, IdxdWorkQueue
from qemu_shim.vmm.machine import MachineConfig, connect_host, machine
from qemu_shim.vmm.supervisor import supervised


def main(count: int) -> None:
    require_one_core()
    configure_log("warning")
    p50, p99 = percentiles(trio.run(give_up_each, count)[-count:])
    sys.stdout.write(json.dumps({"p50": p50, "p99": p99}) + "\n")


async def give_up_each(count: int) -> list[float]:
    """Nanoseconds of a tenth more than `count`: the first of them are no sample."""
    async with (
        supervised(UNTAGGED, "warning") as supervisor,
        connect_host(supervisor.directory) as host,
        machine(host, MachineConfig(ram_bytes=GIB)) as guest,
    ):
        await IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True).enable()
        pages = guest.memory.allocate(count + count // 10)
        took: list[float] = []
        for gpa in range(pages, pages + (count + count // 10) * PAGE_SIZE, PAGE_SIZE):
            guest.portal.movdir64b(WQ, fill(gpa))
            await guest.portal.wait_interrupt(HANDLE)
            start = perf_counter_ns()
            await guest.process.madvise_dontneed(guest.hva_of(gpa), PAGE_SIZE)
            took.append(perf_counter_ns() - start)
        told = (await host.device_sim.stats())["unit"]["devtlb_invalidations"]
        assert told == len(took), f"{told} invalidations for {len(took)} pages given up"
        return took


if __name__ == "__main__":
    main(int(sys.argv[1]))
