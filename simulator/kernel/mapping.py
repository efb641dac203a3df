"""Memory of an in-memory kernel as a process has mapped it.

Who looks through `view`, or through a slice or a cast of it, holds what the view was made of, and so it is
known whether anybody still does: as an mmap object knows it, which is not closed before.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from ctypes import c_ubyte
from functools import cache
from types import ModuleType
from typing import Any
from weakref import ref

from simulator.kernel.files import Memory


class SimMapping:
    """The port `Mapping`, of the first `size` bytes."""

    def __init__(
        self,
        memory: Memory,
        size: int,
        *,
        writable: bool,
        seen: Callable[[Memory, memoryview], memoryview],
        discarded: Callable[[Memory, int, int], None],
    ) -> None:
        self._memory = memory
        self._discarded = discarded
        mapped: Any = _bytes(size).from_buffer(memory.bytes)
        self._mapped = ref(mapped)
        view = memoryview(mapped).cast("B")
        self.view = seen(memory, view if writable else view.toreadonly())

    def discard(self, offset: int, size: int) -> None:
        self._memory.bytes.madvise(mmap.MADV_DONTNEED, offset, size)
        self._discarded(self._memory, offset, size)

    def compiled(self, module: str, ready: Callable[[ModuleType], None]) -> None:
        """Never: it works on memory where nobody could come between two accesses."""

    def close(self) -> None:
        self.view.release()
        if self._mapped() is not None:
            raise BufferError("cannot close exported pointers exist")


@cache
def _bytes(size: int) -> Any:
    """The type of so many: one machine after the other has the same sizes."""
    return c_ubyte * size
