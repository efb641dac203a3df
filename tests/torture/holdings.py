"""What a process holds: fds and mapped memory as the kernel has it [proc(5)], and what it counts itself."""

from __future__ import annotations

import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.torture.daemons import StruckDaemons

_NUMBER = re.compile(r":\[\d+\]$")

# Of STATS, what must be 0 when no VM is there.
GAUGES = {
    "kvmd": ("vm_count", "processes", "frames", "table_pages"),
    "iommufdd": ("hwpt_count", "devices_bound", "partial_held", "pinned_pages"),
    "device_sim": (),
}


@dataclass(frozen=True, slots=True)
class Holdings:
    """`fds` by kind, `maps` by name of the file; `memory`: (device, inode) of each memfd that is mapped."""

    fds: Counter[str] = field(default_factory=Counter)
    maps: Counter[str] = field(default_factory=Counter)
    memory: dict[str, str] = field(default_factory=dict)

    def beyond(self, before: Holdings) -> dict[str, int]:
        """What there is more of."""
        return dict((self.fds - before.fds) + (self.maps - before.maps))


def holdings(pid: int) -> Holdings:
    found = Holdings()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            found.fds["fd " + _NUMBER.sub("", target)] += 1
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        columns = line.split(maxsplit=5)
        if len(columns) == 6 and columns[5].startswith("/memfd:"):
            found.maps["map " + columns[5]] += 1
            found.memory[f"{columns[3]}:{columns[4]}"] = columns[5]
    return found


def all_holdings(daemons: StruckDaemons) -> dict[str, Holdings]:
    return {name: holdings(daemons.running[name].pid) for name in daemons.alive}


def not_zero(name: str, stats: dict[str, Any]) -> dict[str, int]:
    """Of the gauges of a daemon."""
    found = {gauge: stats[gauge] for gauge in GAUGES[name] if stats[gauge]}
    for device, of in stats.get("devices", {}).items():
        if of["page_requests_outstanding"]:
            found[f"{device}'s page requests"] = of["page_requests_outstanding"]
    return found


def memory_of_the_dead(held: dict[str, Holdings]) -> list[str]:
    """Memfds that the unit or its driver have mapped, and nobody alive has made: kvmd makes RAM and tables,
    iommufdd the unit's tables and queues, each its own mapping of them.
    """
    makers = {"kvmd": ("tdp-",), "iommufdd": ("iommu-tables", "dmar-")}
    alive = set[str]()
    for name in makers:
        alive |= held[name].memory.keys() if name in held else set()
    found = []
    for inode, what in held["device_sim"].memory.items() if "device_sim" in held else ():
        own = not what.startswith(tuple(f"/memfd:{start}" for starts in makers.values() for start in starts))
        if inode not in alive and not own:
            found.append(f"device_sim has {what} mapped, whose maker is dead")
    return found
