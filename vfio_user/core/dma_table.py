"""The windows of client memory that a function may reach: none overlaps another, each goes as it came.

[vfio-user VFIO_USER_DMA_MAP]: mapping over an existing window is EEXIST; what is unmapped must be one that
was mapped, exactly.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from errno import EEXIST, EINVAL, ENOENT, ENOSPC

from protocol.errors import UapiError
from protocol.units import Iova
from vfio_user.core.function import DmaWindow
from vfio_user.core.limits import DMA_PAGE_BYTES, MAX_DMA_WINDOWS

ADDRESS_END = 1 << 64
FILE_END = 1 << 63  # of an off_t


def check_window(window: DmaWindow) -> None:
    """Is it a window at all?  EINVAL."""
    where = f"a window of {window.size:#x} bytes at {window.start:#x}, offset {window.offset:#x}"
    if not window.size or (window.start | window.size | window.offset) % DMA_PAGE_BYTES:
        raise UapiError(EINVAL, f"{where}: whole pages of {DMA_PAGE_BYTES} bytes are mapped")
    if window.end > ADDRESS_END or window.offset + window.size > FILE_END:
        raise UapiError(EINVAL, f"{where}: beyond the end of addresses, or of any file")
    if window.fd is None and window.offset:
        raise UapiError(EINVAL, f"{where}: an offset, and no file")


class DmaTable:
    def __init__(self) -> None:
        self._windows: list[DmaWindow] = []  # by their start

    def __iter__(self) -> Iterator[DmaWindow]:
        return iter(tuple(self._windows))

    def __len__(self) -> int:
        return len(self._windows)

    def add(self, window: DmaWindow) -> None:
        """EEXIST for one that overlaps another, ENOSPC for one too many."""
        at = self._place(window.start)
        for other in self._windows[max(at - 1, 0) : at + 1]:
            if window.start < other.end and other.start < window.end:
                raise UapiError(
                    EEXIST, f"{window.start:#x}+{window.size:#x} overlaps {other.start:#x}+{other.size:#x}"
                )
        if len(self._windows) >= MAX_DMA_WINDOWS:
            raise UapiError(ENOSPC, f"{MAX_DMA_WINDOWS} windows are mapped: unmap one first")
        self._windows.insert(at, window)

    def find(self, start: Iova, size: int) -> DmaWindow:
        """ENOENT: nothing was mapped there, or something else."""
        at = self._place(start) - 1
        if at >= 0 and (self._windows[at].start, self._windows[at].size) == (start, size):
            return self._windows[at]
        raise UapiError(ENOENT, f"nothing of {size:#x} bytes was mapped at {start:#x}")

    def remove(self, window: DmaWindow) -> None:
        self._windows.remove(window)

    def _place(self, start: Iova) -> int:
        """Behind the last window that does not start after `start`."""
        return bisect_right(self._windows, start, key=lambda window: window.start)
