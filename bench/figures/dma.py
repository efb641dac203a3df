"""A warm DMA through the walker against a plain slice copy of the same size.

Both copy between shared mappings of memfds that were touched before.  A slice assignment between
memoryviews is the fastest raw copy that Python has, so it is what translation is charged against.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.contenders import Loop
from bench.harness import AtLeast, Bench, Figure, Row, Shown
from bench.memory import shared_buffer
from bench.ours import engine
from protocol.units import KIB, MIB


def slice_copy(size: int) -> Callable[[], object]:
    source, target = shared_buffer(size), shared_buffer(size)

    def copy() -> None:
        target[:] = source

    return copy


def copies(size: int) -> Callable[[Bench], int]:
    """As many as fill about the time of a message contender: a warm copy runs near 30 bytes per ns."""
    return lambda bench: max(100, bench.samples * 10_000 // (size // 30 + 100) // 10)


LARGE, SMALL = 2 * MIB, 64 * KIB

COPY_2M = Loop("slice copy 2 MiB", lambda: slice_copy(LARGE), copies(LARGE))
COPY_64K = Loop("slice copy 64 KiB", lambda: slice_copy(SMALL), copies(SMALL))

DMA_2M = Loop("DMA 2 MiB, 2M leaf", engine.copy_2m, copies(LARGE))
DMA_64K = Loop("DMA 64 KiB, 4K leaves", lambda: engine.copy_4k(SMALL), copies(SMALL))
SCATTERED_2M = Loop("DMA 2 MiB, scattered 4K", lambda: engine.copy_scattered(LARGE), copies(LARGE))
SCATTERED_64K = Loop("DMA 64 KiB, scattered 4K", lambda: engine.copy_scattered(SMALL), copies(SMALL))
READ_64K = Loop("DMA read 64 KiB, 4K leaves", lambda: engine.read_4k(SMALL), copies(SMALL))

DMA = Figure(
    "dma",
    "warm DMA through the walker",
    (
        Row(DMA_2M, COPY_2M, AtLeast(0.9)),
        Row(DMA_64K, COPY_64K, AtLeast(0.3)),
        Row(SCATTERED_2M, COPY_2M, Shown()),
        Row(SCATTERED_64K, COPY_64K, Shown()),
        Row(READ_64K, COPY_64K, Shown()),
    ),
)
