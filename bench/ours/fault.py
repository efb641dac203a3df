"""Ours: IO page faults through the three daemons, all of them and this client on one core.

The guest's device fills one page after another that nobody ever touched, one descriptor at a time, so that
every fill is one page request.  What counts is what the device itself measures, from the translation
that was refused to the one that was granted; frame tags, a debug aid, are off.  Where the time goes comes
from a second run, of daemons that take timestamps (`bench.ours.staged`).

    python -m bench.ours.fault COUNT
"""

from __future__ import annotations

import json
import sys
import tempfile
from bisect import bisect_left
from collections import Counter
from itertools import pairwise
from pathlib import Path

import trio

from bench.ours import staged
from bench.ours.staged import Stamps
from bench.timing import percentiles, require_one_core
from device_sim.core.function import MAX_LATENCIES
from protocol.daemon import configure_log
from protocol.hw.dsa import Descriptor, Flag, Opcode
from protocol.units import GIB, PAGE_SIZE
from qemu_shim.guest.idxd import WQ, IdxdWorkQueue
from qemu_shim.vmm.daemons import DAEMONS, DaemonSpec
from qemu_shim.vmm.machine import MachineConfig, connect_host, machine
from qemu_shim.vmm.supervisor import supervised

PATTERN = 0x5AA5_F00D_CAFE_BEEF
HANDLE = 1
UNTAGGED = {"kvmd": ["--no-frame-tags"]}

# The way of one fault: daemon, stamp, and what the time since the stamp before it was spent on.
WAY = (
    ("device_sim", "miss", ""),
    ("device_sim", "interrupt", "device: page request"),
    ("iommufdd", "requests", "interrupt to iommufdd"),
    ("iommufdd", "ask", "iommufdd: gather the group"),
    ("kvmd", "fault", "message to kvmd"),
    ("kvmd", "slot", "kvmd: checks"),
    ("kvmd", "slot found", "kvmd: find the slot"),
    ("kvmd", "host page", "kvmd: checks"),
    ("kvmd", "host page there", "kvmd: host page"),
    ("kvmd", "map", "kvmd: checks"),
    ("kvmd", "mapped", "kvmd: map"),
    ("kvmd", "fixed", "kvmd: checks"),
    ("iommufdd", "answered", "reply to iommufdd"),
    ("iommufdd", "responded", "iommufdd: group response"),
    ("device_sim", "response", "kick to the device"),
    ("device_sim", "looked", "device: walk again"),
)


def main(count: int) -> None:
    require_one_core()
    configure_log("warning")
    assert count + count // 10 <= MAX_LATENCIES, f"{count} faults: the device remembers {MAX_LATENCIES}"
    p50, p99 = percentiles(trio.run(fault_each, count, DAEMONS, UNTAGGED)[-count:])
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        parts = shares(p50, stamped_run(count, Path(directory)))
    sys.stdout.write(json.dumps({"p50": p50, "p99": p99, "parts": parts}) + "\n")


async def fault_each(
    count: int, daemons: tuple[DaemonSpec, ...], options: dict[str, list[str]]
) -> list[float]:
    """The device's latencies of a tenth more faults than `count`: the first of them are no sample."""
    async with (
        supervised(options, "warning", daemons) as supervisor,
        connect_host(supervisor.directory) as host,
        machine(host, MachineConfig(ram_bytes=GIB)) as guest,
    ):
        await IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True).enable()
        faults = count + count // 10
        pages = guest.memory.allocate(faults)
        for n in range(faults):
            guest.portal.movdir64b(WQ, fill(pages + n * PAGE_SIZE))
            await guest.portal.wait_interrupt(HANDLE)
        device = (await host.device_sim.stats())["devices"]["dsa0"]
        assert device["statuses"] == {"SUCCESS": faults}, device["statuses"]
        assert device["io_faults"] == faults, f"{device['io_faults']} faults for {faults} pages"
        took: list[float] = device["fault_latencies_ns"]
        return took


def fill(gpa: int) -> bytes:
    """A descriptor that fills one page and raises an interrupt; no completion record, so one fault."""
    flags = Flag.BOF | Flag.RCI
    return Descriptor(
        opcode=Opcode.MEMFILL, flags=flags, src=PATTERN, dst=gpa, size=PAGE_SIZE, int_handle=HANDLE
    ).to_bytes()


def stamped_run(count: int, directory: Path) -> dict[str, Stamps]:
    daemons = tuple(staged.staged(spec) for spec in DAEMONS)
    options = {
        spec.name: [*UNTAGGED.get(spec.name, []), *staged.options(spec, directory)] for spec in DAEMONS
    }
    trio.run(fault_each, count, daemons, options)
    return staged.read(directory)


def shares(p50: float, stamps: dict[str, Stamps]) -> dict[str, float]:
    """Each stage's part of `p50`: its share of the stamped faults, whose stamps cost a little themselves."""
    spent: Counter[str] = Counter()
    misses = stamps["device_sim"]["miss"]
    for began, next_began in pairwise([*misses, 1 << 64]):
        at = began
        for daemon, stamp, what in WAY:
            # One fault at a time, and one clock: the next stamp of that name is this fault's.
            found = stamps[daemon][stamp]
            place = bisect_left(found, at)
            reached = found[place] if place < len(found) else 1 << 64
            assert reached < next_began, f"{daemon}: {stamp!r} came after the next fault began, or never"
            spent[what] += reached - at
            at = reached
    del spent[""]
    return {what: p50 * cost / spent.total() for what, cost in spent.items()}


if __name__ == "__main__":
    main(int(sys.argv[1]))
