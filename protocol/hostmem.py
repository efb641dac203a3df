"""The host-physical map: windows of memory, each backed by one memfd, laid out like a PC's.

Models host-physical addresses: RAM lies from 1 MiB to 2 GiB and from 4 GiB up, nothing between, so that
a dump of it loads into other tools.  A window holds tables, queues or frames; one that somebody else's fd
backs is one more window.  Addresses outside every window are not memory: looking one up says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from protocol.units import GIB, MIB, PAGE_SIZE, Hpa

LOW_RAM_START = Hpa(1 * MIB)
LOW_RAM_END = Hpa(2 * GIB)
HIGH_RAM_START = Hpa(4 * GIB)
MAX_WINDOWS = 64


class WindowKind(StrEnum):
    TABLES = "tables"  # their owner stores, everybody else reads
    FRAMES = "frames"  # data pages: guests', read and written by CPUs and devices
    QUEUES = "queues"  # of a remapping unit: it stores what it has to say, its driver reads
    FRAME_TAGS = "frame_tags"  # debug builds: who owns each frame (protocol/frame_tags.py); has no hpa


_FRAMES = WindowKind.FRAMES  # looked at for every piece of a DMA


@dataclass(frozen=True, slots=True)
class Window:
    """`size` bytes at `base`, mapped at `view` in this process."""

    kind: WindowKind
    base: Hpa
    size: int
    view: memoryview

    @property
    def end(self) -> Hpa:
        return Hpa(self.base + self.size)


def check_layout(base: int, size: int) -> str | None:
    """What is wrong with a window at `base`, or None."""
    if base % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
        return f"window {base:#x}+{size:#x} is not whole pages"
    low = base >= LOW_RAM_START and base + size <= LOW_RAM_END
    high = base >= HIGH_RAM_START and base + size <= 1 << 52
    if not low and not high:
        return f"window {base:#x}+{size:#x} is outside RAM (1 MiB..2 GiB, 4 GiB..)"
    return None


class HostMap:
    """The windows this process has mapped."""

    def __init__(self) -> None:
        self._windows: list[Window] = []

    def add(self, window: Window) -> None:
        """Raises ValueError when it overlaps another window, lies outside RAM, or is one too many."""
        problem = check_layout(window.base, window.size)
        if problem is not None:
            raise ValueError(problem)
        if len(self._windows) >= MAX_WINDOWS:
            raise ValueError(f"more than {MAX_WINDOWS} windows")
        for other in self._windows:
            if window.base < other.end and other.base < window.end:
                raise ValueError(f"window {window.base:#x} overlaps the one at {other.base:#x}")
        self._windows.append(window)

    def __iter__(self) -> Iterator[Window]:
        return iter(self._windows)

    def find(self, hpa: Hpa, kind: WindowKind) -> Window | None:
        for window in self._windows:
            if window.base <= hpa < window.base + window.size and window.kind is kind:
                return window
        return None

    def frame(self, hpa: Hpa) -> tuple[memoryview, int] | None:
        """The bytes that hold the frame at `hpa`: (view, offset), or None where no frame is."""
        for window in self._windows:
            offset = hpa - window.base
            if 0 <= offset < window.size and window.kind is _FRAMES:
                return window.view, offset
        return None

    def remove(self, window: Window) -> None:
        self._windows.remove(window)
