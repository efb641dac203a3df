"""The invalidation queue of the remapping unit: a ring in memory that the driver fills and the unit empties.

Models [VT-d 6.5.2]: a store to IQT has descriptors fetched from the head on; each takes effect before the
next is fetched, so a wait is done when its turn comes: it stores its status, and with IF raises the
completion event.  At a descriptor that cannot be executed the queue stops (IQE, with the reason in IQERCD)
and fetches it anew when software has cleared IQE.  A device that does not complete an invalidation in time
stops it too (ITE): the wait behind is aborted, which means that its status is never stored.  A completion
that comes after that is reported (ICE), and stops nothing.

Must hold (I30): tail and ring are software's words, read once for each run and bounded before use; a
descriptor is read once, and what was checked is what is executed; a status goes into a queue window or
nowhere. Departure: time does not pass while descriptors run, so "not in time" is what the device itself says.
A device runs beside the unit, so it may ask for a translation between any two descriptors (R7): one that is
to do so here is behind a unit that executes so many `at_once`, and goes on when it is asked again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from device_sim.core.physmem import PhysicalMemory
from device_sim.core.unit_registers import RegisterSet
from protocol.hw import qi
from protocol.hw.fields import Field
from protocol.hw.qi import IQEI, DescriptorError
from protocol.hw.vtd_regs import (
    IQA_DW,
    IQERCD_ICESID,
    IQERCD_IQEI,
    IQERCD_ITESID,
    Fsts,
    Ics,
    Reg,
    Ring,
    invalidation_ring,
)
from protocol.pt.mem import TableOutside
from protocol.units import Hpa

_DESCRIPTOR = struct.Struct("<4Q")
_WORDS = qi.DESCRIPTOR_SIZE // 8

# Executes one that is no wait; the function that does not complete it, if there is one.
Execute = Callable[[qi.Descriptor], int | None]


class QueuedInvalidation:
    """`execute` and `on_wait`, told of a wait at its turn, raise DescriptorError for what the unit lacks."""

    def __init__(
        self,
        registers: RegisterSet,
        memory: PhysicalMemory,
        execute: Execute,
        on_wait: Callable[[qi.WaitDescriptor], None],
        at_once: int | None = None,
    ) -> None:
        self._registers = registers
        self._memory = memory
        self._execute = execute
        self._on_wait = on_wait
        self._at_once = at_once
        self._iqa = 0
        self._ring = invalidation_ring(0)
        self._head = 0  # the index
        self._late: int | None = None  # a function that completes nothing, until the wait behind it
        self.enabled = False

    def enable(self) -> None:
        """QIE was set: from the start of the ring that IQA names."""
        self._iqa = self._registers.stored(Reg.IQA)
        self._ring = invalidation_ring(self._iqa)
        self._registers.show(Reg.IQA, self._iqa)
        self._head, self._late = 0, None
        self._registers.show(Reg.IQH, 0)
        self.enabled = True

    def disable(self) -> None:
        """QIE was cleared: the head is at the start from then on [VT-d 11.4]."""
        self._registers.show(Reg.IQH, 0)
        self.enabled = False

    def run(self) -> bool:
        """Everything up to the tail, as long as nothing stops it.  True: as many as run at once, and there
        are more.
        """
        if not self.enabled or self._registers.shown(Reg.FSTS) & (Fsts.IQE | Fsts.ITE):
            return False
        try:
            return self._run()
        except DescriptorError as error:
            self._report(Fsts.IQE, IQERCD_IQEI, error.iqei)
            return False

    def report_completion_error(self, rid: int) -> None:
        """ICE: a completion of that function answers nothing that is waited for; the queue goes on."""
        self._report(Fsts.ICE, IQERCD_ICESID, rid)

    def _report(self, status: int, field: Field, value: int) -> None:
        """Why, and then that it is so."""
        others = self._registers.shown(Reg.IQERCD) & ~field.mask
        self._registers.show(Reg.IQERCD, others | field.put(value))
        self._registers.raise_status(Reg.FSTS, status)

    def _run(self) -> bool:
        ring = self._ring
        tail = self._bounded_tail(ring)
        left = self._at_once
        while self._head != tail:
            if left is not None:
                if not left:
                    return True
                left -= 1
            descriptor = qi.decode(self._fetch(ring))
            if isinstance(descriptor, qi.WaitDescriptor):
                self._on_wait(descriptor)
                self._advance(ring)
                if self._late is not None:
                    break  # aborted
                self._complete(descriptor)
            else:
                late = self._execute(descriptor)
                self._late = self._late if late is None else late
                self._advance(ring)
        if self._late is not None:
            late, self._late = self._late, None
            self._report(Fsts.ITE, IQERCD_ITESID, late)
        return False

    def _bounded_tail(self, ring: Ring) -> int:
        if not IQA_DW.get(self._iqa):
            raise DescriptorError(IQEI.BAD_WIDTH, "scalable mode wants descriptors of 256 bits (IQA.DW)")
        offset = self._registers.stored(Reg.IQT)
        tail = ring.index(offset)
        if tail is not None:
            return tail
        iqei = IQEI.INVALID_TAIL if offset >= ring.size else IQEI.TAIL_MISALIGNED
        raise DescriptorError(iqei, f"a tail at {offset:#x} of {ring.size:#x} bytes")

    def _fetch(self, ring: Ring) -> bytes:
        at = Hpa(ring.base + ring.offset(self._head))
        tables = self._memory.tables_at(at)
        try:
            if tables is not None:
                return _DESCRIPTOR.pack(*tables.load_run(at, _WORDS))
        except TableOutside:
            pass
        raise DescriptorError(IQEI.FETCH_ERROR, f"no memory at {at:#x}")

    def _advance(self, ring: Ring) -> None:
        self._head = (self._head + 1) % ring.entries
        self._registers.show(Reg.IQH, ring.offset(self._head))

    def _complete(self, wait: qi.WaitDescriptor) -> None:
        """Status first, then the event that tells of it."""
        if wait.sw:
            self._memory.store32(Hpa(wait.status_addr), wait.status_data)
        if wait.if_:
            self._registers.raise_status(Reg.ICS, Ics.IWC)
