"""What is measured can be: figures are run seldom, and what they use moves.

Each contender of ours is measured once, over few samples; rivals need what a test environment lacks.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import against
from bench.contenders import Loop, Part, Program
from bench.figures import FIGURES
from bench.harness import Bench, Contender
from bench.ours.fault import WAY
from bench.ours.fault import shares as shares_of
from bench.timing import pinned

SAMPLES = 400


def is_ours(contender: Contender) -> bool:
    if isinstance(contender, Part):
        return is_ours(contender.whole.participant)
    return isinstance(contender, Loop) or (
        isinstance(contender, Program) and contender.module.startswith("bench.ours.")
    )


OURS = {
    contender.name: contender
    for figure in FIGURES
    for row in figure.rows
    for contender in (row.ours, row.limit)
    if is_ours(contender)
}


@pytest.mark.parametrize("name", OURS)
def test_what_is_ours_is_measured(name: str, tmp_path: Path) -> None:
    contender = OURS[name]
    bench = Bench(tmp_path, rounds=1, samples=SAMPLES)
    contender.prepare(bench)
    with pinned(max(os.sched_getaffinity(0))):
        sample = contender.measure(bench)
    assert 0 < sample.p50 <= sample.p99, sample


def test_a_stage_that_another_fault_reached_is_no_part_of_this_one() -> None:
    stamps: dict[str, dict[str, list[int]]] = {daemon: {} for daemon, _, _ in WAY}
    for n, (daemon, stamp, _) in enumerate(WAY):
        stamps[daemon][stamp] = [n, 100 + n]
    assert sum(shares_of(30.0, stamps).values()) == pytest.approx(30)
    stamps["kvmd"]["mapped"] = [101]
    with pytest.raises(AssertionError, match="mapped"):
        shares_of(30.0, stamps)


def test_two_trees_are_measured_alternately(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs: list[tuple[str, str]] = []

    def measure(tree: Path, figure: str) -> dict[str, float]:
        runs.append(("there" if tree == tmp_path else "here", figure))
        return {"ours": 110.0 if tree == tmp_path else 99.0, "rival": 7.0, runs[-1][0]: 1.0}

    monkeypatch.setattr(against, "measure", measure)
    pairs = against.compare(tmp_path, ["walk", "rpc"], 2)
    assert [where for where, _ in runs] == [
        "there",
        "here",
        "there",
        "here",
        "here",
        "there",
        "here",
        "there",
    ]
    assert pairs["ours"].ratios() == pytest.approx([0.9] * 4)
    assert sorted(pairs) == ["ours", "rival"], "what only one tree has is compared with nothing"


def test_a_tree_without_an_environment_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(against.CannotMeasureError, match="make venv-bench there"):
        against.measure(tmp_path, "walk")
