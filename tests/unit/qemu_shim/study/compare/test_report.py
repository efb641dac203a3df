"""The report as a file; what a browser makes of it is tests/integration/test_report.py's."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from qemu_shim.scenarios.run import Refusal, Run
from qemu_shim.study.compare.costs import default_costs
from qemu_shim.study.compare.documents import FIGURES
from qemu_shim.study.compare.figures import compare
from qemu_shim.study.compare.report import render
from qemu_shim.study.compare.schema import Comparison
from qemu_shim.vmm.designs import DESIGNS
from tests.unit.qemu_shim.study.compare.runs import all_made_up, made_up

SIZE_MAX = 300_000
EMBEDDED = re.compile(r'<script type="application/json" id="comparison">(.*?)</script>', re.DOTALL)
SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)


def comparison_of(runs: list[Run]) -> Comparison:
    return compare(runs, default_costs(), "qemu-shim compare --seed 1")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """All workloads on all designs, with more steps than a report tells apart."""
    return comparison_of(all_made_up(steps=32))


@pytest.fixture(scope="module")
def page(comparison: Comparison) -> str:
    return render(comparison)


def test_the_file_is_small_with_every_workload_and_design(page: str) -> None:
    assert len(page.encode()) < SIZE_MAX


def test_the_file_names_no_resource_outside_itself(page: str) -> None:
    assert re.findall(r"""https?:|//\w|\bsrc=|<link|@import|url\(|href="[^#]""", EMBEDDED.sub("", page)) == []


def test_the_json_in_the_file_is_the_comparison(page: str, comparison: Comparison) -> None:
    (embedded,) = EMBEDDED.findall(page)
    assert Comparison.model_validate_json(embedded) == comparison


def test_text_of_a_run_cannot_become_markup() -> None:
    evil = "</script><script>alert(1)</script><b>&"
    run = made_up("shared", evil)
    run.refusals.append(Refusal(evil, evil))
    run.problems.append(evil)
    page = render(comparison_of([run]))
    assert page.count("<script") == 2
    assert "<b>&" not in page
    assert json.loads(EMBEDDED.findall(page)[0])["workloads"][0]["workload"] == evil


def test_every_plot_is_well_formed_and_says_what_it_shows(page: str) -> None:
    plots = [ElementTree.fromstring(text) for text in SVG.findall(page)]
    assert len(plots) == len(DESIGNS) * 2 + 10 * 7
    for plot in plots:
        assert plot.get("aria-label") or plot.get("aria-hidden") == "true"


def test_no_part_of_a_plot_lies_outside_its_frame(page: str) -> None:
    for text in SVG.findall(page):
        plot = ElementTree.fromstring(text)
        _, _, width, height = map(float, (plot.get("viewBox") or "").split())
        for shape in (*plot.iter("polyline"), *plot.iter("polygon")):
            for x, y in (map(float, place.split(",")) for place in (shape.get("points") or "").split()):
                assert 0 <= x <= width, text
                assert 0 <= y <= height, text
        for bar in plot.iter("rect"):
            x, y, w, h = (float(bar.get(name) or "nan") for name in ("x", "y", "width", "height"))
            assert 0 <= x <= x + w <= width, text
            assert 0 <= y <= y + h <= height + 0.1, text


def test_what_each_design_did_can_be_read_without_scripts(page: str) -> None:
    rest = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert rest.count("<td>4,099<") == 1  # IO page faults of mirror where 4,096 pages are touched
    assert rest.count("pinned refused: reclaim") == 3


def test_page_and_documents_mark_the_same_designs_as_the_json(page: str, comparison: Comparison) -> None:
    """Those that tie with the cheapest, and those in no ranking; three typographies of one fact."""
    times = FIGURES["time"](comparison).splitlines()[2:]
    assert {len(workload.order[0]) for workload in comparison.workloads} != {1}, "there are ties to be shown"
    assert any(workload.unranked for workload in comparison.workloads)
    for workload, line in zip(comparison.workloads, times, strict=True):
        (row,) = re.findall(rf'<tr data-workload="{workload.workload}">(.*?)</tr>', page)
        cells = re.findall(r'<td class="(\w+)( best)?" .*?(?:<sup>(.)</sup>)?<i', row)
        bold = [cell.strip().startswith("**") for cell in line.split("|")[2:-1]]
        marked = ["†" in cell for cell in line.split("|")[2:-1]]
        first = [name in workload.order[0] for name in DESIGNS]
        assert [name for name, _, _ in cells] == list(DESIGNS)
        assert first == bold == [best == " best" for _, best, _ in cells]
        assert (
            marked == [mark == "†" for _, _, mark in cells] == [name in workload.unranked for name in DESIGNS]
        )


def test_the_same_comparison_gives_the_same_file(page: str, comparison: Comparison) -> None:
    assert render(comparison) == page


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [made_up("shared")],
        [Run("w", "mirror", 1, {}, problems=["down"])],
        [Run("w", "mirror", 1, {}, refusals=[Refusal("all", "of it")]), made_up("shared", "w")],
    ],
    ids=["nothing", "one", "failed", "refused"],
)
def test_any_comparison_can_be_reported(runs: list[Run]) -> None:
    assert "</html>" in render(comparison_of(runs))


def test_a_constant_without_a_range_leaves_its_plot_out() -> None:
    costs = default_costs().with_values({"io_fault_factor": 0.0, "swap_in": 0.0})
    assert "</html>" in render(compare([made_up("shared")], costs, "-"))
