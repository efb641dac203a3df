"""Trio's private names that the simulator stands on, and two runs in one thread that do not meet."""

from __future__ import annotations

import inspect
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio._core._run
from greenlet import getcurrent, greenlet

from simulator.world import trio_run

INSIDES: Any = trio._core._run


@pytest.mark.parametrize(
    "name",
    ["Runner", "KIManager", "EntryQueue", "unrolled_run", "GLOBAL_RUN_CONTEXT", "_r"],
)
def test_trio_has_what_is_used_of_it(name: str) -> None:
    assert hasattr(INSIDES, name)


def test_trio_takes_what_it_is_given() -> None:
    assert INSIDES._ALLOW_DETERMINISTIC_SCHEDULING in (False, True)
    assert "host_uses_signal_set_wakeup_fd" in inspect.signature(INSIDES.unrolled_run).parameters
    required = {field.name for field in INSIDES.Runner.__attrs_attrs__ if field.default is attrs.NOTHING}
    assert required == {
        "clock",
        "instruments",
        "io_manager",
        "ki_manager",
        "strict_exception_groups",
        "system_context",
    }
    assert {"entry_queue", "main_task_outcome", "asyncgens"} <= set(
        inspect.signature(INSIDES.Runner).parameters
    )
    assert "wakeup" in inspect.signature(INSIDES.EntryQueue).parameters
    source = inspect.getsource(INSIDES.unrolled_run)
    assert "_r.shuffle(batch)" in source
    assert "task = batch.pop()" in source, "who is left in it can still go on"
    said = [line.strip() for line in source.partition("runner.io_manager.process_events")[2].splitlines()]
    assert "now = runner.clock.current_time()" in said[:8], "asked next, for deadlines"


class Standing(trio.abc.Clock):
    def start_clock(self) -> None: ...

    def current_time(self) -> float:
        return 0.0

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline


class Elsewhere:
    """An IO manager that lets another greenlet run whenever trio would wait."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        self._woken = False
        self._wakes: trio.lowlevel.Task | None = None

    def get_events(self, timeout: float, /) -> list[Any]:
        self._leave()
        return [self._wakes] if self._woken and self._wakes is not None else []

    def process_events(self, events: list[Any], /) -> None:
        for task in events:
            self._woken, self._wakes = False, None
            trio.lowlevel.reschedule(task)

    async def wait_readable(self, fd: Any, /) -> None: ...

    async def wait_woken(self) -> None:
        self._wakes = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)

    def wakeup_thread_and_signal_safe(self) -> None:
        self._woken = True

    def close(self) -> None: ...


def test_two_runs_take_turns_and_each_has_its_own_tasks_and_generators() -> None:
    seen: list[str] = []
    main = getcurrent()

    def leave() -> None:
        kept = trio_run.kept()
        main.switch()
        trio_run.restored(kept)

    @asynccontextmanager
    async def named(name: str) -> AsyncIterator[str]:
        yield name

    def life(name: str) -> Callable[[], None]:
        async def work() -> None:
            async with named(name) as inside:
                for _ in range(3):
                    seen.append(f"{inside} {trio.lowlevel.current_task().name.rpartition('.')[2]}")
                    await trio.lowlevel.checkpoint()

        work.__name__ = work.__qualname__ = name

        def begin() -> None:
            trio_run.nothing_kept()
            trio_run.run(work, Elsewhere(leave), Standing())

        return begin

    before = sys.get_asyncgen_hooks()
    kept = trio_run.kept()
    runs = [greenlet(life(name)) for name in ("one", "other")]
    while any(not each.dead for each in runs):
        for each in runs:
            if not each.dead:
                each.switch()
    trio_run.restored(kept)
    assert seen == ["one one", "other other"] * 3
    assert sys.get_asyncgen_hooks() == before
    assert not trio.lowlevel.in_trio_run()
