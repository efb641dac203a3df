"""docs/results/simulator.md says what the records beside it say; a record made up here is told as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qemu_shim.vmm.designs import DESIGNS
from simulator.results import PAGE, RECORDS, Records, page, records
from tests.tidy.source import ROOT

ROW = {"strategy": "random", "number": 0, "most": 20_000, "seconds": 9.0, "code": "1"}
PLANTED = {
    "results": [
        {**ROW, "plant": "R7-no-device-tlb", "catch": ["I9", 1, 0, "discard", "shared"]},
        {
            **ROW,
            "plant": "R7-no-device-tlb",
            "number": 1,
            "catch": ["I9", 5, 3, "age", "shared"],
            "code": "2",
        },
        {**ROW, "plant": "R6-paging-structure-cache-stays", "catch": None},
        {**ROW, "plant": "gone", "catch": ["I9", 1, 0, "discard", "shared"]},
    ],
}
OTHERS = {
    "results": [
        {**ROW, "plant": "R7-no-device-tlb", "catch": ["I9", 1, 0, "discard", "shared"]},
        {**ROW, "plant": "R6-paging-structure-cache-stays", "catch": None, "most": 400},
    ],
}
SEARCH = {
    "code": "1",
    "faults": "",
    "interleavings": 1200,
    "pruned": 3,
    "states": 99,
    "failed": 0,
    "faulted": 0,
    "seconds": 1,
}
FULL = {**SEARCH, "story": "age", "design": "mirror", "faults": "full", "ended": True, "left": 0}
EXHAUSTIVE = {
    "searches": [
        {**SEARCH, "story": "age", "design": "shared", "ended": True, "left": 0},
        {**SEARCH, "story": "age", "design": "mirror", "ended": False, "left": 7},
        {**FULL, "faulted": 700},
        {**FULL, "faults": "hangup:each", "code": "2", "interleavings": 1300, "faulted": 100},
        {**FULL, "design": "shared", "faults": "enomem:each"},
    ],
    "plants": [
        {"plant": "R4-one", "story": "age", "design": "mirror", "faults": "", "invariant": "I9", "run": 5}
    ],
}
PLAYED = {"strategy": "mixed", "faults": "", "whole": False, "failed": 0, "repeats": [], "code": "1"}
CLEAN = {
    "rows": [
        {**PLAYED, "name": "age", "design": "shared", "seeds": [0, 12], "schedules": 1200, "traces": 1190},
        {**PLAYED, "name": "age", "design": "shared", "seeds": [12, 20], "schedules": 800, "traces": 790},
        {
            **PLAYED,
            "name": "slot",
            "design": "shared",
            "faults": "evict",
            "seeds": [0, 1],
            "schedules": 90,
            "faulted": 70,
            "traces": 9,
            "errors": ["seed 0: TypeError: of ours"],
            "code": "2",
        },
        {
            **PLAYED,
            "name": "unmap",
            "design": "shared",
            "seeds": [3, 13],
            "schedules": 100,
            "traces": 100,
            "whole": True,
        },
    ],
}
SPEED = {
    "host": {"machine": "x86_64", "python": "3.11.2"},
    "rows": [{"ours": "standing", "limit": "400/s", "verdict": "MISSED"}],
    "contenders": {"standing": [{"p50": 4e6}, {"p50": 9e6}, {"p50": 5e6}], "400/s": [{"p50": 2.5e6}]},
}
FOUND = {"found": [{"by": "make torture", "what": "all", "test": "tests/x.py::test_y"}]}
MADE_UP: Records = {
    "planted": PLANTED,
    "others": OTHERS,
    "exhaustive": EXHAUSTIVE,
    "clean": CLEAN,
    "speed": SPEED,
    "found": FOUND,
}


def test_the_page_is_of_the_records() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(records()), "python -m simulator.results --write"


def test_each_figure_is_worked_out_from_its_record() -> None:
    told = " ".join(page(MADE_UP).split())
    for sentence in (
        "2 were sought, and 1 were found by some strategy in some range, by an invariant that they belong",
        "to; in none: `R6-paging-structure-cache-stays`.",
        "2 were sought (ranges of seeds: 1 to 2 each, of at most 20,000 schedules; states of the code: 2); 1",
        "were found in every range by an invariant that they belong to, 1 of these by a story that was not",
        "story that was not written for them, and 0 more in half of the ranges or more.",
        "most often those, by `random`; `*`: written for it. All took 0.0 hours of one core.",
        "sought (ranges of seeds: 1 each, of at most 400 to 20,000 schedules; states of the code: 1)",
        "1 were found in every range by an invariant that they belong to; the others not, or by another",
        "| mistake | found by | answers | random | stories |",
        "| `R7-no-device-tlb` | I9 | 1.5 | 3 | discard, age |",
        "| `R6-paging-structure-cache-stays` | - | - | - ! 0/1 | - |",
        "On `shared` 1 of 1 searches without faults ended: 1,200 interleavings, of which 0 failed.",
        "0 of 0 searches ended, 0 interleavings failed; 1 more came to no fault, and so to the same once",
        "On `mirror` 0 of 1 searches without faults ended: 1,200 interleavings, of which 0 failed.",
        "2 of 2 searches ended, 0 interleavings failed; 0 more came to no fault",
        "States of the code: 2. Nodes",
        "| `age` | `mirror` | full (the first 8) | all 1,200 | 700 | 3 | 99 | none | 0 |",
        "| `age` | `mirror` | hangup:each | all 1,300 | 100 | 3 |",
        "| `age` | `shared` | enomem:each | all 1,200 | 0 | 3 |",
        "| `age` | `mirror` | none | 1,200 | 0 | 3 | 99 | at least 7 | 0 |",
        "| `R4-one` | `age` | `mirror` | none | I9 | 5 |",
        "2,090 schedules of small stories (distinct by trace: 1,989), and 100 of whole scenarios",
        "Chosen by mixed; of 2 states of the code.",
        "| `shared` | none | 1 | 2,000 | not counted | 1,980 | 0 |",
        "| `shared` | evict | 1 | 90 | 70 | 9 | 0 |",
        "| `unmap` | `shared` | 10 | 100 | 0 |",
        "1 shards are not counted, for an error of ours ended them:",
        "| 2 | `slot` | `shared` | evict | seed 0: TypeError: of ours |",
        "(x86_64, CPython 3.11.2): | what | schedules a second | wanted | verdict |",
        "| --- | --- | --- | --- | | standing | 200 | 400 | MISSED |",
        "1 faults of ours, each with the test that fails if it comes back:",
        "in 1 searches of the shared table that ended, 0 of the other designs, and 2 with faults, no",
        "of planted mistakes 1 are on record as sought and found by such searches.",
    ):
        assert sentence in told, told


def test_all_is_said_of_a_search_only_that_ended() -> None:
    told = page(MADE_UP)
    assert "| all 1,200 |" in told
    assert told.count("all 1,200") == 3


def test_what_is_not_on_record_is_said_with_its_command() -> None:
    told = " ".join(page({"found": FOUND}).split())
    for command in RECORDS.values():
        assert f"Not on record yet: `{command}`." in told
    assert "That these records do not say yet." in told


def test_one_failure_is_the_answer() -> None:
    failed = {"searches": [{**EXHAUSTIVE["searches"][0], "failed": 2}]}
    told = " ".join(page({**MADE_UP, "exhaustive": failed}).split())
    assert "As modelled here, no: 2 interleavings failed." in told
    assert "nothing was found" not in told
    line = "I6: qemu-shim sim age --design shared --strategy mixed --seed 3 --schedules 7"
    by_chance = {"rows": [{**CLEAN["rows"][0], "failed": 1, "repeats": [line]}]}
    told = " ".join(page({**MADE_UP, "clean": by_chance}).split())
    assert "As modelled here, no: 1 interleavings failed." in told
    assert f"| 1 | `{line}` |" in told


def test_a_count_that_some_rows_lack_is_not_said_to_be_all() -> None:
    rows = [{**CLEAN["rows"][0], "faulted": 3}, CLEAN["rows"][1]]
    told = " ".join(page({**MADE_UP, "clean": {"rows": rows}}).split())
    assert "| `shared` | none | 1 | 2,000 | at least 3 | 1,980 | 0 |" in told


def test_a_mistake_that_is_no_more_is_left_out() -> None:
    assert "`gone`" not in page(MADE_UP)


def test_a_changed_record_is_seen(tmp_path: Path) -> None:
    (tmp_path / "clean.json").write_text(json.dumps(CLEAN), encoding="utf-8")
    before = page(records(tmp_path))
    other = {"rows": [{**CLEAN["rows"][0], "schedules": 2001}]}
    (tmp_path / "clean.json").write_text(json.dumps(other), encoding="utf-8")
    assert page(records(tmp_path)) != before


@pytest.mark.parametrize("fault", records()["found"]["found"], ids=lambda it: it["by"])
def test_what_was_found_in_our_code_is_held_by_a_test_that_is_there(fault: dict[str, str]) -> None:
    path, _, name = fault["test"].partition("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_designs_are_called_as_they_are() -> None:
    for name in ("exhaustive", "clean"):
        record = records().get(name, {})
        of_them = record.get("searches", []) + record.get("rows", [])
        assert {each["design"] for each in of_them} <= set(DESIGNS)
