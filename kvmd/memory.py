"""The host's memory as memfds: made, mapped, and then sealed so that nobody else can write tables.

The table window is mapped writable first and sealed against future writable mappings second: from then
on kvmd's mapping is the only one there can be that stores (invariant I1), whatever an importer does
with its copy of the fd.  All windows are sparse, sealed against resizing, and cost what is touched of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Container

from kvmd.config import Settings
from kvmd.core.host import Clock, HostKernel
from protocol.flow import Wait
from protocol.frame_tags import FrameTags, tags_size
from protocol.hostmem import HIGH_RAM_START, LOW_RAM_START, Window, WindowKind
from protocol.kernel.asked import refusal
from protocol.kernel.port import Kernel, Mapping
from protocol.units import PAGE_SHIFT, PAGE_SIZE, Hpa, align_up


def dirty_ring_memory(kernel: Kernel, size: int) -> tuple[int, memoryview]:
    """The entries of a vCPU's dirty ring, which user space maps too: (fd, our mapping).  EMFILE, ENOMEM."""
    try:
        fd, memory = kernel.memfd("kvm-dirty-ring", size, peer_writes=True)
    except OSError as error:
        raise refusal(error, "no memory for a dirty ring") from None
    return fd, memory.view


class HostMemory:
    """The windows, their fds, and the `HostKernel` that lives in them."""

    def __init__(
        self, kernel: Kernel, settings: Settings, clock: Clock, cond_resched: Callable[[], Wait[None]]
    ) -> None:
        self._kernel = kernel
        self._fds: list[tuple[Window, int]] = []
        self._maps: list[Mapping] = []
        tables = self._make(WindowKind.TABLES, LOW_RAM_START, settings.table_bytes)
        frames = self._make(WindowKind.FRAMES, HIGH_RAM_START, settings.ram_bytes, peer_writes=True)
        tags = None
        if settings.frame_tags:
            size = align_up(tags_size(settings.ram_bytes), PAGE_SIZE)
            window = self._make(WindowKind.FRAME_TAGS, HIGH_RAM_START, size)
            tags = FrameTags(HIGH_RAM_START, window.view)
        self.host = HostKernel(
            settings.features,
            tables,
            frames,
            tags,
            self._maps[1].discard,
            clock,
            obstacles=settings.obstacles,
            memlock_pages=None if settings.memlock is None else settings.memlock >> PAGE_SHIFT,
            reuse=settings.reuse,
            seq_start=settings.seq_start,
            zap_batch=settings.zap_batch,
            load_compiled=self._maps[0].compiled,
            cond_resched=cond_resched,
        )

    def _make(self, kind: WindowKind, base: Hpa, size: int, *, peer_writes: bool = False) -> Window:
        fd, mapped = self._kernel.memfd(f"tdp-{kind}", size, peer_writes=peer_writes)
        window = Window(kind, base, size, mapped.view)
        self._fds.append((window, fd))
        self._maps.append(mapped)
        return window

    def share(self, kinds: Container[WindowKind]) -> tuple[list[tuple[str, int, int]], list[int]]:
        """([kind, base, size] of every window of these kinds, a copy of its fd each).  EMFILE."""
        shared = [(window, fd) for window, fd in self._fds if window.kind in kinds]
        copies: list[int] = []
        try:
            for _, fd in shared:
                copies.append(self._kernel.dup(fd))
        except OSError as error:
            for fd in copies:
                self._kernel.close(fd)
            raise refusal(error, "no room for the windows' fds") from None
        return [(str(w.kind), w.base, w.size) for w, _ in shared], copies

    def close(self) -> None:
        for _, fd in self._fds:
            self._kernel.close(fd)
        self._fds.clear()
