"""A trio run that another one's greenlet may interrupt: all that is used of trio's insides.

`trio.run` is a loop over `unrolled_run`, a generator that says how long it could sleep and is sent what
became ready; this is that loop with an `IoManager` of ours.  What trio keeps in a thread (the run and the
task that is current, the hooks of async generators) belongs to one run each here: whoever switches greenlets
keeps its own (`kept`, `restored`).  The names are private: tests/unit/simulator/world/test_trio_run.py asks
for each, and trio is pinned.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator, MutableSequence
from contextlib import contextmanager
from contextvars import copy_context
from random import Random
from typing import Any, Protocol

import trio._core._run

_run: Any = trio._core._run


class IoManager(Protocol):
    """Trio's, as far as a run on Unix sockets and a clock asks it."""

    def get_events(self, timeout: float, /) -> list[Any]: ...
    def process_events(self, events: list[Any], /) -> None: ...
    async def wait_readable(self, fd: Any, /) -> None: ...
    async def wait_woken(self) -> None:
        """Until `wakeup_thread_and_signal_safe` was called."""

    def wakeup_thread_and_signal_safe(self) -> None: ...
    def close(self) -> None: ...


Kept = tuple[dict[str, Any], Any]


def kept() -> Kept:
    """What belongs to the run of the greenlet that is about to be left.  A plain tuple: what the interpreter
    gives is none that its collector knows of, and a frame that was cut off with it would stay for ever.
    """
    return dict(_run.GLOBAL_RUN_CONTEXT.__dict__), tuple(sys.get_asyncgen_hooks())


def restored(what: Kept) -> None:
    context, hooks = what
    mine = _run.GLOBAL_RUN_CONTEXT.__dict__
    mine.clear()
    mine.update(context)
    sys.set_asyncgen_hooks(*hooks)


def nothing_kept() -> None:
    """As a new thread finds it."""
    restored(({}, (None, None)))


class _Order(Random):
    """Instead of trio's random numbers, which serve to order the tasks that can run."""

    def __init__(self, order: Callable[[list[trio.lowlevel.Task]], list[trio.lowlevel.Task]]) -> None:
        super().__init__(0)
        self._order = order

    def shuffle(self, x: MutableSequence[Any]) -> None:
        """Trio sorted them by age, and takes the last first, out of that list."""
        _run.GLOBAL_RUN_CONTEXT.turn = x
        if len(x) > 1:
            x[:] = reversed(self._order(list(x)))


@contextmanager
def ordered(order: Callable[[list[trio.lowlevel.Task]], list[trio.lowlevel.Task]]) -> Iterator[None]:
    """Tasks of one run that can go on do so in `order`; they come by their age."""
    before = _run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING
    _run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING = _Order(order), True
    try:
        yield
    finally:
        _run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING = before


def run(main: Callable[[], Awaitable[Any]], io: IoManager, clock: trio.abc.Clock) -> Any:
    """As `trio.run(main)`."""
    runner = _runner(io, clock)
    steps = _run.unrolled_run(runner, main, (), host_uses_signal_set_wakeup_fd=True)
    events: Any = None
    while True:
        try:
            timeout = steps.send(events)
        except StopIteration:
            break
        events = io.get_events(timeout)
    assert runner.main_task_outcome is not None
    return runner.main_task_outcome.unwrap()


def others_go_on() -> bool:
    """Can other tasks than the current one, be it in this turn of the run that is current?"""
    current = _run.GLOBAL_RUN_CONTEXT
    return bool(current.runner.runq or current.turn)


def next_deadline() -> float:
    """Of the run that is current."""
    deadline: float = _run.GLOBAL_RUN_CONTEXT.runner.deadlines.next_deadline()
    return deadline


def _runner(io: IoManager, clock: trio.abc.Clock) -> Any:
    """As of `setup_runner`, which would have it woken by a socket of the host's, and by Ctrl-C, which is the
    interpreter's and not one run's.
    """
    runner = _run.Runner(
        clock=clock,
        instruments={},  # of which each turn of a task asks four times
        io_manager=io,
        ki_manager=_run.KIManager(),
        entry_queue=_run.EntryQueue(wakeup=io),
        system_context=copy_context(),
        strict_exception_groups=True,
    )
    runner.asyncgens.install_hooks(runner)
    _run.GLOBAL_RUN_CONTEXT.runner = runner
    return runner
