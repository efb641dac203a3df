"""Ours: a memslot goes and comes back in a VM that has so many of them, through messages to kvmd.

The VM's table is lent to a device, as the series has it.  The slots are of one page each that nobody has
touched, so that nothing is zapped: what counts is what it takes to find one among the others.

    python -m bench.ours.slots SLOTS COUNT
"""

from __future__ import annotations

import json
import random
import sys
from time import perf_counter_ns

import trio

from bench.timing import percentiles, require_one_core
from protocol.daemon import configure_log
from protocol.units import GIB, MIB, PAGE_SIZE
from qemu_shim.vmm.machine import MachineConfig, connect_host, machine
from qemu_shim.vmm.supervisor import supervised

SEED = 1
AT = 4 * GIB  # behind the machine's own
FIRST = 64  # numbers below are the machine's own, too


def main(slots: int, count: int) -> None:
    require_one_core()
    configure_log("warning")
    p50, p99 = percentiles(trio.run(change_each, slots, count)[-count:])
    sys.stdout.write(json.dumps({"p50": p50, "p99": p99}) + "\n")


async def change_each(slots: int, count: int) -> list[float]:
    """Nanoseconds of each of a tenth more than `count`: the first of them are no sample."""
    drawn = random.Random(SEED)
    async with (
        supervised({}, "warning") as supervisor,
        connect_host(supervisor.directory) as host,
        machine(host, MachineConfig(ram_bytes=64 * MIB)) as guest,
    ):
        hva = await guest.process.mmap(slots * PAGE_SIZE)

        async def change(number: int, size: int) -> None:
            place = number * PAGE_SIZE
            await guest.vm.set_user_memory_region(FIRST + number, AT + place, size, hva + place)

        for number in range(slots):
            await change(number, PAGE_SIZE)
        took: list[float] = []
        for _ in range(count + count // 10):
            number = drawn.randrange(slots)
            began = perf_counter_ns()
            await change(number, 0)
            await change(number, PAGE_SIZE)
            took.append(perf_counter_ns() - began)
        return took


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
