"""A page fault on the TDP, whoever raised it: slot, host page, retry check, map.

Models kvm_tdp_page_fault and kvm_mmu_fault_exported_tdp [RFC 37/42] as one path: the RFC copied it for faults
without a vCPU, and nothing in it needs one.  The host page is looked up outside any lock, so an
invalidation may take it away before it is mapped: the sequence sampled first and compared last says so (I5).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from kvmd.core.memslot import Memslot
from kvmd.core.mm.page import HostPage
from protocol.pt.geometry import entry_span
from protocol.units import LEVEL_4K, PAGE_SHIFT, Gfn, Level, Pfn, pages_of_level


class Source(Enum):
    """Who faulted: the counters tell them apart, the handling does not."""

    VCPU = "vcpu"
    IO = "io"

    __hash__ = object.__hash__  # members are one of a kind; Enum's own is slow, and every fault is counted


class Result(Enum):
    FIXED = auto()
    SPURIOUS = auto()
    NO_SLOT = auto()  # emulated MMIO for a vCPU, a failure for a device
    READONLY = auto()  # a write to a read-only slot: emulated, or a failure
    NO_PAGE = auto()  # the host has nothing at that hva, or not with that right
    NO_MEMORY = auto()
    UNSTABLE = auto()  # MAX_TRIES invalidations in a row got in the way [RFC defect B-14]

    __hash__ = object.__hash__


RESOLVED = frozenset({Result.FIXED, Result.SPURIOUS})

# With no invalidation in its way a fault takes one try; each further one: a page was taken away meanwhile.
MAX_TRIES = 64


@dataclass(frozen=True, slots=True)
class PageFault:
    gfn: Gfn
    write: bool
    source: Source


def mapping_level(slot: Memslot, gfn: Gfn, page: HostPage, limit: Level) -> Level:
    """The largest level whose entry lies in the slot and in the host page [KVM kvm_mmu_hugepage_adjust]."""
    for level in range(min(page.level, limit), LEVEL_4K, -1):
        pages = pages_of_level(Level(level))
        span = entry_span(gfn, Level(level))
        inside = slot.base_gfn <= span.start and span.end <= slot.span.end
        if inside and (slot.base_gfn ^ (slot.hva >> PAGE_SHIFT)) % pages == 0:
            return Level(level)
    return LEVEL_4K


def first_pfn(slot: Memslot, gfn: Gfn, page: HostPage, level: Level) -> Pfn:
    """The frame that backs the first gfn of the entry of `level` that covers `gfn`."""
    hva = slot.hva_of(entry_span(gfn, level).start) if level > LEVEL_4K else slot.hva_of(gfn)
    return Pfn(page.pfn + ((hva - page.hva) >> PAGE_SHIFT))
