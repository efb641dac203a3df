"""Every interleaving of the stories that are sent at once: held to schedules by chance, to planted bugs, and
to what is on record.
"""

from __future__ import annotations

import json
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from kvmd.service import door
from protocol.daemon import serve
from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.interrupt import EXIT_INTERRUPTED, SIGNALS
from simulator import exhausted
from simulator.command import find
from simulator.command import main as sim
from simulator.exhausted import OnRecord, of_clean_code, searched, told
from simulator.search.delay import DelayBound
from simulator.search.exhaustive import Exhaustive, HiddenDependenceError
from simulator.search.explore import Found, RunEnd, Tally, explore
from simulator.search.pct import PriorityChanges
from simulator.search.replay import Replay
from simulator.search.walk import RandomWalk
from simulator.stories.at_once import AT_ONCE
from simulator.stories.library import STORIES
from simulator.world import system
from simulator.world.forked import Forked
from simulator.world.schedule import Judged
from simulator.world.scheduler import World
from tests.unit.simulator.search.toy import Anew

SMALLEST = ("two-discard", "mirror")
BY_CHANCE = 40


@pytest.mark.parametrize(("pair", "least"), [(SMALLEST, 3), (("three-age", "shared"), 8)])
def test_the_search_ends_and_chance_finds_nothing_else(pair: exhausted.Pair, least: int) -> None:
    """On the real daemons nobody can count traces by hand: what any schedule comes to must be among them."""
    search, tally = searched(pair)
    assert search.summary().startswith(f"all {len(tally.traces)} inequivalent interleavings, ")
    assert not tally.found
    by_chance = set[int]()
    for strategy in (PriorityChanges(1), RandomWalk(1, 0.1)):  # others finish first what was begun first
        by_chance |= explore(Forked(Judged(find, *pair)), strategy, 1, BY_CHANCE).traces
    assert len(by_chance) >= least
    assert by_chance <= tally.traces


@pytest.mark.parametrize(
    ("pair", "plant"),
    [
        (("two-discard", "shared"), "R4-acks-not-awaited"),
        (("two-discard", "shared"), "R17-zap-unflushed"),
        (("two-migrate", "mirror"), "R4-mirror-not-awaited"),
    ],
)
def test_a_planted_bug_is_found(pair: exhausted.Pair, plant: str) -> None:
    _, tally = searched(pair, plant, lambda tally: bool(tally.found))
    assert tally.found


@pytest.mark.parametrize("kind", ["hangup:each", "full"])
def test_with_faults_it_comes_to_all_that_there_is_and_nothing_else(kind: str) -> None:
    """Of the smallest every schedule can be played, each whether or not another comes to the same."""
    pair = ("two-migrate", "pinned")
    search, tally = searched(pair, faults=(kind,))
    assert search.summary().startswith(f"all {len(tally.traces)} inequivalent interleavings, ")
    assert not tally.found
    every = explore(Forked(Judged(find, *pair, faults=(kind,))), DelayBound(), 0, 10**9)
    assert every.over
    assert every.schedules > len(every.traces) > 1
    assert every.traces == tally.traces


@pytest.mark.parametrize(
    ("plant", "faults", "invariant"),
    [("R9-overflow-stays", "full:each", "R9"), ("R18-late-and-done", "ite:each", "I9")],
)
def test_a_bug_that_a_fault_brings_out_is_found_with_it_and_in_none_without(
    plant: str, faults: str, invariant: str
) -> None:
    pair = ("two-migrate", "mirror")
    _, tally = searched(pair, plant, lambda tally: bool(tally.found), (faults,))
    assert tally.found[0].result.invariant == invariant
    _, without = searched(pair, plant)
    assert (without.over, without.found) == (True, [])


def test_a_fault_that_nobody_is_said_to_go_by_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pick = World.pick
    monkeypatch.setattr(World, "pick", lambda world, what, labels, touches=(): pick(world, what, labels))
    with pytest.raises(HiddenDependenceError):
        searched(("two-migrate", "pinned"), faults=("full",))


def test_a_search_with_faults_is_on_record_beside_the_one_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--story", "two-migrate", "--design", "pinned", "--record", str(tmp_path / "r.json")]
    assert exhausted.main(words) == 0
    assert exhausted.main([*words, "--faults", "hangup:each"]) == 0
    assert exhausted.main([*words, "--faults", "evict", "--seconds", "0"]) == 1
    kept = json.loads((tmp_path / "r.json").read_text())["searches"]
    assert [(one["faults"], one["ended"]) for one in kept] == [
        ("", True),
        ("evict", False),
        ("hangup:each", True),
    ]
    assert [one["faulted"] for one in kept] == [0, 0, kept[2]["interleavings"] - kept[0]["interleavings"]]
    out = capsys.readouterr().out
    assert "two-migrate pinned hangup:each: all 8 inequivalent interleavings, " in out
    assert "two-migrate pinned evict (the first 32): 1 inequivalent interleavings, " in out


@pytest.mark.parametrize("kind", ["sigkill", "sigstop", "store-buffer", "hangup:each,sigkill", "rain"])
def test_what_cannot_be_searched_is_said(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for main, words in ((exhausted.main, []), (sim, ["two-discard", "--strategy", "exhaustive"])):
        with pytest.raises(SystemExit):
            main([*words, "--faults", kind])
        assert kind.rpartition(",")[2] in capsys.readouterr().err


@pytest.mark.parametrize(("story", "kind"), [("moves", "store-buffer"), ("lend-dies", "sigkill")])
def test_what_a_story_brings_along_cannot_be_searched_either(
    story: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sim([story, "--design", STORIES[story].playable[-1], "--strategy", "delay"])
    assert f"the faults of {story} with --strategy delay: {kind}" in capsys.readouterr().err


@pytest.mark.parametrize("name", [story.name for story in AT_ONCE])
def test_daemons_look_at_what_each_excerpt_left(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not only at what is left when all has been used again, and taken down."""
    monkeypatch.setattr(door, "check_vm", lambda vm: ["I1: made up"])
    playing = Judged(find, name, "shared")(2)
    end = playing(Replay(()))
    playing.renew()
    assert (end.invariant, end.round) == ("I1", 0)


def test_a_search_that_does_not_end_says_what_is_left(tmp_path: Path) -> None:
    record = OnRecord(tmp_path / "record.json", "this")
    found = of_clean_code(SMALLEST, record, 0.0, lambda line: None)
    assert not found["ended"]
    assert found["interleavings"] == 1
    assert found["left"] > 0
    assert told(found).startswith("two-discard mirror: 1 inequivalent interleavings, ")
    assert told(found).endswith(f", at least {found['left']} left")


def test_the_committed_record_is_what_a_search_comes_to() -> None:
    """Of the smallest; and for each design some search has ended."""
    kept = json.loads(exhausted.EXHAUSTED.read_text(encoding="utf-8"))["searches"]
    assert {one["design"] for one in kept if one["ended"]} == set(DESIGNS)
    assert all(one["ended"] == (one["left"] == 0) and not one["failed"] for one in kept)
    (smallest,) = (
        one for one in kept if (one["story"], one["design"], one["faults"]) == ("two-migrate", "pinned", "")
    )
    search, _ = searched(("two-migrate", "pinned"))
    counts = (search.traces, search.pruned, search.transitions + 1)
    assert counts == (smallest["interleavings"], smallest["pruned"], smallest["states"])


def test_a_failure_in_a_run_that_was_given_up_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Exhaustive()
    tally = explore(Anew(lambda strategy: RunEnd()), search, 0, 1)
    tally.found.append(Found(0, 1, RunEnd("I1", "made up"), (), 0))
    tally.given_up = 1
    monkeypatch.setattr(exhausted, "searched", lambda *_, **__: (search, tally))
    file = tmp_path / "record.json"
    assert exhausted.main(["--story", "two-discard", "--design", "mirror", "--record", str(file)]) == 1
    (kept,) = json.loads(file.read_text())["searches"]
    assert (kept["ended"], kept["failed"]) == (True, 1)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_on_record_what_has_ended(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def second_is_interrupted(pair: exhausted.Pair, **given: Any) -> tuple[Exhaustive, Tally]:
        if (tmp_path / "record.json").exists():
            assert callable(signal.getsignal(number)), "it would be this process's end"
            signal.raise_signal(number)
        return searched(pair, **given)

    monkeypatch.setattr(exhausted, "searched", second_is_interrupted)
    words = ["--story", "two-migrate", "--design", "pinned", "mirror"]
    assert exhausted.main([*words, "--record", str(tmp_path / "record.json")]) == EXIT_INTERRUPTED
    assert "has what was found" in capsys.readouterr().err
    (kept,) = json.loads((tmp_path / "record.json").read_text())["searches"]
    assert kept["ended"]


@pytest.mark.parametrize("daemon", [1, 4])
def test_a_signal_while_a_machine_is_made_is_no_finding(
    daemon: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first machine, and in that of which the forks are."""
    numbers = count(1)

    async def serves(*given: Any) -> None:
        if next(numbers) == daemon:
            signal.raise_signal(signal.SIGINT)
        await serve(*given)

    monkeypatch.setattr(system, "serve", serves)
    file = tmp_path / "record.json"
    words = ["--story", "two-migrate", "--design", "pinned", "--record", str(file)]
    assert exhausted.main(words) == EXIT_INTERRUPTED
    assert not file.exists()


def test_what_is_on_record_is_not_searched_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "record.json"
    found = of_clean_code(SMALLEST, OnRecord(file, "this"), 0.0, lambda line: None)
    monkeypatch.setattr(exhausted, "searched", None)
    assert of_clean_code(SMALLEST, OnRecord(file, "this"), 0.0, lambda line: None) == found
    with pytest.raises(TypeError):
        of_clean_code(SMALLEST, OnRecord(file, "other sources"), 0.0, lambda line: None)


def test_a_search_that_did_not_end_is_taken_up_again_when_there_is_more_time(tmp_path: Path) -> None:
    record = OnRecord(tmp_path / "record.json", "this")
    assert not of_clean_code(SMALLEST, record, 0.0, lambda line: None)["ended"]
    found = of_clean_code(SMALLEST, record, 600.0, lambda line: None)
    assert found["ended"]
    assert of_clean_code(SMALLEST, record, 9999.0, lambda line: None) is found
    assert record.kept["searches"] == [found]


def test_a_failure_that_a_plant_does_not_belong_to_is_no_find(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--plant", "R4-acks-not-awaited", "--story", "two-discard", "--design", "shared"]
    words += ["--record", str(tmp_path / "r.json")]
    monkeypatch.setattr(exhausted, "invariants_of", lambda plant: frozenset({"I99"}))
    assert exhausted.main(words) == 1
    assert "of two-discard on shared, to which it does not belong: " in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(exhausted, "comes_to_the_plant", lambda start, found: False)
    assert exhausted.main(words) == 1
    assert "which comes to no planted line: the clean code fails: " in capsys.readouterr().out
    assert not (tmp_path / "r.json").exists()
    monkeypatch.undo()
    assert exhausted.main(words) == 0


@pytest.mark.parametrize("plant", [[], ["--plant", "R9-overflow-stays"]])
def test_a_design_without_an_interleaving_is_not_said_to_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plant: list[str]
) -> None:
    words = ["--story", "two-discard", "--design", "pinned", "--record", str(tmp_path / "r.json"), *plant]
    with pytest.raises(SystemExit) as ended:
        exhausted.main(words)
    assert ended.value.code == 2
    assert "none of two-discard can be played on pinned" in capsys.readouterr().err


def test_a_plant_is_sought_where_it_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what is on record of another story, design or faults is no answer."""
    words = ["--plant", "R9-overflow-stays", "--story", "two-migrate", "--record", str(tmp_path / "r.json")]
    assert exhausted.main([*words, "--design", "mirror", "--faults", "full:each"]) == 0
    assert "R9-overflow-stays: R9 in run " in capsys.readouterr().out
    assert exhausted.main([*words, "--design", "mirror"]) == 1
    assert exhausted.main([*words, "--design", "pinned", "--faults", "full:each"]) == 1
    assert capsys.readouterr().out == "R9-overflow-stays: not found\n" * 2
    (kept,) = json.loads((tmp_path / "r.json").read_text())["plants"]
    assert (kept["story"], kept["design"], kept["faults"]) == ("two-migrate", "mirror", "full:each")
