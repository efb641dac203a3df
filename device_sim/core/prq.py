"""The page request queue of the remapping unit: a ring in memory that the unit fills and the driver empties.

Models [VT-d 7.4]: 2^(PQS+7) entries of 32 bytes; full when one is left.  An entry lies in memory before the
tail shows it, the tail before PPR.  A request that finds no room sets PRO, and until software clears it all
further ones are dropped; a dropped request that is the last of its group is answered Success by the unit
itself, so that the device asks again (R9).  One that may not ask at all (PRE) is no entry: the unit answers
its group Response Failure.

Must hold: the head is software's word: it is read once when there must be room, and one that names no entry
leaves none; of a ring outside the queues' memory nothing is stored.  Software that cleared PPR and read the
tail too early is told again at its next kick.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from device_sim.core.physmem import PhysicalMemory
from device_sim.core.unit_registers import RegisterSet
from protocol.flow import Wait
from protocol.hw.prq import PageRequest
from protocol.hw.qi import ResponseCode
from protocol.hw.vtd_regs import Prs, Reg, page_request_ring
from protocol.units import Hpa

_ENTRY = struct.Struct("<4Q")

# (requester id, page request group index, code): how the unit answers on its own.
Respond = Callable[[int, int, ResponseCode], None]


class PrqWriter:
    """`allowed` says whether a request may come in at all, and has recorded why not."""

    def __init__(
        self,
        registers: RegisterSet,
        memory: PhysicalMemory,
        respond: Respond,
        allowed: Callable[[PageRequest], bool],
    ) -> None:
        self.requests = 0
        self.dropped = 0
        self._registers = registers
        self._memory = memory
        self._respond = respond
        self._allowed = allowed
        self._pqa = 0
        self._ring = page_request_ring(0)
        self._tail = 0  # the index
        self._drops = False  # PRO came to show, and nobody who waits for room was told that it went
        self._accepting: Wait[None] = Wait()

    @property
    def overflow(self) -> bool:
        return bool(self._registers.shown(Reg.PRS) & Prs.PRO)

    async def wait_accepting(self) -> None:
        """Returns when requests are not dropped any more: software cleared the overflow."""
        while self.overflow:
            await self._accepting

    def submit(self, request: PageRequest) -> None:
        """Queue a request, or drop it."""
        if not self._allowed(request):
            self._answer(request, ResponseCode.FAILURE)
            return
        if self.overflow:
            self._take_clears()
        if self.overflow or not self._store(request):
            self.dropped += 1
            self._drops = True
            self._registers.raise_status(Reg.PRS, Prs.PRO)
            self._answer(request, ResponseCode.SUCCESS)
            return
        self.requests += 1
        self._raise_ppr()

    def _answer(self, request: PageRequest, code: ResponseCode) -> None:
        """On our own, once a group; a stop marker wants no answer."""
        if request.last and not request.is_stop_marker:
            self._respond(request.rid, request.prgi, code)

    def _store(self, request: PageRequest) -> bool:
        """Into the ring, behind it the tail; False if there is no room."""
        ring = self._ring
        head = ring.index(self._registers.stored(Reg.PQH))
        after = (self._tail + 1) % ring.entries
        if head is None or head == after:
            return False
        words = _ENTRY.unpack(request.to_bytes())
        if not self._memory.store64s(Hpa(ring.base + ring.offset(self._tail)), words):
            return False
        self._tail = after
        self._registers.show(Reg.PQT, ring.offset(after))
        return True

    # -- what software stored --------------------------------------------------------------------------

    def latch(self) -> None:
        """A ring that lies elsewhere is a new one: its tail is at its start."""
        pqa = self._registers.stored(Reg.PQA)
        if pqa != self._pqa:
            self._pqa, self._ring, self._tail = pqa, page_request_ring(pqa), 0
            self._registers.show(Reg.PQA, pqa)
            self._registers.show(Reg.PQT, 0)

    def take_clears(self) -> None:
        """PRO cleared lets requests in again; PPR clear over a queue that is not empty is set again."""
        self._take_clears()
        if self._registers.stored(Reg.PQH) != self._ring.offset(self._tail):
            self._raise_ppr()

    def _take_clears(self) -> None:
        self._registers.take_clears(Reg.PRS)
        self._look_for_room()

    def _raise_ppr(self) -> None:
        self._registers.raise_status(Reg.PRS, Prs.PPR)  # which takes clears, of PRO too
        self._look_for_room()

    def _look_for_room(self) -> None:
        if self._drops and not self.overflow:
            self._accept()

    def _accept(self) -> None:
        self._drops = False
        accepting, self._accepting = self._accepting, Wait()
        accepting.set(None)

    def reset(self) -> None:
        """There is no ring, and nobody waits for room in one."""
        self._pqa, self._ring, self._tail = 0, page_request_ring(0), 0
        self._accept()
