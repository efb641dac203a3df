"""What is no simulated process's to see: it is raised where the world is run.

A signal comes while a process's greenlet runs, and the interpreter would raise its KeyboardInterrupt there,
at any place of the product's code: that would take it for a crash, hand it to a task, or lose it in a
finalizer, and a story would be judged by it.  So would it by what a strategy raises, which is asked there.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

from greenlet import getcurrent, greenlet

from qemu_shim.vmm.interrupt import SIGNALS
from simulator.world import trio_run


def raised_outside(main: greenlet, error: BaseException) -> NoReturn:
    """In `main`, where the world is run.  Who runs stands still where it is, until the world is closed."""
    if getcurrent() is main:
        raise error
    kept = trio_run.kept()
    try:
        main.throw(type(error), error, error.__traceback__)
    finally:
        trio_run.restored(kept)
    raise AssertionError("a world that was given up goes on")


@contextmanager
def outside(main: greenlet) -> Iterator[None]:
    """Others' greenlets run: handlers of signals raise in `main`, and what trio keeps of it is kept."""
    assert getcurrent() is main, "a world is run where it was made"
    kept = trio_run.kept()
    before = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    try:
        for number, handler in before.items():
            signal.signal(number, partial(_handled, main, handler))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        trio_run.restored(kept)


def _handled(main: greenlet, handler: Callable[..., Any], *given: Any) -> None:
    try:
        handler(*given)
    except BaseException as error:
        raised_outside(main, error.with_traceback(None))  # which would hold all that the process has


@contextmanager
def held() -> Iterator[None]:
    """A signal waits for the end of what takes milliseconds, and would be left half done, or not hear it."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda signum, _: came.append(signum)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
