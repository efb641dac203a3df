"""A kvmd core in this process: a host on anonymous memory, one process with a VM, flows driven by hand."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from kvmd.core.cpu.vcpu import RunResult, Vcpu
from kvmd.core.export.tdp_fd import CreateTdpFd, ExportedTdp, TdpFaultType
from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.host import CpuFeatures, HostKernel
from kvmd.core.invariants import check_vm
from kvmd.core.mm.check import check_memory
from kvmd.core.mm.frames import Reuse
from kvmd.core.mm.madvise import dontneed
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.reclaim import migrate
from kvmd.core.mm.vma import Prot
from kvmd.core.slots.memslot import MemoryRegion
from kvmd.core.vm import Kvm
from protocol.flow import Wait
from protocol.frame_tags import FrameTags, tags_size
from protocol.hostmem import HIGH_RAM_START, LOW_RAM_START, Window, WindowKind
from protocol.units import GIB, MIB, PAGE_SIZE, Gfn, Gpa, Hva, Level
from tests.kit.by_hand import ByHand
from tests.kit.importer import SlowImporter
from tests.oracle.table import RawTables, flat

T = TypeVar("T")
RW = Prot.READ | Prot.WRITE
BITMAP = Hva(0x3000_0000_0000)  # where tests have their dirty bitmaps
READ = TdpFaultType(read=True, write=False, exec=False)
WRITE = TdpFaultType(read=False, write=True, exec=False)

MM_CHANGES: dict[str, Callable[[Mm, Hva, int], Coroutine[Any, None, object]]] = {
    "munmap": Mm.munmap,
    "madvise_dontneed": dontneed,
    "migrate": migrate,
}


class HandClock:
    """Ticks come at once while the stock lasts, so that nobody polls for ever; then a test gives them."""

    def __init__(self, stock: int = 10_000) -> None:
        self.stock = stock
        self.waiting: list[Wait[None]] = []
        self.now_ns = 1_700_000_000 * 10**9 + 42

    def tick(self) -> Wait[None]:
        wait: Wait[None] = Wait()
        if self.stock:
            self.stock -= 1
            wait.set(None)
        else:
            self.waiting.append(wait)
        return wait

    def wall_ns(self) -> int:
        return self.now_ns


class BareHost:
    """A `Host` and the raw memory it lives in; frames come in whole GiB and cost what is touched."""

    def __init__(
        self,
        features: CpuFeatures | None = None,
        *,
        frames_gib: int = 1,
        tables: int = 2 * MIB,
        reuse: Reuse = Reuse.SOON,
        seq_start: int = 0,
    ) -> None:
        self.tables = bytearray(tables)
        self.frames = mmap.mmap(-1, frames_gib * GIB)
        self.tags = FrameTags(HIGH_RAM_START, memoryview(bytearray(tags_size(frames_gib * GIB))))
        self.clock = HandClock()
        self.host = HostKernel(
            features or CpuFeatures(),
            Window(WindowKind.TABLES, LOW_RAM_START, tables, memoryview(self.tables)),
            Window(WindowKind.FRAMES, HIGH_RAM_START, frames_gib * GIB, memoryview(self.frames)),
            self.tags,
            lambda offset, size: self.frames.madvise(mmap.MADV_REMOVE, offset, size),
            self.clock,
            reuse=reuse,
            seq_start=seq_start,
        )


class World(ByHand):
    """One process with one VM."""

    def __init__(self, features: CpuFeatures | None = None, **host: Any) -> None:
        super().__init__()
        self.bare = BareHost(features, **host)
        self.host = self.bare.host
        self.mm: Mm = self.host.create_mm()
        self.mm.cookie = 77
        self.vm = Kvm(self.host, self.mm)
        self.importer = SlowImporter()  # of `lend`

    def settle(self, wait: Wait[T]) -> T:
        """What it gives when all that `importer` is told of is acked, at once and in order."""
        self.ack_all()
        return wait.result()

    def ack_all(self) -> None:
        while self.importer.pending:
            self.ack(self.importer)

    def do(self, flow: Coroutine[Any, None, T]) -> T:
        """A flow that acks alone may hold up."""
        return self.settle(self.start(flow))

    def ack(self, importer: SlowImporter, index: int = 0) -> None:
        importer.ack(index)
        self.flows.run_ready()

    # -- short names for what tests do all the time ----------------------------------------------------

    def map(self, pages: int = 16, level: int = 1, prot: Prot = RW, hva: int | None = None) -> Hva:
        size = pages * (PAGE_SIZE << 9 * (level - 1))
        return self.run(self.mm.mmap(None if hva is None else Hva(hva), size, prot, Level(level)))

    def region(self, slot: int, gfn: int, pages: int, hva: int, flags: int = 0) -> MemoryRegion:
        return MemoryRegion(slot, flags, Gpa(gfn << 12), pages << 12, Hva(hva))

    def set_slot(self, slot: int, gfn: int, pages: int, hva: int, flags: int = 0) -> None:
        self.run(self.vm.slots_change.set_memory_region(self.region(slot, gfn, pages, hva, flags)))

    def create_vcpu(self, vcpu_id: int = 0, maxphyaddr: int = 46) -> Vcpu:
        vcpu = self.vm.vcpus.create(vcpu_id)
        self.vm.set_maxphyaddr(vcpu, maxphyaddr)
        return vcpu

    def export(self) -> ExportedTdp:
        if not self.vm.vcpus:
            self.create_vcpu()
        return self.run(self.vm.exports.create(CreateTdpFd(0, 0, 0)))

    def lend(self) -> ExportedTdp:
        """Exported, to `importer`."""
        exported = self.export()
        exported.register_importer("unit", self.importer)
        return exported

    def dirty_pages(self, npages: int, slot: int = 0, at: Hva = BITMAP) -> set[int]:
        """KVM_GET_DIRTY_LOG, into a bitmap that is mapped there; its pages."""
        self.do(self.vm.dirty_log.get(slot, at))
        return self.bitmap(npages, at)

    def bitmap(self, count: int, at: Hva = BITMAP) -> set[int]:
        """That are set in the process's bitmap there."""
        data = self.do(self.mm.read(at, (count + 63) // 64 * 8))
        return {bit for bit in range(len(data) * 8) if data[bit // 8] >> bit % 8 & 1}

    def guest_read(self, vcpu: Vcpu, gpa: int, size: int) -> RunResult:
        return self.run(vcpu.run([("r", gpa, size)]))

    def guest_write(self, vcpu: Vcpu, gpa: int, data: bytes) -> RunResult:
        return self.run(vcpu.run([("w", gpa, data)]))

    def device_fault(self, gfn: int) -> Coroutine[Any, None, FaultResult]:
        """A device's store faults: a flow that may have to wait."""
        return self.vm.exports.tdps[0].fault(self.vm.fault_path, 77, Gfn(gfn), WRITE)

    def io_fault(self, exported: ExportedTdp, gfn: int, kind: TdpFaultType = WRITE) -> FaultResult:
        return self.run(exported.fault(self.vm.fault_path, 77, Gfn(gfn), kind))

    def table(self, root: int | None = None, levels: int = 4) -> dict[int, tuple[int, bool]]:
        """The table as the oracle reads it from its raw bytes."""
        at = self.vm.mmu.roots[0].hpa if root is None else root
        return flat(RawTables(LOW_RAM_START, self.bare.tables), at, levels)


def is_sound(vm: Kvm) -> bool:
    """True, or the assertion says which invariant is broken."""
    found = [*check_vm(vm), *check_memory(vm.host.memory, vm.host.processes)]
    assert not found, found
    return True
