"""Ours: memory of the daemons with an idle machine of a given size on them.

`exact` is what they count and what the kernel counts of their memfds: frames, table pages, blocks, which
nothing disturbs.  `private` is memory no other process shares, a few pages more or less from run to run.

    python -m bench.ours.footprint exact|private GIB
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import trio

from protocol.daemon import configure_log
from protocol.units import GIB, KIB, PAGE_SIZE
from qemu_shim.vmm.daemons import DAEMONS, KVMD
from qemu_shim.vmm.machine import MachineConfig, connect_host, machine
from qemu_shim.vmm.supervisor import supervised

BLOCK = 512  # what stat counts in


def main(what: str, gib: int) -> None:
    configure_log("warning")
    parts = trio.run(exact if what == "exact" else private, gib)
    total = sum(parts.values())
    sys.stdout.write(json.dumps({"p50": total, "p99": total, "parts": parts}) + "\n")


async def exact(gib: int) -> dict[str, int]:
    async with (
        supervised(log_level="warning") as supervisor,
        connect_host(supervisor.directory) as host,
        machine(host, MachineConfig(ram_bytes=gib * GIB)),
    ):
        stats = await host.kvmd.stats()
        return {
            "frames in use": stats["frames"] * PAGE_SIZE,
            "table pages in use": stats["table_pages"] * PAGE_SIZE,
            "blocks of memfds": memfd_bytes(daemon(KVMD.module)),
        }


async def private(gib: int) -> dict[str, int]:
    async with (
        supervised(log_level="warning") as supervisor,
        connect_host(supervisor.directory) as host,
        machine(host, MachineConfig(ram_bytes=gib * GIB)),
    ):
        return {spec.name: private_bytes(daemon(spec.module)) for spec in DAEMONS}


def daemon(module: str) -> int:
    """The pid of our child that runs `module`."""
    for children in Path("/proc/self/task").glob("*/children"):  # trio starts processes from its threads
        for pid in map(int, children.read_text(encoding="ascii").split()):
            if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
    raise LookupError(f"no child of ours runs {module}")


def memfd_bytes(pid: int) -> int:
    """What the memfds a process has open occupy."""
    found = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(fd).startswith("/memfd:"):
            of = fd.stat()
            found[of.st_ino] = of.st_blocks * BLOCK
    return sum(found.values())


def private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * KIB for line in lines if line.startswith("Private_"))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
