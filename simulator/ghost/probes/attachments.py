"""Functions as they come onto HWPTs and go, what leads units to their tables, and what they may ask for."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from device_sim.core.context_tables import ContextTables
from device_sim.core.function import Function
from iommufdd.core.device import DeviceEvent, DeviceState, IommufdDevice
from iommufdd.core.group import IommufdGroup
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.hwpt_kvm import HwptKvm
from iommufdd.core.intel_iommu import IntelIommu
from iommufdd.core.iommufd import IommufdCtx
from iommufdd.core.iopf import Iopf
from iommufdd.core.object import Object, Objects
from iommufdd.core.translation_tables import TranslationTables
from iommufdd.kvm_client import KvmTdp
from protocol.hw.context_entry import WORD_BYTES, ContextEntry
from protocol.hw.fields import FormatError
from protocol.hw.pasid_entry import PASID_ENTRY_SIZE, RID_PASID, PasidEntry
from protocol.hw.prq import PageRequest
from protocol.hw.qi import ResponseCode
from protocol.units import PAGE_SHIFT, Hpa, Pasid
from simulator.ghost import heard
from simulator.ghost.functions import Walked, Walker
from simulator.ghost.probes.watch import Seams, Watch

seams = Seams()
CONTEXT, PASID = "context", "PASID"


@seams.around(Function, "configure")
def _configure(watch: Watch, original: Any, function: Function, **what: Any) -> None:
    original(function, **what)
    watch.ghost.functions.masters(function.rid, on=function.dma_enabled)


@seams.around(IommufdDevice, "happens")
def _happens(watch: Watch, original: Any, device: IommufdDevice, event: DeviceEvent) -> None:
    original(device, event)
    if event is DeviceEvent.ENTER:
        watch.ghost.functions.comes(device.rid)
    elif event is DeviceEvent.DRAIN:
        watch.ghost.functions.drained(device.rid, unread=watch.ghost.groups.unread(device.rid))


@seams.around(IommufdDevice, "enter")
async def _enter(watch: Watch, original: Any, device: IommufdDevice, hwpt: Hwpt, *, pinned: bool) -> None:
    if device.state is DeviceState.UNBOUND:
        watch.ghost.verdicts.say("R10", f"function {device.rid:#x} is attached by an iommufd that it left")
    was_maintained = hwpt.maintained
    await original(device, hwpt, pinned=pinned)
    if not was_maintained:
        watch.ghost.verdicts.say("R28", f"function {device.rid:#x} goes onto a table that nobody maintains")
    watch.ghost.functions.came(device.rid, on_demand=hwpt.needs_iopf and not pinned)


@seams.around(IommufdDevice, "leave")
async def _leave(watch: Watch, original: Any, device: IommufdDevice) -> None:
    hwpt, rid = device.hwpt, device.rid
    await original(device)
    if hwpt is None:
        return
    ghost = watch.ghost
    cached = sum(len(ghost.caches.held(("devtlb", f"{rid:#x}", right))) for right in "rw")
    ghost.functions.left(rid, unanswered=ghost.groups.late(rid), cached=cached)
    for (other, index), group in device._partial._groups.items():
        if other == rid and group.hwpt is hwpt:
            ghost.verdicts.say("I24", f"function {rid:#x} left, and some of its group {index} waits still")


@seams.around(IommufdCtx, "close")
def _close(watch: Watch, original: Any, ctx: IommufdCtx) -> None:
    original(ctx)
    watch.kept.append(ctx)
    watch.gone_objects.add(id(ctx.objects))


@seams.around(Objects, "add")
def _add(watch: Watch, original: Any, objects: Objects, obj: Object) -> int:
    if id(objects) in watch.gone_objects:
        what = f"{type(obj).__name__} becomes an object of an iommufd that was closed"
        watch.ghost.verdicts.say("R13", what)
    if isinstance(obj, Hwpt) and not obj.maintained:
        watch.ghost.verdicts.say("R28", "an HWPT is made whose KVM is gone")
    number: int = original(objects, obj)
    return number


@seams.around(KvmTdp, "release")
def _release(watch: Watch, original: Any, tdp: KvmTdp) -> None:
    if tdp in watch.put:
        watch.ghost.verdicts.say("R13", "a TDP FD is put twice")
    watch.put.append(tdp)
    original(tdp)


@seams.around(Iopf, "_handle")
async def _handle(
    watch: Watch, original: Any, iopf: Iopf, device: IommufdDevice, hwpt: Hwpt, group: list[PageRequest]
) -> None:
    watch.ghost.functions.served(device.rid)
    root = watch.root(hwpt.domain.did, hwpt.domain.root)
    pages = _nowhere(watch, root, [request.addr >> PAGE_SHIFT for request in group])
    watch.looked_for[group[-1].rid, group[-1].prgi] = root, pages
    await original(iopf, device, hwpt, group)


@seams.around(Iopf, "_answer")
def _answer(
    watch: Watch,
    original: Any,
    iopf: Iopf,
    rid: int,
    prgi: int,
    code: ResponseCode,
    pasid: Pasid | None = None,
) -> None:
    root, pages = watch.looked_for.pop((rid, prgi), (0, []))
    watch.ghost.groups.answers(rid, prgi, code, _nowhere(watch, root, pages))
    original(iopf, rid, prgi, code, pasid)


def _nowhere(watch: Watch, root: int, pages: list[int]) -> list[int]:
    """Those that no slot and no area shows."""
    view = watch.ghost.view_of(root)
    if view is None:
        return []
    watch.ghost.heard.look(heard.LOOKS_FOR_PAGES)
    shown = watch.ghost.backing.view(view)
    return [page for page in pages if shown.get(page) is None]


@seams.around(Iopf, "prq_event")
def _prq_event(watch: Watch, original: Any, iopf: Iopf, entries: bytes, *, overflow: bool) -> None:
    original(iopf, entries, overflow=overflow)
    if overflow and iopf.partial.held:
        what = f"{iopf.partial.held} requests of groups whose last may have been dropped are kept"
        watch.ghost.verdicts.say("R9", what)


@seams.around(Iopf, "take")
def _take(watch: Watch, original: Any, iopf: Iopf, raw: bytes) -> None:
    with suppress(FormatError):
        request = PageRequest.from_bytes(raw)
        if request.last:
            watch.ghost.groups.taken(request.rid, request.prgi)
    original(iopf, raw)


@seams.around(IntelIommu, "_take_off")
async def _take_off(watch: Watch, original: Any, unit: IntelIommu, rid: int) -> None:
    await original(unit, rid)
    watch.ghost.functions.taken_off(rid)


@seams.around(IntelIommu, "gone")
def _gone(watch: Watch, original: Any, unit: IntelIommu) -> None:
    """The link broke: what the unit has goes with it, and the driver cannot ask any more."""
    original(unit)
    watch.ghost.functions.unlinked()


@seams.around(IntelIommu, "put_pasid_entry")
def _put_pasid_entry(
    watch: Watch, original: Any, unit: IntelIommu, rid: int, pasid: Pasid, entry: PasidEntry
) -> None:
    cap, ecap = unit.cap, unit.ecap
    can = Walker(cap.levels, cap.mgaw, cap.max_huge_page_level, bool(ecap.smpwc), bool(cap.cm))
    hwpt = watch.hwpts.get(entry.did)
    if hwpt is None or entry.did in watch.ending:
        what = f"function {rid:#x} is given domain {entry.did}, whose HWPT is destroyed"
        watch.ghost.verdicts.say("R10", what)
    if hwpt is not None:
        table = hwpt.domain
        kvms = isinstance(hwpt, HwptKvm)
        watch.ghost.functions.walks(rid, can, Walked(table.level, table.max_huge_page_level, kvms))
    original(unit, rid, pasid, entry)
    watch.leads_to[rid] = entry.did, entry.ss_ptr


@seams.around(IommufdGroup, "attach")
async def _attach(
    watch: Watch, original: Any, group: IommufdGroup, device: IommufdDevice, hwpt: Hwpt, *, pinned: bool
) -> None:
    """Or replace: where it was before it reaches nothing any more."""
    await original(group, device, hwpt, pinned=pinned)
    entry, domain = watch.leads_to.get(device.rid), hwpt.domain
    if entry not in (None, (domain.did, domain.root)):
        what = f"function {device.rid:#x} is attached to domain {domain.did}, its entry is of another"
        watch.ghost.verdicts.say("R10", what)


# -- entries that lead to tables, and what units have of them ----------------------------------------------


def _lies(watch: Watch, at: Hpa, size: int, entry: tuple[str, int]) -> None:
    """Where its words are, whose stores are looked at (tables.py)."""
    for word in range(size // WORD_BYTES):
        watch.leading[at + word * WORD_BYTES] = entry, word


@seams.around(TranslationTables, "_context_of")
def _context_of(watch: Watch, original: Any, tables: TranslationTables, rid: int) -> Hpa:
    at: Hpa = original(tables, rid)
    _lies(watch, at, ContextEntry.SIZE, (CONTEXT, rid))
    return at


@seams.around(TranslationTables, "_pasid_entry_at")
def _pasid_entry_at(watch: Watch, original: Any, tables: TranslationTables, rid: int, pasid: Pasid) -> Hpa:
    at: Hpa = original(tables, rid, pasid)
    if pasid == RID_PASID:  # no other is used
        _lies(watch, at, PASID_ENTRY_SIZE, (PASID, rid))
    return at


def _now_cached(watch: Watch, tables: ContextTables) -> None:
    entries: Iterable[tuple[str, int]] = (
        *((CONTEXT, rid) for rid in tables._contexts),
        *((PASID, rid) for rid, _ in tables._pasids),
    )
    watch.ghost.functions.leading.cached(watch.name(tables, "unit's contexts "), entries)


def _and_caches(watch: Watch, original: Any, tables: ContextTables, *args: Any) -> Any:
    try:
        return original(tables, *args)
    finally:
        _now_cached(watch, tables)


for _name in ("use", "invalidate_contexts", "invalidate_pasids", "check_page_request"):
    seams.around(ContextTables, _name)(_and_caches)


@seams.around(ContextTables, "second_stage")
def _second_stage(watch: Watch, original: Any, tables: ContextTables, rid: int) -> Any:
    """Of most requests nothing new is cached."""
    before = len(tables._contexts), len(tables._pasids)
    try:
        found = watch.second_stages[id(tables), rid] = original(tables, rid)
        return found
    finally:
        if before != (len(tables._contexts), len(tables._pasids)):
            _now_cached(watch, tables)
