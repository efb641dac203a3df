"""What a scenario cost: counters of all daemons before and after, and the difference as a table."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

from protocol.errors import UapiError
from qemu_shim.vmm.machine import Host, Machine

Stats = dict[str, Any]


@dataclass(slots=True)
class Snapshot:
    """Counters at one moment; the VM's are those of the machine's own VM."""

    vm: Stats
    unit: Stats
    device: Stats
    iommu: Stats
    kvmd: Stats


@dataclass(slots=True)
class Report:
    """What `qemu-shim run` shows: lines as they came, a table, and what is wrong (empty: all is well);
    `ended`: the refusals that the scenario did not take up.
    """

    scenario: str
    lines: list[str] = field(default_factory=list)
    rows: list[tuple[str, str]] = field(default_factory=list)
    figures: Stats = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    def expect_equal(self, seen: object, expected: object, what: str) -> None:
        self.expect(seen == expected, f"{what}: {seen!r:.80}, expected {expected!r:.80}")

    async def expect_refused(self, what: str, number: int, why: str, call: Awaitable[object]) -> None:
        """The call fails with that errno and for that reason; what it said becomes a line."""
        try:
            await call
        except UapiError as error:
            self.lines.append(f"{what}: {error}")
            self.expect((error.errno, why in error.why) == (number, True), f"{what}: {error}")
        else:
            self.expect(False, f"{what}: was not refused")

    def as_json(self) -> Stats:
        return {
            "scenario": self.scenario,
            "ok": not self.problems,
            "problems": self.problems,
            "lines": self.lines,
            "figures": self.figures,
        }


async def snapshot(host: Host, machine: Machine) -> Snapshot:
    kvmd = await host.kvmd.stats()
    silicon = await host.device_sim.stats()
    devices = list(silicon["devices"].values())
    return Snapshot(
        vm=kvmd["vms"][-1],
        unit=silicon["unit"],
        device=devices[machine.config.device],
        iommu=await host.iommufdd.stats(),
        kvmd=kvmd,
    )


async def check_system(host: Host, report: Report, after: Snapshot) -> None:
    """Invariants that every scenario ends with."""
    report.problems += await host.kvmd.violations() + await host.iommufdd.violations()
    report.problems += after.device["stale_notes"]
    report.expect(
        after.iommu["partial_held"] == 0,
        f"I8: {after.iommu['partial_held']} page requests wait for their group",
    )


def difference(after: Stats, before: Stats) -> Stats:
    """Counters that grew, perhaps from nothing; what is no number is left out."""
    return {key: after[key] - before.get(key, 0) for key in after if isinstance(after[key], int)}


def fill_table(report: Report, before: Snapshot, after: Snapshot) -> None:
    """The figures every scenario shows."""
    vm = difference(after.vm, before.vm)
    unit = difference(after.unit, before.unit)
    device = difference(after.device, before.device)
    latencies = new_latencies(before, after)
    report.figures |= {
        "page_requests": unit["page_requests"],
        "page_request_groups": device["page_request_groups"],
        "ept_violations": vm["ept_violations"],
        "pages_mapped_by_vcpu": vm["pf_fixed"],
        "pages_mapped_by_device": vm["io_pf_fixed"],
        "invalidations": vm["remote_tlb_flush"],
        "invalidation_descriptors": unit["invalidations"],
        "iotlb_hits": unit["iotlb_hits"],
        "iotlb_misses": unit["iotlb_misses"],
        "devtlb_hits": device["devtlb_hits"],
        "devtlb_misses": device["devtlb_misses"],
        "table_pages": after.vm["table_pages"],
        "io_faults_timed": len(latencies),
        "io_fault_p50_us": percentile(latencies, 50) / 1000,
        "io_fault_p99_us": percentile(latencies, 99) / 1000,
    }
    figures = report.figures
    report.rows += [
        ("page requests / groups", f"{figures['page_requests']} / {figures['page_request_groups']}"),
        ("EPT violations", f"{figures['ept_violations']}"),
        (
            "pages mapped by vCPU / device",
            f"{figures['pages_mapped_by_vcpu']} / {figures['pages_mapped_by_device']}",
        ),
        (
            "flushes / invalidation descriptors",
            f"{figures['invalidations']} / {figures['invalidation_descriptors']}",
        ),
        ("IOTLB hits / misses", f"{figures['iotlb_hits']} / {figures['iotlb_misses']}"),
        ("device-TLB hits / misses", f"{figures['devtlb_hits']} / {figures['devtlb_misses']}"),
        ("table pages", f"{figures['table_pages']}"),
        ("IO page fault latency", _latency_text(latencies)),
    ]


def _latency_text(latencies: list[int]) -> str:
    if not latencies:
        return "no IO page fault"
    p50, p99 = percentile(latencies, 50) / 1000, percentile(latencies, 99) / 1000
    return f"p50 {p50:.0f} us, p99 {p99:.0f} us of {len(latencies)}"


def new_latencies(before: Snapshot, after: Snapshot) -> list[int]:
    count = after.device["io_faults"] - before.device["io_faults"]
    latencies: list[int] = after.device["fault_latencies_ns"]
    return latencies[len(latencies) - min(count, len(latencies)) :]


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
