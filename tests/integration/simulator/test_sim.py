"""`qemu-shim sim` as people call it: a clean run, a planted bug, and the story that repeats it."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen, run

import pytest

from protocol.trace import TRACE
from qemu_shim.cli import main
from qemu_shim.vmm.interrupt import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_NO_READER
from simulator import command
from simulator.campaign import CampaignEnd, CampaignRefused
from simulator.search.explore import Found, RunEnd, Tally
from simulator.search.story import Story, from_text, to_text
from tests.kit.daemons import BIN
from tests.patience import WHOLE_RUN_S

SMALL = ("--set", "pages=2", "--workers", "1")


def test_a_clean_scenario_says_what_was_covered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "sharing", *SMALL, "--schedules", "3"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"sharing pages=2: 3 schedules by mixed, 3 traces, [\d,]+ transitions and races, 0 failed", out
    )


def test_as_one_document_it_says_what_was_found_and_the_line_that_repeats_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    story = tmp_path / "found.story"
    words = ["two-discard", "--design", "shared", "--workers", "1", "--schedules", "20", "--json"]
    assert main(["sim", *words]) == 0
    clean = json.loads(capsys.readouterr().out)
    assert (clean["schedules"], clean["failed"], clean["scenario"]) == (20, 0, "two-discard")
    assert "failure" not in clean

    planted = ["--plant", "R17-nobody-is-told", "--story", str(story)]
    assert main(["sim", *words, *planted]) == 1
    failure = json.loads(capsys.readouterr().out)["failure"]
    assert failure["invariant"] == "R17"
    assert failure["story"] == story.read_text()
    assert main([*failure["repeat"].split()[1:], "--workers", "1"]) == 1
    assert f"FAILED: R17: {failure['sentence']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "name a SCENARIO"),
        (["nothing"], "no scenario is called 'nothing'; there are "),
        (["sharing", "--design", "pinned"], "sharing cannot be played on design pinned; it can on shared"),
        (["sharing", "--set", "sites=2"], "--set sites=2: NAME=N, where NAME is one of pages"),
        (["discard", "--set", "pages=2"], "--set pages=2: discard has no parameters"),
        (["unmap", "--set", "pages=two"], "--set pages=two: 'two' is not a number"),
        (["unmap", "--set", "pages=²"], "--set pages=²: '²' is not a number"),
        (["sharing", "--set", "pages=1"], "--set pages=1: 1 is not in 2..65536"),
        (["--replay", "/nowhere"], "--replay /nowhere: "),
        (["sharing", "--schedules", "0"], "--schedules: 0 is less than 1"),
        (["sharing", "--workers", "x"], "--workers: 'x' is not a number"),
        (["--replay", "x", "--json"], "--json is of a search"),
        (["sharing", "--trace", "x"], "--trace is of a story: name it with --replay"),
    ],
)
def test_what_cannot_be_played_is_said_with_what_can(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sim", *words])
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_a_planted_bug_is_found_repeated_and_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kvmd does not wait for acknowledgements of a flush; the ghost sees what is still cached behind it."""
    story = tmp_path / "acks.story"
    words = ["unmap", *SMALL, "--set", "rounds=2", "--set", "workers=2"]
    plant = ["--plant", "R4-acks-not-awaited", "--schedules", "10"]
    assert main(["sim", *words, *plant, "--story", str(story)]) == 1
    out = capsys.readouterr().out
    failed = re.search(r"^FAILED: (\w+): .+$", out, re.M)
    repeat = re.search(r"^repeat: qemu-shim (sim .+)$", out, re.M)
    assert failed is not None
    assert failed[1] == "R17"
    assert repeat is not None
    assert f"replay: qemu-shim sim --replay {story}" in out

    assert main([*repeat[1].split(), "--workers", "1"]) == 1
    assert failed[0] in capsys.readouterr().out

    assert main(["sim", "--replay", str(story)]) == 1
    replayed = capsys.readouterr().out
    assert "R17: " in replayed
    assert "the trace is another one" not in replayed
    said = re.sub(r"\s+", " ", replayed)
    for name in ("sends TDP_INVALIDATE", "unit 0 invalidation descriptor 0x", "stores IQT", "loads IQT"):
        assert name in said, "steps are called as people call them"
    assert re.match(r"\s+\w+( +\w+)+$", replayed.splitlines()[0]), "a column for each process"

    trace = tmp_path / "acks.trace"
    assert main(["sim", "--replay", str(story), "--trace", str(trace)]) == 1
    assert capsys.readouterr().out == replayed
    assert not TRACE.on
    told = trace.read_text(encoding="utf-8")
    assert re.search(
        r"^kvmd: kvm_unmap_hva_range: .*\n(?:.*\n)*?"
        r"kvmd: stores PTE of gpa .*\n(?:.*\n)*?"
        r"kvmd: kvm_tdp_mmu_spte_changed: .* new_spte 0\n(?:.*\n)*?"
        r"kvmd: sends TDP_INVALIDATE\n(?:.*\n)*?"
        r"iommufdd: qi_submit: iotlb_inv .*\n",
        told,
        re.M,
    ), "each process's steps, messages and tracepoints in their order"

    other = replace(from_text(story.read_text(encoding="utf-8")), invariant="I5")
    story.write_text(to_text(other), encoding="utf-8")
    assert main(["sim", "--replay", str(story)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "it breaks R17, and not I5 as the story says" in lines
    assert [line for line in lines if not line.startswith("it breaks ")] == replayed.splitlines()


@pytest.mark.parametrize(
    ("why", "status"), [("time", EXIT_FAILED), ("done", EXIT_FAILED), ("interrupted", EXIT_INTERRUPTED)]
)
def test_no_schedule_is_no_result(
    why: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run_campaign", lambda *_, **__: CampaignEnd(Tally(), why))
    assert main(["sim", "age"]) == status
    assert ("no schedule was played" in capsys.readouterr().err) == (why != "interrupted")


@pytest.mark.parametrize(
    ("why", "said"),
    [("done", ""), ("time", "; the --seconds are over"), ("interrupted", "; interrupted")],
)
def test_a_search_that_was_cut_short_says_so(
    why: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run_campaign", lambda *_, **__: CampaignEnd(Tally(schedules=3), why))
    main(["sim", "age"])
    assert capsys.readouterr().out.endswith(f" 0 failed{said}\n")
    main(["sim", "age", "--json"])
    assert json.loads(capsys.readouterr().out)["ended"] == why


def test_a_story_that_cannot_be_written_is_told_and_the_failure_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "is not there" / "a.story"
    words = ["discard", "--plant", "R7-no-device-tlb", "--workers", "1", "--story", str(nowhere)]
    assert main(["sim", *words]) == 1
    told = capsys.readouterr()
    assert told.err == f"qemu-shim: --story {nowhere}: No such file or directory\n"
    assert "FAILED: I9: " in told.out
    assert "replay: " not in told.out


def test_what_does_not_fail_again_is_told_as_it_was_played(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Found(0, 1, RunEnd("I1", "only once"), (0, 2), 5, ((1,),))
    monkeypatch.setattr(
        command, "run_campaign", lambda *_, **__: CampaignEnd(Tally(1, found=[found]), "found")
    )
    assert main(["sim", "age"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: I1: only once" in out
    assert "not shrunk: played again by itself it does not fail like that" in out
    story = from_text(out)
    assert (story.answers, story.before) == (found.answers, found.before)
    assert main(["sim", "age", "--json"]) == 1
    failure = json.loads(capsys.readouterr().out)["failure"]
    assert not failure["fails_again"]
    assert from_text(failure["story"]) == story


def test_a_worker_that_died_is_no_wrong_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def died(*_: object, **__: object) -> CampaignEnd:
        raise CampaignRefused("a worker died")

    monkeypatch.setattr(command, "run_campaign", died)
    assert main(["sim", "age"]) == EXIT_FAILED
    assert capsys.readouterr().err == "qemu-shim: a worker died\n"


def test_what_nobody_reads_and_what_finds_no_room_is_no_traceback() -> None:
    words = [str(BIN / "qemu-shim"), "sim", "age", "--schedules", "1", "--workers", "1"]
    process = Popen(words, stdout=PIPE, stderr=PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.wait(WHOLE_RUN_S), process.stderr.read()) == (EXIT_NO_READER, "")
    process.stderr.close()
    with open("/dev/full", "w") as full:
        ran = run(words, stdout=full, stderr=PIPE, text=True, check=False)
    assert ran.returncode == EXIT_FAILED
    assert ran.stderr.startswith("qemu-shim: [Errno 28]")


INTERRUPTED = """
import signal
import sys

from qemu_shim.__main__ import main
from simulator.world import system



async def interrupted(*given):
    for _ in range(2):  # the first is heard behind the schedule
        signal.raise_signal(signal.SIGINT)


system.run_scenario = interrupted
sys.exit(main(["sim", "two-migrate", "--design", "pinned", "--strategy", "exhaustive"]))
"""


def test_who_is_interrupted_in_the_middle_of_a_machine_hears_no_more_of_it() -> None:
    ran = run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (EXIT_INTERRUPTED, "", "interrupted\n")


def test_a_story_of_another_program_is_refused_with_what_is_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for scenario, design, plant in (
        ("nothing", "shared", ""),
        ("sharing", "none", ""),
        ("sharing", "shared", "B-99"),
        ("sharing pages=x", "shared", ""),
    ):
        path = tmp_path / "other.story"
        path.write_text(to_text(Story(scenario, design, 1, (), 0, plant)), encoding="utf-8")
        with pytest.raises(SystemExit) as ended:
            main(["sim", "--replay", str(path)])
        assert ended.value.code == 2
        assert "this program has no " in capsys.readouterr().err
