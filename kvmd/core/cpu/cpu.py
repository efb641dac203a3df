"""The CPU's own accesses: TLB, EPT walk, violations; what it cannot do goes to the emulator.

Models a vCPU in guest mode [SDM 29.3], [KVM mmu.c], for one address space.  A walk sets A, and for a store D,
in the leaf it uses, by compare and exchange; a store that sets D is logged, as page-modification logging
does.  The TLB grants a store only through an entry whose D is set, so once D is cleared and the TLB
flushed the next store walks again.  (Entries that point to tables are made with A set, and keep it.)

All bytes of an instruction are reached before any is touched; when something had to be waited for, all
are looked up again.  A vCPU that waits is out of guest mode, so a flush always finds it able to ack at once.
"""

from __future__ import annotations

import errno

from kvmd.core.cpu.emulator import Emulator
from kvmd.core.cpu.exits import Exit, MemoryFault
from kvmd.core.cpu.guest_ram import pages_of
from kvmd.core.cpu.program import Modification
from kvmd.core.cpu.vcpu_arch import VcpuArch
from kvmd.core.faults.fault_path import FaultPath
from kvmd.core.faults.page_fault import EMULATED, RESOLVED, FaultResult, FaultSource, PageFault
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.guest_frames import GuestFrames
from kvmd.core.slots.guest_memfd import ATTRIBUTE_PRIVATE
from kvmd.core.tables.spte import mmio_is_fresh
from protocol.errors import ModelBug
from protocol.kvm_run import ExitReason
from protocol.pt import bits
from protocol.pt.ept_exit import EptAccess, ept_exit
from protocol.pt.geometry import ENTRY_BYTES, gfn_limit, index_of
from protocol.pt.walk import Outcome, Walk, walk
from protocol.trace import TRACE, HandleMmioPageFault, KvmPageFault
from protocol.units import PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE, Gfn, GfnSpan, Gpa, Hpa, gfn_of

MAX_TLB_ENTRIES = 4096
MAX_VIOLATIONS = 64  # resolved in a row, with no flush between: what was mapped is not there

Range = tuple[Gpa, int, int]  # gpa, size, the right it takes
Piece = tuple[Gpa, Hpa, int]  # gpa, hpa, size: within one page


class Cpu:
    """Guest memory at privilege 3."""

    def __init__(
        self,
        vcpu: VcpuArch,
        as_id: int,
        frames: GuestFrames,
        dirty_log: DirtyLog,
        fault_path: FaultPath,
        emulator: Emulator,
    ) -> None:
        self.tlb: dict[Gfn, tuple[Hpa, int]] = {}  # gfn -> (hpa of its page, rights)
        self._vcpu = vcpu
        self._as_id = as_id
        self._host = vcpu.host
        self._slots = frames.slots
        self._private = frames.private
        self._dirty_log = dirty_log
        self._fault_path = fault_path
        self._emulator = emulator
        self._missed = bits.EMPTY  # the entry that the last walk in vain ended at

    def flush_tlb(self, span: GfnSpan | None) -> None:
        """INVEPT: forget `span`, or everything."""
        if span is None:
            self.tlb = {}
        elif span.npages > len(self.tlb):
            start, end = span.start, span.end
            self.tlb = {gfn: hit for gfn, hit in self.tlb.items() if not start <= gfn < end}
        else:
            for gfn in range(span.start, span.end):
                self.tlb.pop(Gfn(gfn), None)

    # -- accesses --------------------------------------------------------------------------------------

    # awaits: asked, pieces: cannot change: `_reach` walks anew after each sleep, and the emulator asks for
    # itself
    async def load(self, gpa: Gpa, size: int) -> bytes:
        hpa = self._hit(gpa, size, bits.READ)
        if hpa is not None:
            return self._host.read_frame(hpa, size)
        pieces = await self._reach((gpa, size, bits.READ))
        return await self._emulator.load(gpa, size) if pieces is None else self._read(pieces)

    # awaits: asked: cannot change: a TLB that missed; `_reach` walks anew after each sleep
    async def store(self, gpa: Gpa, data: bytes) -> None:
        hpa = self._hit(gpa, len(data), bits.WRITE)
        if hpa is not None:
            self._host.write_frame(hpa, data)
            self._dirty_log.stores.stored(self._as_id, Gfn(gpa >> PAGE_SHIFT))
            return
        pieces = await self._reach((gpa, len(data), bits.WRITE))
        if pieces is None:
            await self._emulator.store(gpa, data)
        else:
            self._write(pieces, data)

    # awaits: change: cannot change: what the instruction does
    async def modify(self, gpa: Gpa, size: int, change: Modification, *, locked: bool) -> None:
        pieces = await self._reach((gpa, size, bits.WRITE))
        if pieces is None:
            await self._emulator.modify(gpa, size, change, locked=locked)
        else:
            self._write(pieces, change(self._read(pieces)))

    async def fetch(self, gpa: Gpa) -> None:
        if await self._reach((gpa, 1, bits.EXEC)) is None:
            await self._emulator.fetch(gpa)

    def prefetch(self, gpa: Gpa) -> None:
        self._translate(gfn_of(gpa), bits.READ)

    # awaits: count: cannot change: worked out of the operands
    async def copy(self, dst: Gpa, src: Gpa, size: int) -> int:
        """Up to the next page bound of either side; not past where the copy would meet its own result."""
        count = min(size, _to_page_end(src), _to_page_end(dst))
        pieces = await self._reach((src, count, bits.READ), (dst, count, bits.WRITE))
        if pieces is None:
            return await self._emulator.copy(dst, src, size)
        (_, source, _), (_, target, _) = pieces
        if 0 < target - source < count:
            count = target - source
        self._write([(dst, target, count)], self._host.read_frame(source, count))
        return count

    async def fill(self, gpa: Gpa, byte: int, size: int) -> int:
        count = min(size, _to_page_end(gpa))
        pieces = await self._reach((gpa, count, bits.WRITE))
        if pieces is None:
            return await self._emulator.fill(gpa, byte, size)
        self._write(pieces, bytes([byte]) * count)
        return count

    def _read(self, pieces: list[Piece]) -> bytes:
        return b"".join([self._host.read_frame(hpa, count) for _, hpa, count in pieces])

    def _write(self, pieces: list[Piece], data: bytes) -> None:
        at = 0
        for gpa, hpa, count in pieces:
            self._host.write_frame(hpa, data[at : at + count])
            self._dirty_log.stores.stored(self._as_id, gfn_of(gpa))
            at += count

    def _hit(self, gpa: Gpa, size: int, need: int) -> Hpa | None:
        """The short way for what lies in one page that the TLB knows."""
        cached = self.tlb.get(gpa >> PAGE_SHIFT)  # type: ignore[call-overload]
        offset = gpa & PAGE_OFFSET_MASK
        if cached and cached[1] & need and offset + size <= PAGE_SIZE:
            return Hpa(cached[0] | offset)
        return None

    # -- translation -----------------------------------------------------------------------------------

    # awaits: at, tries, wanted: cannot change: operands, and a count | asked, flushes: cannot change:
    # after each sleep all is translated anew, and the count is only compared
    async def _reach(self, *ranges: Range) -> list[Piece] | None:
        """Where all the bytes are now, a piece a page; nothing may await before they are used.  None: the
        emulator has to make this access.
        """
        wanted = [(at, count, need) for gpa, size, need in ranges for at, count in pages_of(gpa, size)]
        tries, flushes = 0, self._vcpu.tlb_flushes
        while tries < MAX_VIOLATIONS:
            pieces = []
            for at, count, need in wanted:
                page = self._translate(gfn_of(at), need)
                if page is None:
                    break
                pieces.append((at, Hpa(page | at & PAGE_OFFSET_MASK), count))
            else:
                if not self._vcpu.must_leave:  # setting D may have filled the dirty ring
                    return pieces
                await self._vcpu.enter()
                continue
            if not await self._violation(gfn_of(at), need):
                return None
            before, flushes = flushes, self._vcpu.tlb_flushes
            tries = tries + 1 if before == flushes else 0  # or it may have been taken away again
        raise ModelBug(
            f"R20: vCPU {self._vcpu.id}: gpa {at:#x} faults after {MAX_VIOLATIONS} resolved violations"
        )

    def _translate(self, gfn: Gfn, need: int) -> Hpa | None:
        """The page of `gfn` by the TLB or a walk.  None: EPT violation."""
        cached = self.tlb.get(gfn)
        if cached is not None and cached[1] & need:
            return cached[0]
        root = self._vcpu.load_root(self._as_id)
        self._missed = bits.EMPTY
        if gfn >= gfn_limit(root.role.level):  # the walk would not see those bits
            return None
        host = self._host
        found = walk(host.writer, host.ept_rules, root.hpa, root.role.level, gfn << PAGE_SHIFT)
        if found.outcome is Outcome.RESERVED:
            raise ModelBug(
                f"EPT misconfiguration at gfn {gfn:#x}: entry {found.entry:#018x} level {found.level}"
            )
        if found.outcome is not Outcome.MAPPED or not found.rights & need:
            self._missed = found.entry
            if TRACE.on and (exited := ept_exit(found, EptAccess(need))):
                TRACE.emit(KvmPageFault(self._vcpu.id, 0, gfn << PAGE_SHIFT, exited.qualification))
            return None
        rights = found.rights
        if root.role.ad_enabled:
            rights = self._set_accessed_dirty(gfn, found, need)
        if len(self.tlb) >= MAX_TLB_ENTRIES:
            self.tlb.clear()
        page = Hpa(found.hpa(gfn << PAGE_SHIFT))
        self.tlb[gfn] = page, rights
        return page

    def _set_accessed_dirty(self, gfn: Gfn, found: Walk, need: int) -> int:
        """A, and D for a store; the rights to cache: no W while D is clear."""
        entry = found.entry | bits.ACCESSED | (bits.DIRTY if need == bits.WRITE else 0)
        if entry != found.entry:
            at = found.table + index_of(gfn, found.level) * ENTRY_BYTES
            stored = self._host.writer.cmpxchg64(at, found.entry, entry)
            assert stored, "nothing ran since the walk"
            if (entry ^ found.entry) & bits.DIRTY:
                self._log(gfn)
        return found.rights if entry & bits.DIRTY else found.rights & ~bits.WRITE

    def _log(self, gfn: Gfn) -> None:
        """Page-modification logging."""
        slot = self._slots.find(gfn, self._as_id)
        if slot is not None:
            self._dirty_log.mark(slot, gfn, self._vcpu.id)

    # awaits: fault: cannot change: frozen | asked: cannot change: the levels of a vCPU's roots are fixed once
    # it has run
    async def _violation(self, gfn: Gfn, need: int) -> bool:
        """Have the page mapped, however often user space has to help.  False: nothing can be mapped."""
        vcpu = self._vcpu
        vcpu.ept_violations += 1
        if gfn >= gfn_limit(vcpu.load_root(self._as_id).role.level):
            return False
        if mmio_is_fresh(self._missed, self._slots.generation):
            if TRACE.on:
                TRACE.emit(HandleMmioPageFault(0, gfn, 0))  # KVM prints no address for a direct MMU
            return False
        fault = PageFault(gfn, need == bits.WRITE, FaultSource.VCPU, self._as_id, fetch=need == bits.EXEC)
        while True:
            result = await self._fault_path.handle_fault(fault, vcpu)
            if result in EMULATED:
                return False
            if result in RESOLVED:
                if vcpu.must_leave:
                    await vcpu.enter()
                return True
            if result is FaultResult.UNSTABLE:
                await vcpu.pause()
            else:
                await self._leave(gfn, result)

    async def _leave(self, gfn: Gfn, result: FaultResult) -> None:
        why = f"gfn {gfn:#x}: {result.name.lower()}"
        if result is FaultResult.HWPOISON:
            slot = self._slots.find(gfn, self._as_id)
            hva = None if slot is None else slot.hva_of(gfn)
            await Exit(ExitReason.INTR, errno.EINTR, why, sigbus=hva)
        elif result is FaultResult.MEMORY_FAULT:
            flags = ATTRIBUTE_PRIVATE if self._private.attributes.is_private(gfn) else 0
            what = MemoryFault(flags, Gpa(gfn << PAGE_SHIFT), PAGE_SIZE)
            await Exit(ExitReason.MEMORY_FAULT, errno.EFAULT, why, memory_fault=what)
        else:
            number = errno.ENOMEM if result is FaultResult.NO_MEMORY else errno.EFAULT
            await Exit(ExitReason.UNKNOWN, number, why)


def _to_page_end(gpa: Gpa) -> int:
    return PAGE_SIZE - (gpa & PAGE_OFFSET_MASK)
