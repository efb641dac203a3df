"""The pool of worker processes, with workers that die as the test tells them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from qemu_shim.scenarios.run import Run
from qemu_shim.study.campaign import pool
from qemu_shim.study.campaign.point import Point
from qemu_shim.study.campaign.runner import Interrupted, run_points

POINTS = [Point("w", "shared", seed, (("pages", 4),)) for seed in range(8)]
STUB = Path(__file__).with_name("stub_worker.py")
Fates = Mapping[int, Sequence[str]]


class Stubs:
    def __init__(self, directory: Path) -> None:
        self.plan = directory / "plan"

    def fates(self, fates: Fates) -> None:
        self.plan.write_text(json.dumps(fates))

    def workers_of(self, seed: int) -> list[int]:
        return [int(pid) for pid in self.plan.with_name(f"seen-{seed}").read_text().split()]


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    made = Stubs(tmp_path)
    monkeypatch.setattr(pool, "WORKER", (sys.executable, "-S", str(STUB), str(made.plan)))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made.fates({})
    return made


def good(run: Run) -> bool:
    return run.problems == []


def nothing_left(stubs: Stubs) -> bool:
    """No worker lives, no scratch is there."""
    pids = {
        pid
        for seed in range(8)
        if stubs.plan.with_name(f"seen-{seed}").exists()
        for pid in stubs.workers_of(seed)
    }
    alive = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    return alive == [] == list(stubs.plan.parent.glob("tdp-worker-*"))


@pytest.mark.parametrize("jobs", [1, 3, 50])
def test_each_point_is_run_once_and_comes_back_in_its_place(jobs: int, stubs: Stubs) -> None:
    heard: list[int] = []
    runs = run_points(POINTS, jobs, lambda run: heard.append(run.seed))
    assert [run.seed for run in runs] == list(range(8))
    assert sorted(heard) == list(range(8))
    workers = [stubs.workers_of(seed) for seed in range(8)]
    assert all(len(pids) == 1 for pids in workers)
    assert len({pids[0] for pids in workers}) <= min(jobs, 8)
    assert nothing_left(stubs)


def test_no_points_need_no_workers(stubs: Stubs) -> None:
    assert run_points([], 2) == []


@pytest.mark.parametrize("fate", ["die", "exit", "tear"])
def test_a_worker_that_dies_loses_nothing_and_costs_no_other_point_a_try(fate: str, stubs: Stubs) -> None:
    stubs.fates({2: [fate], 5: [fate, fate]})
    runs = run_points(POINTS, 2)
    assert [run.seed for run in runs] == list(range(8))
    assert all(map(good, runs))
    assert [len(stubs.workers_of(seed)) for seed in range(8)] == [1, 1, 2, 1, 1, 3, 1, 1]
    assert nothing_left(stubs)


def test_a_point_that_kills_every_worker_is_given_up_and_the_rest_is_run(stubs: Stubs) -> None:
    stubs.fates({0: ["die"] * 9, 7: ["exit"] * 9})
    runs = run_points(POINTS, 2)
    assert [run.problems for run in runs if not good(run)] == [
        [f"{pool.TRIES} workers died of it, the last with status {status}"] for status in (-signal.SIGKILL, 7)
    ]
    assert [good(run) for run in runs] == [False, *[True] * 6, False]
    assert len(stubs.workers_of(0)) == pool.TRIES


def interrupt_when(holds: Callable[[], bool], number: signal.Signals) -> threading.Thread:
    def wait() -> None:
        while not holds():
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_what_runs_and_leaves_nothing(number: signal.Signals, stubs: Stubs) -> None:
    stubs.fates({1: ["mute"], 2: ["mute"]})
    heard: list[int] = []
    both = [stubs.plan.with_name(f"seen-{seed}") for seed in (1, 2)]
    interrupting = interrupt_when(lambda: all(path.exists() for path in both), number)
    with pytest.raises(Interrupted):
        run_points(POINTS[:3], 2, lambda run: heard.append(run.seed))
    interrupting.join()
    assert heard == [0]
    assert nothing_left(stubs)


def test_what_goes_wrong_where_runs_are_heard_of_ends_the_work(stubs: Stubs) -> None:
    def full(run: Run) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        run_points(POINTS, 2, full)
    assert nothing_left(stubs)
