"""The command line: what is refused, what it says, and its exit status; no daemon is started."""

from __future__ import annotations

import json
import sys

import pytest

from qemu_shim import __main__, cli
from qemu_shim.scenarios.measure import Report
from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.study.workloads.library import WORKLOADS
from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.interrupt import EXIT_INTERRUPTED
from tests.tidy.source import ROOT


@pytest.fixture(autouse=True)
def no_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(**_: object) -> None:
        raise AssertionError("a daemon was to be started")

    monkeypatch.setattr(cli, "supervised", never)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["run"], "SCENARIO"),
        (["run", "nothing"], "invalid choice: 'nothing'"),
        (["run", "dmatest", "--iterations", "many"], "'many' is not a number"),
        (["run", "dmatest", "--iterations", "0"], "0 is not in 1..1000000"),
        (["run", "dmatest", "--iterations", "1000001"], "1000001 is not in 1..1000000"),
        (["run", "dmatest", "--pages", "4"], "unrecognized arguments"),
        (["run", "sharing", "--pages", "1"], "1 is not in 2..65536"),
        (["run", "--log-level", "loud", "dmatest"], "invalid choice: 'loud'"),
        (["list", "extra"], "unrecognized arguments"),
        (["list", "--designs", "--workloads"], "not allowed with argument"),
        (["run", "dmatest", "--kvmd", "--socket /tmp/x"], "whoever starts kvmd says where its sockets are"),
        (["run", "dmatest", "--iommufdd", "--kvm=/tmp/x"], "whoever starts iommufdd says"),
        (["run", "dmatest", "--kvmd", "'"], "No closing quotation"),
        (["run", "dmatest", "--kvmd"], "expected one argument"),
        (["run", "--attach", "/tmp", "dmatest", "--kvmd", "--no-pml"], "the daemons of --attach run already"),
        (["inspect", "--kvmd", "--no-pml"], "unrecognized arguments"),
        (["run", "--attach", "/no/such", "sharing"], "--attach /no/such: there is no such directory"),
        (["run", "sharing", "--dump", "/proc/nope"], "--dump /proc/nope: No such file or directory"),
        (["run", "--dump", "/etc/passwd", "sharing"], "--dump /etc/passwd: File exists"),
        (["inspect", "--dump", "/proc/nope"], "--dump /proc/nope: No such file or directory"),
    ],
)
def test_a_wrong_command_says_what_is_wrong_and_exits_with_2(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


def test_list_as_json_has_every_scenario_with_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed.keys() == SCENARIOS.keys() >= {"dmatest", "unmap", "sharing"}
    assert listed["sharing"]["params"] == {"pages": 64}
    assert "RFC-108" in listed["dmatest"]["tags"]
    assert all(entry["summary"] for entry in listed.values())


def test_list_for_people_names_every_scenario_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for scenario in SCENARIOS.values():
        assert scenario.name in text
        assert scenario.summary in text
        assert all(name in text for name in scenario.params)


def test_list_workloads_says_what_each_parameter_is_and_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--workloads"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["list", "--workloads", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed.keys() == WORKLOADS.keys()
    for workload in WORKLOADS.values():
        assert workload.summary in text
        for name, param in workload.params.items():
            assert f"{param.help} ({param.default}, {param.low}..{param.high})" in text
            assert listed[workload.name]["params"][name] == param.default
            assert param.low <= param.default <= param.high


def test_list_designs_says_what_each_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--designs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[it.name, it.summary] for it in DESIGNS.values()]
    assert cli.main(["list", "--designs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": it.name, "summary": it.summary} for it in DESIGNS.values()
    ]


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_every_default_is_within_its_bounds(name: str) -> None:
    for param in SCENARIOS[name].params.values():
        assert param.low <= param.default <= param.high


def test_the_readme_has_a_row_for_every_scenario() -> None:
    rows = [
        line.split("|") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")
    ]
    assert [row[1].strip(" `") for row in rows] == list(SCENARIOS)


class Played:
    """Stands in for the run itself: what it was asked, and what it reports."""

    def __init__(self, finished: bool = True, problems: tuple[str, ...] = ()) -> None:
        self.params: dict[str, int] = {}
        self._finished = finished
        self._problems = problems

    async def run(self, scenario: object, params: dict[str, int], report: Report, options: object) -> bool:
        self.params = params
        report.lines.append("a line")
        report.rows.append(("row", "1"))
        report.problems += self._problems
        return self._finished


def play(monkeypatch: pytest.MonkeyPatch, played: Played, *argv: str) -> int:
    monkeypatch.setattr(cli, "_run", played.run)
    monkeypatch.setattr(cli, "configure_log", lambda level: None)
    return cli.main(["run", *argv])


@pytest.mark.parametrize(
    ("given", "iterations"), [([], 5), (["--iterations", "7"], 7), (["--iterations=0x10"], 16)]
)
def test_parameters_are_those_given_or_the_defaults(
    monkeypatch: pytest.MonkeyPatch, given: list[str], iterations: int
) -> None:
    played = Played()
    assert play(monkeypatch, played, "dmatest", *given) == 0
    assert played.params["iterations"] == iterations
    assert played.params["buf_size"] == 4096


@pytest.mark.parametrize(
    ("problems", "status", "last"),
    [((), 0, "dmatest: ok"), (("I8: lost",), 1, "dmatest: failed")],
)
def test_the_exit_status_and_last_line_say_whether_it_held(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    problems: tuple[str, ...],
    status: int,
    last: str,
) -> None:
    assert play(monkeypatch, Played(problems=problems), "dmatest") == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a line"
    assert lines[-1] == last
    assert [line for line in lines if line.startswith("FAILED")] == [f"FAILED: {p}" for p in problems]


def test_what_shows_more_is_what_the_command_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for attached, more in ([], True), (["--attach", "/tmp"], False):
        play(monkeypatch, Played(problems=("bad",)), *attached, "sharing")
        line = capsys.readouterr().out.splitlines()[-2]
        assert line.startswith("to see more: --dump DIR writes the tables")
        assert ("--kvmd" in line, "--log-level" in line) == (more, more)


def test_json_is_one_document_even_if_it_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play(monkeypatch, Played(problems=("bad",)), "--json", "sharing") == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["scenario"], document["ok"], document["problems"]) == ("sharing", False, ["bad"])
    assert document["lines"] == ["a line"]


def test_an_interrupted_run_is_130_and_prints_no_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play(monkeypatch, Played(finished=False), "unmap") == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "interrupted" in err


def test_an_interrupt_while_a_command_is_imported_is_130_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Importing:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "qemu_shim.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "qemu_shim.cli")
    monkeypatch.setattr(sys, "meta_path", [Importing(), *sys.meta_path])
    assert __main__.main(["sim", "age"]) == EXIT_INTERRUPTED
    assert capsys.readouterr() == ("", "interrupted\n")
