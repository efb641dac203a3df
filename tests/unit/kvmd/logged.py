"""A VM with one slot that logs, and short names for what tests of its log do all the time."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from kvmd.core.capability import KvmCap, enable_cap
from kvmd.core.cpu.vcpu import Vcpu
from kvmd.core.export.tdp_fd import ExportedTdp
from kvmd.core.host import CpuFeatures
from kvmd.core.invariants import check_vm
from kvmd.core.slots.dirty_log import ClearDirtyLog
from protocol.pt.cursor import RangeEntry, walk_range
from protocol.units import MIB, Gfn, Hva
from tests.kit.kvmd import BITMAP, World
from tests.kit.refusals import errno_of

GFN, HVA = 0x400, 0x2000_0000_0000
NO_PML = CpuFeatures(pml=False)


class Logged(World):
    """A slot of 128 pages (or 4 of 2 MiB) at GFN, a bitmap's page, one vCPU; an importer that acks late.

    With `ring`, so many bytes of dirty ring for the vCPU, and bitmaps beside it.
    """

    def __init__(
        self,
        features: CpuFeatures = NO_PML,
        *,
        level: int = 1,
        export: bool = False,
        flags: int = 1,
        manual: int = 0,
        pages: int = 0,
        ring: int = 0,
        bitmap: bool = True,
    ) -> None:
        super().__init__(features, tables=8 * MIB)
        if manual:
            enable_cap(self.vm, KvmCap.MANUAL_DIRTY_LOG_PROTECT2, 0, [manual])
        if ring:
            enable_cap(self.vm, KvmCap.DIRTY_LOG_RING, 0, [ring])
            if bitmap:
                enable_cap(self.vm, KvmCap.DIRTY_LOG_RING_WITH_BITMAP, 0, [0])
        self.pages = pages or (128 if level == 1 else 2048)
        self.map(self.pages >> 9 * (level - 1), level, hva=HVA)
        self.map(1, hva=BITMAP)
        self.log(flags)
        self.vcpu: Vcpu = self.create_vcpu()
        self.ring = memoryview(bytearray(ring))
        if ring:
            self.vm.dirty_log.add_ring(self.vcpu.arch.id, self.ring)
        self.exported: ExportedTdp | None = None
        if export:
            self.exported = self.lend()

    def log(self, flags: int) -> None:
        self.set_slot(0, GFN, self.pages, HVA, flags)

    def write(self, *pages: int) -> None:
        for page in pages:
            result = self.guest_write(self.vcpu, GFN + page << 12, b"x")
            assert result.done, result

    def touch(self, page: int) -> None:
        """The process stores to it: no zero page, which nobody could write, is there any more."""
        self.run(self.mm.write(Hva(HVA + (page << 12)), b"host"))

    def read(self, *pages: int) -> None:
        for page in pages:
            self.guest_read(self.vcpu, GFN + page << 12, 1)

    def bits(self) -> set[int]:
        return self.bitmap(self.pages)

    def get(self, where: int = BITMAP, slot: int = 0) -> Coroutine[Any, None, None]:
        return self.vm.dirty_log.get(slot, Hva(where))

    def dirty(self) -> set[int]:
        """GET, with nobody to wait for."""
        self.run(self.get())
        return self.bits()

    def clear(self, first: int, count: int, pages: set[int]) -> Coroutine[Any, None, None]:
        mask = sum(1 << page - first for page in pages).to_bytes((count + 63) // 64 * 8, "little")
        self.run(self.mm.write(BITMAP, mask))
        return self.vm.dirty_log.clear(ClearDirtyLog(0, count, first, BITMAP))

    def entry(self, page: int) -> int:
        met = self.vm.mmu.leaf_at(self.vm.mmu.roots[0], Gfn(GFN + page))
        return 0 if met is None else met.entry

    def level(self, page: int) -> int:
        met = self.vm.mmu.leaf_at(self.vm.mmu.roots[0], Gfn(GFN + page))
        return 0 if met is None else met.level

    def entries(self) -> list[RangeEntry]:
        """All that is in the table and not empty."""
        root = self.vm.mmu.roots[0]
        return list(walk_range(self.vm.mmu.writer, root.format, root.hpa, root.role.level, root.everything))


def refusal_of(flow: Coroutine[Any, None, Any], world: World) -> int:
    """And nothing is broken by it."""
    found = errno_of(lambda: world.run(flow))
    assert check_vm(world.vm) == []
    return found
