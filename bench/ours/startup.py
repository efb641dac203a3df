"""Ours: from starting a client to a machine that runs on three daemons it has started.

python -m bench.ours.startup COUNT
python -m bench.ours.startup up
"""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median
from time import perf_counter_ns

MARKS = ("client imported", "daemons ready", "client connected", "machine up")


def main(count: int) -> None:
    """Each start is a process of its own: imports count, as they do for a user."""
    runs = [start() for _ in range(count)]
    took = sorted(sum(run.values()) for run in runs)
    parts = {mark: median(run[mark] for run in runs) for mark in MARKS}
    sys.stdout.write(json.dumps({"p50": took[count // 2], "p99": took[-1], "parts": parts}) + "\n")


def start() -> dict[str, float]:
    """Nanoseconds between marks: all processes of a host read the same clock."""
    began = perf_counter_ns()
    argv = [sys.executable, "-m", "bench.ours.startup", "up"]
    ran = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    reached = [began, *json.loads(ran.stdout)]
    return {mark: reached[n + 1] - reached[n] for n, mark in enumerate(MARKS)}


def up() -> None:
    import trio

    from protocol.daemon import configure_log
    from qemu_shim.vmm.machine import MachineConfig, connect_host, machine
    from qemu_shim.vmm.supervisor import supervised

    reached = [perf_counter_ns()]

    async def bring_up() -> None:
        async with supervised(log_level="warning") as supervisor:
            reached.append(perf_counter_ns())
            async with connect_host(supervisor.directory) as host:
                reached.append(perf_counter_ns())
                async with machine(host, MachineConfig()):
                    reached.append(perf_counter_ns())

    configure_log("warning")
    trio.run(bring_up)
    sys.stdout.write(json.dumps(reached))


if __name__ == "__main__":
    up() if sys.argv[1] == "up" else main(int(sys.argv[1]))
