"""What a scenario cost: counters of all daemons before and after, and what they grew by as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qemu_shim.scenarios.counters import Counters, Raw, flatten, grown
from qemu_shim.vmm.daemons import DEVICE_SIM, IOMMUFDD, KVMD
from qemu_shim.vmm.machine import Host

SHOWN = 16  # bytes of those that differ
# The rows that every scenario's table ends with.
COSTS = (
    ("page requests / groups", ("io_faults", "io_groups")),
    ("EPT violations", ("cpu_faults",)),
    ("pages mapped by vCPU / device", ("pages_mapped_cpu", "pages_mapped_io")),
    ("flushes / invalidation descriptors", ("flushes", "invalidation_descriptors")),
    ("IOTLB hits / misses", ("iotlb_hits", "iotlb_misses")),
    ("device-TLB hits / misses", ("devtlb_hits", "devtlb_misses")),
)


@dataclass(slots=True)
class Snapshot:
    """The daemons' counters at one moment, and of each device how many IO page faults it has waited for and
    how long it waited for the last of them, in ns.  VMs are our own; devices and units are all there are, for
    a unit does not know its devices' apart: others' work on the same daemons counts too.
    """

    raw: Raw
    waits: dict[str, tuple[int, list[int]]]

    def since(self, before: Snapshot) -> Counters:
        return Counters.of(grown(self.raw, before.raw))


@dataclass(slots=True)
class Report:
    """What `qemu-shim run` shows: lines as they came, a table, and what is wrong (empty: all is well);
    `ended`: the refusals that the scenario did not take up.
    """

    scenario: str
    lines: list[str] = field(default_factory=list)
    rows: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    def as_json(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario,
            "ok": not self.problems,
            "problems": self.problems,
            "lines": self.lines,
            "figures": self.figures,
        }


def difference(seen: object, expected: object) -> str:
    """In words; of bytes where they begin to differ, of anything as much as fits a line."""
    if isinstance(seen, bytes) and isinstance(expected, bytes) and len(seen) == len(expected) > SHOWN:
        at = next((n for n, byte in enumerate(seen) if byte != expected[n]), 0)
        return f"{seen[at : at + SHOWN].hex()} from byte {at} on, expected {expected[at : at + SHOWN].hex()}"
    return f"{seen!r:.80}, expected {expected!r:.80}"


async def snapshot(host: Host) -> Snapshot:
    kvmd, iommu, silicon = await host.kvmd.stats(), await host.iommufdd.stats(), await host.device_sim.stats()
    waits = {name: (of["io_faults"], of["fault_latencies_ns"]) for name, of in silicon["devices"].items()}
    return Snapshot(flatten(kvmd, iommu, silicon), waits)


async def check_system(host: Host, report: Report) -> None:
    """Invariants that every scenario ends with, of the daemons that live."""
    if KVMD.name not in host.killed:
        report.problems += await host.kvmd.violations()
    if IOMMUFDD.name not in host.killed:
        report.problems += await host.iommufdd.violations()
        held = (await host.iommufdd.stats())["partial_held"]
        report.expect(held == 0, f"I8: {held} page requests wait for their group")
    if DEVICE_SIM.name not in host.killed:
        for device in (await host.device_sim.stats())["devices"].values():
            report.problems += device["stale_notes"]


def fill_table(report: Report, before: Snapshot, after: Snapshot) -> None:
    """The figures every scenario shows."""
    cost, tables = after.since(before), after.raw["vm.table_pages"]
    latencies = new_latencies(before, after)
    report.figures |= {name: getattr(cost, name) for _, names in COSTS for name in names}
    report.figures |= {
        "table_pages": tables,
        "io_faults_timed": len(latencies),
        "io_fault_p50_us": percentile(latencies, 50) / 1000,
        "io_fault_p99_us": percentile(latencies, 99) / 1000,
    }
    report.rows += [(label, " / ".join(str(getattr(cost, name)) for name in names)) for label, names in COSTS]
    report.rows += [("table pages", f"{tables}"), ("IO page fault latency", _latency_text(latencies))]


def _latency_text(latencies: list[int]) -> str:
    if not latencies:
        return "no IO page fault"
    p50, p99 = percentile(latencies, 50) / 1000, percentile(latencies, 99) / 1000
    return f"p50 {p50:.0f} us, p99 {p99:.0f} us of {len(latencies)}"


def new_latencies(before: Snapshot, after: Snapshot) -> list[int]:
    """In ns; a device keeps the last of them only."""
    found: list[int] = []
    for name, (count, latencies) in after.waits.items():
        new = count - before.waits.get(name, (0, []))[0]
        found += latencies[len(latencies) - min(new, len(latencies)) :]
    return found


def percentile(values: list[int], percent: int) -> float:
    """Nearest rank; 0 of nothing."""
    if not values:
        return 0.0
    rank = (len(values) * percent + 99) // 100
    return float(sorted(values)[max(rank, 1) - 1])


def render(report: Report, width: int = 100) -> str:
    """The table as text."""
    widest = max((len(name) for name, _ in report.rows), default=0)
    lines = [f"  {name:<{widest}}   {value}"[:width] for name, value in report.rows]
    rule = "  " + "-" * (widest + 3 + max((len(value) for _, value in report.rows), default=0))
    return "\n".join([rule, *lines, rule])
