"""A lent-out table, an importer that pins and acks by hand, and 512 pages to pin."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from kvmd.core.capability import KvmCap, enable_cap
from kvmd.core.export.pinning import Account
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.units import Gfn, GfnSpan, Hva
from tests.kit.importer import SlowImporter
from tests.kit.kvmd import World, is_sound

T = TypeVar("T")

PAGE = 4096
BASE, PAGES = 0x200, 512
WORD = BASE + 5


class Guest:
    """Gfns 0x200..0x3ff, lent out, an importer that acks by hand and pins.  `own`: in the IOMMU's root."""

    def __init__(self, *, level: int = 1, own: bool = False, **host: Any) -> None:
        self.world = World(**host)
        self.vm = self.world.vm
        self.hva = self.world.map(PAGES >> 9 * (level - 1), level)
        self.world.set_slot(0, BASE, PAGES, self.hva)
        self.vcpu = self.world.create_vcpu()
        if own:
            enable_cap(self.vm, KvmCap.TDP_FD_OWN_ROOT, 0, [0])
        self.exported = self.world.export()
        self.importer = SlowImporter()
        self.exported.register_importer("unit", self.importer)
        self.account = self.vm.pinning.open()
        self.asked: list[tuple[Account, GfnSpan, int]] = []  # pins so far: whose, of what, and their names

    def settle(self, wait: Wait[T]) -> T:
        while self.importer.pending:
            self.world.ack(self.importer)
        return wait.result()

    def do(self, flow: Coroutine[Any, None, T]) -> T:
        return self.settle(self.world.start(flow))

    def pin(self, gfn: int, pages: int = 1, account: Account | None = None) -> None:
        span, account = GfnSpan.of_pages(Gfn(gfn), pages), account or self.account
        self.asked.append((account, span, self.do(self.vm.pinning.pin(account, span))))

    def unpin(self, gfn: int, pages: int = 1, account: Account | None = None) -> int:
        """The first request of that account for that span."""
        wanted = account or self.account, GfnSpan.of_pages(Gfn(gfn), pages)
        found = next(asked for asked in self.asked if asked[:2] == wanted)
        self.asked.remove(found)
        return self.do(self.vm.pinning.unpin(found[0], found[2]))

    def refused(self, gfn: int, pages: int = 1) -> int:
        with pytest.raises(UapiError) as caught:
            self.pin(gfn, pages)
        return caught.value.errno

    def hva_of(self, gfn: int) -> Hva:
        return Hva(self.hva + (gfn - BASE) * PAGE)

    def entry(self, gfn: int) -> int:
        met = self.vm.mmu.leaf_at(self.exported.root, Gfn(gfn))
        return 0 if met is None else met.entry

    def set_slot(self, gfn: int, pages: int, hva: int, flags: int = 0, slot: int = 0) -> None:
        self.do(self.vm.slots_change.set_memory_region(self.world.region(slot, gfn, pages, hva, flags)))

    def sound(self) -> bool:
        return is_sound(self.vm)
