"""Host-physical memory as the device and the remapping unit see it: tables to read, frames to read
and write, queues to write.

Models the memory bus.  Windows come in sets, one set for each importer that shares its host's memory
with us, and several sets may name the same window: it stays as long as one of them does.  In debug
builds a window of frame tags comes along, with which the device proves that it touches no frame after
it was given up (I6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protocol.frame_tags import TAG_BYTES, FrameTags
from protocol.hostmem import HostMap, Window, WindowKind
from protocol.hw.queue_window import QueueWriter
from protocol.pt.mem import TableReader
from protocol.units import Hpa


@dataclass(slots=True)
class _Mapped:
    window: Window
    users: int
    release: Callable[[], None]
    reader: TableReader | None = None
    queue: QueueWriter | None = None
    tags: FrameTags | None = None


class PhysicalMemory:
    def __init__(self) -> None:
        self._map = HostMap()
        self.frame = self._map.frame  # (view, offset) of the frame byte at an hpa, or None
        self._mapped: dict[tuple[WindowKind, Hpa, int], _Mapped] = {}
        # (first byte, the byte behind the last, what accesses it), of a kind: each walk looks here
        self._tables: list[tuple[Hpa, Hpa, TableReader]] = []
        self._queues: list[tuple[Hpa, Hpa, QueueWriter]] = []
        self.tags: FrameTags | None = None

    def find(self, kind: WindowKind, base: Hpa, size: int) -> Window | None:
        """The window if it is mapped already."""
        mapped = self._mapped.get((kind, base, size))
        return None if mapped is None else mapped.window

    def share(self, window: Window) -> None:
        """One user more of a window that is mapped."""
        self._mapped[window.kind, window.base, window.size].users += 1

    def add(self, window: Window, release: Callable[[], None]) -> None:
        """Take a new window; `release` unmaps it after its last user.  Raises ValueError if it fits
        nowhere.
        """
        mapped = _Mapped(window, 1, release)
        if window.kind is WindowKind.FRAME_TAGS:
            if window.size % TAG_BYTES:
                raise ValueError(f"{window.size:#x} bytes of frame tags are not whole tags")
            mapped.tags = self.tags = FrameTags(window.base, window.view)
        else:
            self._map.add(window)
        if window.kind is WindowKind.TABLES:
            mapped.reader = TableReader(window.base, window.view)
            self._tables.append((window.base, window.end, mapped.reader))
        if window.kind is WindowKind.QUEUES:
            mapped.queue = QueueWriter(window.base, window.view)
            self._queues.append((window.base, window.end, mapped.queue))
        self._mapped[window.kind, window.base, window.size] = mapped

    def drop(self, window: Window) -> None:
        """One user less."""
        key = window.kind, window.base, window.size
        mapped = self._mapped[key]
        mapped.users -= 1
        if mapped.users:
            return
        del self._mapped[key]
        if mapped.reader is not None:
            self._tables.remove((window.base, window.end, mapped.reader))
            mapped.reader.release()
        if mapped.queue is not None:
            self._queues.remove((window.base, window.end, mapped.queue))
            mapped.queue.release()
        if mapped.tags is not None:
            mapped.tags.release()
            self.tags = None
        else:
            self._map.remove(window)
        window.view.release()
        mapped.release()

    def tables_at(self, hpa: Hpa) -> TableReader | None:
        """What reads the tables of the window that holds `hpa`; None where no table memory is."""
        for base, end, reader in self._tables:
            if base <= hpa < end:
                return reader
        return None

    def store32(self, hpa: Hpa, value: int) -> bool:
        """One aligned store of 4 bytes; False, and nothing stored, outside the queue windows."""
        queue = self._queue_at(hpa, 4)
        if queue is None:
            return False
        queue.words32[hpa - queue.base >> 2] = value
        return True

    def store64s(self, hpa: Hpa, words: Sequence[int]) -> bool:
        """Aligned stores of 8 bytes each, in order; False, and nothing stored, likewise."""
        queue = self._queue_at(hpa, 8 * len(words))
        if queue is None:
            return False
        first = hpa - queue.base >> 3
        for n, word in enumerate(words, first):
            queue.words64[n] = word
        return True

    def _queue_at(self, hpa: Hpa, size: int) -> QueueWriter | None:
        for base, end, queue in self._queues:
            if base <= hpa <= end - size:
                return queue
        return None
