"""One remapping unit as its driver has it: registers, tables, queues, and its three events.

Models struct intel_iommu [Linux intel/iommu.h], how the driver brings a unit up [Linux intel/iommu.c
init_dmars], and what it does at each of its interrupts.  The unit is told of what was stored by a kick, and
tells by events (docs/decisions/0018).  What is read of it is its word: PeerError where it cannot be.

A function that completes no invalidation keeps translations that nobody can take from it.  So whoever waits
for one is not told before the function reaches nothing: its context entry gone, the unit told, its bus
mastering off.  Told earlier, he would give a frame away that the function still writes to (I6, R18).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from iommufdd.core import qi
from iommufdd.core.counts import UnitCounts
from iommufdd.core.fault_records import FaultRecords
from iommufdd.core.inval_queue import InvalidationQueue, InvalidationTimeOut
from iommufdd.core.page_requests import PageRequestQueue
from iommufdd.core.translation_tables import TranslationTables
from iommufdd.core.unit_registers import UnitRegisters
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.hw.caps import Cap, Ecap
from protocol.hw.pasid_entry import PasidEntry
from protocol.hw.qi import Descriptor, DevTlbInv, ResponseCode
from protocol.hw.vtd_regs import (
    IQA_BASE,
    IQA_DW,
    PQA_BASE,
    PQA_PQS,
    Fsts,
    Gcmd,
    Ics,
    Reg,
    invalidation_ring,
    page_request_ring,
)
from protocol.units import PAGE_SIZE, Hpa, Pasid

PQS = 4  # 2048 page requests, as the kernel has it
QUEUE_BYTES = (PAGE_SIZE << PQS) + PAGE_SIZE  # of `queues`: the page requests, then the status words


@dataclass(frozen=True, slots=True)
class UnitMemory:
    """Where one unit's structures lie.  `tables` is ours to store into, with `ring_at` a page of it for the
    invalidation queue; `queues`, QUEUE_BYTES at `queues_at`, is the unit's.
    """

    tables: TranslationTables
    ring_at: Hpa
    ring: memoryview
    queues_at: Hpa
    queues: memoryview


class IntelIommu:
    """`on_page_requests(entries, overflow)` and `on_faults(records)` are called with what is new;
    `end_dma(rid)` takes a function's bus mastering from it.
    """

    def __init__(
        self,
        number: int,
        cap: Cap,
        ecap: Ecap,
        registers: UnitRegisters,
        memory: UnitMemory,
        counts: UnitCounts,
        on_page_requests: Callable[[IntelIommu, bytes, bool], None],
        on_faults: Callable[[list[bytes]], None],
        end_dma: Callable[[int], Coroutine[Any, Any, None]],
    ) -> None:
        self.number = number
        self.cap = cap
        self.ecap = ecap
        self.tables = memory.tables
        self._registers = registers
        self._on_faults = on_faults
        self._iqa = IQA_BASE.put(memory.ring_at) | IQA_DW.put(True)
        self._pqa = PQA_BASE.put(memory.queues_at) | PQA_PQS.put(PQS)
        requests = page_request_ring(self._pqa)
        self.page_requests = PageRequestQueue(
            registers,
            requests,
            memory.queues,
            lambda entries, overflow: on_page_requests(self, entries, overflow),
        )
        self.queue = InvalidationQueue(
            registers,
            invalidation_ring(self._iqa),
            memory.ring,
            memory.queues[requests.size :],
            Hpa(memory.queues_at + requests.size),
            counts,
            self.page_requests.look,
        )
        self._faults = FaultRecords(registers, cap)
        self._end_dma = end_dma
        self._taken_off: dict[int, Wait[None]] = {}  # functions that answer nothing, each until it is done
        self._in_effect: Wait[None] = Wait()
        self._gone = False

    async def bring_up(self) -> None:
        """From reset to translation.  Raises UapiError(ENODEV): the unit is gone."""
        store = self._registers.store
        for register in (Reg.FECTL, Reg.PECTL, Reg.IECTL, Reg.IQT, Reg.PQH):  # no event is masked
            store(register, 0)
        store(Reg.IQA, self._iqa)
        store(Reg.PQA, self._pqa)
        store(Reg.RTADDR, self.tables.rtaddr)
        await self._command(Gcmd.QIE)
        await self._command(Gcmd.QIE | Gcmd.SRTP)
        if not self.cap.esrtps:
            await self.queue.submit(qi.forget_all())
        await self._command(Gcmd.QIE | Gcmd.TE)

    async def _command(self, command: int) -> None:
        """Store GCMD, and wait until all of it shows in GSTS."""
        self._registers.store(Reg.GCMD, command)
        self._registers.kick()
        while self._registers.load(Reg.GSTS) & command != command:
            self._check_there()
            await self._in_effect
        self._check_there()

    def _check_there(self) -> None:
        if self._gone:
            raise UapiError(errno.ENODEV, "the remapping unit is gone")

    # -- what the IOMMU core asks ----------------------------------------------------------------------

    # awaits: descriptors, told: cannot change: the caller's own
    async def submit(self, descriptors: Sequence[Descriptor]) -> None:
        """Returns when all took effect, or what they would have dropped can be used by nobody.  Errors as of
        `InvalidationQueue.submit`, a time-out only if the unit goes on about a function that is off the bus.
        """
        told: set[int] = set()
        while True:
            self._check_there()  # whatever came of taking a function off
            if self._taken_off:
                descriptors = await self._answerable(descriptors)
            try:
                await self.queue.submit(descriptors)
                return
            except InvalidationTimeOut as timed_out:
                if timed_out.rid in told or not self.tables.has(timed_out.rid):
                    raise
                told.add(timed_out.rid)
                await self._take_off(timed_out.rid)

    # awaits: each each, left: cannot change: the caller's own; one in `left` whose function is taken off
    # meanwhile times out in the queue, and `submit` comes back with it
    async def _answerable(self, descriptors: Sequence[Descriptor]) -> list[Descriptor]:
        """Without those that would wait for a function that answers nothing, once it reaches nothing; raises
        what kept it from being taken off the bus.
        """
        left: list[Descriptor] = []
        for each in descriptors:
            done = self._taken_off.get(each.sid) if isinstance(each, DevTlbInv) else None
            if done is None:
                left.append(each)
            else:
                await done
        return left

    # awaits: asked, done, error: cannot change: from here on others find ours, which is set once
    async def _take_off(self, rid: int) -> None:
        """The function reaches nothing when this returns, and never again while this link lasts."""
        done = self._taken_off.get(rid)
        if done is not None:
            await done
            return
        done = self._taken_off[rid] = Wait()
        try:
            self.tables.retire_context_entry(rid)
            await self.submit(qi.forget_function(rid))
            self.tables.clear_context_entry(rid)
            try:
                await self._end_dma(rid)
            except UapiError as error:
                if error.errno != errno.ENODEV:
                    raise
                await self.queue.submit([qi.wait()])  # the link broke, beside which the unit may still live
                raise UapiError(errno.EIO, f"function {rid:#x} is still on the bus: {error}") from None
        except Exception as error:
            done.fail(error)
            raise
        done.set(None)

    def respond(self, rid: int, prgi: int, code: ResponseCode, pasid: Pasid | None = None) -> bool:
        """A page group response; nobody waits for it.  False: there is nobody any more."""
        return self.queue.post(qi.page_group_response(rid, prgi, code, pasid))

    def check_on_bus(self, rid: int) -> None:
        if rid in self._taken_off:
            why = f"function {rid:#x} completes no invalidations, and is off the bus: start device_sim anew"
            raise UapiError(errno.EIO, why)

    def put_pasid_entry(self, rid: int, pasid: Pasid, entry: PasidEntry) -> None:
        self.check_on_bus(rid)
        self.tables.put_pasid_entry(rid, pasid, entry)

    def retire_pasid_entry(self, rid: int, pasid: Pasid) -> None:
        self.tables.retire_pasid_entry(rid, pasid)

    def clear_pasid_entry(self, rid: int, pasid: Pasid) -> None:
        self.tables.clear_pasid_entry(rid, pasid)

    # -- its events ------------------------------------------------------------------------------------

    def on_completion(self) -> None:
        """A wait was done, or a command took effect."""
        self._registers.clear(Reg.ICS, Ics.IWC)
        self.queue.look()
        in_effect, self._in_effect = self._in_effect, Wait()
        in_effect.set(None)

    def on_page_request(self) -> None:
        self.page_requests.look()

    def on_fault(self) -> None:
        """A fault was recorded, or the invalidation queue stopped."""
        fsts = self._registers.load(Reg.FSTS)
        status = self._registers.status(Reg.FSTS)
        if status & (Fsts.IQE | Fsts.ITE | Fsts.ICE):
            self.queue.recover(status)
        records = self._faults.take(fsts)
        self._registers.kick()
        if records:
            self._on_faults(records)

    def lost(self) -> None:
        """It hears and tells nothing any more, and may walk until it is `gone`."""
        self.queue.lost()

    def gone(self) -> None:
        """It does nothing any more, and nobody waits for it."""
        self._gone = True
        self.queue.gone()
        self._in_effect.set(None)
        self._in_effect = Wait()
