"""Reports: percentiles by hand, the table, and what makes a scenario fail."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import pytest

from qemu_shim.scenarios.measure import (
    Report,
    Snapshot,
    fill_table,
    new_latencies,
    percentile,
    render,
)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([], 50, 0.0),
        ([7], 50, 7.0),
        ([7], 99, 7.0),
        ([2, 1], 50, 1.0),
        ([3, 1, 2], 50, 2.0),
        ([1, 2, 3, 4], 50, 2.0),
        ([15, 20, 35, 40, 50], 40, 20.0),
        ([15, 20, 35, 40, 50], 100, 50.0),
        (list(range(1, 101)), 50, 50.0),
        (list(range(100, 0, -1)), 99, 99.0),
        (list(range(1, 1001)), 99, 990.0),
    ],
)
def test_a_percentile_is_the_value_of_nearest_rank(values: list[int], percent: int, expected: float) -> None:
    before = list(values)
    assert percentile(values, percent) == expected
    assert values == before


def snapshot(io_faults: int = 0, latencies: Sequence[int] = (), **counts: int) -> Snapshot:
    """`unit_page_requests=3` is the source `unit.page_requests`."""
    raw = {
        "vm.ept_violations": 4,
        "vm.remote_tlb_flush": 2,
        "vm.table_pages": 9,
        "unit.page_requests": 3,
        "device.page_request_groups": 2,
        "device.devtlb_hits": 70,
        **{name.replace("_", ".", 1): count for name, count in counts.items()},
    }
    return Snapshot(Counter(raw), {"dsa0": (io_faults, list(latencies))})


def test_what_grew_is_counted_by_name_and_what_did_not_is_0() -> None:
    cost = snapshot(vm_ept_violations=6, vm_remote_tlb_flush=3).since(snapshot())
    grew = {name: count for name, count in asdict(cost).items() if count}
    assert grew == {"cpu_faults": 2, "flushes": 1}


@pytest.mark.parametrize(
    ("before", "after", "latencies", "expected"),
    [
        (0, 2, [10, 20], [10, 20]),
        (2, 3, [10, 20, 30], [30]),
        (3, 3, [10, 20, 30], []),
        (0, 9, [20, 30], [20, 30]),
    ],
)
def test_latencies_are_those_of_the_faults_since(
    before: int, after: int, latencies: list[int], expected: list[int]
) -> None:
    found = new_latencies(snapshot(io_faults=before), snapshot(io_faults=after, latencies=latencies))
    assert found == expected


def test_the_table_shows_what_changed_and_json_the_same_figures() -> None:
    report = Report("demo")
    before = snapshot()
    after = snapshot(2, [40_000, 60_000], device_devtlb_hits=75, vm_ept_violations=10, unit_page_requests=5)
    fill_table(report, before, after)
    rows = dict(report.rows)
    assert rows["page requests / groups"] == "2 / 0"
    assert rows["EPT violations"] == "6"
    assert rows["device-TLB hits / misses"] == "5 / 0"
    assert rows["table pages"] == "9"
    assert rows["IO page fault latency"] == "p50 40 us, p99 60 us of 2"
    figures = json.loads(json.dumps(report.as_json()))["figures"]
    assert (figures["io_fault_p50_us"], figures["io_fault_p99_us"]) == (40.0, 60.0)
    assert (figures["io_faults"], figures["cpu_faults"], figures["devtlb_hits"]) == (2, 6, 5)


def test_without_a_fault_the_table_says_so() -> None:
    report = Report("demo")
    fill_table(report, snapshot(), snapshot())
    assert dict(report.rows)["IO page fault latency"] == "no IO page fault"
    assert report.figures["io_fault_p99_us"] == 0


def test_a_report_is_ok_until_an_expectation_fails() -> None:
    report = Report("demo")
    report.expect(True, "never shown")
    assert report.as_json()["ok"] is True
    report.expect(False, "two faults for one page")
    assert report.as_json()["ok"] is False
    assert report.as_json()["problems"] == ["two faults for one page"]


def test_the_rendered_table_is_aligned_between_two_rules() -> None:
    report = Report("demo", rows=[("tests", "5"), ("bytes verified", "40960")])
    assert render(report).splitlines() == [
        "  ----------------------",
        "  tests            5",
        "  bytes verified   40960",
        "  ----------------------",
    ]


def test_a_row_is_cut_at_the_width() -> None:
    report = Report("demo", rows=[("name", "x" * 200)])
    assert len(render(report, width=40).splitlines()[1]) == 40
