"""docs/results/comparison.*: what is generated there is what the figures beside it render to."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from qemu_shim.compare.costs import default_costs
from qemu_shim.compare.documents import filled
from qemu_shim.compare.report import render
from qemu_shim.compare.schema import VERSION, Comparison
from tests.tidy.source import ROOT

RESULTS = ROOT / "docs" / "results"
AGAIN = "qemu-shim compare --from docs/results/comparison.json --docs docs/results writes it again"
SIZE_MAX = 300_000


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return Comparison.model_validate_json((RESULTS / "comparison.json").read_bytes())


def test_the_page_has_the_figures_of_the_json(comparison: Comparison) -> None:
    text = (RESULTS / "comparison.md").read_text(encoding="utf-8")
    assert filled(text, comparison) == text, AGAIN


def test_the_report_has_the_figures_of_the_json(comparison: Comparison) -> None:
    page = (RESULTS / "comparison.html").read_text(encoding="utf-8")
    assert render(comparison) == page, AGAIN
    assert len(page.encode()) < SIZE_MAX


def test_the_figures_were_priced_with_the_constants_of_today(comparison: Comparison) -> None:
    assert comparison.version == VERSION
    today = [asdict(constant) for constant in default_costs().constants.values()]
    assert [cost.model_dump() for cost in comparison.costs] == today, "run make comparison"


def test_a_changed_figure_is_seen(comparison: Comparison) -> None:
    text = (RESULTS / "comparison.md").read_text(encoding="utf-8")
    assert filled(text.replace("| `boot-touch` |", "| `boot-tuch` |"), comparison) == text
    assert filled(text, comparison.model_copy(update={"command": "other"})) != text
