"""Memory to measure with."""

from __future__ import annotations

import mmap
import os


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
