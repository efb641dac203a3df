"""What comes of a cluster's answers; the test plays the library, tests/integration has the real one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import trio

from qemu_shim.scenarios.run import Run
from qemu_shim.study.campaign import cluster
from qemu_shim.study.campaign.cluster import ClusterFailed, OtherCode, run_on_cluster
from qemu_shim.study.campaign.point import Point

POINTS = [Point("w", "shared", seed, (("pages", 4),)) for seed in range(3)]


class KilledWorker(Exception):
    pass


class Future:
    def __init__(self, point: Point, answer: object) -> None:
        self.status = "pending"
        self.ends = threading.Event()
        self._point = point
        self._answer = answer

    def add_done_callback(self, heard: Callable[[Future], None]) -> None:
        threading.Thread(target=self._end, args=[heard]).start()

    def _end(self, heard: Callable[[Future], None]) -> None:
        if self._answer == "stays":
            self.ends.wait()
        self.status = {"gone": "cancelled"}.get(str(self._answer), "finished")
        if isinstance(self._answer, Exception):
            self.status = "error"
        heard(self)

    def done(self) -> bool:
        return self.status != "pending"

    def exception(self) -> Exception | None:
        return self._answer if isinstance(self._answer, Exception) else None

    def result(self) -> Run:
        return Run(self._point.workload, self._point.design, self._point.seed, dict(self._point.params))


class Library:
    """`answers` by seed: an exception, "gone" with the scheduler, "stays" until told to stop; else a run."""

    KilledWorker = KilledWorker

    def __init__(self, answers: dict[int, object]) -> None:
        self._answers = answers
        self.told: list[str] = []
        self.waited: list[Future] = []
        self.keys: list[str] = []
        self.closed = False

    def Client(self, address: str, timeout: float) -> SimpleNamespace:
        return SimpleNamespace(submit=self._submit, status="running", close=self._close)

    def Event(self, name: str, client: object) -> SimpleNamespace:
        return SimpleNamespace(set=lambda: self.told.append(name))

    def wait(self, futures: list[Future], timeout: float) -> None:
        self.waited = futures
        for future in futures:
            future.ends.set()

    def _submit(self, work: object, point: Point, code: str, stop: str, *, key: str, pure: bool) -> Future:
        assert (work, pure) == (cluster._on_worker, False)
        self.keys.append(key)
        return Future(point, self._answers.get(point.seed))

    def _close(self, timeout: float) -> None:
        self.closed = True


def ran(monkeypatch: pytest.MonkeyPatch, answers: dict[int, object]) -> tuple[Library, list[Run]]:
    library, runs = Library(answers), list[Run]()
    monkeypatch.setattr(cluster, "_library", lambda: library)
    try:
        trio.run(run_on_cluster, POINTS, "tcp://x", runs.append)
    finally:
        assert library.closed
    return library, runs


def test_every_point_is_asked_for_by_a_key_of_this_campaign_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first, runs = ran(monkeypatch, {})
    second, _ = ran(monkeypatch, {})
    assert sorted(run.seed for run in runs) == [0, 1, 2]
    assert len({*first.keys, *second.keys}) == 6
    assert first.told == []


def test_a_point_that_the_scheduler_gave_up_is_a_failure_and_the_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, runs = ran(monkeypatch, {1: KilledWorker("died 4 times")})
    problems = {run.seed: run.problems for run in runs}
    assert problems == {0: [], 1: ["the scheduler gave it up: died 4 times"], 2: []}


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (OtherCode("the worker's code is a, the campaign's b"), "cannot run points.*code is a"),
        (ModuleNotFoundError("qemu_shim"), "cannot run points.*qemu_shim"),
        ("gone", "the scheduler went away"),
    ],
)
def test_a_cluster_that_cannot_run_points_is_no_failure_of_any_point(
    answer: object, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterFailed, match=word):
        ran(monkeypatch, dict.fromkeys(range(3), answer))


async def test_when_cancelled_it_waits_for_what_runs_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    library, runs = Library({1: "stays"}), list[Run]()
    monkeypatch.setattr(cluster, "_library", lambda: library)
    with trio.CancelScope() as scope:

        def done(run: Run) -> None:
            runs.append(run)
            if len(runs) == 2:
                scope.cancel()

        await run_on_cluster(POINTS, "tcp://x", done)
    assert scope.cancelled_caught
    assert sorted(run.seed for run in runs) == [0, 2]
    assert len(library.told) == 1
    assert len(library.waited) == 1
    assert library.closed
