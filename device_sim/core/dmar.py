"""The remapping unit: PASID entries, translation, invalidation descriptors, faults.

Models a VT-d unit in scalable mode, second stage only [VT-d 3], [VT-d 6], [VT-d 7].  A request without
PASID uses entry 0 (RID_PASID).  Translation looks in the IOTLB, then walks, from a cached table pointer
if there is one.  A missing page or right is no fault of the unit's when a function with ATS asks: it
answers with fewer rights, and the function may ask for the page (a page request).

A fault that its PASID entry qualifies is recorded unless FPD is set there.  Requests to the interrupt
range are not translated (`msi.py`), and no answer covers that range.

I9: descriptors take effect in the order they come, a wait completes after those before it; one with PD after
every page request before it has been told to software.
Departure: PASID entries are written by message, 64 bytes at once, and not read from a table in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from device_sim.core import msi
from device_sim.core.iotlb import Iotlb, IotlbEntry, PscEntry
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.prq import PageRequestQueue
from protocol.hw import qi
from protocol.hw.caps import Cap, Ecap
from protocol.hw.faults import QUALIFIED, AddressType, FaultReason, FaultRecord, FaultType
from protocol.hw.pasid_entry import RID_PASID, PasidEntry, Pgtt
from protocol.hw.qi import DescriptorError, ResponseCode
from protocol.pt import bits
from protocol.pt.geometry import INDEX_BITS, address_bits
from protocol.pt.mem import TableOutside, TableReader
from protocol.pt.walk import Outcome, Walk, second_stage_rules, walk
from protocol.units import (
    LEVEL_4K,
    PAGE_SHIFT,
    PAGE_SIZE,
    Hpa,
    Iova,
    IovaPfn,
    Level,
    Pasid,
    iova_pfn_of,
    pages_of_level,
    pfn_of,
    size_of_level,
)

MAX_FAULT_RECORDS = 256
MAX_MESSAGE_NOTES = 64
_TABLE_MASK = (1 << INDEX_BITS + PAGE_SHIFT) - 1  # the address bits a level-1 table translates
STABLE_TRIES = 16


class RequestRefused(Exception):
    """The unit aborts the request; it has recorded why."""

    def __init__(self, reason: FaultReason) -> None:
        super().__init__(reason.name)
        self.reason = reason


class Endpoint(Protocol):
    """What the unit needs of a function behind it."""

    def invalidate_translations(self, start: IovaPfn, npages: int) -> None: ...
    def page_response(self, prgi: int, code: ResponseCode) -> None: ...


@dataclass(slots=True)
class _Attached:
    """A valid second-stage PASID entry, decoded."""

    did: int
    root: Hpa
    levels: Level
    npages: int  # what the root and the unit's own width can address
    fpd: bool


NOT_PRESENT = IotlbEntry(Hpa(0), LEVEL_4K, 0, 0)


class RemappingUnit:
    """`on_event` is called whenever a page request or a fault record waits to be read; `drain` must tell
    software of all that wait before it returns; `deliver` takes interrupt messages on their way.
    """

    def __init__(
        self,
        cap: Cap,
        ecap: Ecap,
        haw: int,
        memory: PhysicalMemory,
        on_event: Callable[[], None],
        drain: Callable[[], None],
        deliver: Callable[[msi.InterruptMessage], None] = lambda message: None,
    ) -> None:
        self.cap = cap
        self.ecap = ecap
        self.iotlb = Iotlb()
        self.prq = PageRequestQueue(self._auto_respond, on_event)
        self.iotlb_invalidations = 0  # descriptors executed
        self.devtlb_invalidations = 0
        self.invalidation_messages = 0  # that carried any of them
        self.walks = 0
        self._rules = second_stage_rules(haw, cap.max_huge_page_level, snoop_control=bool(ecap.sc))
        self._haw = haw
        self._on_event = on_event
        self._drain = drain
        self.deliver = deliver
        self._memory = memory
        self._entries: dict[tuple[int, Pasid], bytes] = {}
        self._pasid_cache: dict[tuple[int, Pasid], _Attached] = {}
        self._endpoints: dict[int, Endpoint] = {}
        self._faults: deque[bytes] = deque()
        self.faults_recorded = 0
        self.faults_lost = 0
        self.interrupts = 0
        self.messages: deque[msi.InterruptMessage] = deque(maxlen=MAX_MESSAGE_NOTES)

    @property
    def invalidations(self) -> int:
        return self.iotlb_invalidations + self.devtlb_invalidations

    def add_endpoint(self, rid: int, endpoint: Endpoint) -> None:
        self._endpoints[rid] = endpoint

    # -- what the driver does --------------------------------------------------------------------------

    def write_pasid_entry(self, rid: int, pasid: Pasid, raw: bytes) -> None:
        """Store an entry; cached copies stay until the PASID cache is invalidated.  Raises FormatError."""
        PasidEntry.from_bytes(raw)
        self._entries[rid, pasid] = raw

    def pasid_entry(self, rid: int) -> bytes:
        """What requests without PASID of that function are translated by; empty if nothing was written."""
        return self._entries.get((rid, RID_PASID), b"")

    def execute(self, ring: bytes) -> list[int]:
        """Run descriptors in order; the status data of each completed wait.

        Raises DescriptorError at the first bad one: the queue stops there, those before it have taken effect.
        """
        if len(ring) % qi.DESCRIPTOR_SIZE:
            raise DescriptorError(qi.IQEI.TAIL_MISALIGNED, f"{len(ring)} bytes of descriptors")
        completed = []
        before = self.invalidations
        for at in range(0, len(ring), qi.DESCRIPTOR_SIZE):
            descriptor = qi.decode(ring[at : at + qi.DESCRIPTOR_SIZE])
            if isinstance(descriptor, qi.Wait):
                self._wait(descriptor)
                if descriptor.sw:
                    completed.append(descriptor.status_data)
            else:
                self._execute_one(descriptor)
        self.invalidation_messages += self.invalidations > before
        return completed

    def _wait(self, descriptor: qi.Wait) -> None:
        if not descriptor.pd:
            return
        if not self.ecap.pds:
            raise DescriptorError(qi.IQEI.RESERVED_FIELD, "this unit drains no page requests (ECAP.PDS)")
        self._drain()

    def _execute_one(self, descriptor: qi.Descriptor) -> None:
        match descriptor:
            case qi.IotlbInv():
                self.iotlb_invalidations += 1
                self._invalidate_iotlb(descriptor)
            case qi.DevTlbInv():
                if not self.ecap.dt:
                    raise DescriptorError(qi.IQEI.BAD_TYPE, "this unit knows no device TLBs (ECAP.DT)")
                self.devtlb_invalidations += 1
                endpoint = self._endpoints.get(descriptor.sid)
                if endpoint is not None:
                    endpoint.invalidate_translations(*descriptor.pages)
            case qi.PasidCacheInv():
                self._pasid_cache.clear()
            case qi.PageGroupResponse():
                endpoint = self._endpoints.get(descriptor.rid)
                if endpoint is not None:
                    endpoint.page_response(descriptor.prgi, ResponseCode.from_wire(descriptor.code))
            case _:
                raise DescriptorError(qi.IQEI.BAD_TYPE, f"{type(descriptor).__name__} is not implemented")

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
        """The driver is gone: nothing is translated any more, and nothing is cached."""
        self._entries.clear()
        self._pasid_cache.clear()
        self.iotlb.invalidate_all()
        self.prq.reset()
        self._faults.clear()
        for endpoint in self._endpoints.values():
            endpoint.invalidate_translations(IovaPfn(0), qi.MAX_PAGES)

    # -- translation -----------------------------------------------------------------------------------

    def translation_request(self, rid: int, page: IovaPfn, need: int) -> IotlbEntry:
        """ATS: the leaf that covers iova page `page`, with the rights the table gives; rights 0: not present.

        A cached entry without the right `need` is walked again: rights are raised without an invalidation.
        Raises RequestRefused on configuration errors, reserved bits, an address too wide: those are recorded.
        """
        attached = self._attached(rid, page)
        if msi.touches(Iova(page << PAGE_SHIFT), PAGE_SIZE):
            raise self._refuse(rid, page, FaultReason.SGN_8, fpd=attached.fpd)
        if page >= attached.npages:
            raise self._refuse(rid, page, FaultReason.SGN_5, fpd=attached.fpd)
        entry = self.iotlb.lookup(attached.did, page, need)
        if entry is None:
            entry = self._fill(rid, attached, page)
        return entry if entry.level == LEVEL_4K else _beside_interrupts(entry, page)

    def _fill(self, rid: int, attached: _Attached, page: IovaPfn) -> IotlbEntry:
        """Walk, and cache what was found; absent entries never are (CM = 0)."""
        tables = self._memory.tables_at(attached.root)
        if tables is None:
            raise self._refuse(rid, page, FaultReason.SSS_4, fpd=attached.fpd)
        try:
            found, tag = self._walk_stable(tables, attached, page)
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
        self.messages.append(message)
        self.deliver(message)

    def _walk(self, tables: TableReader, attached: _Attached, page: IovaPfn) -> Walk:
        self.walks += 1
        address = page << PAGE_SHIFT
        pointer = self.iotlb.lookup_table(attached.did, page)
        if pointer is None:
            return walk(tables, self._rules, attached.root, attached.levels, address)
        found = walk(tables, self._rules, pointer.table, LEVEL_4K, address & _TABLE_MASK)
        rights = found.rights & pointer.rights
        return Walk(found.outcome, found.level, found.entry, rights, pointer.rights, found.table)

    def _walk_stable(self, tables: TableReader, attached: _Attached, page: IovaPfn) -> tuple[Walk, int]:
        """A walk, and in debug builds the frame's tag as of that walk: it must not change in between."""
        found = self._walk(tables, attached, page)
        tags = self._memory.tags
        if tags is None or found.outcome is not Outcome.MAPPED:
            return found, 0
        for _ in range(STABLE_TRIES):
            tag = tags.read(pfn_of(found.hpa(0)))
            again = self._walk(tables, attached, page)
            if again == found or again.outcome is not Outcome.MAPPED:
                return again, tag
            found = again
        return found._replace(outcome=Outcome.ABSENT), 0

    def _attached(self, rid: int, page: IovaPfn) -> _Attached:
        """The PASID entry of a request without PASID, checked in the unit's order."""
        key = rid, RID_PASID
        cached = self._pasid_cache.get(key)
        if cached is not None:
            return cached
        if not self.ecap.dt:
            raise self._refuse(rid, page, FaultReason.SCT_5)
        raw = self._entries.get(key)
        if raw is None:
            raise self._refuse(rid, page, FaultReason.SPT_2)
        entry = PasidEntry.from_bytes(raw)
        if not entry.present:
            raise self._refuse(rid, page, FaultReason.SPT_2, fpd=entry.fpd)
        level = entry.level
        usable = entry.pgtt == Pgtt.SECOND_STAGE and bool(self.ecap.ssts) and level in self.cap.levels
        if not usable or level is None or (entry.pgsnp and not self.ecap.sc):
            raise self._refuse(rid, page, FaultReason.SPT_4, fpd=entry.fpd)
        if entry.ss_ptr >> self._haw:
            raise self._refuse(rid, page, FaultReason.SSS_4, fpd=entry.fpd)
        npages = 1 << min(address_bits(level), self.cap.mgaw) - PAGE_SHIFT
        attached = _Attached(entry.did, entry.ss_ptr, level, npages, entry.fpd)
        self._pasid_cache[key] = attached
        return attached

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
        if len(self._faults) >= MAX_FAULT_RECORDS:
            self.faults_lost += 1  # PFO
        else:
            self._faults.append(record.to_bytes())
            self.faults_recorded += 1
            self._on_event()
        return RequestRefused(reason)

    def take_faults(self) -> Iterator[bytes]:
        """Fault records not read yet."""
        while self._faults:
            yield self._faults.popleft()

    def _auto_respond(self, rid: int, prgi: int, code: ResponseCode) -> None:
        endpoint = self._endpoints.get(rid)
        if endpoint is not None:
            endpoint.page_response(prgi, code)


def _beside_interrupts(entry: IotlbEntry, page: IovaPfn) -> IotlbEntry:
    """No answer covers the interrupt range: of a huge leaf over it the page that was asked for is given."""
    inside = page % pages_of_level(entry.level)
    if not msi.touches(Iova((page - inside) << PAGE_SHIFT), size_of_level(entry.level)):
        return entry
    return entry._replace(hpa=Hpa(entry.hpa + (inside << PAGE_SHIFT)), level=LEVEL_4K)
