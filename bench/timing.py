"""What every participant of a measurement needs: one core, one clock, one kind of percentile.

All participants of a round trip share one core.  Between two cores of a virtual machine the wake-up
(guest halt, interrupt, exit to the host) costs several times the software path and hides it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter_ns


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """This thread, and every process started within, on `core` only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def require_one_core() -> None:
    """A participant started by hand must not report a figure of another kind."""
    cores = os.sched_getaffinity(0)
    if len(cores) != 1:
        raise SystemExit(f"not pinned: {len(cores)} cores allowed, wanted 1")


def time_each(call: Callable[[], object], count: int, batch: int = 1) -> list[float]:
    """Nanoseconds of each of `count` calls; a tenth more goes first, untimed.

    With `batch` a sample is the mean of that many calls, for calls that the clock itself (some 50 ns)
    would distort.
    """
    assert count >= 1, f"count {count}"
    assert batch >= 1, f"batch {batch}"
    for _ in range(count // 10):
        call()
    took: list[float] = []
    for _ in range(max(1, count // batch)):
        start = perf_counter_ns()
        for _ in range(batch):
            call()
        took.append((perf_counter_ns() - start) / batch)
    return took


def percentiles(took: Sequence[float]) -> tuple[float, float]:
    """p50 and p99, counted as the C rivals count them."""
    assert took, "no samples"
    ordered = sorted(took)
    return ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
