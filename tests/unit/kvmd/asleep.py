"""A guest whose memory is under a userfaultfd: every first touch of a page sleeps until the test says so."""

from __future__ import annotations

import pytest

from kvmd.core.cpu.exits import Mmio
from kvmd.core.cpu.vcpu import RunResult
from kvmd.core.host import CpuFeatures
from kvmd.core.mm.userfaultfd import Userfaultfd
from protocol.flow import Wait
from protocol.kvm_run import ExitReason
from protocol.units import Gfn, Gpa, Hva
from tests.kit.kvmd import BITMAP, RW, World

PAGE, PAGES, GFN, ELSEWHERE = 4096, 16, 0x100, 0x900
GPA = GFN << 12
HVA = Hva(0x2000_0000_0000)
LOG, READONLY = 1, 2
OURS = b"the VMM's own memory, no guest's"


class Asleep(World):
    """Slot 0 of 16 pages at GFN, an importer that acks late if the TDP is `export`ed."""

    def __init__(self, flags: int = 0, *, features: CpuFeatures | None = None, export: bool = False) -> None:
        super().__init__(features)
        self.uffd = Userfaultfd(self.mm, user_mode_only=False)
        self.map(1, hva=BITMAP)
        self.map_ram()
        self.slot(flags=flags)
        self.vcpu = self.create_vcpu()
        if export:
            self.lend()

    @property
    def gfn(self) -> Gfn:
        """The first one."""
        return Gfn(GFN)

    def map_ram(self) -> None:
        self.map(PAGES, hva=HVA)
        self.run(self.uffd.register(HVA, PAGES * PAGE, missing=True, wp=False))

    def slot(self, gfn: int = GFN, pages: int = PAGES, flags: int = 0, hva: int = HVA) -> None:
        """Set slot 0, whatever has to be acked for it."""
        self.do(self.vm.slots_change.set_memory_region(self.region(0, gfn, pages, hva, flags)))

    def delete(self) -> None:
        self.slot(0, 0, 0, 0)

    def access(self, gpa: int, data: bytes | None, cpl: int) -> Wait[RunResult]:
        """Begin a store of `data`, or a load of 8 bytes; it must sleep."""
        code = ("r", gpa, 8) if data is None else ("w", gpa, data)
        running = self.start(self.vcpu.run([code], cpl))
        assert not running.done, "the page was there"
        return running

    def vmm_maps_its_own(self) -> None:
        """What it had there goes, which wakes who sleeps on it, and memory of its own comes."""
        self.do(self.mm.mmap(HVA, PAGES * PAGE, RW, fixed=True))
        self.run(self.mm.write(HVA, OURS))
        self.flows.run_ready()

    def page_comes(self, gpa: int = GPA) -> None:
        self.run(self.uffd.copy(Hva(HVA + ((gpa & ~(PAGE - 1)) - GPA)), b"uffd" * 1024, wp=False))
        self.flows.run_ready()

    def dirty(self) -> set[int]:
        """KVM_GET_DIRTY_LOG."""
        return self.dirty_pages(64)

    def seen(self, hva: int, size: int) -> bytes:
        return self.run(self.mm.read(Hva(hva), size))


def left_by(ran: RunResult) -> Mmio | None:
    assert ran.done or ran.exit.reason is ExitReason.MMIO, ran
    return ran.exit.mmio


def mmio(gpa: int, data: bytes | None) -> Mmio:
    return Mmio(Gpa(gpa), 8, data is not None, data or b"")


# -- how the slot goes from under GFN ------------------------------------------------------------------------


def delete(guest: Asleep) -> None:
    guest.delete()


def move(guest: Asleep) -> None:
    guest.slot(ELSEWHERE)


def make_anew_elsewhere(guest: Asleep) -> None:
    guest.delete()
    guest.slot(ELSEWHERE)


def cut(guest: Asleep) -> None:
    guest.delete()
    guest.slot(GFN + 1, PAGES - 1, hva=HVA + PAGE)


SLOT_GOES = pytest.mark.parametrize("change", [delete, move, make_anew_elsewhere, cut])
