"""The report in a real browser that can reach no host: its figures are there, and its script has run."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qemu_shim.study.compare.costs import default_costs
from qemu_shim.study.compare.figures import compare
from qemu_shim.study.compare.report import render
from qemu_shim.study.compare.rows import number_text, us_text
from qemu_shim.study.compare.schema import Comparison
from tests.patience import WHOLE_RUN_S
from tests.tidy.source import ROOT
from tests.unit.qemu_shim.study.compare.runs import all_made_up

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NO_HOST = ("--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)


def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(
            "no browser: the report is tested in a real one. `make browser` installs Debian's chromium"
        )
    return found


def opened(page: Path, profile: Path) -> str:
    """The document as the browser has it once its scripts have run."""
    command = [browser(), *QUIET, *NO_HOST, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WHOLE_RUN_S, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(all_made_up(), default_costs(), "qemu-shim compare --seed 1")


@pytest.fixture(scope="module")
def dom(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("report")
    page = directory / "report.html"
    page.write_text(render(comparison), encoding="utf-8")
    return opened(page, directory / "profile")


def shown(dom: str) -> str:
    """Without the JSON and the scripts: what a reader sees."""
    return re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)


def test_the_figures_of_the_json_are_in_the_document(dom: str, comparison: Comparison) -> None:
    section = dict(re.findall(r'<section id="([^"]+)">(.*?)</section>', shown(dom), re.DOTALL))
    assert list(section) == [workload.workload for workload in comparison.workloads]
    for workload in comparison.workloads:
        cells = re.findall(r"<td>([^<]*)", section[workload.workload])
        for it in workload.designs:
            for text in (number_text(it.faults.cpu), number_text(it.faults.io), us_text(it.time.total.us)):
                assert text in cells, f"{workload.workload}, {it.design}: {text}"


def test_the_script_ran_and_wrote_every_series_as_a_table(dom: str, comparison: Comparison) -> None:
    tables = re.findall(r"<caption>(\w+)</caption>(.*?)</table>", shown(dom), re.DOTALL)
    designs = [it for workload in comparison.workloads for it in workload.designs]
    assert [name for name, _ in tables] == [it.design for it in designs]
    for (_, body), it in zip(tables, designs, strict=True):
        rows = [re.findall(r"<td>([^<]*)", row) for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)[1:]]
        assert [html.unescape(row[0]) for row in rows] == it.series.step
        assert [int(row[3].replace(",", "")) for row in rows] == it.series.io_faults
        assert [int(row[4].replace(",", "")) for row in rows] == it.series.table_bytes


def test_the_scripts_times_are_those_that_were_computed_here(dom: str, comparison: Comparison) -> None:
    """The page has the cost model's plane a second time, in its script: both say the same at the defaults."""
    for workload in comparison.workloads:
        (row,) = re.findall(rf'<tr data-workload="{workload.workload}">(.*?)</tr>', dom, re.DOTALL)
        times = re.findall(r'class="(\w+)( best)?" data-design="\w+"><span>([^<]*)</span>', row)
        assert [(name, text) for name, _, text in times] == [
            (it.design, us_text(it.time.total.us)) for it in workload.designs
        ]
        assert {name for name, best, _ in times if best} == set(workload.order[0])


def test_the_json_is_still_in_the_document(dom: str, comparison: Comparison) -> None:
    (text,) = re.findall(r'<script type="application/json" id="comparison">(.*?)</script>', dom, re.DOTALL)
    assert json.loads(text) == json.loads(comparison.model_dump_json())


def test_a_script_that_fails_would_be_seen(comparison: Comparison, tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text(render(comparison).replace("JSON.parse(", "JSON.purse("), encoding="utf-8")
    broken = opened(page, tmp_path / "profile")
    assert "<caption>" not in broken


def test_the_report_in_the_documents_opens(tmp_path: Path) -> None:
    page = ROOT / "docs" / "results" / "comparison.html"
    comparison = Comparison.model_validate_json(page.with_suffix(".json").read_bytes())
    dom = opened(page, tmp_path / "profile")
    assert dom.count("<caption>") == sum(len(workload.designs) for workload in comparison.workloads)


def test_without_a_browser_the_tests_fail_and_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(pytest.fail.Exception, match="make browser"):
        browser()
