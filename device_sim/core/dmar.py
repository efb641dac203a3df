"""The remapping unit: what a kick has it look at, what descriptors do, and translation.

Models a VT-d unit in scalable mode, second stage only [VT-d 3], [VT-d 6], [VT-d 7], whose structures lie in
memory: which table translates a function `context_tables.py` reads.  Translation looks in the IOTLB, then
walks, from a cached table pointer if there is one.  A missing page or right is no fault of the unit's when a
function with ATS asks: it answers with fewer rights, and the function may ask for the page (a page request).

A fault that its PASID entry qualifies is recorded unless FPD is set there.  Requests to the interrupt
range are not translated (`msi.py`), and no answer covers that range.

A store that hardware would trap is a store and a kick [docs/decisions/0018]: GCMD, IQT and what is latched
with them are looked at there, in the order of `kick`.

I9: descriptors take effect in the order they come, a wait completes after those before it; every page request
before it lies in its queue then, so one with PD has nothing left to drain.
R25: none takes effect in the middle of a walk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from device_sim.core import msi
from device_sim.core.context_tables import ContextTables, NoTable, SecondStage
from device_sim.core.fault_recording import FaultRecording
from device_sim.core.inval_queue import QueuedInvalidation
from device_sim.core.iotlb import Iotlb, IotlbEntry, PscEntry
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.prq import PrqWriter
from device_sim.core.unit_registers import Events, RegisterPages, RegisterSet
from protocol.hw import qi
from protocol.hw.caps import Cap, Ecap
from protocol.hw.faults import QUALIFIED, AddressType, FaultReason, FaultRecord, FaultType
from protocol.hw.prq import PageRequest
from protocol.hw.qi import DescriptorError, ResponseCode
from protocol.hw.vtd_regs import Gcmd, Reg
from protocol.pt import bits
from protocol.pt.geometry import INDEX_BITS
from protocol.pt.mem import TableOutside, TableReader
from protocol.pt.walk import Outcome, Walk, second_stage_rules, walk
from protocol.units import (
    LEVEL_4K,
    PAGE_SHIFT,
    PAGE_SIZE,
    Hpa,
    Iova,
    IovaPfn,
    iova_pfn_of,
    pages_of_level,
    pfn_of,
    size_of_level,
)

MAX_MESSAGE_NOTES = 64
_TABLE_MASK = (1 << INDEX_BITS + PAGE_SHIFT) - 1  # the address bits a level-1 table translates
STABLE_TRIES = 16
_LEVELS = Gcmd.QIE | Gcmd.TE  # what GSTS shows of GCMD for as long as it is stored there


class RequestRefused(Exception):
    """The unit aborts the request; it has recorded why."""

    def __init__(self, reason: FaultReason) -> None:
        super().__init__(reason.name)
        self.reason = reason


class Endpoint(Protocol):
    """What the unit needs of a function behind it."""

    def invalidate_translations(self, start: IovaPfn, npages: int) -> bool:
        """False: the function does not complete it in time."""
        ...

    def page_response(self, prgi: int, code: ResponseCode) -> None: ...


NOT_PRESENT = IotlbEntry(Hpa(0), LEVEL_4K, 0, 0)


class RemappingUnit:
    """`deliver` takes interrupt messages on their way; `fence` is a full fence between two processes."""

    def __init__(
        self,
        cap: Cap,
        ecap: Ecap,
        haw: int,
        memory: PhysicalMemory,
        deliver: Callable[[msi.InterruptMessage], None] = lambda message: None,
        fence: Callable[[], None] = lambda: None,
        descriptors_at_once: int | None = None,
    ) -> None:
        self.cap = cap
        self.ecap = ecap
        self.iotlb = Iotlb()
        self.registers = RegisterSet(cap, ecap, fence)
        self.tables = ContextTables(cap, ecap, haw, memory)
        self.queue = QueuedInvalidation(
            self.registers, memory, self._execute, self._on_wait, descriptors_at_once
        )
        self.prq = PrqWriter(self.registers, memory, self._auto_respond, self._admit)
        self.faults = FaultRecording(cap, self.registers)
        self.iotlb_invalidations = 0  # descriptors executed
        self.devtlb_invalidations = 0
        self.invalidation_waits = 0  # with any of them before it: how often the driver submitted some
        self._waited_for = 0  # descriptors executed before the last such wait
        self.walks = 0
        self._rules = second_stage_rules(haw, cap.max_huge_page_level, snoop_control=bool(ecap.sc))
        self.deliver = deliver
        self._memory = memory
        self._rtaddr: int | None = None  # as SRTP took it
        self._gcmd = 0
        self._endpoints: dict[int, Endpoint] = {}
        self.interrupts = 0
        self.interrupt_messages: deque[msi.InterruptMessage] = deque(maxlen=MAX_MESSAGE_NOTES)

    @property
    def invalidation_descriptors(self) -> int:
        return self.iotlb_invalidations + self.devtlb_invalidations

    def add_endpoint(self, rid: int, endpoint: Endpoint) -> None:
        self._endpoints[rid] = endpoint

    # -- what the driver does --------------------------------------------------------------------------

    def connect(self, pages: RegisterPages, events: Events) -> None:
        """A driver has the registers from now on, as after a reset."""
        self.registers.connect(pages, events)

    def kick(self) -> bool:
        """Software stored something: controls and commands, what was cleared, then the queues.  True: there
        is more in them, for another kick.
        """
        self.registers.latch_controls()
        self.prq.latch()
        self._command()
        self.faults.take_clears()
        self.registers.take_clears(Reg.FSTS)
        self.registers.take_clears(Reg.ICS)
        has_more = self.queue.run()
        self.prq.take_clears()
        return has_more

    def _command(self) -> None:
        """GCMD is a level, but for SRTP, which acts where it comes to be set."""
        now = self.registers.stored(Reg.GCMD)
        if now == self._gcmd:
            return
        changed, self._gcmd = now ^ self._gcmd, now
        shown = before = self.registers.shown(Reg.GSTS)
        if changed & Gcmd.QIE:
            if now & Gcmd.QIE:
                self.queue.enable()
            else:
                self.queue.disable()
        if changed & now & Gcmd.SRTP:
            self._rtaddr = self.registers.stored(Reg.RTADDR)
            self.registers.show(Reg.RTADDR, self._rtaddr)
            shown |= Gcmd.SRTP
        if changed & (Gcmd.TE | Gcmd.SRTP):
            self.tables.use(self._rtaddr if now & Gcmd.TE else None)
            self.iotlb.invalidate_all()
        shown = shown & ~_LEVELS | now & _LEVELS
        if shown != before or changed & now & Gcmd.SRTP:
            self.registers.show(Reg.GSTS, shown)
            self.registers.send_event(Reg.ICS)  # hardware has no event for it, its driver spins

    def pasid_entry(self, rid: int) -> bytes:
        """What requests without PASID of that function are translated by; empty if nothing is there."""
        return self.tables.entry_in_memory(rid)

    def _on_wait(self, descriptor: qi.WaitDescriptor) -> None:
        if descriptor.pd and not self.ecap.pds:
            raise DescriptorError(qi.IQEI.RESERVED_FIELD, "this unit drains no page requests (ECAP.PDS)")
        if descriptor.sw and self._waited_for < self.invalidation_descriptors:
            self._waited_for = self.invalidation_descriptors
            self.invalidation_waits += 1

    def _execute(self, descriptor: qi.Descriptor) -> int | None:
        """The function that does not complete it in time, if one does not."""
        match descriptor:
            case qi.IotlbInv():
                self.iotlb_invalidations += 1
                self._invalidate_iotlb(descriptor)
            case qi.DevTlbInv():
                if not self.ecap.dt:
                    raise DescriptorError(qi.IQEI.BAD_TYPE, "this unit knows no device TLBs (ECAP.DT)")
                self.devtlb_invalidations += 1
                endpoint = self._endpoints.get(descriptor.sid)
                if endpoint is not None and not endpoint.invalidate_translations(*descriptor.pages):
                    return descriptor.sid
            case qi.PageGroupResponse():
                endpoint = self._endpoints.get(descriptor.rid)
                if endpoint is not None:
                    endpoint.page_response(descriptor.prgi, ResponseCode.from_wire(descriptor.code))
            case qi.ContextInv():
                self.tables.invalidate_contexts(descriptor)
            case qi.PasidCacheInv():
                self.tables.invalidate_pasids(descriptor)
            case _:
                raise DescriptorError(qi.IQEI.BAD_TYPE, f"{type(descriptor).__name__} is not implemented")
        return None

    def unexpected_completion(self, rid: int) -> None:
        """A function completes what timed out [VT-d 11.4.8.1]: reported, and that is all."""
        self.queue.report_completion_error(rid)

    def _invalidate_iotlb(self, descriptor: qi.IotlbInv) -> None:
        if descriptor.granularity is qi.IotlbGranularity.GLOBAL:
            self.iotlb.invalidate_all()
        elif descriptor.granularity is qi.IotlbGranularity.DOMAIN:
            self.iotlb.invalidate_domain(descriptor.did)
        elif not self.cap.psi:
            raise DescriptorError(qi.IQEI.RESERVED_FIELD, "no page-selective invalidation (CAP.PSI)")
        elif descriptor.am > self.cap.mamv:
            raise DescriptorError(
                qi.IQEI.RESERVED_FIELD, f"AM {descriptor.am} is beyond MAMV {self.cap.mamv}"
            )
        else:
            start, npages = descriptor.pages
            self.iotlb.invalidate_pages(descriptor.did, start, npages, leaves_only=descriptor.ih)

    def reset(self) -> None:
        """The driver is gone: nothing is translated any more, and nothing is cached.  Its functions are
        stopped, which empties their device TLBs.
        """
        self.registers.connect(RegisterPages.private(), Events())
        self._gcmd, self._rtaddr = 0, None
        self.tables.use(None)
        self.iotlb.invalidate_all()
        self.queue.disable()
        self.prq.reset()
        self.faults.reset()

    # -- translation -----------------------------------------------------------------------------------

    def translation_request(self, rid: int, page: IovaPfn, need: int) -> IotlbEntry:
        """ATS: the leaf that covers iova page `page`, with the rights the table gives; rights 0: not present.

        A cached entry or table pointer without the right `need` is not used: rights are raised without an
        invalidation.
        Raises RequestRefused on configuration errors, reserved bits, an address too wide: those are recorded.
        """
        attached = self._attached(rid, page)
        if msi.touches(Iova(page << PAGE_SHIFT), PAGE_SIZE):
            raise self._refuse(rid, page, FaultReason.SGN_8, fpd=attached.fpd)
        if page >= attached.npages:
            raise self._refuse(rid, page, FaultReason.SGN_5, fpd=attached.fpd)
        entry = self.iotlb.lookup(attached.did, page, need)
        if entry is None:
            entry = self._fill(rid, attached, page, need)
        return entry if entry.level == LEVEL_4K else _outside_interrupt_range(entry, page)

    def _fill(self, rid: int, attached: SecondStage, page: IovaPfn, need: int) -> IotlbEntry:
        """Walk, and cache what was found; absent entries never are (CM = 0)."""
        tables = self._memory.tables_at(attached.root)
        if tables is None:
            raise self._refuse(rid, page, FaultReason.SSS_4, fpd=attached.fpd)
        try:
            found, tag = self._walk_stable(tables, attached, page, need)
        except TableOutside:
            raise self._refuse(rid, page, FaultReason.SSS_1, fpd=attached.fpd) from None
        if found.outcome is Outcome.RESERVED:
            raise self._refuse(rid, page, FaultReason.SSS_3, fpd=attached.fpd)
        if found.outcome is Outcome.ABSENT:
            return NOT_PRESENT
        entry = IotlbEntry(Hpa(found.hpa(0)), found.level, found.rights & (bits.READ | bits.WRITE), tag)
        if msi.touches(entry.hpa, size_of_level(entry.level)):
            raise self._refuse(rid, page, FaultReason.SGN_8, fpd=attached.fpd)
        self.iotlb.fill(attached.did, page, entry)
        if found.level == LEVEL_4K:
            self.iotlb.fill_table(attached.did, page, PscEntry(found.table, found.rights_above))
        return entry

    def interrupt_request(self, rid: int, iova: Iova, size: int, *, write: bool) -> None:
        """May an untranslated request that touches the interrupt range go on?  RequestRefused if not."""
        if not (write and msi.is_message(iova, size)):
            kind = FaultType.WRITE if write else FaultType.READ
            raise self._refuse(
                rid, iova_pfn_of(iova), FaultReason.SGN_8, type=kind, at=AddressType.UNTRANSLATED
            )

    def interrupt(self, message: msi.InterruptMessage) -> None:
        """An interrupt message came: it goes on to the interrupt controller."""
        self.interrupts += 1
        self.interrupt_messages.append(message)
        self.deliver(message)

    def _walk(self, tables: TableReader, attached: SecondStage, page: IovaPfn, need: int) -> Walk:
        self.walks += 1
        address = page << PAGE_SHIFT
        pointer = self.iotlb.lookup_table(attached.did, page, need)
        if pointer is None:
            return walk(tables, self._rules, attached.root, attached.levels, address)
        found = walk(tables, self._rules, pointer.table, LEVEL_4K, address & _TABLE_MASK)
        rights = found.rights & pointer.rights
        return Walk(found.outcome, found.level, found.entry, rights, pointer.rights, found.table)

    def _walk_stable(
        self, tables: TableReader, attached: SecondStage, page: IovaPfn, need: int
    ) -> tuple[Walk, int]:
        """A walk, and in debug builds the frame's tag as of that walk: it must not change in between."""
        found = self._walk(tables, attached, page, need)
        tags = self._memory.tags
        if tags is None or found.outcome is not Outcome.MAPPED:
            return found, 0
        for _ in range(STABLE_TRIES):
            tag = tags.read(pfn_of(found.hpa(0)))
            again = self._walk(tables, attached, page, need)
            if again == found or again.outcome is not Outcome.MAPPED:
                return again, tag
            found = again
        return found._replace(outcome=Outcome.ABSENT), 0

    def _attached(self, rid: int, page: IovaPfn) -> SecondStage:
        try:
            return self.tables.second_stage(rid)
        except NoTable as found:
            raise self._refuse(rid, page, found.reason, fpd=found.fpd) from None

    # -- faults and page requests ----------------------------------------------------------------------

    def _refuse(
        self,
        rid: int,
        page: IovaPfn,
        reason: FaultReason,
        *,
        fpd: bool = False,
        type: FaultType = FaultType.READ,
        at: AddressType = AddressType.TRANSLATION_REQUEST,
    ) -> RequestRefused:
        """Record a fault unless it is a qualified one and FPD hides it; the caller raises the result."""
        if fpd and reason in QUALIFIED:
            return RequestRefused(reason)
        record = FaultRecord(
            sid=rid,
            addr=Iova((page << PAGE_SHIFT) & (1 << 64) - 1),
            reason=reason,
            type=type,
            at=at,
        )
        self.faults.record(record)
        return RequestRefused(reason)

    def _admit(self, request: PageRequest) -> bool:
        """PRE, before anything else is looked at [VT-d 7.4]."""
        try:
            self.tables.check_page_request(request.rid)
        except NoTable as found:
            self._refuse(
                request.rid,
                iova_pfn_of(request.addr),
                found.reason,
                fpd=found.fpd,
                type=FaultType.PAGE_REQUEST,
                at=AddressType.UNTRANSLATED,
            )
            return False
        return True

    def _auto_respond(self, rid: int, prgi: int, code: ResponseCode) -> None:
        endpoint = self._endpoints.get(rid)
        if endpoint is not None:
            endpoint.page_response(prgi, code)


def _outside_interrupt_range(entry: IotlbEntry, page: IovaPfn) -> IotlbEntry:
    """No answer covers the interrupt range: of a huge leaf over it the page that was asked for is given."""
    inside = page % pages_of_level(entry.level)
    if not msi.touches(Iova((page - inside) << PAGE_SHIFT), size_of_level(entry.level)):
        return entry
    return entry._replace(hpa=Hpa(entry.hpa + (inside << PAGE_SHIFT)), level=LEVEL_4K)
