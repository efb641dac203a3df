"""A CPU's translations and accesses, and what dirty logs must tell of its stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvmd.core.cpu.cpu import Cpu
from kvmd.core.cpu.guest_ram import pages_of
from kvmd.core.cpu.vcpu_arch import VcpuArch
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.store_record import REGION_PAGES, StoreRecord, Told
from kvmd.core.tables.tdp_table import Root
from protocol.errors import UapiError
from protocol.pt import bits
from protocol.units import (
    PAGE_SHIFT,
    Gfn,
    GfnSpan,
    Hpa,
)
from simulator.ghost.caches import Holder
from simulator.ghost.probes.watch import Seams, Watch
from simulator.ghost.spans import Translation

seams = Seams()


def _cpu(watch: Watch, cpu: Cpu) -> Holder:
    return "vcpu", f"{watch.vm_of[id(cpu._slots)]}", f"{cpu._vcpu.id}", f"{cpu._as_id}"


@seams.around(Cpu, "_translate")
def _cpu_translate(watch: Watch, original: Any, cpu: Cpu, gfn: Gfn, need: int) -> Hpa | None:
    before = cpu.tlb.get(gfn)
    page: Hpa | None = original(cpu, gfn, need)
    cached = cpu.tlb.get(gfn)
    if cached is not None and cached is not before:
        root = cpu._vcpu.load_root(cpu._as_id)
        hpa, rights = cached
        if rights & bits.WRITE and root.role.ad_enabled:
            rights |= bits.DIRTY
        holder = _cpu(watch, cpu)
        watch.ghost.keeps(holder, [(kept, kept + 1) for kept in cpu.tlb])
        watch.ghost.cached(holder, root.hpa, gfn, gfn + 1, Translation(hpa >> PAGE_SHIFT, rights))
    return page


@seams.around(Cpu, "flush_tlb")
def _flush_tlb(watch: Watch, original: Any, cpu: Cpu, span: GfnSpan | None) -> None:
    original(cpu, span)
    watch.ghost.keeps(_cpu(watch, cpu), [(gfn, gfn + 1) for gfn in cpu.tlb])


@seams.around(VcpuArch, "load_root")
def _load_root(watch: Watch, original: Any, vcpu: VcpuArch, as_id: int = 0) -> Root:
    """One that could not be made."""
    try:
        root: Root = original(vcpu, as_id)
    except UapiError:
        if (kept := vcpu.roots[as_id]) is not None:
            what = f"vCPU {vcpu.id} has no new root, and keeps {kept.hpa:#x}, which it has put"
            watch.ghost.verdicts.say("R3", what)
        raise
    return root


def _cpu_uses(watch: Watch, cpu: Cpu, gpa: int, hpa: int, need: int) -> None:
    view, write = watch.view(cpu._slots, cpu._as_id), need == bits.WRITE
    who = " ".join(_cpu(watch, cpu))
    watch.ghost.accesses.used(who, view, gpa >> PAGE_SHIFT, hpa >> PAGE_SHIFT, write=write)


@seams.around(Cpu, "_hit")
def _cpu_hit(watch: Watch, original: Any, cpu: Cpu, gpa: int, size: int, need: int) -> Hpa | None:
    hpa: Hpa | None = original(cpu, gpa, size, need)
    if hpa is not None:
        _cpu_uses(watch, cpu, gpa, hpa, need)
    return hpa


@seams.around(Cpu, "_reach")
async def _cpu_reach(watch: Watch, original: Any, cpu: Cpu, *ranges: Any) -> Any:
    pieces = await original(cpu, *ranges)
    if pieces is not None:
        needs = [need for gpa, size, need in ranges for _ in pages_of(gpa, size)]
        for (gpa, hpa, _), need in zip(pieces, needs, strict=True):
            _cpu_uses(watch, cpu, gpa, hpa, need)
    return pieces


@seams.around(DirtyLog, "__init__")
def _dirty_log(watch: Watch, original: Any, log: DirtyLog, *args: Any, **named: Any) -> None:
    original(log, *args, **named)
    watch.logs[id(log.stores)] = log


@seams.around(StoreRecord, "stored")
def _stored(watch: Watch, original: Any, record: StoreRecord, as_id: int, gfn: Gfn) -> None:
    original(record, as_id, gfn)
    watch.ghost.stored(watch.view(record._slots, as_id), gfn)


def _tells_of(told: Told, number: int, page: int) -> int:
    return told(number, page // REGION_PAGES) >> page % REGION_PAGES & 1


@seams.around(StoreRecord, "telling")
@contextmanager
def _telling(watch: Watch, original: Any, record: StoreRecord, told: Told) -> Iterator[None]:
    """A report, from when its marks are taken."""
    ghost, log = watch.ghost, watch.logs[id(record)]
    reports, reported = [], watch.reported.setdefault(id(record), [])
    for slot in record._slots:
        if slot.logs:
            pages = [page for page in range(slot.npages) if _tells_of(told, slot.number, page)]
            reported += [(slot.number, page) for page in pages]
            gfns = [slot.base_gfn + page for page in pages]
            reports.append(ghost.report_begins(watch.view(record._slots, slot.as_id), gfns))
    with original(record, told):
        yield
    watch.mark_told(log)
    for report in reports:
        ghost.stores.end(report)
