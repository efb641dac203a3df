"""The page request queue, the driver's side: a ring that the unit fills and the driver empties.

Models prq_event_thread [Linux intel/prq.c] on [VT-d 7.4].  PPR is cleared before the tail is read, with a
fence between: a request that comes after that raises the event again.  The head moves behind what was read
when all of it was taken.  After an overflow what waits for the last of its group is given up, for that may
have been dropped, and only then is PRO cleared.
Must hold: the tail is the unit's word, read once and within the ring; what lies before it is copied, once.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from iommufdd.core.unit_registers import UnitRegisters
from protocol.errors import PeerError
from protocol.hw.vtd_regs import Prs, Reg, Ring


class PageRequestQueue:
    """`take` gets the new entries, side by side, and whether the queue overflowed."""

    def __init__(
        self, registers: UnitRegisters, ring: Ring, view: memoryview, take: Callable[[bytes, bool], None]
    ) -> None:
        self._registers = registers
        self._ring = ring
        self._view = view
        self._take = take
        self._head = 0  # the index
        self.seq = count()  # of entries, as tracing numbers them [Linux intel/prq.c prq_seq_number]

    def look(self) -> None:
        """Everything that is there is taken.  Raises PeerError if that cannot be."""
        registers = self._registers
        registers.clear(Reg.PRS, Prs.PPR)
        tail = self._tail()
        overflow = bool(registers.status(Reg.PRS) & Prs.PRO)
        if tail == self._head and not overflow:
            return
        self._take(self._copy(tail), overflow)
        self._head = tail
        registers.store(Reg.PQH, self._ring.offset(tail))
        if overflow:
            registers.clear(Reg.PRS, Prs.PRO)
            registers.kick()

    def _tail(self) -> int:
        offset = self._registers.load(Reg.PQT)
        index = self._ring.index(offset)
        if index is None:
            raise PeerError(f"page request queue: the tail is at {offset:#x}, beyond the ring")
        return index

    def _copy(self, tail: int) -> bytes:
        start, end = self._ring.offset(self._head), self._ring.offset(tail)
        if start <= end:
            return bytes(self._view[start:end])
        return bytes(self._view[start : self._ring.size]) + bytes(self._view[:end])
