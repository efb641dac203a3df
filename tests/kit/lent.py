"""A VM with RAM in one slot and a vCPU; and one whose table is lent to an importer that acks by hand."""

from __future__ import annotations

from typing import Any

from kvmd.core.capability import KvmCap, enable_cap
from kvmd.core.mm.vma import Prot
from protocol.units import PAGE_SIZE, Gfn, Hva
from tests.kit.kvmd import RW, World, is_sound


class Backed(World):
    """`pages` of 4 KiB from gfn `base` on, in mappings of `level`; `host`: what a `World` takes."""

    def __init__(
        self, base: int, pages: int, *, level: int = 1, slot: int = 0, prot: Prot = RW, **host: Any
    ) -> None:
        super().__init__(**host)
        self.base, self.pages = base, pages
        self.hva = self.map(pages >> 9 * (level - 1), level, prot)
        self.set_slot(slot, base, pages, self.hva)
        self.vcpu = self.create_vcpu()

    def hva_of(self, gfn: int) -> Hva:
        return Hva(self.hva + (gfn - self.base) * PAGE_SIZE)

    def ram(self, offset: int, size: int) -> bytes:
        """As the process sees it."""
        return self.run(self.mm.read(Hva(self.hva + offset), size))

    def sound(self) -> bool:
        return is_sound(self.vm)


class Lent(Backed):
    """`own`: the IOMMU walks a root of its own.  `policy`: its behaviours and its largest leaf."""

    def __init__(
        self,
        base: int,
        pages: int,
        *,
        own: bool = False,
        policy: tuple[int, int] | None = None,
        **backed: Any,
    ) -> None:
        super().__init__(base, pages, **backed)
        if policy is not None:
            enable_cap(self.vm, KvmCap.TDP_FD_ROOT_POLICY, 0, list(policy))
        elif own:
            enable_cap(self.vm, KvmCap.TDP_FD_OWN_ROOT, 0, [0])
        self.exported = self.lend()

    def change_slot(self, slot: int, gfn: int, pages: int, hva: int, flags: int = 0) -> None:
        """Acked at once."""
        self.do(self.vm.slots_change.set_memory_region(self.region(slot, gfn, pages, hva, flags)))

    def entry_of(self, gfn: int) -> int:
        """Of the lent root."""
        met = self.vm.mmu.leaf_at(self.exported.root, Gfn(gfn))
        return 0 if met is None else met.entry
