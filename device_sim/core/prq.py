"""The page request queue of the remapping unit: a ring the hardware fills and the driver empties.

Models [VT-d 7.4]: 2^(PQS+7) entries of 32 bytes; full when one is left.  A request that finds no room sets
the overflow flag, and until software clears it all further ones are dropped; a dropped request that is
the last of its group is answered Success by the unit itself, so that the device asks again (R9).
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.flow import Wait
from protocol.hw.prq import PageRequest
from protocol.hw.qi import ResponseCode

PQS = 4
RING_ENTRIES = 1 << (PQS + 7)  # 2048: 64 KiB

# (requester id, page request group index, code): how the unit answers on its own.
Respond = Callable[[int, int, ResponseCode], None]


class PageRequestQueue:
    """`interrupt` is called for every entry written, and when the overflow flag goes up."""

    def __init__(self, respond: Respond, interrupt: Callable[[], None], entries: int = RING_ENTRIES) -> None:
        self.requests = 0
        self.dropped = 0
        self.overflow = False
        self._respond = respond
        self._interrupt = interrupt
        self._room = entries - 1  # tail + 1 == head means full
        self._occupied = 0
        self._undelivered: list[bytes] = []
        self._overflow_untold = False
        self._accepting: Wait[None] = Wait()

    async def wait_accepting(self) -> None:
        """Returns when requests are not dropped any more: software cleared the overflow."""
        while self.overflow:
            await self._accepting

    def submit(self, request: PageRequest) -> None:
        """The hardware's side: queue a request, or drop it."""
        if self.overflow or self._occupied == self._room:
            self.dropped += 1
            if not self.overflow:
                self.overflow = self._overflow_untold = True
                self._interrupt()
            if request.last and not request.is_stop_marker:
                self._respond(request.rid, request.prgi, ResponseCode.SUCCESS)
            return
        self.requests += 1
        self._occupied += 1
        self._undelivered.append(request.to_bytes())
        self._interrupt()

    def take_new(self) -> bytes:
        """Entries written since the last call: what the next interrupt is about, with the overflow flag."""
        new = b"".join(self._undelivered)
        self._undelivered.clear()
        self._overflow_untold = False
        return new

    @property
    def has_new(self) -> bool:
        """Entries, or an overflow that left none: software would never clear what it is not told."""
        return bool(self._undelivered) or self._overflow_untold

    def consume(self, entries: int) -> bool:
        """Software moved the head.  False if it claims more than there are."""
        if not 0 <= entries <= self._occupied - len(self._undelivered):
            return False
        self._occupied -= entries
        return True

    def clear_overflow(self) -> None:
        self.overflow = self._overflow_untold = False
        accepting, self._accepting = self._accepting, Wait()
        accepting.set(None)

    def reset(self) -> None:
        self._occupied = 0
        self._undelivered.clear()
        self.clear_overflow()
