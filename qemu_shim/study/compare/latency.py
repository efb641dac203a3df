"""How long who faulted waits, in the classes that Linux counts for VT-d [Linux drivers/iommu/intel/perf.c].

A vCPU waits for its fault.  A device waits for a page request group, which has one answer however many pages
it asks for.  A modelled wait takes what its kind is priced at: a class says how many of a kind fall into it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import NamedTuple

from qemu_shim.study.compare.costs import Values

BOUNDS_US = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)  # of each class the first latency that is not in it
CLASSES = ("<0.1 us", "0.1-1 us", "1-10 us", "10-100 us", "0.1-1 ms", "1-10 ms", ">=10 ms")


class WaitTimes(NamedTuple):
    """So many of `side` took `us` each."""

    side: str
    number: int
    us: float


def class_of(latency_us: float) -> int:
    return bisect_right(BOUNDS_US, latency_us)


def waits(events: Mapping[str, float], values: Values) -> list[WaitTimes]:
    """Those of one step.  Groups of a step are taken to be alike, and pages read from swap to fill whole
    groups: the counts of a step say no more.
    """

    def count(name: str) -> int:
        return int(events.get(name, 0))

    major = count("cpu_faults_major")
    found = [
        WaitTimes("cpu", count("cpu_faults") - major, values["cpu_fault"]),
        WaitTimes("cpu", major, values["cpu_fault"] + values["swap_in"]),
    ]
    groups, pages, major = count("io_groups"), count("io_faults"), count("io_faults_major")
    if groups:
        us = values["cpu_fault"] * values["io_fault_factor"] + (pages / groups - 1) * values["group_page"]
        of_major = min(groups, math.ceil(major * groups / pages))
        found.append(WaitTimes("io", groups - of_major, us))
        found.append(WaitTimes("io", of_major, us + values["swap_in"] * major / max(of_major, 1)))
    return [some for some in found if some.number > 0]
