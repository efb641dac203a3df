"""docs/results/performance.md says what its run came to, and why what falls short does."""

from __future__ import annotations

from bench.figures import FIGURES
from bench.harness import Verdict
from bench.page import PAGE, page, short, told


def test_the_page_is_what_its_records_make_of_it() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(*told()), "python -m bench.page"


def test_each_row_that_falls_short_has_a_reason_and_no_other() -> None:
    run, tried = told()
    assert tried["short"].keys() == set(short(run["rows"]))


def test_what_is_on_the_page_is_what_is_measured() -> None:
    run, tried = told()
    rows = {(f.name, row.ours.name, row.limit.name): str(row.wanted) for f in FIGURES for row in f.rows}
    kept = {(row["figure"], row["ours"], row["limit"]): row["wanted"] for row in run["rows"]}
    assert kept.items() <= rows.items()
    assert {each["figure"] for each in tried["tried"]} <= {figure for figure, _, _ in kept}


def test_a_row_that_falls_short_without_a_reason_is_noticed() -> None:
    run, tried = told()
    rows = [{**row, "verdict": Verdict.MISSED.value} for row in run["rows"]]
    met = {row["ours"] for row in rows} - set(short(run["rows"]))
    assert set(short(rows)) - tried["short"].keys() == met
