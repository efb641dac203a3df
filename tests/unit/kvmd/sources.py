"""A page that a CPU and a device use, everything that can take it away, and what each must do meanwhile."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.host import CpuFeatures
from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.madvise import ADVICE
from kvmd.core.slots.guest_memfd import ATTRIBUTE_PRIVATE, GuestMemfd, MemfdFlag
from kvmd.core.vm import Kvm, VmType
from protocol.flow import Wait
from protocol.hostmem import LOW_RAM_START
from protocol.pt.entry import pfn_of
from protocol.units import MIB, PAGE_SIZE, WHOLE_SIZE, Gfn, Gpa, Hva, Pfn
from tests.kit.importer import SlowImporter
from tests.kit.kvmd import RW, World
from tests.oracle.table import Machine, RawTables, ept_walk

GFN, PAGES = 0x400, 512
PAGE = (GFN << 12, PAGE_SIZE)  # what a flush of the page is told as
SLOT = REGION = (GFN << 12, PAGES * PAGE_SIZE)
WHOLE = (0, WHOLE_SIZE)
MACHINE = Machine(address_width=46, snoop_control=True)

Flow = Coroutine[Any, Any, Any]


@dataclass
class Witness(SlowImporter):
    """Notes, each time it is told, whether the CPU could still use the page."""

    rig: Any = None
    cpu_had_it: list[bool] = field(default_factory=list)

    def invalidate(self, start: int, size: int, epoch: int) -> Wait[None]:
        self.cpu_had_it.append(self.rig.cpu_has_it)
        return super().invalidate(start, size, epoch)


class Used(World):
    """One slot of 512 pages; the CPU wrote to the first and the last, a device faulted on the first.

    `memory`: "small", "file", "huge" (hugetlb) or "thp"; of a protected VM it is private.
    """

    def __init__(
        self,
        memory: str = "small",
        *,
        features: CpuFeatures | None = None,
        flags: int = 0,
        kind: VmType = VmType.DEFAULT,
    ) -> None:
        super().__init__(features, tables=8 * MIB)
        if kind is not VmType.DEFAULT:
            self.mm.notifiers.clear()
            self.vm = Kvm(self.host, self.mm, kind=kind)
        self.file = MemoryFile(self.host.memory, "ram", PAGES * PAGE_SIZE)
        self.hva = self._map(memory)
        self.memfd = GuestMemfd(self.vm.id, self.host.memory, self.mm.id, PAGES * PAGE_SIZE, MemfdFlag(0))
        region = self.region(0, GFN, PAGES, self.hva, flags)
        if kind is not VmType.DEFAULT:
            region = replace(region, flags=4, version=2, guest_memfd=lambda: self.memfd)
        self.run(self.vm.slots_change.set_memory_region(region))
        if kind is not VmType.DEFAULT:
            self.run(self.vm.private.set_attributes(Gpa(GFN << 12), PAGES * PAGE_SIZE, ATTRIBUTE_PRIVATE, 0))
        self.exported = self.export()
        self.cpu = self.vm.vcpus[0]
        self.importer: Witness = Witness(rig=self)
        self.exported.register_importer("unit", self.importer)
        self.raw = RawTables(LOW_RAM_START, self.bare.tables)
        assert self.guest_write(self.cpu, GFN << 12, b"guest").done
        assert self.guest_write(self.cpu, GFN + PAGES - 1 << 12, b"guest").done
        assert self.io_fault(self.exported, GFN) in (FaultResult.SPURIOUS, FaultResult.FIXED)
        self.importer.heard.clear()

    def _map(self, memory: str) -> Hva:
        if memory == "huge":
            return self.map(1, 2)
        if memory == "file":
            flow = self.mm.mmap(None, PAGES * PAGE_SIZE, RW, shared=True, file=self.file)
            return self.run(flow)
        hva = self.map(PAGES, hva=0x2000_0000_0000)
        if memory == "thp":
            self.run(self.mm.write(hva, b"huge"))
            self.run(self.advise("collapse", hva, PAGES * PAGE_SIZE))
        return hva

    def advise(self, advice: str, hva: int | None = None, size: int = PAGE_SIZE) -> Flow:
        return ADVICE[advice](self.mm, Hva(self.hva if hva is None else hva), size)

    # -- what is there now -----------------------------------------------------------------------------

    def entry(self, gfn: int = GFN) -> int:
        """As the oracle's walk of the raw bytes ends."""
        return ept_walk(self.raw, MACHINE, int(self.exported.meta.root_hpa), 4, gfn << 12).entry

    @property
    def cpu_has_it(self) -> bool:
        return Gfn(GFN) in self.cpu._cpus[0].tlb

    @property
    def frame(self) -> Pfn:
        return pfn_of(self.entry())

    def tag(self, pfn: Pfn) -> int:
        return self.bare.tags.read(pfn)


def zapped(before: int, now: int) -> bool:
    return now == 0


def same(before: int, now: int) -> bool:
    return now == before


def small(before: int, now: int) -> bool:
    """What was huge is in small leaves with the same rights."""
    return before & 0x80 != 0 and now == before & ~0x80


def protected(before: int, now: int) -> bool:
    return before & 2 != 0 and now == before & ~2


def small_protected(before: int, now: int) -> bool:
    return now == before & ~0x82


def tracked(before: int, now: int) -> bool:
    """Split down to the page, which loses W and what could give it back."""
    return now == before & ~0x82 & ~(1 << 58)


def unaccessed(before: int, now: int) -> bool:
    return before & 0x100 != 0 and now == before & ~0x100


def absent_but_remembered(before: int, now: int) -> bool:
    return now == before & ~7 | 0b101 << 54


def undirtied(before: int, now: int) -> bool:
    return before & 0x200 != 0 and now == before & ~0x200


def frozen(before: int, now: int) -> bool:
    return now == 0x5A0


def huge(before: int, now: int) -> bool:
    return before & 0x80 == 0 and now & 0x80 != 0


def writable_again(before: int, now: int) -> bool:
    return before & 2 == 0 and now == before | 2
