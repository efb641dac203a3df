"""`make schedules`: a small run and the next one, what is kept, and what is said when something broke."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from qemu_shim.cli import main as qemu_shim
from qemu_shim.vmm.interrupt import SIGNALS
from simulator.clean import Shard, Sitting, repeats, shards, stories
from simulator.command import OF_SMALL_SHARD, SCHEDULES_OF_SHARD, begin, find
from simulator.faults.kinds import ALL, FAULTED_COST
from simulator.rows import Play, Rows
from simulator.search.explore import Found, RunEnd, Tally, explore
from simulator.search.strategies import STRATEGIES
from simulator.stories.library import STORIES
from simulator.version import version
from simulator.world.schedule import Judged
from tests.patience import WHOLE_RUN_S

STORY_NAMES = ("migrate", "swap", "asleep")  # the last cannot be played where all is pinned
PLAY = Play("slot", "mirror", "mixed", "evict")


def command(where: Path, *words: str) -> list[str]:
    record = ("--workers", "1", "--record", str(where / "r.json"))
    return [sys.executable, "-m", "simulator.clean", "--design", "pinned", *record, *words]


def run(where: Path, *words: str) -> tuple[int, str]:
    ran = subprocess.run(command(where, *words), capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + ran.stderr


def rows_of(where: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((where / "r.json").read_text())["rows"]
    return rows


def test_each_story_has_as_many_and_the_next_run_goes_on(tmp_path: Path) -> None:
    few = ("--schedules", "12", "--seeds", "0", "--faults", "", "--story", *STORY_NAMES)
    code, told = run(tmp_path, *few)
    assert (code, "24 schedules: nothing broke" in told) == (0, True), told
    before = rows_of(tmp_path)
    assert [row["name"] for row in before] == ["migrate", "swap"]
    assert all(row["schedules"] == 12 and row["seeds"] == [0, 1] for row in before)
    assert all(1 < row["traces"] <= 12 for row in before)

    assert run(tmp_path, *few)[0] == 0
    after = rows_of(tmp_path)
    assert all(row["schedules"] == 24 and row["seeds"] == [0, 2] for row in after)
    assert all(old["traces"] < new["traces"] for old, new in zip(before, after, strict=True))

    assert run(tmp_path, *few, "--again")[0] == 0
    assert rows_of(tmp_path) == before, "the same seeds come to the same"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_a_record_of_what_was_played(tmp_path: Path, number: signal.Signals) -> None:
    """And those of whoever is not played again, though all were to be."""
    (tmp_path / "r.json").write_text('{"rows": []}')
    kept = Rows(tmp_path / "r.json", "other sources")
    kept.of(Play("sharing", "shared", "mixed", whole=True), 0).add(0, 7, {1}, [])
    kept.write()
    endless = ("--schedules", str(10**9), "--story", "swap", "--again")
    with subprocess.Popen(command(tmp_path, *endless), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "by turns" in process.stderr.readline()
        process.send_signal(number)
        _, told = process.communicate(timeout=WHOLE_RUN_S)
    assert process.returncode == 130, told
    assert "has what was played" in told
    assert ("sharing", 7) in {(row["name"], row["schedules"]) for row in rows_of(tmp_path)}


def test_time_that_is_up_is_no_failure(tmp_path: Path) -> None:
    code, told = run(tmp_path, "--seconds", "4", "--schedules", str(10**9), "--story", "swap", "--seeds", "0")
    assert code == 0, told
    assert sum(row["schedules"] for row in rows_of(tmp_path)) > 0


def test_each_is_played_with_all_faults_too_as_who_seeks_plays_it(tmp_path: Path) -> None:
    code, told = run(tmp_path, "--schedules", "17", "--seeds", "0", "--story", "swap")
    assert code == 0, told
    assert [(row["faults"], row["schedules"]) for row in rows_of(tmp_path)] == [("", 17), (ALL, 2)]


def test_by_turns_each_has_its_share() -> None:
    whole, faulted = Play("sharing", "shared", "mixed", whole=True), Play("slot", "shared", "mixed", ALL)
    dealt = list(shards({PLAY: 5, whole: 0, faulted: 1}, OF_SMALL_SHARD + 7, 3))
    assert dealt == [
        Shard(PLAY, 5, OF_SMALL_SHARD),
        Shard(whole, 0, SCHEDULES_OF_SHARD),
        Shard(faulted, 1, (OF_SMALL_SHARD + 7) // FAULTED_COST + 1),
        Shard(PLAY, 6, 7),
        Shard(whole, 1, SCHEDULES_OF_SHARD),
        Shard(whole, 2, SCHEDULES_OF_SHARD),
    ]


def test_who_has_least_comes_first(tmp_path: Path) -> None:
    two = stories(["migrate", "asleep"], ["pinned", "shared"], "mixed", "")
    assert [play[:2] for play in two] == [("migrate", "pinned"), ("migrate", "shared"), ("asleep", "shared")]
    rows = Rows(tmp_path / "r.json", "one")
    rows.of(two[0], 0).add(0, 100, {1}, [])
    rows.of(two[2], 0).add(0, 10, {1}, [])
    assert sorted(two, key=rows.schedules) == [two[1], two[2], two[0]]


def test_what_breaks_is_told_with_the_line_that_repeats_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sitting = Sitting(Rows(tmp_path / "r.json", "one"), set())
    future = Future[Tally]()
    end = RunEnd("I6", "a page in two hands")
    future.set_result(Tally(schedules=100, faulted=60, traces={1, 2}, found=[Found(3, 17, end, (0, 1), 5)]))
    sitting.ended(Shard(PLAY, 3, 100), future)
    words = "sim slot --design mirror --strategy mixed --seed 3 --schedules 17 --faults evict"
    assert sitting.repeats == [f"I6: qemu-shim {words}"]
    assert capsys.readouterr().out == f"I6: qemu-shim {words}\n"
    sitting.rows.write()
    (row,) = rows_of(tmp_path)
    assert (row["schedules"], row["traces"], row["failed"], row["seeds"]) == (100, 2, 1, [3, 4])
    assert row["faulted"] == 60
    assert qemu_shim([*words.split(), "--workers", "1"]) == 0, "it is a command"


def test_each_line_repeats_the_failure_that_it_stands_for(capsys: pytest.CaptureFixture[str]) -> None:
    """A planted bug stands for one of the clean code."""
    plant, play = "R4-acks-not-awaited", Play("discard", "shared", "mixed")
    judged = Judged(find, play.name, play.design, plant=plant)
    tally = explore(begin(judged, 6), STRATEGIES[play.strategy].make(2), 2, 6)
    assert len(tally.found) > 2
    for found, line in list(zip(tally.found, repeats(play, tally), strict=True))[:3]:
        invariant, _, words = line.partition(": qemu-shim ")
        assert qemu_shim([*words.split(), "--plant", plant, "--workers", "1", "--json"]) == 1
        told = json.loads(capsys.readouterr().out)
        assert (told["schedules"], told["failure"]["invariant"]) == (found.schedule, invariant)
        assert told["failure"]["sentence"] == found.result.sentence
        again = told["failure"]["repeat"].split()
        assert ("--failure" in again) == (found is not tally.found[0]), "what it prints repeats it as well"


def test_an_error_of_ours_is_told_and_counts_as_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sitting = Sitting(Rows(tmp_path / "r.json", "one"), {PLAY})
    future = Future[Tally]()
    future.set_exception(TypeError("of ours"))
    sitting.ended(Shard(PLAY, 3, 100), future)
    assert (sitting.errors, sitting.schedules) == (1, 0)
    assert "TypeError: of ours" in capsys.readouterr().err


def test_an_error_of_ours_is_on_record_for_the_next_run(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "r.json", version())
    rows.of(swap := Play("swap", "pinned", "mixed"), 3).broke(3, TypeError("of ours\nand more"))
    rows.write()
    few = ("--schedules", "2", "--seeds", "0", "--faults", "", "--story", "swap")
    code, told = run(tmp_path, *few)
    assert (code, "2 schedules: nothing broke" in told) == (0, True), told
    assert "an error of ours is on record: swap on pinned, seed 3: TypeError: of ours\n" in told
    (row,) = rows_of(tmp_path)
    assert row == row | swap._asdict() | {"seeds": [3, 5], "schedules": 2, "failed": 0}
    assert row["errors"] == ["seed 3: TypeError: of ours"]
    assert run(tmp_path, *few, "--again")[0] == 0
    assert rows_of(tmp_path)[0]["errors"] == []


@pytest.mark.parametrize(
    "words", [("--seconds", "0"), ("--schedules", "-3"), ("--seeds", "-1"), ("--workers", "0")]
)
def test_nothing_played_is_no_result(tmp_path: Path, words: tuple[str, str]) -> None:
    code, told = run(tmp_path, "--story", "swap", *words)
    assert "nothing broke" not in told
    if words[0] == "--seconds":
        assert (code, "no schedule was played" in told) == (1, True), told
    else:
        assert (code, "is less than" in told) == (2, True), told


def test_an_error_of_ours_is_told_beside_what_was_played(tmp_path: Path) -> None:
    sitting = Sitting(Rows(tmp_path / "r.json", "one"), set(), schedules=7, errors=1)
    assert sitting.told() == "7 schedules: nothing broke; 1 shards ended in an error of ours"
    sitting.schedules = 0
    assert sitting.told() == "no schedule was played; 1 shards ended in an error of ours"


def test_a_story_is_played_on_the_designs_that_can() -> None:
    assert {play.design for play in stories(["asleep"], [], "mixed", "")} == {*STORIES["asleep"].playable}


def test_a_design_without_a_schedule_is_not_said_to_hold(tmp_path: Path) -> None:
    code, told = run(tmp_path, "--story", "asleep")
    assert (code, "none of asleep can be played on pinned" in told) == (2, True)
    code, told = run(tmp_path, "--schedules", "0", "--seeds", "0")
    assert (code, "nothing would be played" in told) == (2, True)
    assert not (tmp_path / "r.json").exists()
