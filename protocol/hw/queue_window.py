"""Stores into a queue window: page requests and the status of waits, which a driver reads.

Models what a unit stores to memory [VT-d 6.5.2], [VT-d 7.4]: an aligned word of 4 or 8 bytes is seen whole or
not at all, and those stored before a tail are seen before it: item access on a cast `memoryview` is one mov,
and x86-64 keeps stores in order.  Must hold: nobody but the unit stores there.
"""

from __future__ import annotations

from protocol.units import Hpa


class QueueWriter:
    """Words of the window at `base`."""

    __slots__ = ("base", "words32", "words64")

    def __init__(self, base: Hpa, view: memoryview) -> None:
        self.base = base
        self.words32 = view.cast("I")
        self.words64 = view.cast("Q")

    def release(self) -> None:
        self.words32.release()
        self.words64.release()
