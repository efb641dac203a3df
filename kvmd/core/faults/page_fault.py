"""A page fault on the TDP, whoever raised it: what is asked, and what it may come to.

Models struct kvm_page_fault and the RET_PF codes [KVM mmu_internal.h], for faults of vCPUs and for those that
come through a TDP FD [RFC 37/42].  The way a fault takes is `fault_path`.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from kvmd.core.tables.tdp_table import Root
from protocol.errors import EHWPOISON
from protocol.units import Gfn


class FaultSource(Enum):
    """Who faulted: the counters tell them apart, the handling does not."""

    VCPU = "vcpu"
    IO = "io"

    __hash__ = object.__hash__  # members are one of a kind; Enum's own is slow, and every fault is counted


class FaultResult(Enum):
    FIXED = auto()
    FAST = auto()  # only W was missing, and was put back
    SPURIOUS = auto()
    NO_SLOT = auto()  # emulated MMIO for a vCPU, a failure for a device
    READONLY = auto()  # a write to a read-only slot: emulated, or a failure
    TRACKED = auto()  # a write to a tracked gfn: emulated, or a failure [RFC defect B-24]
    NO_PAGE = auto()  # the host has nothing at that hva, or not with that right
    HWPOISON = auto()  # the page is there, its contents are lost
    NO_MEMORY = auto()
    MEMORY_FAULT = auto()  # private, and its slot has no private page for it: KVM_EXIT_MEMORY_FAULT
    # MAX_TRIES invalidations in a row got in the way [RFC defect B-14]; or its slot goes under a prefetch
    UNSTABLE = auto()

    __hash__ = object.__hash__


RESOLVED = frozenset({FaultResult.FIXED, FaultResult.FAST, FaultResult.SPURIOUS})
# RET_PF_EMULATE, for a vCPU
EMULATED = frozenset({FaultResult.NO_SLOT, FaultResult.READONLY, FaultResult.TRACKED})

# What a device's fault that was not resolved is to the importer: the first two are about this page only.
IO_ERRNO = {
    FaultResult.NO_SLOT: errno.EFAULT,
    FaultResult.READONLY: errno.EFAULT,
    FaultResult.NO_PAGE: errno.EFAULT,
    FaultResult.TRACKED: errno.EINVAL,
    FaultResult.MEMORY_FAULT: errno.EFAULT,
    FaultResult.HWPOISON: EHWPOISON,
    FaultResult.NO_MEMORY: errno.ENOMEM,
    FaultResult.UNSTABLE: errno.EAGAIN,
}
# What the host's answer to a lookup means; anything else: it has no page there.
LOOKUP_RESULT = {errno.ENOMEM: FaultResult.NO_MEMORY, EHWPOISON: FaultResult.HWPOISON}

# With no invalidation in its way a fault takes one try; each further one: a page was taken away meanwhile.
MAX_TRIES = 64


@dataclass(frozen=True, slots=True)
class PageFault:
    gfn: Gfn
    write: bool
    source: FaultSource
    as_id: int = 0
    fetch: bool = False  # of an instruction: a device never does
    prefetch: bool = False  # KVM_PRE_FAULT_MEMORY: mapped, not accessed


class FaultingVcpu(Protocol):
    """What a fault asks of the vCPU that raised it; a device has none."""

    id: int
    mmio_sptes_made: int

    def load_root(self, as_id: int = 0) -> Root:
        """The root it runs on in an address space."""
