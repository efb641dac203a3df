"""Fault latencies in the classes that Linux counts for VT-d [Linux drivers/iommu/intel/perf.c].

A modelled fault takes what its kind is priced at: a class says how many faults of a kind fall into it.
"""

from __future__ import annotations

from bisect import bisect_right

from qemu_shim.compare.costs import Counts, Values

BOUNDS_US = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)  # of each class the first latency that is not in it
CLASSES = ("<0.1 us", "0.1-1 us", "1-10 us", "10-100 us", "0.1-1 ms", "1-10 ms", ">=10 ms")
KINDS = ("cpu", "cpu_major", "io", "io_major")


def class_of(latency_us: float) -> int:
    return bisect_right(BOUNDS_US, latency_us)


def latencies(counts: Counts, values: Values) -> dict[str, tuple[int, float]]:
    """Kind of fault -> how many there were, and what each took, in us."""
    cpu, io = values["cpu_fault"], values["cpu_fault"] * values["io_fault_factor"]
    of_kind = {"cpu": cpu, "cpu_major": cpu + values["swap_in"], "io": io, "io_major": io + values["swap_in"]}
    numbers = {f"{side}_major": counts.get(f"{side}_faults_major", 0) for side in ("cpu", "io")}
    for side in ("cpu", "io"):
        numbers[side] = max(0, counts.get(f"{side}_faults", 0) - numbers[f"{side}_major"])
    return {kind: (numbers[kind], of_kind[kind]) for kind in KINDS}
