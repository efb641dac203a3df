"""A vCPU: accesses to guest memory through the TDP, by the CPU's rules, with a TLB that flushes clear.

Models KVM_RUN as far as the table is concerned: the guest's code is a list of accesses; each is
translated by the TLB or by an EPT walk, an EPT violation goes to the fault path, an access without a
slot leaves to user space as KVM_EXIT_MMIO [SDM 29.3], [KVM vmx.c].  A vCPU that waits for a fault is
out of guest mode, so a flush always finds it able to ack at once.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, Protocol

from kvmd.core.host import Host
from kvmd.core.page_fault import RESOLVED, PageFault, Result, Source
from kvmd.core.tdp_mmu import Root
from protocol.errors import ModelBug
from protocol.pt import bits
from protocol.pt.ept_exit import EptAccess, ept_exit
from protocol.pt.geometry import gfn_limit
from protocol.pt.walk import Outcome, walk
from protocol.trace import TRACE, KvmPageFault
from protocol.units import PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE, Gfn, GfnSpan, Gpa

MAX_TLB_ENTRIES = 4096
MMIO_BYTES = 8  # an MMIO exit carries at most this much
# A resolved violation maps the page; an invalidation may take it away again before the retry.
MAX_VIOLATIONS = 64


class Access(NamedTuple):
    """One access of the guest: `data` is what a write stores, None for a read of `size` bytes."""

    gpa: Gpa
    size: int
    data: bytes | None


class ExitReason(IntEnum):
    """kvm_run.exit_reason [KVM kvm.h]; DONE is ours: the accesses given are all executed."""

    DONE = 0
    MMIO = 6


@dataclass(slots=True)
class RunResult:
    """What KVM_RUN gives back: `done` accesses finished, `reads` in their order."""

    exit_reason: ExitReason = ExitReason.DONE
    errno: int = 0
    why: str = ""
    done: int = 0
    reads: list[bytes] = field(default_factory=list)
    mmio_gpa: int = 0
    mmio_bytes: int = 0
    mmio_is_write: bool = False


class Vm(Protocol):
    """What a vCPU needs of its VM."""

    @property
    def host(self) -> Host: ...
    def load_root(self, vcpu: Vcpu) -> Root:
        """The root to run on, which may have changed since the last call."""

    async def handle_fault(self, fault: PageFault, vcpu: Vcpu) -> Result: ...


class _Stop(Exception):
    """The access cannot finish: the result says why."""


class Vcpu:
    def __init__(self, vm: Vm, vcpu_id: int) -> None:
        self.id = vcpu_id
        self.maxphyaddr = 0  # until KVM_SET_CPUID2
        self.root: Root | None = None
        self.ept_violations = 0
        self.tlb_flushes = 0
        self.running = False
        self._vm = vm
        self._tlb: dict[Gfn, tuple[int, int]] = {}  # gfn -> (hpa of its page, rights)

    def flush_tlb(self, span: GfnSpan | None) -> None:
        """INVEPT: forget `span`, or everything."""
        self.tlb_flushes += 1
        if span is None or span.npages > len(self._tlb):
            self._tlb = {} if span is None else {g: t for g, t in self._tlb.items() if g not in span}
        else:
            for gfn in range(span.start, span.end):
                self._tlb.pop(Gfn(gfn), None)

    async def run(self, accesses: Sequence[Access]) -> RunResult:
        """Execute until all are done or one must leave to user space; that one has had no effect beyond pages
        before the one that stopped it."""
        result = RunResult()
        self.running = True
        try:
            for access in accesses:
                parts = []
                at = 0
                while at < access.size:
                    gpa = Gpa(access.gpa + at)
                    count = min(access.size - at, PAGE_SIZE - (gpa & PAGE_OFFSET_MASK))
                    hpa = await self._translate(gpa, count, access.data is not None, result)
                    if access.data is None:
                        parts.append(self._vm.host.read_frame(hpa, count))
                    else:
                        self._vm.host.write_frame(hpa, access.data[at : at + count])
                    at += count
                if access.data is None:
                    result.reads.append(b"".join(parts))
                result.done += 1
        except _Stop:
            pass
        finally:
            self.running = False
        return result

    async def _translate(self, gpa: Gpa, count: int, write: bool, result: RunResult) -> int:
        """Where the bytes at `gpa` (within one page) are now; nothing may await before they are used."""
        gfn = Gfn(gpa >> PAGE_SHIFT)
        need = bits.WRITE if write else bits.READ
        if gfn >= gfn_limit(self._vm.load_root(self).role.level):  # the walk would not see those bits
            self._leave(Result.NO_SLOT, gpa, count, write, result)
        for _ in range(MAX_VIOLATIONS):
            cached = self._tlb.get(gfn)
            if cached is not None and cached[1] & need:
                return cached[0] | (gpa & PAGE_OFFSET_MASK)
            if self._fill(gfn, need):
                continue
            self.ept_violations += 1
            fault = await self._vm.handle_fault(PageFault(gfn, write, Source.VCPU), self)
            if fault not in RESOLVED:
                self._leave(fault, gpa, count, write, result)
        raise ModelBug(
            f"vCPU {self.id}: gpa {gpa:#x} still faults after {MAX_VIOLATIONS} resolved violations"
        )

    def _fill(self, gfn: Gfn, need: int) -> bool:
        """Walk, and cache what the walk allows.  False: EPT violation."""
        root = self._vm.load_root(self)
        host = self._vm.host
        found = walk(host.writer, host.ept_rules, root.hpa, root.role.level, gfn << PAGE_SHIFT)
        if found.outcome is Outcome.RESERVED:
            raise ModelBug(
                f"EPT misconfiguration at gfn {gfn:#x}: entry {found.entry:#018x} level {found.level}"
            )
        if found.outcome is not Outcome.MAPPED or not found.rights & need:
            if TRACE.on and (exited := ept_exit(found, EptAccess(need))):
                TRACE.emit(KvmPageFault(self.id, 0, gfn << PAGE_SHIFT, exited.qualification))
            return False
        if len(self._tlb) >= MAX_TLB_ENTRIES:
            self._tlb.clear()
        self._tlb[gfn] = found.hpa(gfn << PAGE_SHIFT), found.rights
        return True

    def _leave(self, fault: Result, gpa: Gpa, count: int, write: bool, result: RunResult) -> None:
        if fault in (Result.NO_SLOT, Result.READONLY):
            result.exit_reason = ExitReason.MMIO
            result.mmio_gpa, result.mmio_bytes, result.mmio_is_write = gpa, min(count, MMIO_BYTES), write
        elif fault is Result.NO_MEMORY:
            result.errno, result.why = errno.ENOMEM, f"gpa {gpa:#x}: the host has no memory for it"
        else:
            result.errno, result.why = errno.EFAULT, f"gpa {gpa:#x}: {fault.name.lower()}"
        raise _Stop
