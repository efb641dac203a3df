"""One point: whatever goes wrong is in its run; and the number of the code it was run by."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from qemu_shim.scenarios.run import Run
from qemu_shim.study.campaign import code, execute
from qemu_shim.study.campaign.point import Point
from qemu_shim.vmm.supervisor import DaemonFailed

POINT = Point("w", "shared", 5, (("pages", 4),))
Play = Callable[[Point], Awaitable[Run]]


@pytest.fixture
def plays(monkeypatch: pytest.MonkeyPatch) -> Callable[[Play], None]:
    return lambda play: monkeypatch.setattr(execute, "_play", play)


async def well(point: Point) -> Run:
    return Run(point.workload, point.design, point.seed, dict(point.params))


async def for_ever(point: Point) -> Run:
    await trio.sleep_forever()
    return await well(point)


def test_a_run_comes_back_as_it_is(plays: Callable[[Play], None]) -> None:
    plays(well)
    assert execute.execute(POINT) == Run("w", "shared", 5, {"pages": 4})


def test_a_bug_in_a_workload_is_the_points_failure_with_its_place(plays: Callable[[Play], None]) -> None:
    async def play(point: Point) -> Run:
        async with trio.open_nursery():
            raise KeyError("nothing")

    plays(play)
    run = execute.execute(POINT)
    assert run is not None
    line = inspect.getsourcelines(play)[1] + 2
    assert run.problems == [f"KeyError: 'nothing' (test_execute.py:{line})"]
    assert (run.design, run.seed, run.params) == ("shared", 5, {"pages": 4})


def test_of_several_failures_each_is_told(plays: Callable[[Play], None]) -> None:
    async def play(point: Point) -> Run:
        raise ExceptionGroup("both", [DaemonFailed("kvmd ended with status 1"), ValueError("x")])

    plays(play)
    run = execute.execute(POINT)
    assert run is not None
    assert run.problems[0] == "kvmd ended with status 1"
    assert run.problems[1] == "ValueError: x"


def test_a_point_that_hangs_is_a_failure(
    plays: Callable[[Play], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "LIMIT_S", 0.05)
    plays(for_ever)
    run = execute.execute(POINT)
    assert run is not None
    assert run.problems == ["came to no end within 0 s"]


def test_a_point_that_is_stopped_has_no_run(plays: Callable[[Play], None]) -> None:
    ended = []

    async def play(point: Point) -> Run:
        try:
            return await for_ever(point)
        finally:
            ended.append(point)

    plays(play)
    assert execute.execute(POINT, trio.lowlevel.checkpoint) is None
    assert ended == [POINT]


def test_the_codes_number_changes_with_any_source_that_a_run_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "ROOT", tmp_path)
    seen = set()
    for number, name in enumerate(
        (
            "kvmd/core/vm.py",
            "protocol/units.py",
            "qemu_shim/study/workloads/x.py",
            "qemu_shim/study/campaign/x.py",
        )
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        for text in ("a", "b"):
            (tmp_path / name).write_text(text)
            code.product_version.cache_clear()
            seen.add((number, code.code_version()))
    code.product_version.cache_clear()
    assert [sum(number == n for n, _ in seen) for number in range(4)] == [2, 2, 2, 1]
    assert len({version for _, version in seen}) == 6, "and each is another"
