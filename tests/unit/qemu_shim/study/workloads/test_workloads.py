"""Workloads as data: parameters within bounds, counters of all daemons under the contract's names."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.counters import (
    COUNTS,
    GAUGES,
    SOURCES,
    Counters,
    added_up,
    flatten,
    grown,
    tables,
)
from qemu_shim.scenarios.recorder import Recorder
from qemu_shim.scenarios.scenario import Param, Scenario
from qemu_shim.study.compare.schema import Told, Work
from qemu_shim.study.workloads.library import WORKLOADS

OWN = {"pages_written", "pages_reported", "pages_missed"}  # the scenario's to count
KVMD = {
    "vms": [
        {"ept_violations": 3, "table_pages.cpu.1": 2},
        {"ept_violations": 4, "table_pages.cpu.1": 1, "table_pages.iommu.1": 5},
    ],
    "frames": 9,
}
IOMMU = {"page_requests": 2, "hwpts": [{"invalidations": 6, "faults": {"INVALID": 1}}, {"invalidations": 1}]}
SILICON = {
    "unit": {"page_requests": 2, "interrupt_messages": [[1, 2, 3]]},
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


def test_every_counter_has_a_unit_and_a_meaning_and_every_figure_of_compare_is_one() -> None:
    """What only a scenario knows has no source."""
    for each in fields(Counters):
        assert each.metadata["unit"]
        assert each.metadata["meaning"]
    assert {name for name, sources in SOURCES.items() if not sources} == OWN
    assert {*Told.model_fields, *Work.model_fields} <= {*COUNTS, *OWN}
    assert {*GAUGES} == {"pinned_pages", "resident_pages"}


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


async def test_the_invariants_are_looked_at_on_every_device() -> None:
    """With two of them, a stale access of the first one is a problem as well."""

    async def kvmds() -> list[str]:
        return ["I11: a leaf"]

    async def iommufdds() -> list[str]:
        return ["I22: a pin"]

    async def held() -> dict[str, int]:
        return {"partial_held": 0}

    async def devices() -> dict[str, object]:
        return {"devices": {name: {"stale_notes": [f"I6: {name}"]} for name in ("first", "second")}}

    host: Any = SimpleNamespace(
        killed=set(),
        kvmd=SimpleNamespace(violations=kvmds),
        iommufdd=SimpleNamespace(violations=iommufdds, stats=held),
        device_sim=SimpleNamespace(stats=devices),
    )
    recorder = Recorder(host)
    machine: Any = None
    recorder.machines.append(machine)
    assert await recorder.problems() == ["I11: a leaf", "I22: a pin", "I6: first", "I6: second"]
