"""Summaries over seeds, worked out by hand."""

from __future__ import annotations

from qemu_shim.scenarios.run import Refusal, Run, Sample
from qemu_shim.study.campaign.summary import as_text, summary


def run_of(seed: int, faults: int, pinned: tuple[int, ...], design: str = "mirror") -> Run:
    samples = [
        Sample(f"step {n}", {"io_faults": faults * n}, {"pinned_pages": p}) for n, p in enumerate(pinned)
    ]
    return Run("w", design, seed, {"pages": 4}, samples)


RUNS = [
    run_of(2, 5, (0, 9, 1)),
    run_of(0, 1, (0, 2, 2)),
    run_of(1, 3, (0, 4, 3)),
    run_of(0, 8, (0, 0, 0), "shared"),
]


def test_counts_are_those_of_the_end_and_gauges_the_most_there_was() -> None:
    mirror, shared = summary(RUNS)["groups"]
    assert mirror["seeds"] == [0, 1, 2]
    assert mirror["figures"]["io_faults"] == {"min": 2, "median": 6, "max": 10}
    assert mirror["figures"]["pinned_pages"] == {"min": 2, "median": 4, "max": 9}
    assert shared["figures"]["io_faults"] == {"min": 16, "median": 16, "max": 16}


def test_runs_on_daemons_with_other_options_are_apart() -> None:
    other = run_of(0, 9, (0,))
    other.options["iommufdd"] = "--premap-pages 8"
    groups = summary([RUNS[1], other])["groups"]
    assert [group["options"] for group in groups] == [{}, {"iommufdd": "--premap-pages 8"}]
    assert "w  pages 4 --iommufdd '--premap-pages 8'" in list(as_text(summary([other])))


def test_what_failed_is_named_and_not_counted() -> None:
    broken = run_of(7, 1000, (0, 1000))
    broken.problems.append("an invariant")
    document = summary([*RUNS, broken])
    assert document["points"] == 5
    assert document["failed"] == [{"point": "w/mirror/7/pages=4", "problems": ["an invariant"]}]
    assert document["groups"] == summary(RUNS)["groups"]


def test_parameters_are_told_apart() -> None:
    other = run_of(0, 1, (0,))
    other.params["pages"] = 5
    assert [group["params"]["pages"] for group in summary([RUNS[0], other])["groups"]] == [4, 5]


def test_a_refusal_is_a_result() -> None:
    refusals = [Refusal("overcommit", "all of it is pinned")]
    refused = [Run("w", "pinned", seed, {"pages": 4}, refusals=refusals) for seed in (0, 1)]
    document = summary([*RUNS, *refused])
    assert document["failed"] == []
    assert document["groups"][-1]["refusals"] == [{"what": "overcommit", "why": "all of it is pinned"}]
    assert "  pinned refused: overcommit: all of it is pinned" in list(as_text(document))


def test_the_table_has_a_column_a_design_and_a_row_for_what_is_not_nothing() -> None:
    lines = list(as_text(summary(RUNS)))
    assert lines[0] == "w  pages 4"
    cells = [line.split() for line in lines[1:6]]
    assert cells[0] == ["mirror", "shared"]
    assert ["seeds", "3", "1"] in cells
    assert ["io_faults", "2/6/10", "16"] in cells
    assert ["pinned_pages", "2/4/9", "0"] in cells
    assert lines[-1] == "4 points, 0 failed"
