"""A VM with one slot that logs, and short names for what tests of its log do all the time."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import pytest

from kvmd.core.capability import KvmCap, enable_cap
from kvmd.core.cpu.vcpu import Vcpu
from kvmd.core.export.tdp_fd import ExportedTdp
from kvmd.core.host import CpuFeatures
from kvmd.core.invariants import check_vm
from kvmd.core.slots.dirty_log import ClearDirtyLog
from protocol.errors import UapiError
from protocol.pt.cursor import RangeEntry, walk_range
from protocol.units import MIB, Gfn, Hva
from tests.kit.importer import SlowImporter
from tests.kit.kvmd import World

GFN, HVA, BITMAP = 0x400, 0x2000_0000_0000, 0x3000_0000_0000
NO_PML = CpuFeatures(pml=False)


class Logged:
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
        self.world = world = World(features, tables=8 * MIB)
        self.vm = world.vm
        if manual:
            enable_cap(self.vm, KvmCap.MANUAL_DIRTY_LOG_PROTECT2, 0, [manual])
        if ring:
            enable_cap(self.vm, KvmCap.DIRTY_LOG_RING, 0, [ring])
            if bitmap:
                enable_cap(self.vm, KvmCap.DIRTY_LOG_RING_WITH_BITMAP, 0, [0])
        self.pages = pages or (128 if level == 1 else 2048)
        world.map(self.pages >> 9 * (level - 1), level, hva=HVA)
        world.map(1, hva=BITMAP)
        self.log(flags)
        self.vcpu: Vcpu = world.create_vcpu()
        self.ring = memoryview(bytearray(ring))
        if ring:
            self.vm.dirty_log.add_ring(self.vcpu.arch.id, self.ring)
        self.importer = SlowImporter()
        self.exported: ExportedTdp | None = None
        if export:
            self.exported = world.export()
            self.exported.register_importer("unit", self.importer)

    def log(self, flags: int) -> None:
        self.world.set_slot(0, GFN, self.pages, HVA, flags)

    def write(self, *pages: int) -> None:
        for page in pages:
            result = self.world.guest_write(self.vcpu, GFN + page << 12, b"x")
            assert result.done, result

    def touch(self, page: int) -> None:
        """The process stores to it: no zero page, which nobody could write, is there any more."""
        self.world.run(self.world.mm.write(Hva(HVA + (page << 12)), b"host"))

    def read(self, *pages: int) -> None:
        for page in pages:
            self.world.guest_read(self.vcpu, GFN + page << 12, 1)

    def bits(self) -> set[int]:
        data = self.world.run(self.world.mm.read(Hva(BITMAP), (self.pages + 63) // 64 * 8))
        return {page for page in range(len(data) * 8) if data[page // 8] >> page % 8 & 1}

    def get(self, where: int = BITMAP, slot: int = 0) -> Coroutine[Any, None, None]:
        return self.vm.dirty_log.get(slot, Hva(where))

    def dirty(self) -> set[int]:
        """GET, with nobody to wait for."""
        self.world.run(self.get())
        return self.bits()

    def clear(self, first: int, count: int, pages: set[int]) -> Coroutine[Any, None, None]:
        mask = sum(1 << page - first for page in pages).to_bytes((count + 63) // 64 * 8, "little")
        self.world.run(self.world.mm.write(Hva(BITMAP), mask))
        return self.vm.dirty_log.clear(ClearDirtyLog(0, count, first, Hva(BITMAP)))

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


def errno_of(flow: Coroutine[Any, None, Any], world: World) -> int:
    with pytest.raises(UapiError) as caught:
        world.run(flow)
    assert check_vm(world.vm) == []
    return caught.value.errno
