"""Shared memory as a process sees it that can be stopped before each load and store.

What product code does with a mapping's `view` is a memoryview's: it is cast to words, sliced, loaded from
and stored to.  Of structures (tables, queues, registers, rings) each access is a point, of whatever width:
x86 does not tear it, and a slice counts as one.  Of frames a slice is: what a device stores there goes in two
halves, with a point between, because a copy is torn.  Memory that only one process has mapped is nobody's
business.  Not installed, it costs nothing: then a mapping's view is the memoryview itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Access = Callable[[int, int, bool], None]
"""`access(at, size, writes)`: the running process is about to, in bytes of the memory."""

STRUCTURES = (
    "tdp-tables",
    "iommu-tables",
    "dmar-tables",
    "dmar-queues",
    "dmar-stores",
    "unit",
    "kvm-dirty-ring",
)
FRAMES = "tdp-frames"
TAGS = "tdp-frame_tags"  # what the model's own checks go by: no hardware looks at it, so nobody comes between


def watched(memory: str, process: str, view: memoryview, access: Access, note: Access) -> Any:
    """In place of `view`, of the memory that was made under that name; `note`: as `access`, but no point."""
    if memory == FRAMES:
        return FramesView(view, access, note)
    if memory == TAGS:
        return StructuresView(view, 0, note)
    if memory.startswith(STRUCTURES):
        return StructuresView(view, 0, access)
    return view


class Words:
    """A memoryview cast to words, from byte `at` of the memory on."""

    def __init__(self, words: memoryview, at: int, access: Access) -> None:
        self._words = words
        self._at = at
        self._size = words.itemsize
        self._access = access
        self.nbytes = words.nbytes

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, where: Any) -> Any:
        if isinstance(where, slice):
            self._slice(where, writes=False)
        else:
            self._access(self._at + where * self._size, self._size, False)
        return self._words[where]

    def __setitem__(self, where: Any, value: Any) -> None:
        if isinstance(where, slice):
            self._slice(where, writes=True)
        else:
            self._access(self._at + where * self._size, self._size, True)
        self._words[where] = value

    def _slice(self, where: slice, *, writes: bool) -> None:
        start, stop, _ = where.indices(len(self._words))
        self._access(self._at + start * self._size, (stop - start) * self._size, writes)

    def release(self) -> None:
        self._words.release()


class StructuresView:
    """A memoryview of bytes, likewise; a slice of it is one as well."""

    def __init__(self, view: memoryview, at: int, access: Access) -> None:
        self._view = view
        self._at = at
        self._access = access

    def __len__(self) -> int:
        return len(self._view)

    @property
    def nbytes(self) -> int:
        return self._view.nbytes

    def cast(self, form: Any) -> Words:
        return Words(self._view.cast(form), self._at, self._access)

    def toreadonly(self) -> StructuresView:
        return StructuresView(self._view.toreadonly(), self._at, self._access)

    def __bytes__(self) -> bytes:
        self._access(self._at, len(self._view), False)
        return bytes(self._view)

    def __getitem__(self, where: slice) -> StructuresView:
        start, _, _ = where.indices(len(self._view))
        return StructuresView(self._view[where], self._at + start, self._access)

    def __setitem__(self, where: slice, value: Any) -> None:
        start, stop, _ = where.indices(len(self._view))
        self._access(self._at + start, stop - start, True)
        self._view[where] = value

    def release(self) -> None:
        self._view.release()

    def __enter__(self) -> StructuresView:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class FramesView:
    """A memoryview of frames; a slice of it is memory that is looked at, or stored to, without a point, and
    as late as behind the next slice (`view[a:b] = view[c:d]`).
    """

    def __init__(self, view: memoryview, access: Access, note: Access) -> None:
        self._view = view
        self._access = access
        self._note = note
        self._before = 0, 0  # where the last slice is, and its size
        self.readonly = view.readonly

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, where: slice) -> memoryview:
        start, stop, _ = where.indices(len(self._view))
        size = stop - start
        self._access(start, size, False)
        for at, length in ((start, size), self._before):
            self._note(at, length, not self.readonly)
        self._before = start, size
        return self._view[where]

    def __setitem__(self, where: slice, value: Any) -> None:
        start, stop, _ = where.indices(len(self._view))
        middle = (start + stop) // 2
        for first, end in ((start, middle), (middle, stop)):
            if first < end:
                self._access(first, end - first, True)
                self._view[first:end] = value[first - start : end - start]

    def release(self) -> None:
        self._view.release()
