"""A VM whose TDP FD exports a root of the IOMMU's own, an importer that acks by hand, 512 pages of RAM."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from kvmd.core.capability import KvmCap, enable_cap
from kvmd.core.export.tdp_fd import TdpFaultType
from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.stats import vm_stats
from kvmd.core.tables.tdp_table import Root
from protocol.flow import Wait
from protocol.units import MIB, Gfn, GfnSpan, Hva
from tests.kit.importer import SlowImporter
from tests.kit.kvmd import WRITE, World, is_sound
from tests.oracle.table import RawTables, flat

T = TypeVar("T")

PAGE = 4096
BASE, PAGES = 0x400, 512  # slot 0
BITMAP = 0x3000_0000_0000


class Managed:
    """`own`: or the RFC's design, for comparison.  `policy`: another root's behaviours and largest leaf."""

    def __init__(
        self,
        *,
        level: int = 1,
        own: bool = True,
        pages: int = PAGES,
        policy: tuple[int, int] | None = None,
        **host: Any,
    ) -> None:
        self.world = World(**{"tables": 8 * MIB, **host})
        self.vm = self.world.vm
        self.hva = self.world.map(pages >> 9 * (level - 1), level)
        self.world.map(4, hva=BITMAP)
        self.pages = pages
        self.world.set_slot(0, BASE, pages, self.hva)
        self.vcpu = self.world.create_vcpu()
        if policy is not None:
            enable_cap(self.vm, KvmCap.TDP_FD_ROOT_POLICY, 0, list(policy))
        elif own:
            enable_cap(self.vm, KvmCap.TDP_FD_OWN_ROOT, 0, [0])
        self.exported = self.world.export()
        self.importer = SlowImporter()
        self.exported.register_importer("unit", self.importer)

    # -- what is done ----------------------------------------------------------------------------------

    def settle(self, wait: Wait[T]) -> T:
        while self.importer.pending:
            self.world.ack(self.importer)
        return wait.result()

    def do(self, flow: Coroutine[Any, None, T]) -> T:
        return self.settle(self.world.start(flow))

    def write(self, *pages: int) -> None:
        for page in pages:
            assert self.do(self.vcpu.run([("w", BASE + page << 12, b"cpu")])).done

    def read(self, *pages: int) -> None:
        for page in pages:
            assert self.do(self.vcpu.run([("r", BASE + page << 12, 1)])).done

    def fault(self, page: int, kind: TdpFaultType = WRITE) -> FaultResult:
        return self.do(self.exported.fault(self.vm.fault_path, 77, Gfn(BASE + page), kind))

    def touch(self, page: int) -> None:
        """The process stores to it: there is a page of its own, writable."""
        self.do(self.world.mm.write(Hva(self.hva + page * PAGE), b"host"))

    def set_slot(self, slot: int, gfn: int, pages: int, hva: int, flags: int = 0) -> None:
        self.do(self.vm.slots_change.set_memory_region(self.world.region(slot, gfn, pages, hva, flags)))

    def log(self, on: int = 1) -> None:
        self.set_slot(0, BASE, self.pages, self.hva, on)

    def dirty(self) -> set[int]:
        """KVM_GET_DIRTY_LOG."""
        self.do(self.vm.dirty_log.get(0, Hva(BITMAP)))
        data = self.do(self.world.mm.read(Hva(BITMAP), (self.pages + 63) // 64 * 8))
        return {page for page in range(len(data) * 8) if data[page // 8] >> page % 8 & 1}

    # -- what is there ---------------------------------------------------------------------------------

    @property
    def heard(self) -> int:
        """How often the importer was told."""
        return len(self.importer.heard)

    @property
    def cpu_root(self) -> Root:
        (root,) = self.vm.mmu.cpu_roots(0)
        return root

    def seen(self, root: Root) -> dict[int, bool]:
        """Page of the slot -> writable, as the oracle reads it from the table's raw bytes."""
        table = flat(RawTables(0x10_0000, self.world.bare.tables), root.hpa, root.role.level)
        return {gfn - BASE: writable for gfn, (_, writable) in table.items()}

    @property
    def cpu(self) -> dict[int, bool]:
        return self.seen(self.cpu_root)

    @property
    def iommu(self) -> dict[int, bool]:
        return self.seen(self.exported.root)

    def entry(self, page: int) -> int:
        """Of the IOMMU's root."""
        met = self.vm.mmu.leaf_at(self.exported.root, Gfn(BASE + page))
        return 0 if met is None else met.entry

    def span(self, page: int, pages: int = 1) -> GfnSpan:
        return GfnSpan.of_pages(Gfn(BASE + page), pages)

    def stats(self) -> dict[str, int]:
        return vm_stats(self.vm)

    def sound(self) -> bool:
        return is_sound(self.vm)
