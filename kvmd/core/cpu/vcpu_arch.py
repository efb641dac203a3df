"""The state of one vCPU, and what stands between it and the guest.

Models struct kvm_vcpu and its kvm_vcpu_arch [KVM kvm_host.h]: all that the CPU, the emulator, the guest's
code and the faults it raises ask of the vCPU they run on.  It runs nothing itself: that is `vcpu`, above them
all.
"""

from __future__ import annotations

import errno

from kvmd.core.cpu.exits import Exit
from kvmd.core.host import HostKernel
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.memslot import MAX_ADDRESS_SPACES
from kvmd.core.tables.tdp import VmTdp
from kvmd.core.tables.tdp_table import Root
from protocol.kvm_run import ExitReason
from protocol.trace import TRACE, KvmDirtyRingExit


class VcpuArch:
    """On `host`, whose paging it has; in `tdp` are its roots, one for each address space it was in."""

    def __init__(self, vcpu_id: int, host: HostKernel, tdp: VmTdp, dirty_log: DirtyLog) -> None:
        self.id = vcpu_id
        self.host = host
        self.tdp = tdp
        self.maxphyaddr = 0  # until KVM_SET_CPUID2
        self.roots: list[Root | None] = [None] * MAX_ADDRESS_SPACES
        self.ept_violations = 0
        self.mmio_sptes_made = 0
        self.tlb_flushes = 0
        self.immediate_exit = False  # of the KVM_RUN under way
        self.exit_reason = ExitReason.UNKNOWN  # kvm_run's, which not every KVM_RUN writes
        self._dirty_log = dirty_log
        self._kicked = False

    def load_root(self, as_id: int = 0) -> Root:
        """The root it runs on in an address space; a new one after its old became obsolete."""
        mmu, root = self.tdp.mmu, self.roots[as_id]
        if root is not None and root.invalid:
            self.roots[as_id] = None  # there may be no page for another
            mmu.put_root(root)
            root = None
            self.tdp.flusher.reclaim()
        if root is None:
            role = self.host.features.role_of(self.maxphyaddr, as_id)
            root = self.roots[as_id] = mmu.get_root(role)
        return root

    @property
    def must_leave(self) -> bool:
        """No entering the guest with a dirty ring that is full."""
        return self._dirty_log.ring_full(self.id)

    async def enter(self) -> None:
        """Leave for as long as we must, then enter."""
        while self.immediate_exit:
            await self.interrupted()
        while self.must_leave:
            if TRACE.on:
                TRACE.emit(KvmDirtyRingExit(self.id))
            await Exit(ExitReason.DIRTY_RING_FULL)

    def interrupted(self) -> Exit:
        """The signal that immediate_exit stands for; why the guest left last stays where it is."""
        return Exit(self.exit_reason, errno.EINTR, f"vCPU {self.id}: immediate_exit")

    async def pause(self) -> None:
        """Let others run; a signal that came meanwhile is seen here."""
        await self.host.clock.tick()
        if self._kicked:
            self._kicked = False
            await Exit(ExitReason.INTR, errno.EINTR, f"vCPU {self.id}: interrupted")

    @property
    def signal_pending(self) -> bool:
        return self._kicked

    def kick(self) -> None:
        """A signal for the thread that runs this vCPU."""
        self._kicked = True
