"""`make planted`: a bug that a story breaks on at once, one that none can meet, and a resumed hunt."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from qemu_shim.vmm.designs import SHARED
from qemu_shim.vmm.interrupt import EXIT_FAILED, EXIT_INTERRUPTED, SIGNALS
from simulator import hunting, seeking
from simulator.planted.hunt import MAX_SCHEDULES, Catch, RangeEnd, Record, Sought, seed_of
from simulator.planted.registry import PLANTED, current, planted
from simulator.search.explore import RunEnd
from simulator.search.option import Strategy
from simulator.search.strategies import DEFAULT
from tests.planted import sweep
from tests.unit.simulator.search.toy import Anew


def hunted(record: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    hunting.main(["--ranges", "1", *words, "--most", "2", "--record", str(record), "--json"])
    results: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return results


def here(tasks: Iterable[Any], do: Callable[..., Any], workers: int) -> Generator[Any]:
    """The pool, in this process."""
    for task in tasks:
        future = Future[Any]()
        try:
            future.set_result(do(task, lambda: False))
        except Exception as error:
            future.set_exception(error)
        yield task, future


@pytest.fixture(autouse=True)
def nothing_scouted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes as long as all there is here."""
    monkeypatch.setattr(hunting, "scouted", lambda plants: {pair: {} for pair in seeking.pairs()})


def test_found_and_not_found_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of its own."""
    record = tmp_path / "build" / "planted.json"
    found, not_met = hunted(record, capsys, "R7-no-device-tlb", "a-full-disk-is-a-traceback")
    (catch,) = found["found"]
    assert (catch["invariant"], catch["schedules"], catch["steps"]) == ("I9", 1, 0)
    assert (catch["story"], catch["design"]) in seeking.pairs()
    assert not_met["found"] == [None]


def test_others_are_all_stories_but_those_written_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, bool] = {}

    def find(strategy: str, seed: int, most: int, worth: Any, stop: Any, plays: Any, replays: int) -> None:
        asked.update({story: plays(story) for story, _ in seeking.pairs()})

    monkeypatch.setattr(hunting, "find", find)
    monkeypatch.setattr(hunting, "pooled", here)
    hunted(tmp_path / "a.json", capsys, "R15-unit-without-its-fence")
    assert all(asked.values())
    hunted(tmp_path / "b.json", capsys, "R15-unit-without-its-fence", "--others")
    assert {story for story, is_played in asked.items() if not is_played} == {"two-move", "moves", "units"}


def test_how_short_a_story_can_be_is_asked_in_some_ranges_of_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, int]] = []

    def find(strategy: str, seed: int, most: int, worth: Any, stop: Any, plays: Any, replays: int) -> None:
        asked.append((strategy, seed, replays))

    monkeypatch.setattr(hunting, "find", find)
    monkeypatch.setattr(hunting, "pooled", here)
    ranges = hunting.SHRUNK_RANGES + 1
    options = ("--ranges", str(ranges), "--strategy", DEFAULT, "random")
    hunted(tmp_path / "a.json", capsys, "R15-unit-without-its-fence", *options)
    shrunk = [(strategy, seed) for strategy, seed, replays in asked if replays]
    assert shrunk == [(DEFAULT, seed_of(number)) for number in range(ranges - 1)]
    assert len(asked) == 2 * ranges


def test_what_is_on_record_is_not_sought_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "planted.json"
    sought = Sought("R7-no-device-tlb", DEFAULT, 0)
    Record(record).put(sought, RangeEnd(None, most=2, seconds=7.0, code="other sources"))
    (kept,) = hunted(record, capsys, "R7-no-device-tlb")
    assert (kept["found"], kept["seconds"]) == ([None], 7.0)
    (anew,) = hunted(record, capsys, "R7-no-device-tlb", "--again")
    assert anew["found"] != [None]


def test_a_range_that_ends_in_an_error_is_told_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scout told nonsense of one plant."""
    reach = {pair: {"R13-did-is-left": "often"} for pair in seeking.pairs()}
    monkeypatch.setattr(hunting, "scouted", lambda plants: reach)
    words = ["R13-did-is-left", "R7-no-device-tlb", "--ranges", "1", "--most", "2", "--json"]
    status = hunting.main([*words, "--record", str(tmp_path / "planted.json")])
    told = capsys.readouterr()
    assert [it["plant"] for it in json.loads(told.out)] == ["R7-no-device-tlb"]
    assert f"R13-did-is-left {DEFAULT} 0: " in told.err
    assert "TypeError" in told.err
    assert status == 1


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_on_record_what_was_found(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(tasks: Iterable[Any], *_: object) -> Generator[Any]:
        first = next(iter(tasks))
        future = Future[Any]()
        future.set_result((None, 1.0))
        yield first, future
        assert callable(signal.getsignal(number)), "it would be this process's end"
        signal.raise_signal(number)

    monkeypatch.setattr(hunting, "pooled", interrupted)
    record = tmp_path / "planted.json"
    words = ["R7-no-device-tlb", "--ranges", "2", "--record", str(record)]
    assert hunting.main(words) == EXIT_INTERRUPTED
    assert "has what was found" in capsys.readouterr().err
    assert [*Record(record).read()] == [Sought("R7-no-device-tlb", DEFAULT, 0)]


def test_clean_code_that_fails_before_anything_is_planted_ends_the_hunt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scouted(_: object) -> None:
        raise seeking.CleanCodeFails("I5: and its story")

    monkeypatch.setattr(hunting, "scouted", scouted)
    words = ["R7-no-device-tlb", "--ranges", "1", "--record", str(tmp_path / "planted.json")]
    assert hunting.main(words) == EXIT_FAILED
    assert "the clean code fails" in capsys.readouterr().err


@pytest.mark.parametrize("error", [TypeError("of ours"), seeking.CleanCodeFails("I5: and its story")])
def test_what_was_right_once_does_not_hide_that_it_was_sought_in_vain(
    error: Exception,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find(*_: object) -> None:
        raise error

    monkeypatch.setattr(hunting, "find", find)
    monkeypatch.setattr(hunting, "pooled", here)
    record, sought = tmp_path / "planted.json", Sought("R7-no-device-tlb", DEFAULT, 0)
    right = RangeEnd(Catch("I9", 1, 0, "discard", "shared"), MAX_SCHEDULES, 7.0, "other sources")
    Record(record).put(sought, right)
    words = [sought.plant, "--ranges", "1", "--record", str(record)]
    assert hunting.main(words) == 0
    assert hunting.main([*words, "--again"]) == 1
    told = capsys.readouterr().err
    assert f"R7-no-device-tlb {DEFAULT} 0: " in told
    assert str(error) in told
    assert Record(record).read() == {sought: right}


def test_a_scout_tells_where_the_lines_of_all_plants_are_come_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeking, "pairs", lambda: [("discard", "shared"), ("hole", "shared")])
    plants = [PLANTED[name] for name in ("R7-no-device-tlb", "R24-hole-without-a-zap", "R16-bit-11")]
    reach = seeking.scouted(plants)
    discards, holes = reach["discard", "shared"], reach["hole", "shared"]
    assert discards["R7-no-device-tlb"] == 1
    assert "R24-hole-without-a-zap" not in discards
    assert holes["R24-hole-without-a-zap"] == 1
    assert current() is None


def test_an_unknown_plant_is_an_error_with_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        hunting.main(["R7-no-device"])
    assert ended.value.code == 2
    assert "R7-no-device-tlb" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--ranges", "--most", "--workers"])
def test_a_hunt_that_would_look_at_nothing_is_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        hunting.main(["R7-no-device-tlb", option, "0"])
    assert ended.value.code == 2
    assert f"{option}: 0 is less than 1" in capsys.readouterr().err


def test_a_strategy_that_has_seen_all_there_is_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Strategy] = []

    def without_choices(strategy: Strategy) -> RunEnd:
        runs.append(strategy)
        return RunEnd()

    monkeypatch.setattr(seeking, "Forked", lambda _: Anew(without_choices))
    monkeypatch.setattr(seeking, "pairs", lambda: [("discard", "shared")])
    assert seeking.find("exhaustive", 0, 10) is None
    assert len(runs) == 1


@pytest.mark.parametrize("strategy", ["exhaustive", "delay"])
def test_a_search_that_compares_schedules_begins_each_in_one_state(
    monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """In rounds of one machine the second is another one, and the search would not get through."""
    monkeypatch.setattr(seeking, "pairs", lambda: [("discard", "shared")])
    assert seeking.find(strategy, 0, 12) is None


def test_the_hunt_and_the_sweep_of_the_suite_keep_their_records_apart() -> None:
    names = {hunting.RECORD.name, hunting.RECORD_OF_OTHERS.name, sweep.RECORD.name}
    assert len(names) == 3


# -- a bounded run, in every `make test` ------------------------------------------------------------------

# Whose memory it is (a device goes on with a page that was given up, a fault maps one), and a lost write: a
# store that no dirty report names is not migrated.
THREE = {
    "R7-no-device-tlb": "I9",
    "R1-range-not-looked-at": "I5",
    "R19-cleared-and-not-flushed": "I25",
}
BOUND, FEW_REPLAYS = 180, 20


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All stories of the design that is argued about."""
    ours = [(story, design) for story, design in seeking.pairs() if design == SHARED.name]
    monkeypatch.setattr(seeking, "pairs", lambda: ours)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", THREE)
def test_each_of_three_planted_bugs_is_found_by_its_invariant(name: str) -> None:
    with planted(name) as plant:
        found = seeking.find("random", seed_of(0), BOUND, replays=FEW_REPLAYS)
    assert found is not None, f"{BOUND} schedules, and {name} is not found"
    assert found.invariant == THREE[name] == plant.invariant


@pytest.mark.usefixtures("bounded")
def test_without_one_as_many_schedules_find_nothing() -> None:
    assert seeking.find("random", seed_of(0), BOUND) is None
