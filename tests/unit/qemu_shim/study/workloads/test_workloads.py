"""Workloads as data: parameters within bounds, counters of all daemons under the contract's names."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from qemu_shim.scenarios import recorder
from qemu_shim.scenarios import run as contract
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.counters import COUNTS, GAUGES, added_up, flatten, grown, tables
from qemu_shim.scenarios.scenario import Param, Scenario
from qemu_shim.study.workloads.library import WORKLOADS

KVMD = {
    "vms": [
        {"ept_violations": 3, "table_pages.cpu.1": 2},
        {"ept_violations": 4, "table_pages.cpu.1": 1, "table_pages.iommu.1": 5},
    ],
    "frames": 9,
}
IOMMU = {"page_requests": 2, "hwpts": [{"invalidations": 6, "faults": {"INVALID": 1}}, {"invalidations": 1}]}
SILICON = {
    "unit": {"page_requests": 2, "messages": [[1, 2, 3]]},
    "devices": {"dsa0": {"bytes_moved": 7, "fault_latencies_ns": [5, 6]}, "dsa1": {"bytes_moved": 8}},
}


async def nothing(ctx: Context) -> None:
    """A play without steps."""


def test_counters_of_all_vms_hwpts_and_devices_are_added_up() -> None:
    raw = flatten(KVMD, IOMMU, SILICON)
    counts = added_up(COUNTS, raw)
    assert (counts["cpu_faults"], counts["io_faults"], counts["io_faults_failed"]) == (7, 2, 1)
    assert (counts["invalidations"], counts["dma_bytes"]) == (7, 15)
    assert added_up(GAUGES, raw)["resident_pages"] == 9


def test_tables_are_gauges_by_owner_and_level() -> None:
    assert tables(flatten(KVMD, IOMMU, SILICON)) == {"table_pages.cpu.1": 3, "table_pages.iommu.1": 5}


def test_a_minus_takes_away_and_what_was_before_does_not_count() -> None:
    raw = Counter({"a": 10, "b": 3})
    assert added_up({"left": ("a", "-b", "nobody")}, raw) == {"left": 7}
    assert added_up({"left": ("a", "-b")}, grown(raw, Counter({"a": 4, "b": 1}))) == {"left": 4}


def test_every_count_and_gauge_has_a_name_of_the_contract() -> None:
    """The contract's docstring is what `compare` is written against."""
    document = re.sub(r"\([^)]*\)", "", contract.__doc__ or "")
    counts, _, gauges = document.partition("\ncounts  ")[2].partition("\ngauges  ")
    named = {name.strip() for name in re.split("[,;]", counts.partition(".")[0])}
    assert named == {*COUNTS, "pages_written", "pages_reported", "pages_missed"}  # the workload's to count
    assert {name.strip() for name in gauges.split(",")[:2]} == {*GAUGES}


@pytest.mark.parametrize(
    ("given", "error"),
    [({"pages": 0}, ValueError), ({"pages": 11}, ValueError), ({"sheets": 1}, LookupError)],
)
def test_a_parameter_out_of_bounds_or_of_no_name_is_refused(
    given: dict[str, int], error: type[Exception]
) -> None:
    workload = Scenario("w", "", nothing, {"pages": Param(5, 1, 10, "pages"), "share": Param(0, 0, 9, "")})
    assert workload.with_defaults({"share": 3}) == {"pages": 5, "share": 3}
    with pytest.raises(error):
        workload.with_defaults(given)


def test_every_workload_has_defaults_within_its_bounds() -> None:
    for name, workload in WORKLOADS.items():
        assert workload.name == name
        assert list(workload.with_defaults({})) == list(workload.params)


async def test_the_invariants_are_looked_at_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two of them, a stale access of the first one's device is a problem as well."""

    async def kvmds() -> list[str]:
        return ["I11: a leaf"]

    async def iommufdds() -> list[str]:
        return ["I22: a pin"]

    async def looked(_: object, machine: str) -> SimpleNamespace:
        return SimpleNamespace(device={"stale_notes": [f"I6: {machine}"]}, iommu={"partial_held": 0})

    monkeypatch.setattr(recorder, "snapshot", looked)
    host: Any = SimpleNamespace(
        kvmd=SimpleNamespace(violations=kvmds), iommufdd=SimpleNamespace(violations=iommufdds)
    )
    of_two = recorder.Recorder(host)
    machines: Any = ["first", "second"]
    of_two.machines += machines
    assert await of_two.problems() == ["I11: a leaf", "I22: a pin", "I6: first", "I6: second"]
