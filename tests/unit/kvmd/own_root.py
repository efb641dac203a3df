"""A VM whose TDP FD exports a root of the IOMMU's own, an importer that acks by hand, 512 pages of RAM."""

from __future__ import annotations

from typing import Any, TypeVar

from kvmd.core.export.tdp_fd import TdpFaultType
from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.stats import vm_stats
from kvmd.core.tables.tdp_table import Root
from protocol.units import MIB, Gfn, GfnSpan, Hva
from tests.kit.kvmd import BITMAP, WRITE
from tests.kit.lent import Lent
from tests.oracle.table import RawTables, flat

T = TypeVar("T")

PAGE = 4096
BASE, PAGES = 0x400, 512  # slot 0


class Managed(Lent):
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
        super().__init__(BASE, pages, level=level, own=own, policy=policy, **{"tables": 8 * MIB, **host})
        self.map(4, hva=BITMAP)

    # -- what is done ----------------------------------------------------------------------------------

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
        self.do(self.mm.write(Hva(self.hva + page * PAGE), b"host"))

    def log(self, on: int = 1) -> None:
        self.change_slot(0, BASE, self.pages, self.hva, on)

    def dirty(self) -> set[int]:
        """KVM_GET_DIRTY_LOG."""
        return self.dirty_pages(self.pages)

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
        table = flat(RawTables(0x10_0000, self.bare.tables), root.hpa, root.role.level)
        return {gfn - BASE: writable for gfn, (_, writable) in table.items()}

    @property
    def cpu(self) -> dict[int, bool]:
        return self.seen(self.cpu_root)

    @property
    def iommu(self) -> dict[int, bool]:
        return self.seen(self.exported.root)

    def entry(self, page: int) -> int:
        """Of the IOMMU's root."""
        return self.entry_of(BASE + page)

    def span(self, page: int, pages: int = 1) -> GfnSpan:
        return GfnSpan.of_pages(Gfn(BASE + page), pages)

    def stats(self) -> dict[str, int]:
        return vm_stats(self.vm)
