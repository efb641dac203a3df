"""A VM: memslots, vCPUs, the TDP, and the order in which they change.

Models struct kvm: the facade the shell talks to.  Its three flows are those of the RFC: a fault, from a
vCPU or from a device [RFC 37/42]; an invalidation by the host [RFC 41/42]; a memslot change, which keeps an
exported root valid and only clears its leaves [RFC 36/42].

Invariants with their home here: I5 a host page looked up before an invalidation is not mapped after it;
I6/I7 nothing is given up before `Flusher` says so; I11 an entry maps the page the host has there now.
"""

from __future__ import annotations

import errno
from collections import Counter
from enum import IntEnum

from kvmd.core.dirty_log import DirtyLog
from kvmd.core.flush import Flusher
from kvmd.core.host import Host
from kvmd.core.memslot import Change, Memslot, Memslots, Region
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.page import HostPage
from kvmd.core.page_fault import (
    LOOKUP_RESULT,
    MAX_TRIES,
    PageFault,
    Result,
    Source,
    first_pfn,
    mapping_level,
)
from kvmd.core.page_track import PageTrack
from kvmd.core.pinning import Pinning
from kvmd.core.private_memory import PrivateMemory
from kvmd.core.slots_change import SlotsChange
from kvmd.core.spte import MMIO_GENERATION_MASK
from kvmd.core.tdp_fd import CREATE_TDP_FD_BYTES, CreateTdpFd, ExportedTdp, Exporter, FaultType, check_create
from kvmd.core.tdp_mmu import Outcome, Role, Root, TdpMmu
from kvmd.core.uaccess import copy_from_user, copy_to_user
from kvmd.core.vcpu import Vcpu
from protocol.errors import UapiError
from protocol.flow import RwLock, Wait
from protocol.pt.geometry import gfn_limit
from protocol.pt.meta import TYPE_EPT, ExportedTdpMeta, promised_masks
from protocol.trace import TRACE, KvmUnmapHvaRange
from protocol.units import LEVEL_4K, PAGE_SHIFT, Gfn, GfnSpan, Gpa, Hva, Level, gfn_of

MAX_VCPUS = 1024
MAX_VCPU_IDS = 4 * MAX_VCPUS
SEQ_MASK = (1 << 64) - 1


class VmType(IntEnum):
    """KVM_CREATE_VM's argument; a protected VM has private memory [KVM kvm.h]."""

    DEFAULT = 0
    SW_PROTECTED = 1


class Kvm:
    """`seq_start` is where the invalidate sequence begins: tests start it near a wrap (R2)."""

    def __init__(self, host: Host, mm: Mm, seq_start: int = 0, kind: VmType = VmType.DEFAULT) -> None:
        self.id = host.new_vm_id()
        self.type = kind
        self.host = host
        self.mm = mm
        features = host.features
        self.vcpus: list[Vcpu] = []
        self.exported: dict[int, ExportedTdp] = {}
        self.flusher = Flusher(self.id, host.pool, self._tell_walkers)
        self.mmu = TdpMmu(
            self.id, host.writer, host.pool, host.ept_rules, self.flusher.next_epoch, pml=features.pml
        )
        self.pinning = Pinning(self)
        self.page_track = PageTrack()
        self.wall_clock_epoch_ns = host.clock.wall_ns()  # when the guest's clock read zero
        self.faults: Counter[tuple[Source, Result]] = Counter()
        self.retries = 0
        self.noncoherent_dma = 0  # how often it is registered
        self._invalidate_seq = seq_start & SEQ_MASK
        self._in_progress: list[tuple[Hva, Hva]] = []
        self._invalidations_over: Wait[None] = Wait()
        self._make_memory()
        mm.notifiers.append(self)

    def _make_memory(self) -> None:
        """Slots, their logging, private memory: all change under one lock, the slots_lock."""
        host, features = self.host, self.host.features
        self._slots_lock = lock = RwLock()
        self.slots = Memslots(Gfn(1 << (features.maxphyaddr - PAGE_SHIFT)), features.address_spaces)
        self.dirty_log = DirtyLog(
            lock, self.slots, self.mmu, self.flusher, self.mm, self._level_now, pml=features.pml
        )
        self.slots_change = SlotsChange(
            self.id,
            lock,
            self.slots,
            self.mmu,
            self.flusher,
            self.dirty_log,
            self.exported,
            lambda: host.cond_resched(),
            self._slot_replaced,
            self.pinning,
        )
        self.private = PrivateMemory(
            self.id,
            lock,
            host.frames,
            self.mm.id,
            self.mmu,
            self.flusher,
            supported=self.type is VmType.SW_PROTECTED,
        )

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

    def set_maxphyaddr(self, vcpu: Vcpu, maxphyaddr: int) -> None:
        """KVM_SET_CPUID2, as far as the TDP is concerned."""
        if not 32 <= maxphyaddr <= self.host.features.maxphyaddr:
            limit = self.host.features.maxphyaddr
            raise UapiError(errno.EINVAL, f"MAXPHYADDR {maxphyaddr}: the host's CPUs have 32..{limit}")
        if any(vcpu.roots):
            raise UapiError(errno.EINVAL, f"vCPU {vcpu.id} has run: its CPUID is fixed")
        for exported in self.exported.values():
            lent, own = exported.root.role, self._role(maxphyaddr, exported.as_id)
            if lent != own:  # it would leave the shared table without anybody noticing (defect B-28)
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
            self._role(vcpu.maxphyaddr, exported.as_id) != exported.root.role
            for exported in self.exported.values()
            for vcpu in self.vcpus
        )

    def load_root(self, vcpu: Vcpu, as_id: int = 0) -> Root:
        """The root a vCPU runs on in an address space; a new one after its old became obsolete."""
        root = vcpu.roots[as_id]
        if root is not None and root.invalid:
            self.mmu.put_root(root)
            root = None
            self.flusher.reclaim()
        if root is None:
            root = vcpu.roots[as_id] = self.mmu.get_root(self._role(vcpu.maxphyaddr, as_id))
        return root

    def _role(self, maxphyaddr: int, as_id: int) -> Role:
        features = self.host.features
        return Role(features.root_level(maxphyaddr), as_id, features.ept_ad_bits)

    # -- faults ----------------------------------------------------------------------------------------

    async def handle_fault(self, fault: PageFault, vcpu: Vcpu | None = None) -> Result:
        """Populate `fault.gfn` in the root of `vcpu`, or in the exported one when a device asks."""
        result = await self._resolve(fault, vcpu)
        self.faults[fault.source, result] += 1
        return result

    async def _resolve(self, fault: PageFault, vcpu: Vcpu | None) -> Result:
        for _ in range(MAX_TRIES):
            result = await self._try(fault, vcpu)
            if result is not None:
                return result
            self.retries += 1
        return Result.UNSTABLE

    async def _try(self, fault: PageFault, vcpu: Vcpu | None) -> Result | None:
        """None: something was in the way; it may be gone now."""
        gfn = fault.gfn
        slot = self.slots.find(gfn, fault.as_id)
        if slot is None:
            self._remember_mmio(gfn, vcpu, fault.as_id)
            return Result.NO_SLOT
        if slot is self.slots_change.going:
            await self.slots_change.settled
            return None
        if fault.write and slot.readonly:
            return Result.READONLY
        if fault.write and self.page_track.is_tracked(slot, gfn):
            return Result.TRACKED
        if fault.write and self._fast_page_fault(fault, slot, vcpu):
            return Result.FAST
        pinned = self.pinning.page_of(slot, gfn)
        if pinned is not None:
            return await self._map(fault, slot, pinned, vcpu)
        private = self.private.serves(slot, gfn)
        hva = slot.hva_of(gfn)
        if self._is_changing(hva):  # no use to look the page up: wait until the host is done
            await self._invalidations_over
            return None
        seq = self._invalidate_seq
        try:
            if private:
                page = self.private.page(slot, gfn)
            else:
                page = await self.mm.get_user_page(hva, write=fault.write)
        except UapiError as error:
            return LOOKUP_RESULT.get(error.errno, Result.NO_PAGE)
        stale = seq != self._invalidate_seq or self._is_changing(hva)
        stale |= self.private.serves(slot, gfn) != private
        if stale or self.slots.find(gfn, fault.as_id) is not slot or slot is self.slots_change.going:
            return None
        return Result.MEMORY_FAULT if page is None else await self._map(fault, slot, page, vcpu)

    async def _map(self, fault: PageFault, slot: Memslot, page: HostPage, vcpu: Vcpu | None) -> Result | None:
        root = self._fault_root(vcpu, fault.as_id)
        level = self.level_of(slot, fault.gfn, page)
        writable = page.writable and not slot.readonly and not self.page_track.is_tracked(slot, fault.gfn)
        try:
            mapped = self.mmu.map(
                root,
                fault.gfn,
                first_pfn(slot, fault.gfn, page, level),
                level,
                writable=writable,
                accessed=not fault.prefetch,
            )
        except UapiError:  # no page left for a table
            return Result.NO_MEMORY
        if mapped.outcome is Outcome.FIXED and writable:
            self.mark_page_dirty(slot, fault.gfn, vcpu)
        if mapped.flush is not None:
            await self.flusher.flush(mapped.flush)
        if mapped.outcome is Outcome.RETRY:  # who froze the entry waits for a flush
            await self.flusher.drain()
            return None
        return Result.FIXED if mapped.outcome is Outcome.FIXED else Result.SPURIOUS

    def _fault_root(self, vcpu: Vcpu | None, as_id: int) -> Root:
        """A vCPU of another width than the exported root's has a root of its own (defect B-28).  ENODEV: the
        TDP FD was released while a device's fault slept.
        """
        if vcpu is not None:
            return self.load_root(vcpu, as_id)
        if 0 not in self.exported:
            raise UapiError(errno.ENODEV, "the TDP is not exported any more")
        return self.exported[0].root

    def _remember_mmio(self, gfn: Gfn, vcpu: Vcpu | None, as_id: int) -> None:
        """An MMIO entry for a vCPU to find; a device's fault leaves nothing, nor what no entry can say."""
        if vcpu is not None and gfn < 1 << (self.host.features.maxphyaddr - PAGE_SHIFT):
            made = self.mmu.map_mmio(self.load_root(vcpu, as_id), gfn, self.slots.generation)
            vcpu.mmio_sptes_made += made

    async def settled_slot(self, gfn: Gfn, as_id: int) -> Memslot | None:
        """The slot of `gfn`, once it is not being deleted or moved."""
        while (slot := self.slots.find(gfn, as_id)) is not None and slot is self.slots_change.going:
            await self.slots_change.settled
        return slot

    # -- write tracking --------------------------------------------------------------------------------

    async def track_page(self, gpa: Gpa) -> None:
        """Every store to the page of `gpa` is emulated from now on.  EINVAL: no slot; tracked too often."""
        await self._slots_lock.acquire(write=True)
        try:
            gfn = gfn_of(gpa)
            if gfn in self.pinning.pinned:
                raise UapiError(errno.EBUSY, f"gfn {gfn:#x} is pinned: no store of a device faults there")
            self.page_track.add(self._slot_to_track(gfn), gfn)
            if self.mmu.write_protect(gfn, as_id=0):
                await self.flusher.flush(GfnSpan.of_pages(gfn, 1))
            await self.flusher.drain()
        finally:
            self._slots_lock.release()

    async def untrack_page(self, gpa: Gpa) -> None:
        """EINVAL: no slot, or not tracked."""
        await self._slots_lock.acquire(write=True)
        try:
            gfn = gfn_of(gpa)
            self.page_track.remove(self._slot_to_track(gfn), gfn)
        finally:
            self._slots_lock.release()

    def _slot_to_track(self, gfn: Gfn) -> Memslot:
        slot = self.slots.find(gfn)
        if slot is None:
            raise UapiError(errno.EINVAL, f"gfn {gfn:#x} is in no memslot: nothing there to track")
        return slot

    # -- invalidation by the host (MmuNotifier) --------------------------------------------------------

    async def invalidate_range_start(self, start: Hva, end: Hva) -> None:
        """Zap what start..end backs, flush, wait for every ack [RFC 41/42]."""
        self._in_progress.append((start, end))
        if TRACE.on:
            TRACE.emit(KvmUnmapHvaRange(start, end))
        zapped = False
        for slot in self.slots:
            span = slot.gfns_of(start, end)
            if span is not None:
                zapped |= self.mmu.zap_leafs(span)
        if zapped:
            await self.flusher.flush(None)  # KVM flushes everything for a notifier event
        await self.flusher.drain()

    def invalidate_range_end(self, start: Hva, end: Hva) -> None:
        self._invalidate_seq = (self._invalidate_seq + 1) & SEQ_MASK
        self._in_progress.remove((start, end))
        over, self._invalidations_over = self._invalidations_over, Wait()
        over.set(None)

    async def clear_flush_young(self, start: Hva, end: Hva) -> bool:
        """Whether the range was used; it counts as not used now, and copies of it go, importers' too."""
        young = False
        for slot in self.slots:
            span = slot.gfns_of(start, end)
            if span is not None:
                young |= self.mmu.age_leafs(span)
        if young:
            await self.flusher.flush(None)
        return young

    def test_young(self, start: Hva, end: Hva) -> bool:
        spans = (slot.gfns_of(start, end) for slot in self.slots)
        return any(span is not None and self.mmu.has_young(span) for span in spans)

    @property
    def host_is_changing(self) -> bool:
        """An invalidation is in progress: the table is ahead of the host's page map."""
        return bool(self._in_progress)

    def changing(self, hva: Hva) -> Wait[None] | None:
        """What to wait for while the host changes what it has at `hva`."""
        return self._invalidations_over if self._is_changing(hva) else None

    def _is_changing(self, hva: Hva) -> bool:
        return bool(self._in_progress) and any(start <= hva < end for start, end in self._in_progress)

    def _tell_walkers(self, span: GfnSpan | None, epoch: int) -> list[Wait[None]]:
        """CPUs first, then importers [RFC 42/42]."""
        for vcpu in self.vcpus:
            vcpu.flush_tlb(span)
        return [wait for exported in self.exported.values() for wait in exported.flush_notify(span, epoch)]

    # -- memslots and their logging --------------------------------------------------------------------

    async def set_memory_region(self, region: Region) -> None:
        """KVM_SET_USER_MEMORY_REGION and its second form."""
        await self.pinning.follow(region, await self.slots_change.set_memory_region(region))

    def mark_page_dirty(self, slot: Memslot, gfn: Gfn, vcpu: Vcpu | None) -> None:
        """KVM made a page writable, or stored to it, for `vcpu` or for a device."""
        self.dirty_log.mark(slot, gfn, None if vcpu is None else vcpu.id)

    def dirty_ring_full(self, vcpu: Vcpu) -> bool:
        """Whether `vcpu` must not enter the guest before user space has harvested its ring."""
        return self.dirty_log.ring_full(vcpu.id)

    def _fast_page_fault(self, fault: PageFault, slot: Memslot, vcpu: Vcpu | None) -> bool:
        """The page is mapped and only logging took W: no look at the host page is needed [KVM mmu.c]."""
        if not self.mmu.fast_page_fault(self._fault_root(vcpu, fault.as_id), fault.gfn, logs=slot.logs):
            return False
        self.mark_page_dirty(slot, fault.gfn, vcpu)
        return True

    def _slot_replaced(self, change: Change, old: Memslot | None) -> None:
        if change in (Change.DELETE, Change.MOVE) and old is not None:
            self.page_track.forget(old)
        if self.slots.generation & MMIO_GENERATION_MASK == 0:  # entries of the last time round look fresh
            self.mmu.zap_mmio()

    def _level_now(self, slot: Memslot, gfn: Gfn) -> Level:
        """The largest leaf a fault at `gfn` would make now."""
        if self.private.serves(slot, gfn):
            return LEVEL_4K
        page = self.mm.present_page(slot.hva_of(gfn))
        return LEVEL_4K if page is None else self.level_of(slot, gfn, page)

    def level_of(self, slot: Memslot, gfn: Gfn, page: HostPage) -> Level:
        """The size of leaf that a fault at `gfn` gets for `page`."""
        limit = self.private.attributes.max_level(gfn, self.host.features.max_page_level)
        return mapping_level(slot, gfn, page, limit, self._needs_small)

    def _needs_small(self, slot: Memslot, span: GfnSpan) -> bool:
        return self.page_track.any_in(slot, span) or self.pinning.pinned.any_in(slot.as_id, span)

    # -- the exported TDP ------------------------------------------------------------------------------

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
            self.release_tdp_fd(exported)
            raise
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
        root = self.mmu.get_root(self._role(self.maxphyaddr, request.as_id))
        root.exported = True
        if self.dirty_log.lend(root):
            for vcpu in self.vcpus:
                vcpu.flush_tlb(None)
        meta = ExportedTdpMeta(
            TYPE_EPT,
            root.role.level,
            root.hpa,
            self.host.features.max_page_level,
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

    def release_tdp_fd(self, exported: ExportedTdp) -> None:
        """The last copy of the TDP FD is closed.  The root stays valid and mapped: vCPUs run on it, and no
        importer is left whose caches could be stale (defect B-18 zapped here without a flush)."""
        assert self.exported[exported.as_id] is exported
        del self.exported[exported.as_id]
        exported.released = True
        exported.root.exported = False
        self.mmu.put_root(exported.root)

    async def fault_exported(self, exported: ExportedTdp, mm_token: int, gfn: Gfn, kind: FaultType) -> Result:
        """The TDP FD's fault op [RFC 07/42].  EINVAL: no right asked, or another process's; EPERM: it exited;
        ENODEV: released.
        """
        exported.check_alive()
        if not (kind.read or kind.write or kind.exec):
            raise UapiError(errno.EINVAL, f"fault at gfn {gfn:#x} asks for no access")
        if mm_token != self.mm.token:
            raise UapiError(errno.EINVAL, f"fault at gfn {gfn:#x}: the HWPT belongs to another process")
        if not self.mm.alive:
            raise UapiError(errno.EPERM, f"fault at gfn {gfn:#x}: the VM's process has exited")
        if gfn >= gfn_limit(exported.root.role.level):
            return Result.NO_SLOT
        return await self.handle_fault(PageFault(gfn, kind.write, Source.IO))

    # -- the end ---------------------------------------------------------------------------------------

    async def destroy(self) -> None:
        """The last fd of the VM is closed: no vCPU runs and nothing is exported any more."""
        assert not self.exported, "an exported TDP keeps its VM"
        self.mm.notifiers.remove(self)
        await self.flusher.drain()
        self.mmu.drop_all()
        await self.flusher.flush(None)
        self.host.pool.forget(self.id)
