"""Reports: percentiles by hand, the table, and what makes a scenario fail."""

from __future__ import annotations

import json

import pytest

from qemu_shim.scenarios.measure import (
    Report,
    Snapshot,
    difference,
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


def snapshot(**device: object) -> Snapshot:
    vm = {
        "ept_violations": 4,
        "pf_fixed": 4,
        "io_pf_fixed": 1,
        "remote_tlb_flush": 2,
        "table_pages": 9,
        "name": "vm0",
    }
    unit = {"page_requests": 3, "invalidations": 2, "iotlb_hits": 5, "iotlb_misses": 6}
    counters = {
        "page_request_groups": 2,
        "devtlb_hits": 70,
        "devtlb_misses": 8,
        "io_faults": 0,
        "fault_latencies_ns": [],
    }
    return Snapshot(vm, unit, counters | device, {}, {})


def test_a_difference_has_the_numbers_and_nothing_else() -> None:
    after = {"grew": 9, "same": 4, "name": "x", "list": [1]}
    assert difference(after, {"grew": 2, "same": 4, "name": "x", "list": []}) == {"grew": 7, "same": 0}


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
    found = new_latencies(snapshot(io_faults=before), snapshot(io_faults=after, fault_latencies_ns=latencies))
    assert found == expected


def test_the_table_shows_what_changed_and_json_the_same_figures() -> None:
    report = Report("demo")
    before = snapshot()
    after = snapshot(devtlb_hits=75, io_faults=2, fault_latencies_ns=[40_000, 60_000])
    after.vm["ept_violations"] = 10
    after.unit["page_requests"] = 5
    fill_table(report, before, after)
    rows = dict(report.rows)
    assert rows["page requests / groups"] == "2 / 0"
    assert rows["EPT violations"] == "6"
    assert rows["device-TLB hits / misses"] == "5 / 0"
    assert rows["table pages"] == "9"
    assert rows["IO page fault latency"] == "p50 40 us, p99 60 us of 2"
    figures = json.loads(json.dumps(report.as_json()))["figures"]
    assert (figures["io_fault_p50_us"], figures["io_fault_p99_us"]) == (40.0, 60.0)
    assert (figures["page_requests"], figures["ept_violations"], figures["devtlb_hits"]) == (2, 6, 5)


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
