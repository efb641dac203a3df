"""Figures of a run small enough to be worked out by hand."""

from __future__ import annotations

import pytest

from qemu_shim.scenarios.run import Refusal, Run, Sample
from qemu_shim.study.compare.costs import default_costs
from qemu_shim.study.compare.figures import SERIES_MAX, compare, design_figures
from qemu_shim.study.compare.latency import BOUNDS_US, CLASSES, class_of
from qemu_shim.study.compare.schema import Comparison
from qemu_shim.vmm.designs import DESIGNS
from tests.unit.qemu_shim.study.compare.runs import all_made_up, made_up

PAGE_CLEARED = 0.245e6 / 262144 * 0.8527
PAGE_PINNED = 0.245e6 / 262144


def by_hand() -> Run:
    """Two pages are pinned at start, each side faults one in, one is read from swap, one let go."""
    return Run(
        "by hand",
        "pinned",
        7,
        {"pages": 2},
        [
            Sample("start", {"pages_pinned": 2, "pages_allocated": 2}, {"pinned_pages": 2}),
            Sample(
                "first dma",
                {"pages_pinned": 2, "pages_allocated": 2, "cpu_faults": 1, "io_faults": 1, "io_groups": 1},
                {"pinned_pages": 2, "table_pages.iommufd.1": 3, "table_pages.cpu.2": 1},
            ),
            Sample(
                "end",
                {
                    "pages_pinned": 2,
                    "pages_allocated": 2,
                    "cpu_faults": 1,
                    "io_faults": 2,
                    "io_groups": 2,
                    "io_faults_major": 1,
                    "swap_ins": 1,
                    "pages_written": 5,
                    "pages_reported": 4,
                },
                {"pinned_pages": 1, "table_pages.iommufd.1": 2, "table_pages.cpu.2": 1},
            ),
        ],
        [Refusal("ballooning", "pinned pages stay")],
    )


def test_figures_of_a_run_worked_out_by_hand() -> None:
    it = design_figures(by_hand(), default_costs())
    start, dma, end = 2 * PAGE_PINNED, 2 + 20 + 4 * PAGE_CLEARED, 20 + 700 + 4 * 1.3
    assert it.time.total.us == pytest.approx(start + dma + end, abs=1e-3)
    assert it.time.total.low_us == pytest.approx(start + dma + end - 2 * 2 * 7 - 640, abs=1e-3)
    assert it.time.total.high_us == pytest.approx(start + dma + end + 2 * 2 * 70 + 9300, abs=1e-3)
    assert it.time.first_dma is not None
    assert it.time.first_dma.us == pytest.approx(start + dma, abs=1e-3)
    assert it.time.paid_us["vcpu"] == 2
    assert it.time.paid_us["device"] == 2 * 20 + 700
    assert it.pinned.page_seconds == pytest.approx((1 * start + 2 * dma + 1.5 * end) / 1e6, abs=1e-8)
    assert (it.pinned.pages_max, it.pinned.pages_end) == (2, 1)
    assert it.tables.pages == {"iommufd": [3, 0, 0, 0, 0], "cpu": [0, 1, 0, 0, 0]}
    assert it.tables.bytes_max == 4 * 4096
    assert (it.faults.cpu, it.faults.io, it.faults.io_major) == (1, 2, 1)
    assert it.refusals[0].what == "ballooning"
    assert it.work.pages_missed == 1, "five were written, four reported"
    assert it.series.us == pytest.approx([start, start + dma, start + dma + end], abs=1e-3)
    assert it.series.pinned_bytes == [8192, 8192, 4096]


def test_latencies_fall_into_the_classes_linux_has() -> None:
    it = design_figures(by_hand(), default_costs()).latency["both"]
    assert it.classes == [0, 0, 1, 1, 1, 0, 0]
    assert (it.count, it.min_us, it.max_us) == (3, 2, 720)
    assert it.avg_us == pytest.approx((2 + 20 + 720) / 3, abs=1e-3)
    assert [class_of(bound) for bound in (0, *BOUNDS_US)] == list(range(len(CLASSES)))
    assert [class_of(bound * 0.999) for bound in BOUNDS_US] == list(range(len(BOUNDS_US)))


def test_a_wait_is_a_groups() -> None:
    """Of 24 pages asked for in 3 groups, 16 are read from swap: two groups of 8, and one that has none."""
    counts = {"io_faults": 24, "io_groups": 3, "io_faults_major": 16}
    run = Run("w", "shared", 1, {}, [Sample("start", counts, {})])
    it = design_figures(run, default_costs()).latency
    assert it["io"].count == 3
    assert it["io"].classes == [0, 0, 0, 1, 0, 2, 0]
    assert (it["io"].min_us, it["io"].max_us) == (20 + 7, 20 + 7 + 8 * 700)
    assert it["io"].count * it["io"].avg_us == pytest.approx(3 * 20 + 21 * 1 + 16 * 700, abs=0.01)
    assert it["both"] == it["io"]
    assert it["cpu"].count == 0


def test_waits_are_told_apart_by_the_step_they_are_of() -> None:
    """In the first step nothing is read from swap, in the second everything."""
    first = {"io_faults": 8, "io_groups": 1}
    second = {"io_faults": 16, "io_groups": 2, "io_faults_major": 8}
    run = Run("w", "shared", 1, {}, [Sample("a", first, {}), Sample("b", second, {})])
    assert design_figures(run, default_costs()).latency["io"].classes == [0, 0, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(("of_pages", "told"), [((5, 9, 2), 2), ((5, 3, 0), 2), ((5, 9, 0), 0)])
def test_a_page_never_reported_is_missed_whoever_counts_it(of_pages: tuple[int, int, int], told: int) -> None:
    written, reported, missed = of_pages
    counts = {"pages_written": written, "pages_reported": reported, "pages_missed": missed}
    run = Run("w", "shared", 1, {}, [Sample("start", counts, {})])
    assert design_figures(run, default_costs()).work.pages_missed == told


def test_the_plane_gives_the_time_at_both_ends_of_the_band() -> None:
    for run in all_made_up():
        time = design_figures(run, default_costs()).time
        fixed, factor, swap = time.plane
        total = time.total
        for us, io, swap_us in ((total.low_us, 3, 60), (total.us, 10, 700), (total.high_us, 80, 10000)):
            assert fixed + factor * io + swap * swap_us == pytest.approx(us, abs=0.02)


def test_what_steps_cost_adds_up_to_the_whole() -> None:
    for run in all_made_up():
        it = design_figures(run, default_costs())
        assert it.series.us[-1] == pytest.approx(it.time.total.us, abs=0.01)
        assert sum(it.time.paid_us.values()) == pytest.approx(it.time.total.us, abs=0.01)


def test_a_long_series_is_thinned_and_keeps_its_end() -> None:
    run = made_up("shared", pages=4096, steps=200)
    series = design_figures(run, default_costs()).series
    assert len(series.step) <= SERIES_MAX + 1
    assert (series.step[0], series.step[-1]) == ("start", "reclaim")
    assert {len(column) for column in (series.us, series.io_faults, series.table_bytes)} == {len(series.step)}


def test_the_document_reads_back_as_it_was_written() -> None:
    comparison = compare(all_made_up(), default_costs(), "qemu-shim compare --seed 1")
    assert Comparison.model_validate_json(comparison.model_dump_json()) == comparison
    assert comparison.version == 4
    assert all([it.design for it in w.designs] == list(DESIGNS) for w in comparison.workloads)


def test_the_same_runs_give_the_same_document_in_any_order() -> None:
    runs = all_made_up()
    forward = compare(runs, default_costs(), "-")
    backward = compare(runs[::-1], default_costs(), "-")
    assert forward.workloads == backward.workloads[::-1]
