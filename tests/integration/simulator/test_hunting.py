"""`make planted`: a bug that a story breaks on at once, one that none can meet, and a resumed hunt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qemu_shim.vmm.designs import SHARED
from simulator import hunting
from simulator.planted.hunt import seeds_of
from simulator.planted.registry import PLANTED, planted
from simulator.search.explore import RunEnd
from simulator.search.option import Strategy
from simulator.search.strategies import DEFAULT
from tests.planted import sweep
from tests.unit.simulator.search.toy import Anew


def hunted(record: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, object]]:
    hunting.main([*words, "--ranges", "1", "--most", "2", "--record", str(record), "--json"])
    results: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return results


def test_found_and_not_found_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "build" / "planted.json"
    found, not_met = hunted(record, capsys, "R7-no-device-tlb", "a-full-disk-is-a-traceback")
    assert found["found"] == [{"invariant": "I9", "schedules": 1, "steps": 0}]
    assert not_met["found"] == [None]


def test_what_is_on_record_is_not_sought_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "planted.json"
    first = hunted(record, capsys, "R7-no-device-tlb")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it is on record")

    monkeypatch.setattr(hunting, "find", never)
    assert hunted(record, capsys, "R7-no-device-tlb") == first


def test_an_unknown_plant_is_an_error_with_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        hunting.main(["R7-no-device"])
    assert ended.value.code == 2
    assert "R7-no-device-tlb" in capsys.readouterr().err


def test_a_strategy_that_has_seen_all_there_is_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Strategy] = []

    def without_choices(strategy: Strategy) -> RunEnd:
        runs.append(strategy)
        return RunEnd()

    monkeypatch.setattr(hunting, "Forked", lambda _: Anew(without_choices))
    monkeypatch.setattr(hunting, "pairs", lambda: [("discard", "shared")])
    assert hunting.find(PLANTED["R7-no-device-tlb"], "exhaustive", range(10), 10) is None
    assert len(runs) == 1


@pytest.mark.parametrize("strategy", ["exhaustive", "delay"])
def test_a_search_that_compares_schedules_begins_each_in_one_state(
    monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """In rounds of one machine the second is another one, and the search would not get through."""
    monkeypatch.setattr(hunting, "pairs", lambda: [("discard", "shared")])
    assert hunting.find(PLANTED["R7-no-device-tlb"], strategy, range(99), 12) is None


def test_the_hunt_and_the_sweep_of_the_suite_keep_their_records_apart() -> None:
    assert hunting.RECORD.name != sweep.RECORD.name


# -- a bounded run, in every `make test` ------------------------------------------------------------------

# Whose memory it is (a device goes on with a page that was given up, a fault maps one), and a lost write: a
# store that no dirty report names is not migrated.
THREE = {
    "R7-no-device-tlb": "I9",
    "R1-range-not-looked-at": "I5",
    "R19-cleared-and-not-flushed": "I25",
}
BOUND, A_TURN, FEW_REPLAYS = 180, 5, 20


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All stories of the design that is argued about, in short turns."""
    ours = [(story, design) for story, design in hunting.pairs() if design == SHARED.name]
    monkeypatch.setattr(hunting, "pairs", lambda: ours)
    monkeypatch.setattr(hunting, "TURN", A_TURN)
    monkeypatch.setattr(hunting, "REPLAYS", FEW_REPLAYS)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", THREE)
def test_each_of_three_planted_bugs_is_found_by_its_invariant(name: str) -> None:
    with planted(name) as plant:
        found = hunting.find(plant, DEFAULT, seeds_of(0), BOUND)
    assert found is not None, f"{BOUND} schedules, and {name} is not found"
    assert found.invariant == THREE[name] == plant.invariant


@pytest.mark.usefixtures("bounded")
def test_without_one_as_many_schedules_find_nothing() -> None:
    assert hunting.find(PLANTED["R7-no-device-tlb"], DEFAULT, seeds_of(0), BOUND) is None
