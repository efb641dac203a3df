"""A VM: memslots, vCPUs, the TDP, and the order in which they change.

Models struct kvm: the facade the shell talks to.  The three flows of the RFC have a module each: a fault,
from a vCPU or from a device (`fault_path`); an invalidation by the host (`host_changes`); a memslot change
(`slots_change`).  Here is what they share, the vCPUs, and the TDP that is lent out.
"""

from __future__ import annotations

import errno
from enum import IntEnum

from kvmd.core.cpu.vcpu import Vcpu
from kvmd.core.export.pinning import Pinning
from kvmd.core.export.tdp_fd import (
    CREATE_TDP_FD_BYTES,
    CreateTdpFd,
    ExportedTdp,
    Exporter,
    ExportEvent,
    TdpFaultType,
    check_create,
)
from kvmd.core.faults.fault_notes import FaultNotes
from kvmd.core.faults.fault_path import FaultPath
from kvmd.core.faults.leaf_levels import LeafLevels
from kvmd.core.faults.nx_huge import NxHugePages
from kvmd.core.faults.page_fault import (
    FaultResult,
    FaultSource,
    PageFault,
)
from kvmd.core.host import HostKernel
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.uaccess import copy_from_user, copy_to_user
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.guest_frames import GuestFrames
from kvmd.core.slots.host_changes import HostChanges
from kvmd.core.slots.memslot import MemoryRegion, Memslot, Memslots
from kvmd.core.slots.page_track import PageTrack
from kvmd.core.slots.pinned import PinnedGfns
from kvmd.core.slots.private_memory import PrivateMemory
from kvmd.core.slots.slots_change import SlotsChange
from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.flush import Flusher
from kvmd.core.tables.tdp import VmTdp
from kvmd.core.tables.tdp_table import RootEvent, RootState, TdpMmu
from kvmd.core.tables.zap import Zapper
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.pt.geometry import gfn_limit
from protocol.pt.meta import TYPE_EPT, ExportedTdpMeta, promised_masks
from protocol.units import PAGE_SHIFT, PAGE_SIZE, Gfn, GfnSpan, Gpa, gfn_of

MAX_VCPUS = 1024
MAX_VCPU_IDS = 4 * MAX_VCPUS


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
        return Kvm(host, mm, kind=kind)


class Kvm:
    """`seq_start`: see `HostChanges`."""

    def __init__(self, host: HostKernel, mm: Mm, seq_start: int = 0, kind: VmType = VmType.DEFAULT) -> None:
        self.id = host.new_vm_id()
        self.type = kind
        self.host = host
        self.mm = mm
        features = host.features
        self.vcpus: list[Vcpu] = []
        self.exported: dict[int, ExportedTdp] = {}
        self.tdp_fds_made = 0
        self.flusher = Flusher(self.id, host.pool, self._tell_walkers)
        self.mmu = TdpMmu(
            self.id, host.writer, host.pool, host.ept_rules, self.flusher.next_epoch, pml=features.pml
        )
        self.tdp = VmTdp(self.mmu, self.flusher, Zapper(self.mmu, self.flusher, lambda: host.cond_resched()))
        self.page_track = PageTrack()
        self.wall_clock_epoch_ns = host.clock.wall_ns()  # when the guest's clock read zero
        self.fault_notes = FaultNotes()
        self.noncoherent_dma = 0  # how often it is registered
        self._make_memory(seq_start)
        mm.notifiers.append(self.host_changes)

    def _make_memory(self, seq_start: int) -> None:
        """Slots, their logging, private memory: all change under one lock, the slots_lock."""
        features, tdp = self.host.features, self.tdp
        has_private = self.type is VmType.SW_PROTECTED
        address_spaces = 1 if has_private else features.address_spaces  # no SMM with private memory
        self.mmu.keep = pinned = PinnedGfns()
        self.slots = Memslots(Gfn(1 << (features.maxphyaddr - PAGE_SHIFT)), address_spaces)
        self.host_changes = HostChanges(self.slots, tdp, seq_start)
        self.private = PrivateMemory(
            self.id, self.slots, self.mm, self.host_changes, pinned, supported=has_private
        )
        self.frames = frames = GuestFrames(
            self.slots, self.mm, self.host_changes, self.private, self.page_track, pinned
        )
        self.levels = LeafLevels(frames, features.max_page_level)
        self.dirty_log = DirtyLog(self.slots, self.mm, tdp, self.levels.level_now, pml=features.pml)
        self.pinning = Pinning(frames, tdp, self.dirty_log)
        self.mm.claims.replaced.append(self.private.replaces)
        self.slots_change = SlotsChange(frames, tdp, self.dirty_log, self.pinning)
        self.nx_huge = NxHugePages(self.slots, tdp)
        self.fault_path = FaultPath(frames, self.levels, tdp, self.nx_huge, self.dirty_log, self.fault_notes)

    # -- vCPUs -----------------------------------------------------------------------------------------

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """EINVAL: id out of range, or too many; EEXIST: id in use."""
        if not 0 <= vcpu_id < MAX_VCPU_IDS:
            raise UapiError(errno.EINVAL, f"vCPU id {vcpu_id}: 0..{MAX_VCPU_IDS - 1}")
        if len(self.vcpus) >= MAX_VCPUS:
            raise UapiError(errno.EINVAL, f"the VM has {MAX_VCPUS} vCPUs already")
        if any(vcpu.id == vcpu_id for vcpu in self.vcpus):
            raise UapiError(errno.EEXIST, f"vCPU {vcpu_id} exists")
        vcpu = Vcpu(self, vcpu_id)
        self.vcpus.append(vcpu)
        return vcpu

    def remove_vcpu(self, vcpu: Vcpu) -> None:
        """One that never got its fd, and so never ran."""
        self.vcpus.remove(vcpu)
        self.dirty_log.rings.pop(vcpu.id, None)

    def set_maxphyaddr(self, vcpu: Vcpu, maxphyaddr: int) -> None:
        """KVM_SET_CPUID2, as far as the TDP is concerned."""
        if not 32 <= maxphyaddr <= self.host.features.maxphyaddr:
            limit = self.host.features.maxphyaddr
            raise UapiError(errno.EINVAL, f"MAXPHYADDR {maxphyaddr}: the host's CPUs have 32..{limit}")
        if any(vcpu.roots):
            raise UapiError(errno.EINVAL, f"vCPU {vcpu.id} has run: its CPUID is fixed")
        for exported in self.exported.values():
            lent, own = exported.root.role, self.host.features.role_of(maxphyaddr, exported.as_id)
            if (
                lent.level != own.level
            ):  # it would leave the shared table without anybody noticing (defect B-28)
                raise UapiError(
                    errno.EINVAL,
                    f"MAXPHYADDR {maxphyaddr}: takes a {own.level}-level root, the exported has {lent.level}",
                )
        vcpu.maxphyaddr = maxphyaddr

    @property
    def maxphyaddr(self) -> int:
        """Of the VM: the smallest any vCPU was given; 0 while none was [RFC 35/42]."""
        return min((v.maxphyaddr for v in self.vcpus if v.maxphyaddr), default=0)

    @property
    def vcpus_apart(self) -> int:
        """How many vCPUs were given a width, before the export, for which they need another root than the
        exported one.
        """
        return sum(
            self.host.features.role_of(vcpu.maxphyaddr, exported.as_id).level != exported.root.role.level
            for exported in self.exported.values()
            for vcpu in self.vcpus
        )

    # -- write tracking --------------------------------------------------------------------------------

    # awaits: asked: cannot change: tracked in the turn it was asked, and from then on a pin is refused
    async def track_page(self, gpa: Gpa) -> None:
        """Every store to the page of `gpa` is emulated from now on.  EINVAL: no slot; tracked too often."""
        await self.slots.lock.acquire(write=True)
        try:
            gfn = gfn_of(gpa)
            if gfn in self.pinning.pinned:
                raise UapiError(errno.EBUSY, f"gfn {gfn:#x} is pinned: no store of a device faults there")
            self.page_track.add(self._slot_to_track(gfn), gfn)
            if tdp_mmu.write_protect(self.mmu, gfn, as_id=0):
                await self.flusher.flush(GfnSpan.of_pages(gfn, 1))
            await self.flusher.drain()
        finally:
            self.slots.lock.release()

    async def untrack_page(self, gpa: Gpa) -> None:
        """EINVAL: no slot, or not tracked."""
        await self.slots.lock.acquire(write=True)
        try:
            gfn = gfn_of(gpa)
            self.page_track.remove(self._slot_to_track(gfn), gfn)
        finally:
            self.slots.lock.release()

    def _slot_to_track(self, gfn: Gfn) -> Memslot:
        slot = self.slots.find(gfn)
        if slot is None:
            raise UapiError(errno.EINVAL, f"gfn {gfn:#x} is in no memslot: nothing there to track")
        return slot

    def _tell_walkers(self, span: GfnSpan | None, epoch: int) -> list[Wait[None]]:
        """CPUs first, then importers [RFC 42/42]."""
        for vcpu in self.vcpus:
            vcpu.flush_tlb(span)
        return [wait for exported in self.exported.values() for wait in exported.flush_notify(span, epoch)]

    # -- memslots and their logging --------------------------------------------------------------------

    async def set_memory_region(self, region: MemoryRegion) -> None:
        """KVM_SET_USER_MEMORY_REGION and its second form."""
        await self.slots_change.set_memory_region(region)

    # awaits: asked: cannot change: the width of the guest's addresses is the VM's for good
    async def zap_gfn_range(self, gpa: Gpa, size: int) -> None:
        """What changes of MTRRs and of APICv have zapped.  EINVAL: not whole pages, or beyond the guest."""
        if not size or (gpa | size) % PAGE_SIZE or gpa + size > self.slots.gfn_limit << PAGE_SHIFT:
            raise UapiError(errno.EINVAL, f"zap of {gpa:#x}+{size:#x}: not whole pages the guest can have")
        span = GfnSpan.of_pages(gfn_of(gpa), size >> PAGE_SHIFT)
        async with self.host_changes.zapped_gfns([span], told=span):
            pass  # the change itself is the CPU's

    # -- the exported TDP ------------------------------------------------------------------------------

    # awaits: exported: cannot change: nobody else has it before this returns
    async def create_tdp_fd(self, request: CreateTdpFd) -> ExportedTdp:
        """KVM_CREATE_TDP_FD: lend the root of an address space out [RFC 04/42].

        What cannot be told to the caller is taken back before anybody sees it (defect B-06).  The fd gets
        its number where it arrives, so what is written to the struct is what was there.
        """
        struct = (
            b"" if request.argp is None else await copy_from_user(self.mm, request.argp, CREATE_TDP_FD_BYTES)
        )
        exported = self._reserve_export(request)
        try:
            await self._copy_to_user(request, struct)
        except UapiError:
            await self.close_tdp_fd(exported)
            raise
        self.tdp_fds_made += 1
        return exported

    async def _copy_to_user(self, request: CreateTdpFd, struct: bytes) -> None:
        if request.argp is not None:
            await copy_to_user(self.mm, request.argp, struct)

    def _reserve_export(self, request: CreateTdpFd) -> ExportedTdp:
        """Nothing waits between the checks and the reservation (defect B-02)."""
        check = Exporter(len(self.vcpus), self.maxphyaddr, self.noncoherent_dma, self.host.obstacles)
        check_create(request, self.slots.address_spaces, self.exported.__contains__, check)
        if not self.dirty_log.uses_bitmap:
            raise UapiError(errno.EINVAL, "dirty rings without bitmaps cannot log a device's stores")
        root = self.mmu.get_root(
            self.host.features.role_of(self.maxphyaddr, request.as_id, self.mmu.lent_policy)
        )
        root.happens(RootEvent.EXPORT)
        if self.dirty_log.lend(root):
            for vcpu in self.vcpus:
                vcpu.flush_tlb(None)
        meta = ExportedTdpMeta(
            TYPE_EPT,
            root.role.level,
            root.hpa,
            min(root.role.policy.max_huge_page_level, self.host.features.max_page_level),
            promised_masks(self.host.ept_rules),
        )
        exported = ExportedTdp(request.as_id, root, meta)
        self.exported[request.as_id] = exported
        return exported

    def register_noncoherent_dma(self) -> None:
        """A device's DMA does not snoop.  EBUSY while a TDP is exported, whose entries promise write-back
        (defect B-27).
        """
        if self.exported:
            raise UapiError(
                errno.EBUSY,
                f"non-coherent DMA: address space {min(self.exported)} is exported, as write-back memory",
            )
        self.noncoherent_dma += 1

    def unregister_noncoherent_dma(self) -> None:
        if self.noncoherent_dma == 0:
            raise UapiError(errno.EINVAL, "non-coherent DMA is not registered")
        self.noncoherent_dma -= 1

    # awaits: exported, root: cannot change: its last fd is closed, nobody else closes it
    async def close_tdp_fd(self, exported: ExportedTdp) -> None:
        """The last copy of the TDP FD is closed, and nothing walks for an importer any more."""
        exported.happens(ExportEvent.CLOSE)  # nobody registers or faults from now on
        await self.pinning.close_all()
        root = exported.root
        self.release_tdp_fd(exported)
        if not root.role.policy.cpus:
            async with self.slots.lock:
                if root.state is not RootState.DISMANTLED:
                    await self.tdp.zapper.dismantle([root])

    def release_tdp_fd(self, exported: ExportedTdp) -> None:
        """The root stays valid and mapped if vCPUs run on it: no importer is left whose caches could be stale
        (defect B-18 zapped here without a flush)."""
        assert self.exported[exported.as_id] is exported
        del self.exported[exported.as_id]
        exported.happens(ExportEvent.RELEASE)
        exported.root.happens(RootEvent.RELEASE)
        if not exported.root.role.policy.cpus:
            exported.root.happens(RootEvent.INVALIDATE)
        self.mmu.put_root(exported.root)

    async def fault_exported(
        self, exported: ExportedTdp, mm_cookie: int, gfn: Gfn, kind: TdpFaultType
    ) -> FaultResult:
        """The TDP FD's fault op [RFC 07/42].  EINVAL: no right asked, or another process's; EPERM: it exited;
        ENODEV: released.
        """
        exported.check_alive()
        if not (kind.read or kind.write or kind.exec):
            raise UapiError(errno.EINVAL, f"fault at gfn {gfn:#x} asks for no access")
        if mm_cookie != self.mm.cookie:
            raise UapiError(errno.EINVAL, f"fault at gfn {gfn:#x}: the HWPT belongs to another process")
        if not self.mm.alive:
            raise UapiError(errno.EPERM, f"fault at gfn {gfn:#x}: the VM's process has exited")
        if gfn >= gfn_limit(exported.root.role.level):
            return FaultResult.NO_SLOT
        return await self.fault_path.handle_fault(PageFault(gfn, kind.write, FaultSource.IO))

    # -- the end ---------------------------------------------------------------------------------------

    async def destroy(self) -> None:
        """The last fd of the VM is closed: no vCPU runs and nothing is exported any more."""
        assert not self.exported, "an exported TDP keeps its VM"
        assert not any(vcpu.running for vcpu in self.vcpus), "a vCPU that runs keeps its VM"
        self.fault_notes.close()
        self.mm.notifiers.remove(self.host_changes)
        self.mm.claims.replaced.remove(self.private.replaces)
        await self.flusher.drain()
        for root in [root for vcpu in self.vcpus for root in vcpu.roots if root is not None]:
            self.mmu.put_root(root)
        await self.tdp.zapper.dismantle(self.mmu.roots)
        await self.flusher.flush(None)
        self.host.pool.forget(self.id)
