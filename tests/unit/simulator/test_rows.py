"""Rows of clean play: the same sources add to them, others begin one, and no seed is played twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simulator.rows import REPEATS_KEPT, Play, Rows

AGE, SLOT = Play("age", "shared", "mixed"), Play("slot", "mirror", "rare", "evict,full")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = Rows(file := tmp_path / "there" / "rows.json", "one")
    rows.of(AGE, 0).add(0, 100, {1, 2, 3}, [])
    rows.of(AGE, 1).add(1, 50, {3, 4}, ["I6: how"])
    rows.of(SLOT, 0).add(0, 10, {1}, [])
    rows.write()
    return file


def rows_of(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return rows


def test_the_same_sources_add_to_a_row(file: Path) -> None:
    rows = Rows(file, "one")
    assert (rows.fresh(AGE), rows.fresh(SLOT)) == (2, 1)
    rows.of(AGE, 2).add(2, 100, {4, 5}, [])
    rows.write()
    age, slot = rows_of(file)
    assert age == age | AGE._asdict() | {"code": "one", "seeds": [0, 3], "schedules": 250, "traces": 5}
    assert (age["failed"], age["repeats"]) == (1, ["I6: how"])
    assert slot == slot | SLOT._asdict() | {"schedules": 10, "traces": 1}


def test_a_row_has_the_seeds_of_shards_that_ended_in_any_order(tmp_path: Path) -> None:
    rows = Rows(file := tmp_path / "rows.json", "one")
    for seed in (4, 3, 5):
        rows.of(AGE, seed).add(seed, 100, {seed}, [])
    rows.write()
    assert [row["seeds"] for row in rows_of(file)] == [[3, 6]]


def test_other_sources_begin_a_row_with_seeds_that_nobody_had(file: Path) -> None:
    rows = Rows(file, "two")
    rows.of(AGE, seed := rows.fresh(AGE)).add(seed, 100, {1, 2}, [])
    rows.write()
    before, after, _ = rows_of(file)
    assert (before["code"], before["seeds"], before["traces"]) == ("one", [0, 2], 4)
    assert (after["code"], after["seeds"], after["traces"]) == ("two", [2, 3], 2)


def test_a_row_of_other_sources_is_never_added_to(file: Path) -> None:
    """What would say which traces come again is gone."""
    Rows(file, "two").write()
    assert all("least" not in row for row in rows_of(file))
    rows = Rows(file, "one")
    rows.of(AGE, rows.fresh(AGE)).add(2, 100, {1}, [])
    rows.write()
    assert [(row["seeds"], row["traces"]) for row in rows_of(file)[:2]] == [([0, 2], 4), ([2, 3], 1)]


def test_what_is_dropped_is_dropped_of_all_sources(file: Path) -> None:
    rows = Rows(file, "two")
    rows.of(AGE, 7).add(7, 1, {1}, [])
    rows.drop(AGE)
    assert (rows.fresh(AGE), rows.fresh(SLOT)) == (0, 1)
    rows.write()
    assert [row["name"] for row in rows_of(file)] == ["slot"]


def test_failures_are_counted_and_the_first_told(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.json", "one")
    for seed in range(3):
        rows.of(AGE, 0).add(seed, 100, {1}, [f"{seed}"] * 7)
    rows.write()
    (age,) = rows_of(tmp_path / "rows.json")
    assert age["failed"] == 21
    assert age["repeats"] == (["0"] * 7 + ["1"] * 7)[:REPEATS_KEPT]


def test_those_with_a_fault_are_counted_from_sitting_to_sitting(file: Path) -> None:
    rows = Rows(file, "one")
    rows.of(SLOT, 1).add(1, 10, {2}, [], faulted=7)
    rows.write()
    rows = Rows(file, "one")
    rows.of(SLOT, 2).add(2, 10, {2}, [], faulted=2)
    rows.write()
    assert [row["faulted"] for row in rows_of(file)] == [0, 9]


def test_a_row_of_before_they_were_counted_is_read(file: Path) -> None:
    rows = rows_of(file)
    for row in rows:
        del row["faulted"]
    file.write_text(json.dumps({"rows": rows}))
    read = Rows(file, "one")
    assert [row.faulted for row in read.open.values()] == [0, 0]


def test_it_is_the_same_when_nothing_was_played(file: Path) -> None:
    before = file.read_bytes()
    Rows(file, "one").write()
    assert file.read_bytes() == before
