"""A remapping unit's caches, a function's device TLB, its DMA and its page requests."""

from __future__ import annotations

from typing import Any

from device_sim.core.context_tables import SecondStage
from device_sim.core.devtlb import DevTlb
from device_sim.core.dmar import RemappingUnit
from device_sim.core.function import Function
from device_sim.core.iotlb import Iotlb, IotlbEntry, PscEntry
from device_sim.core.pri import PageRequestInterface
from device_sim.core.prq import PrqWriter
from protocol.hw.prq import PageRequest
from protocol.hw.qi import ResponseCode
from protocol.pt import bits
from protocol.pt.geometry import ENTRY_BYTES, INDEX_BITS, index_of
from protocol.pt.mem import TableReader
from protocol.pt.walk import Walk
from protocol.units import (
    PAGE_OFFSET_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    Gfn,
    Hpa,
    Iova,
    IovaPfn,
    Level,
)
from simulator.ghost.caches import Holder
from simulator.ghost.probes.watch import Seams, Watch, block_of
from simulator.ghost.spans import Translation

seams = Seams()
OVERFLOW = "overflow"


@seams.around(RemappingUnit, "_fill")
def _unit_fill(
    watch: Watch, original: Any, unit: RemappingUnit, rid: int, attached: Any, page: IovaPfn, need: int
) -> IotlbEntry:
    watch.filling[id(unit.iotlb), attached.did] = watch.root(attached.did, attached.root)
    entry: IotlbEntry = original(unit, rid, attached, page, need)
    return entry


@seams.around(RemappingUnit, "_walk")
def _walk(
    watch: Watch,
    original: Any,
    unit: RemappingUnit,
    tables: TableReader,
    attached: SecondStage,
    page: IovaPfn,
    need: int,
) -> Walk:
    """Where it loaded the last entry: the page may have been given up since the pointer to it was loaded."""
    found: Walk = original(unit, tables, attached, page, need)
    watch.ghost.table_read(watch.name(unit.iotlb, "unit"), found.table)
    watch.walked[id(unit)] = found.table + index_of(Gfn(page), found.level) * ENTRY_BYTES, found.entry
    return found


@seams.around(RemappingUnit, "translation_request")
def _translation_request(
    watch: Watch, original: Any, unit: RemappingUnit, rid: int, page: IovaPfn, need: int
) -> IotlbEntry:
    """What was stored and waits in a processor's buffer is not there for a unit yet."""
    ghost = watch.ghost
    before = ghost.heard.changes
    watch.walked.pop(id(unit), None)
    entry: IotlbEntry = original(unit, rid, page, need)
    if not entry.rights & need and ghost.heard.changes == before:
        walked = watch.walked.get(id(unit))
        if walked is not None and (ghost.tables.load(walked[0]) ^ walked[1]) & bits.RWX:
            return entry
        attached = watch.second_stages[id(unit.tables), rid]
        root = watch.root(attached.did, attached.root)
        ghost.faults.is_not_granted(root, page, need, ghost.caches.leads_astray(root, page))
    return entry


@seams.around(Iotlb, "fill")
def _iotlb_fill(
    watch: Watch, original: Any, iotlb: Iotlb, did: int, page: IovaPfn, entry: IotlbEntry
) -> None:
    """One without rights translates nothing: what comes of it the device is told (`_translation_request`)."""
    original(iotlb, did, page, entry)
    root = watch.filling.get((id(iotlb), did))
    if root is not None and entry.rights:
        watch.dids.setdefault(id(iotlb), set()).add(did)
        value = Translation(entry.hpa >> PAGE_SHIFT, entry.rights)
        watch.ghost.cached(_iotlb(watch, iotlb, "iotlb", did), root, *block_of(page, entry.level), value)


@seams.around(Iotlb, "fill_table")
def _iotlb_fill_table(
    watch: Watch, original: Any, iotlb: Iotlb, did: int, page: IovaPfn, entry: PscEntry
) -> None:
    original(iotlb, did, page, entry)
    root = watch.filling.get((id(iotlb), did))
    if root is not None:
        holder = _iotlb(watch, iotlb, "psc", did)
        watch.ghost.pointer_cached(holder, root, *block_of(page, Level(2)), entry.table)


def _iotlb(watch: Watch, iotlb: Iotlb, kind: str, did: int) -> Holder:
    return kind, watch.name(iotlb, "unit"), f"domain {did}"


def _after_invalidation(watch: Watch, original: Any, iotlb: Iotlb, *args: Any, **named: Any) -> None:
    original(iotlb, *args, **named)
    for did in watch.dids.get(id(iotlb), ()):
        kept = [block_of(page, entry.level) for page, entry in iotlb.entries(did)]
        watch.ghost.keeps(_iotlb(watch, iotlb, "iotlb", did), kept)
        domain = iotlb._domains.get(did)
        pointers = (
            [] if domain is None else [(key << INDEX_BITS, (key + 1) << INDEX_BITS) for key in domain.tables]
        )
        watch.ghost.keeps_pointers(_iotlb(watch, iotlb, "psc", did), pointers)


for _name in ("invalidate_all", "invalidate_domain", "invalidate_pages"):
    seams.around(Iotlb, _name)(_after_invalidation)


@seams.around(Function, "__init__")
def _function(watch: Watch, original: Any, function: Function, *args: Any, **named: Any) -> None:
    original(function, *args, **named)
    watch.functions[id(function.devtlb)] = function


def _devtlb(function: Function, write: bool) -> Holder:
    return "devtlb", f"{function.rid:#x}", "w" if write else "r"


@seams.around(DevTlb, "fill")
def _devtlb_fill(
    watch: Watch, original: Any, tlb: DevTlb, page: IovaPfn, hpa: Hpa, level: Level, rights: int, tag: Any
) -> None:
    original(tlb, page, hpa, level, rights, tag)
    function = watch.functions.get(id(tlb))
    if function is None:
        return
    attached = watch.second_stages[id(function._unit.tables), function.rid]
    root = watch.root(attached.did, attached.root)
    for write, right in ((False, bits.READ), (True, bits.WRITE)):
        if rights & right:
            value = Translation(hpa >> PAGE_SHIFT, right)
            watch.ghost.cached(_devtlb(function, write), root, *block_of(page, level), value)


@seams.around(DevTlb, "invalidate")
def _devtlb_invalidate(watch: Watch, original: Any, tlb: DevTlb, start: IovaPfn, npages: int) -> None:
    original(tlb, start, npages)
    function = watch.functions.get(id(tlb))
    if function is not None:
        entries = list(tlb.entries())
        for write in (False, True):
            kept = [block_of(page, level) for page, _, level, which in entries if which is write]
            watch.ghost.keeps(_devtlb(function, write), kept)


def _dma(watch: Watch, function: Function, iova: int, size: int, write: bool) -> None:
    """Each page of an access that the device TLB has all of."""
    at = iova
    for hpa, length in function.devtlb.runs(Iova(iova), size, write)[0]:
        end = at + length
        while at < end:
            watch.ghost.device_used(
                _devtlb(function, write), at >> PAGE_SHIFT, hpa >> PAGE_SHIFT, write=write
            )
            step = min(PAGE_SIZE - (at & PAGE_OFFSET_MASK), end - at)
            at, hpa = at + step, Hpa(hpa + step)


@seams.around(Function, "read")
def _dma_read(watch: Watch, original: Any, function: Function, iova: Iova, size: int) -> bytes | None:
    """Looked at before and after: memory may go from hand to hand in between."""
    if function.devtlb.runs(iova, size, False)[1] < size:
        read: bytes | None = original(function, iova, size)
        return read
    _dma(watch, function, iova, size, False)
    read = original(function, iova, size)
    _dma(watch, function, iova, size, False)
    return read


@seams.around(Function, "write")
def _dma_write(watch: Watch, original: Any, function: Function, iova: Iova, data: bytes) -> bool:
    if function.devtlb.runs(iova, len(data), True)[1] < len(data):
        return bool(original(function, iova, data))
    _dma(watch, function, iova, len(data), True)
    written = bool(original(function, iova, data))
    _dma(watch, function, iova, len(data), True)
    return written


@seams.around(Function, "copy")
def _dma_copy(watch: Watch, original: Any, function: Function, src: Iova, dst: Iova, size: int) -> int:
    readable = function.devtlb.runs(src, size, False)[1]
    count = min(readable, function.devtlb.runs(dst, size, True)[1])
    for _ in range(2):
        _dma(watch, function, src, count, False)
        _dma(watch, function, dst, count, True)
        if not _:
            copied = int(original(function, src, dst, size))
    return copied


@seams.around(PrqWriter, "submit")
def _submit(watch: Watch, original: Any, queue: PrqWriter, request: PageRequest) -> None:
    key = request.rid, request.prgi
    if request.last:
        watch.ghost.groups.sent(*key)
        watch.begins("page request group", key)
    original(queue, request)


@seams.around(PrqWriter, "_answer")
def _answers_itself(
    watch: Watch, original: Any, queue: PrqWriter, request: PageRequest, code: ResponseCode
) -> None:
    """Success: of one that it dropped.  Who is answered asks on, and finds room perhaps."""
    if code is ResponseCode.SUCCESS:
        watch.begins(OVERFLOW, watch.name(queue, "queue "))
        watch.ghost.groups.dropped(request.rid, request.addr >> PAGE_SHIFT)
    original(queue, request, code)


@seams.around(PrqWriter, "_accept")
def _accept(watch: Watch, original: Any, queue: PrqWriter) -> None:
    watch.ends(OVERFLOW, watch.name(queue, "queue "))
    watch.ghost.groups.accepted()
    original(queue)


@seams.around(PageRequestInterface, "respond")
def _respond(watch: Watch, original: Any, pri: PageRequestInterface, index: int, code: Any) -> None:
    watch.ghost.groups.answered(pri._rid, index)
    watch.ends("page request group", (pri._rid, index))
    if code is ResponseCode.FAILURE:
        watch.ghost.functions.failed(pri._rid)
    original(pri, index, code)


@seams.around(PageRequestInterface, "disable")
def _disable(watch: Watch, original: Any, pri: PageRequestInterface) -> None:
    for rid, index in watch.ghost.groups.outstanding:
        if rid == pri._rid:
            watch.ends("page request group", (rid, index))
    watch.ghost.groups.forgotten(pri._rid)
    waiting = [*pri._groups.values(), *pri._waiting]
    original(pri)
    watch.ghost.functions.asks(pri._rid, on=False)
    _tell_unsent(watch, pri)
    untold = sum(not group.answered.done for group in waiting)
    watch.ghost.functions.switched_off(pri._rid, waiting=untold)


@seams.around(PageRequestInterface, "enable")
def _enable(watch: Watch, original: Any, pri: PageRequestInterface, allocation: int) -> None:
    original(pri, allocation)
    watch.ghost.functions.asks(pri._rid, on=True)


@seams.around(PageRequestInterface, "_send_waiting")
def _send_waiting(watch: Watch, original: Any, pri: PageRequestInterface) -> None:
    original(pri)
    _tell_unsent(watch, pri)


def _tell_unsent(watch: Watch, pri: PageRequestInterface) -> None:
    """Groups go out in the order they came: as long as any waits, the function waits for credits."""
    kind = "group without credits"
    if pri._waiting:
        watch.begins(kind, pri._rid)
    else:
        watch.ends(kind, pri._rid)
