"""A warm DMA through the walker against a plain slice copy of the same size.

Both copy between shared mappings of memfds that were touched before.  A slice assignment between
memoryviews is the fastest raw copy that Python has, so it is what translation is charged against.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

from bench.contenders import Loop, Unwritten
from bench.harness import AtLeast, Bench, Figure, Row

KIB, MIB = 1 << 10, 1 << 20


def shared_buffer(size: int) -> memoryview:
    """`size` bytes of a memfd, every page present."""
    fd = os.memfd_create("bench", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        view = memoryview(mmap.mmap(fd, size))
    finally:
        os.close(fd)
    view[:] = b"\xa5" * size
    return view


def slice_copy(size: int) -> Callable[[], object]:
    source, target = shared_buffer(size), shared_buffer(size)

    def copy() -> None:
        target[:] = source

    return copy


def copies(size: int) -> Callable[[Bench], int]:
    """As many as fill about the time of a message contender: a warm copy runs near 30 bytes per ns."""
    return lambda bench: max(100, bench.samples * 10_000 // (size // 30 + 100) // 10)


COPY_2M = Loop("slice copy 2 MiB", lambda: slice_copy(2 * MIB), copies(2 * MIB))
COPY_64K = Loop("slice copy 64 KiB", lambda: slice_copy(64 * KIB), copies(64 * KIB))

DMA = Figure(
    "dma",
    "warm DMA through the walker",
    (
        Row(Unwritten("DMA 2 MiB, 2M leaf", waits_for="device_sim"), COPY_2M, AtLeast(0.9)),
        Row(Unwritten("DMA 64 KiB, 4K leaves", waits_for="device_sim"), COPY_64K, AtLeast(0.3)),
    ),
)
