"""A VM: what it is made of, from its first fd to its last.

Models struct kvm [KVM kvm_host.h]: what is at the bottom is made first, and each part takes the few it
stands on; none takes the VM.  Whatever happens to a VM is the doing of one of its parts: a fault, from a vCPU
or from a device (`faults/fault_path`); an invalidation by the host (`slots/host_changes`); a memslot change
(`slots/slots_change`); a TDP lent out (`export/exports`); a vCPU that runs (`cpu/vcpu`).
"""

from __future__ import annotations

import errno
from enum import IntEnum

from kvmd.core.cpu.vcpu import Vcpu
from kvmd.core.cpu.vcpus import Vcpus
from kvmd.core.export.exports import Exports
from kvmd.core.export.pinning import Pinning
from kvmd.core.faults.fault_notes import FaultNotes
from kvmd.core.faults.fault_path import FaultPath
from kvmd.core.faults.leaf_levels import LeafLevels
from kvmd.core.faults.nx_huge import NxHugePages
from kvmd.core.host import HostKernel
from kvmd.core.mm.mm import Mm
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.guest_frames import GuestFrames
from kvmd.core.slots.host_changes import HostChanges
from kvmd.core.slots.memslot import Memslots
from kvmd.core.slots.page_track import PageTrack
from kvmd.core.slots.pinned import PinnedGfns
from kvmd.core.slots.private_memory import PrivateMemory
from kvmd.core.slots.slots_change import SlotsChange
from kvmd.core.slots.write_track import WriteTrack
from kvmd.core.tables.flush import Flusher
from kvmd.core.tables.tdp import VmTdp
from kvmd.core.tables.tdp_table import TdpMmu
from kvmd.core.tables.zap import Zapper
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.units import PAGE_SHIFT, Gfn, GfnSpan


class VmType(IntEnum):
    """KVM_CREATE_VM's argument; a protected VM has private memory [KVM kvm.h]."""

    DEFAULT = 0
    SW_PROTECTED = 1


# awaits: host, mm: cannot change: the caller's
async def create_vm(host: HostKernel, mm: Mm, kind: VmType) -> Kvm:
    """A VM of `mm`, whose memory is in the middle of no change when the VM begins to be told of changes
    [mm mmu_notifier.c].
    """
    async with mm.mmap_lock:
        return Kvm(host, mm, kind)


class Kvm:
    def __init__(self, host: HostKernel, mm: Mm, kind: VmType = VmType.DEFAULT) -> None:
        self.id = host.new_vm_id()
        self.type = kind
        self.host = host
        self.mm = mm
        self.wall_clock_epoch_ns = host.clock.wall_ns()  # when the guest's clock read zero
        self._make_tables()
        self._make_slots()
        self._make_walkers()
        mm.notifiers.append(self.host_changes)
        mm.claims.replaced.append(self.private.replaces)

    def _make_tables(self) -> None:
        host = self.host
        self.flusher = Flusher(self.id, host.pool, self._tell_walkers)
        self.mmu = TdpMmu(
            self.id, host.writer, host.pool, host.ept_rules, self.flusher.next_epoch, pml=host.features.pml
        )
        self.mmu.compiled = host.compiled
        zapper = Zapper(self.mmu, self.flusher, lambda: host.cond_resched(), host.zap_batch)
        self.tdp = VmTdp(self.mmu, self.flusher, zapper)

    def _make_slots(self) -> None:
        """What is behind the guest's frames: all of it changes under the slots_lock."""
        features, mm, tdp = self.host.features, self.mm, self.tdp
        has_private = self.type is VmType.SW_PROTECTED
        address_spaces = 1 if has_private else features.address_spaces  # no SMM with private memory
        self.mmu.pinned = pinned = PinnedGfns()
        self.page_track = PageTrack()
        self.slots = Memslots(Gfn(1 << (features.maxphyaddr - PAGE_SHIFT)), address_spaces)
        self.host_changes = HostChanges(self.slots, tdp, self.host.seq_start)
        self.private = PrivateMemory(
            self.id, self.slots, mm, self.host_changes, pinned, supported=has_private
        )
        self.frames = GuestFrames(self.slots, mm, self.host_changes, self.private, self.page_track, pinned)
        self.levels = LeafLevels(self.frames, features.max_page_level)
        self.dirty_log = DirtyLog(self.slots, mm, tdp, self.levels.level_now, pml=features.pml)
        self.pinning = Pinning(self.frames, tdp, self.dirty_log)
        self.slots_change = SlotsChange(self.frames, tdp, self.dirty_log, self.pinning)
        self.write_track = WriteTrack(self.frames, tdp)

    def _make_walkers(self) -> None:
        """Faults, and who raises them: vCPUs, and devices behind what is lent out."""
        host, frames, tdp, log = self.host, self.frames, self.tdp, self.dirty_log
        self.nx_huge = NxHugePages(self.slots, tdp)
        self.fault_notes = FaultNotes()
        self.fault_path = FaultPath(frames, self.levels, tdp, self.nx_huge, log, self.fault_notes)
        self.vcpus = Vcpus(host, frames, tdp, log, self.fault_path)
        self.exports = Exports(host, frames, tdp, log, self.pinning, self.vcpus)

    def _tell_walkers(self, span: GfnSpan | None, epoch: int) -> list[Wait[None]]:
        """CPUs first, then importers [RFC 42/42]."""
        self.vcpus.flush_tlb(span)
        return self.exports.flush_notify(span, epoch)

    def set_maxphyaddr(self, vcpu: Vcpu, maxphyaddr: int) -> None:
        """KVM_SET_CPUID2, as far as the TDP is concerned."""
        if not 32 <= maxphyaddr <= self.host.features.maxphyaddr:
            limit = self.host.features.maxphyaddr
            raise UapiError(errno.EINVAL, f"MAXPHYADDR {maxphyaddr}: the host's CPUs have 32..{limit}")
        if any(vcpu.arch.roots):
            raise UapiError(errno.EINVAL, f"vCPU {vcpu.arch.id} has run: its CPUID is fixed")
        self.exports.check_width(maxphyaddr)
        vcpu.arch.maxphyaddr = maxphyaddr

    # awaits: vcpu: cannot change: the last fd is closed, nobody makes one or runs one
    async def destroy(self) -> None:
        """The last fd of the VM is closed: no vCPU runs and nothing is exported any more."""
        assert not self.exports.tdps, "an exported TDP keeps its VM"
        assert not any(vcpu.running for vcpu in self.vcpus), "a vCPU that runs keeps its VM"
        self.fault_notes.close()
        self.mm.notifiers.remove(self.host_changes)
        self.mm.claims.replaced.remove(self.private.replaces)
        await self.flusher.drain()
        for root in [root for vcpu in self.vcpus for root in vcpu.arch.roots if root is not None]:
            self.mmu.put_root(root)
        await self.tdp.zapper.dismantle(self.mmu.roots)
        await self.flusher.flush(None)
        self.host.pool.forget(self.id)
