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

from kvmd.core.flush import Flusher
from kvmd.core.host import Host
from kvmd.core.host_mm import Mm
from kvmd.core.memslot import ADDRESS_SPACES, Change, Memslot, Memslots, Region
from kvmd.core.page_fault import MAX_TRIES, PageFault, Result, Source, first_pfn, mapping_level
from kvmd.core.tdp_fd import CreateTdpFd, ExportedTdp, FaultType, check_create
from kvmd.core.tdp_mmu import Outcome, Role, Root, TdpMmu
from kvmd.core.vcpu import Vcpu
from protocol.errors import UapiError
from protocol.flow import RwLock, Wait
from protocol.pt.geometry import gfn_limit
from protocol.pt.meta import TYPE_EPT, ExportedTdpMeta, promised_masks
from protocol.trace import TRACE, KvmUnmapHvaRange
from protocol.units import PAGE_SHIFT, Gfn, GfnSpan, Hva

MAX_VCPUS = 1024
SEQ_MASK = (1 << 64) - 1


class Kvm:
    """`seq_start` is where the invalidate sequence begins: tests start it near a wrap (R2)."""

    def __init__(self, host: Host, mm: Mm, seq_start: int = 0) -> None:
        self.id = host.new_vm_id()
        self.host = host
        self.mm = mm
        self.slots = Memslots(Gfn(1 << (host.features.maxphyaddr - PAGE_SHIFT)))
        self.vcpus: list[Vcpu] = []
        self.exported: dict[int, ExportedTdp] = {}
        self.flusher = Flusher(self.id, host.pool, self._tell_walkers)
        self.mmu = TdpMmu(self.id, host.writer, host.pool, host.ept_rules, self.flusher.next_epoch)
        self.faults: Counter[tuple[Source, Result]] = Counter()
        self.retries = 0
        self._invalidate_seq = seq_start & SEQ_MASK
        self._in_progress: list[tuple[Hva, Hva]] = []
        self._invalidations_over: Wait[None] = Wait()
        self._slots_lock = RwLock()
        self._invalid_slot: Memslot | None = None  # being deleted or moved: faults on it wait
        self._slot_settled: Wait[None] = Wait()
        mm.notifiers.append(self)

    # -- vCPUs -----------------------------------------------------------------------------------------

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """EINVAL: id out of range; EEXIST: id in use."""
        if not 0 <= vcpu_id < MAX_VCPUS:
            raise UapiError(errno.EINVAL, f"vCPU id {vcpu_id}: 0..{MAX_VCPUS - 1}")
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
        if vcpu.root is not None:
            raise UapiError(errno.EINVAL, f"vCPU {vcpu.id} has run: its CPUID is fixed")
        vcpu.maxphyaddr = maxphyaddr

    @property
    def maxphyaddr(self) -> int:
        """Of the VM: the smallest any vCPU was given; 0 while none was [RFC 35/42]."""
        return min((v.maxphyaddr for v in self.vcpus if v.maxphyaddr), default=0)

    def load_root(self, vcpu: Vcpu) -> Root:
        """The root a vCPU runs on; a new one after its old became obsolete."""
        if vcpu.root is not None and vcpu.root.invalid:
            self.mmu.put_root(vcpu.root)
            vcpu.root = None
            self.flusher.reclaim()
        if vcpu.root is None:
            vcpu.root = self.mmu.get_root(self._role(vcpu.maxphyaddr, as_id=0))
        return vcpu.root

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
            slot = self.slots.find(fault.gfn)
            if slot is None:
                return Result.NO_SLOT
            if slot is self._invalid_slot:
                self.retries += 1
                await self._slot_settled
                continue
            if fault.write and slot.readonly:
                return Result.READONLY
            hva = slot.hva_of(fault.gfn)
            if self._is_changing(hva):  # no use to look the page up: wait until the host is done
                self.retries += 1
                await self._invalidations_over
                continue
            seq = self._invalidate_seq
            try:
                page = await self.mm.get_user_page(hva, write=fault.write)
            except UapiError as error:
                return Result.NO_MEMORY if error.errno == errno.ENOMEM else Result.NO_PAGE
            stale = seq != self._invalidate_seq or self._is_changing(hva)
            if stale or self.slots.find(fault.gfn) is not slot or slot is self._invalid_slot:
                self.retries += 1
                continue
            level = mapping_level(slot, fault.gfn, page, self.host.features.max_page_level)
            try:
                mapped = self.mmu.map(
                    self._fault_root(vcpu),
                    fault.gfn,
                    first_pfn(slot, fault.gfn, page, level),
                    level,
                    writable=page.writable and not slot.readonly,
                )
            except UapiError:  # no page left for a table
                return Result.NO_MEMORY
            if mapped.flush is not None:
                await self.flusher.flush(mapped.flush)
            if mapped.outcome is not Outcome.RETRY:
                return Result.FIXED if mapped.outcome is Outcome.FIXED else Result.SPURIOUS
            self.retries += 1
        return Result.UNSTABLE

    def _fault_root(self, vcpu: Vcpu | None) -> Root:
        """A vCPU of another width than the exported root's has a root of its own (defect B-28)."""
        return self.exported[0].root if vcpu is None else self.load_root(vcpu)

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

    @property
    def host_is_changing(self) -> bool:
        """An invalidation is in progress: the table is ahead of the host's page map."""
        return bool(self._in_progress)

    def _is_changing(self, hva: Hva) -> bool:
        return bool(self._in_progress) and any(start <= hva < end for start, end in self._in_progress)

    def _tell_walkers(self, span: GfnSpan | None, epoch: int) -> list[Wait[None]]:
        """CPUs first, then importers [RFC 42/42]."""
        for vcpu in self.vcpus:
            vcpu.flush_tlb(span)
        return [wait for exported in self.exported.values() for wait in exported.flush_notify(span, epoch)]

    # -- memslots --------------------------------------------------------------------------------------

    async def set_memory_region(self, region: Region) -> None:
        """KVM_SET_USER_MEMORY_REGION; one change of a VM at a time."""
        await self._slots_lock.acquire(write=True)
        try:
            change, old, new = self.slots.plan(region)
            if change in (Change.DELETE, Change.MOVE):
                self._invalid_slot = old
                await self._zap_all_fast()
            if change is not Change.NONE:
                self.slots.replace(old, new)
        finally:
            self._invalid_slot = None
            settled, self._slot_settled = self._slot_settled, Wait()
            settled.set(None)
            self._slots_lock.release()

    async def _zap_all_fast(self) -> None:
        """A slot goes away: other roots become obsolete, exported ones lose their leaves [RFC 36/42]."""
        flush = self.mmu.invalidate_roots()
        for exported in self.exported.values():
            flush |= self.mmu.zap_leafs(exported.root.everything)
        if flush:
            await self.flusher.flush(None)
        await self.flusher.drain()

    # -- the exported TDP ------------------------------------------------------------------------------

    def create_tdp_fd(self, request: CreateTdpFd) -> ExportedTdp:
        """KVM_CREATE_TDP_FD: lend the root of an address space out [RFC 04/42]."""
        check_create(
            request,
            ADDRESS_SPACES,
            self.exported.__contains__,
            vcpus=len(self.vcpus),
            maxphyaddr=self.maxphyaddr,
        )
        root = self.mmu.get_root(self._role(self.maxphyaddr, request.as_id))
        root.exported = True
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

    def release_tdp_fd(self, exported: ExportedTdp) -> None:
        """The last copy of the TDP FD is closed.  The root stays valid and mapped: vCPUs run on it, and no
        importer is left whose caches could be stale (defect B-18 zapped here without a flush)."""
        assert self.exported[exported.as_id] is exported
        del self.exported[exported.as_id]
        exported.root.exported = False
        self.mmu.put_root(exported.root)

    async def fault_exported(self, exported: ExportedTdp, mm_token: int, gfn: Gfn, kind: FaultType) -> Result:
        """The TDP FD's fault op [RFC 07/42].  EINVAL: no right asked, or another process's; EPERM: it
        exited.
        """
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
