"""KVM_PRE_FAULT_MEMORY: map a range before the guest touches it.

Models kvm_vcpu_pre_fault_memory [KVM kvm_main.c]: each page is a read fault of the vCPU that counts as no
access, so A stays clear; what is done is taken off the range that goes back, and an error is told only if
nothing was done.  A slot that is being deleted or moved is not waited for: EAGAIN.
"""

from __future__ import annotations

import errno

from kvmd.core.cpu.vcpu import Vcpu
from kvmd.core.cpu.vcpu_arch import VcpuArch
from kvmd.core.faults.fault_path import FaultPath
from kvmd.core.faults.page_fault import RESOLVED, FaultResult, FaultSource, PageFault
from protocol.errors import UapiError
from protocol.pt.geometry import entry_span, gfn_limit
from protocol.units import LEVEL_4K, PAGE_SHIFT, PAGE_SIZE, Gfn, Gpa

FAULT_BATCH = 64  # faults after which others get a turn
_ERRNO = {
    FaultResult.NO_SLOT: errno.ENOENT,
    FaultResult.NO_MEMORY: errno.ENOMEM,
    FaultResult.UNSTABLE: errno.EAGAIN,
}


async def pre_fault_memory(
    vcpu: Vcpu, fault_path: FaultPath, gpa: Gpa, size: int, flags: int
) -> tuple[Gpa, int]:
    """What is left of the range: its start and size.  EBUSY: the vCPU runs."""
    with vcpu.loaded():
        if flags or gpa % PAGE_SIZE or size % PAGE_SIZE or not size or gpa + size >= 1 << 64:
            raise UapiError(
                errno.EINVAL, f"pre-fault {gpa:#x}+{size:#x} flags {flags:#x}: whole pages, no flags"
            )
        at = await _pre_fault_until(vcpu.arch, fault_path, gpa, Gpa(gpa + size))
    return at, gpa + size - at


# awaits: gpa, vcpu, fault_path: cannot change: how far this request is; a vCPU lives as long as its VM
async def _pre_fault_until(vcpu: VcpuArch, fault_path: FaultPath, start: Gpa, end: Gpa) -> Gpa:
    """How far it came."""
    gpa, faults = start, 0
    while gpa < end and not vcpu.signal_pending:
        try:
            gpa = Gpa(min(end, await _pre_fault(vcpu, fault_path, Gfn(gpa >> PAGE_SHIFT)) << PAGE_SHIFT))
        except UapiError:
            if gpa == start:
                raise
            break
        faults += 1
        if faults % FAULT_BATCH == 0:
            await vcpu.host.cond_resched()
    return gpa


# awaits: vcpu: cannot change: a vCPU lives as long as its VM | asked: cannot change: the levels of a
# vCPU's roots are fixed once it has run
async def _pre_fault(vcpu: VcpuArch, fault_path: FaultPath, gfn: Gfn) -> Gfn:
    """Map the page; the first gfn that is not mapped with it."""
    if vcpu.must_leave:
        raise UapiError(errno.EINTR, f"gfn {gfn:#x}: the dirty ring is full, harvest it first")
    root = vcpu.load_root()
    if gfn >= gfn_limit(root.role.level):
        raise UapiError(errno.ENOENT, f"gfn {gfn:#x} is beyond the vCPU's table")
    result = await fault_path.handle_fault(PageFault(gfn, False, FaultSource.VCPU, prefetch=True), vcpu)
    if result not in RESOLVED:
        raise UapiError(_ERRNO.get(result, errno.EFAULT), f"gfn {gfn:#x}: {result.name.lower()}")
    met = vcpu.tdp.mmu.leaf_at(vcpu.load_root(), gfn)
    return entry_span(gfn, LEVEL_4K if met is None else met.level).end
