"""The command: what it refuses, what it says while it works, and its exit status; nothing is run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from qemu_shim import cli
from qemu_shim.scenarios.run import Run, Sample
from qemu_shim.study.campaign.point import Point
from qemu_shim.study.campaign.runner import Interrupted
from qemu_shim.study.command import compare as command
from qemu_shim.study.compare.schema import Comparison
from qemu_shim.study.workloads.library import WORKLOADS
from qemu_shim.vmm.designs import DESIGNS
from tests.unit.qemu_shim.study.compare.runs import made_up

Done = Callable[[Run], None]


class Campaign:
    """Stands in for the processes: what was to be run, and made-up runs of it."""

    def __init__(self, spoil: Callable[[Run], None] = lambda run: None) -> None:
        self.points: list[Point] = []
        self.jobs: int | None = None
        self._spoil = spoil

    def run_points(self, points: Iterable[Point], jobs: int | None, on_done: Done) -> list[Run]:
        self.points, self.jobs = list(points), jobs
        runs = [made_up(point.design, point.workload, seed=point.seed) for point in self.points]
        for run in runs:
            self._spoil(run)
            on_done(run)
        return runs


def call(monkeypatch: pytest.MonkeyPatch, campaign: Campaign, *argv: str) -> int:
    monkeypatch.setattr(command, "run_points", campaign.run_points)
    monkeypatch.setattr(cli, "configure_log", lambda level: None)
    return cli.main(["compare", *argv])


def test_by_default_everything_is_run_and_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign = Campaign()
    assert call(monkeypatch, campaign) == 0
    assert {(point.workload, point.design) for point in campaign.points} == {
        (workload, design) for workload in WORKLOADS for design in DESIGNS
    }
    assert (campaign.jobs, {point.seed for point in campaign.points}) == (None, {1})
    out, err = capsys.readouterr()
    assert all(name in out for name in (*WORKLOADS, *DESIGNS))
    assert err.splitlines()[-1].startswith(f"[{len(campaign.points)}/{len(campaign.points)}] ")
    assert max(map(len, out.splitlines())) <= 100


def test_options_of_daemons_are_in_every_point_and_in_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "check_options", lambda options: None)
    campaign, path = Campaign(), tmp_path / "f.json"
    said = ["dmatest", "--kvmd", "--no-pml", "--iommufdd", "--premap-pages 8", "--json", str(path)]
    assert call(monkeypatch, campaign, *said) == 0
    assert {point.options for point in campaign.points} == {
        (("iommufdd", "--premap-pages 8"), ("kvmd", "--no-pml"))
    }
    assert Comparison.model_validate_json(path.read_text()).command == (
        "qemu-shim compare dmatest --seed 1 --kvmd --no-pml --iommufdd '--premap-pages 8'"
    )


def test_only_what_was_asked_for_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = Campaign()
    assert call(monkeypatch, campaign, "dmatest", "--designs", "shared", "--seed", "9", "--jobs", "3") == 0
    assert [(p.workload, p.design, p.seed) for p in campaign.points] == [("dmatest", "shared", 9)]
    assert campaign.jobs == 3


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["fly"], "no workload is named fly; there are boot-touch, "),
        (["--designs", "best"], "no design is named best; there are "),
        (["--costs", "nowhere.toml"], "nowhere.toml: "),
        (["--report", "no/such/dir.html"], "its directory does not exist"),
        (["--json", "no/such/dir.json"], "its directory does not exist"),
        (["--docs", "no/such"], "no/such: "),
        (["--from", "nowhere.json"], "nowhere.json: "),
    ],
)
def test_a_wrong_command_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], complaint: str
) -> None:
    campaign = Campaign()
    assert call(monkeypatch, campaign, *argv) == 2
    assert complaint in capsys.readouterr().err
    assert campaign.points == []


@pytest.mark.parametrize("argv", [["--seed", "-1"], ["--jobs", "0"], ["--jobs", "257"], ["--seed", "x"]])
def test_a_number_out_of_its_bounds_is_refused(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, Campaign(), *argv)
    assert ended.value.code == 2


def miss_a_page(run: Run) -> None:
    last = run.samples[-1]
    run.samples[-1] = Sample(last.step, {**last.counts, "pages_missed": 1}, last.gauges)


@pytest.mark.parametrize(
    ("spoil", "status"),
    [(lambda run: run.problems.append("I8: lost"), 1), (miss_a_page, 1), (lambda run: None, 0)],
    ids=["problem", "missed", "well"],
)
def test_the_exit_status_says_whether_all_held(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Run], None], status: int
) -> None:
    assert call(monkeypatch, Campaign(spoil), "dmatest") == status


def test_an_interrupted_comparison_is_130_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: object) -> list[Run]:
        raise Interrupted

    monkeypatch.setattr(command, "run_points", interrupted)
    monkeypatch.setattr(cli, "configure_log", lambda level: None)
    assert cli.main(["compare", "--json", str(tmp_path / "f.json")]) == 130
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[-1]) == ("", "interrupted: every daemon was stopped, nothing is left")
    assert list(tmp_path.iterdir()) == []


def test_figures_and_report_are_written_and_can_be_shown_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figures, page, again = tmp_path / "f.json", tmp_path / "r.html", tmp_path / "again.html"
    assert call(monkeypatch, Campaign(), "dmatest", "--json", str(figures), "--report", str(page)) == 0
    first = capsys.readouterr().out
    comparison = Comparison.model_validate_json(figures.read_text())
    assert comparison.command == "qemu-shim compare dmatest --seed 1"
    campaign = Campaign()
    assert call(monkeypatch, campaign, "--from", str(figures), "--report", str(again)) == 0
    assert campaign.points == []
    assert capsys.readouterr().out == first
    assert page.read_text() == again.read_text()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"version": 1}', "figures of version 1, this shows 4: run `compare` again"),
        ('{"version": 4}', "Field required"),
        ("[]", "Comparison"),
        ("{", "Expecting property name"),
        ("\xff", "codec can't decode"),
    ],
)
def test_a_file_that_is_no_comparison_of_today_says_so(
    text: str, complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(text.encode("latin-1"))
    assert cli.main(["compare", "--from", str(path)]) == 2
    assert f"qemu-shim compare: {path}: " in (err := capsys.readouterr().err)
    assert complaint in err


def test_other_commands_do_not_wait_for_what_shows_figures() -> None:
    told = "import sys, qemu_shim.cli; print(sorted({'jinja2', 'markupsafe', 'rich'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
