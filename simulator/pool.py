"""Tasks on all cores, each in some process, their results as they end.

Workers ignore Ctrl-C, which reaches everybody at a terminal: they are told when it is enough, and end the
task they are at as soon as it lets them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from multiprocessing import active_children, get_context
from typing import Protocol, TypeVar

from qemu_shim.vmm.interrupt import SIGNALS

TELLS_S = 0.5
Task = TypeVar("Task")
Result = TypeVar("Result")
Stop = Callable[[], bool]
"""Is it enough?"""


class _Event(Protocol):
    def is_set(self) -> bool: ...


_enough: _Event  # of this process, which is a worker
_whole = 0  # in how many places that must not be left half way this process is
_missed = False  # a KeyboardInterrupt comes behind them


def _begin(enough: _Event) -> None:
    global _enough
    _enough = enough
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _do(do: Callable[[Task, Stop], Result], task: Task) -> Result:
    return do(task, _enough.is_set)


@contextmanager
def whole() -> Iterator[None]:
    """What holds locks of others, for which they would wait for ever: a KeyboardInterrupt comes behind it."""
    global _whole, _missed
    _whole += 1
    try:
        yield
    finally:
        _whole -= 1
    if _missed and not _whole:
        _missed = False
        raise KeyboardInterrupt


@contextmanager
def _deaf() -> Iterator[None]:
    """To Ctrl-C, as a worker that is started here is from its first instruction on: it imports for a while
    before `_begin`.  We hear of it afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pooled(
    tasks: Iterable[Task],
    do: Callable[[Task, Stop], Result],
    workers: int | None,
    stop: Stop = lambda: False,
) -> Generator[tuple[Task, Future[Result]] | None]:
    """Tasks that ended, whichever way; None: some time has passed.  `workers`: one a core.

    Once `stop` says so no task is begun, and those under way are waited for; who closes the generator does
    not hear of them.
    """
    workers = workers or os.cpu_count() or 1
    todo = iter(tasks)
    context = get_context("spawn")
    enough = context.Event()
    pool = ProcessPoolExecutor(workers, context, _begin, (enough,))
    running: dict[Future[Result], Task] = {}
    try:
        while True:
            if stop():
                enough.set()
                running = {future: task for future, task in running.items() if not future.cancel()}
                todo = iter(())
            with whole():
                with _deaf():
                    for task in islice(todo, 2 * workers - len(running)):
                        running[pool.submit(_do, do, task)] = task
                ended, _ = wait(running, TELLS_S, FIRST_COMPLETED)
            if not running:
                return
            for future in ended:
                yield running.pop(future), future
            if not ended:
                yield None
    finally:
        with whole():
            enough.set()
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def interrupts(*, at_once: bool = False) -> Iterator[Stop]:
    """Has there been a Ctrl-C, or a SIGTERM?  `at_once`: the first is a KeyboardInterrupt.  At a second one
    nobody waits for what is under way: who does it is killed, and it is lost."""
    seen = False

    def handle(*_: object) -> None:
        nonlocal seen
        global _missed
        if seen:
            for worker in active_children():
                worker.kill()
        is_heard, seen = seen or at_once, True
        if is_heard and _whole:
            _missed = True
        elif is_heard:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield lambda: seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
