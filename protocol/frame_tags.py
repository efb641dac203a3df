"""Who owns each frame: a word a frame that kvmd writes and a device's debug check reads.

A debug aid, no part of the modelled hardware: it lets the device prove invariant I6, that it never touches a
frame after it was given up.  Every time a frame is taken or given up its tag changes: owner in the low
16 bits (0: free), a count that never repeats above.  A translation remembers the tag it was made under; a
different tag at the time of use means the frame changed hands in between.
"""

from __future__ import annotations

from protocol.units import PAGE_SHIFT, Hpa, Pfn

TAG_BYTES = 8
OWNER_BITS = 16
FREE = 0


class FrameTags:
    """Tags of the frames from `base` on; `view` may be a read-only mapping."""

    __slots__ = ("_count", "_first", "_words")

    def __init__(self, base: Hpa, view: memoryview) -> None:
        self._first = base >> PAGE_SHIFT
        self._words = view.cast("Q")
        self._count = 0

    def read(self, pfn: int) -> int:
        return self._words[pfn - self._first]

    def change(self, pfn: Pfn, npages: int, owner: int) -> None:
        """The frames pfn..pfn + npages - 1 pass to `owner` (0: nobody)."""
        assert 0 <= owner < 1 << OWNER_BITS, f"owner {owner:#x}"
        self._count += 1
        tag = self._count << OWNER_BITS | owner
        first = pfn - self._first
        assert first >= 0, f"frame {pfn:#x} is outside of the window"
        for i in range(first, first + npages):
            self._words[i] = tag

    def release(self) -> None:
        self._words.release()


def is_free(tag: int) -> bool:
    return tag & ((1 << OWNER_BITS) - 1) == FREE


def tags_size(frames_bytes: int) -> int:
    """Bytes of tags for a window of `frames_bytes`."""
    return (frames_bytes >> PAGE_SHIFT) * TAG_BYTES
