"""A and D: the CPU's walk sets them, its TLB respects them, and a store that sets D is logged."""

from __future__ import annotations

import pytest

from kvmd.core.cpu.cpu import Cpu
from kvmd.core.host import CpuFeatures
from kvmd.core.invariants import check_vm
from protocol.kvm_run import ExitReason
from protocol.pt import bits
from protocol.pt.walk import Walk
from protocol.units import Gfn, Level
from tests.kit.kvmd import World
from tests.kit.lent import Backed

RAM, PAGE = 0x10_0000, 4096


class OneLeaf(Backed):
    """One page at gfn 0x100, mapped; D and A are the test's to clear."""

    def __init__(self, *, level: int = 1, ad_bits: bool = True) -> None:
        base = 0x200 if level == 2 else RAM >> 12
        super().__init__(base, 512, level=level, features=CpuFeatures(ept_ad_bits=ad_bits))
        self.gpa = self.base << 12
        self.logged: list[int] = []
        self.vm.dirty_log.mark = (  # type: ignore[method-assign]
            lambda slot, gfn, *who: self.logged.append(gfn)
        )
        self.store()
        self.logged.clear()  # the fault that made the entry is logged too

    def store(self) -> None:
        assert self.guest_write(self.vcpu, self.gpa, b"x").done

    def load(self) -> None:
        assert self.guest_read(self.vcpu, self.gpa, 1).done

    @property
    def entry(self) -> int:
        return next(met.entry for met in self.vm.mmu.leaves(self.vm.mmu.roots[0]))

    def clear(self, mask: int, *, flush: bool = True) -> None:
        met = next(self.vm.mmu.leaves(self.vm.mmu.roots[0]))
        assert self.host.writer.cmpxchg64(met.at, met.entry, met.entry & ~mask)
        if flush:
            self.vcpu.flush_tlb(None)


@pytest.mark.parametrize("level", [1, 2])
def test_a_store_through_a_clean_entry_sets_d_and_is_logged_and_a_load_is_not(level: int) -> None:
    guest = OneLeaf(level=level)
    violations = guest.vcpu.arch.ept_violations
    guest.clear(bits.DIRTY | bits.ACCESSED)
    guest.load()
    assert guest.entry & (bits.ACCESSED | bits.DIRTY) == bits.ACCESSED
    assert guest.logged == []
    guest.store()
    assert guest.entry & bits.DIRTY
    assert guest.logged == [guest.gpa >> 12]
    guest.store()
    assert guest.logged == [guest.gpa >> 12], "once, until D is cleared again"
    assert guest.vcpu.arch.ept_violations == violations, "no violation: the walk did it all"
    assert check_vm(guest.vm) == []


def test_a_store_after_d_was_cleared_and_flushed_walks_again() -> None:
    """And a load in between does not let the next store slip through the TLB."""
    guest = OneLeaf()
    for _ in range(3):
        guest.clear(bits.DIRTY)
        guest.load()
        guest.store()
    assert guest.logged == [0x100] * 3


def test_a_ring_that_setting_d_filled_is_left_for_before_the_store() -> None:
    guest = OneLeaf()
    guest.clear(bits.DIRTY)
    guest.vm.dirty_log.ring_full = lambda vcpu_id: bool(guest.logged)  # type: ignore[method-assign]
    stopped = guest.guest_write(guest.vcpu, guest.gpa, b"y")
    assert (stopped.exit.reason, stopped.done) == (ExitReason.DIRTY_RING_FULL, False)
    guest.logged.clear()
    assert guest.run(guest.vcpu.run(None)).done
    assert guest.guest_read(guest.vcpu, guest.gpa, 1).reads == [b"y"]


def test_without_the_flush_a_store_is_lost() -> None:
    """Why whoever clears D must flush: the TLB has D, so nobody walks."""
    guest = OneLeaf()
    guest.clear(bits.DIRTY, flush=False)
    guest.store()
    assert guest.logged == []


def test_a_tlb_that_forgot_d_would_lose_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: W is cached though D is clear."""
    right = Cpu._set_accessed_dirty
    guest = OneLeaf()

    def forgetful(cpu: Cpu, gfn: Gfn, found: Walk, need: int) -> int:
        right(cpu, gfn, found, need)
        return found.rights

    monkeypatch.setattr(Cpu, "_set_accessed_dirty", forgetful)
    guest.clear(bits.DIRTY)
    guest.load()
    guest.store()
    assert guest.logged == []


def test_a_cpu_without_a_and_d_sets_neither_and_logs_nothing() -> None:
    guest = OneLeaf(ad_bits=False)
    before = guest.entry
    guest.vcpu.flush_tlb(None)
    guest.store()
    assert guest.entry == before
    assert before & (bits.ACCESSED | bits.DIRTY) == 0
    assert guest.logged == []


def test_an_entry_that_changed_since_is_not_stored_over() -> None:
    guest = OneLeaf()
    met = next(guest.vm.mmu.leaves(guest.vm.mmu.roots[0]))
    guest.clear(bits.WRITE)
    assert not guest.host.writer.cmpxchg64(met.at, met.entry, met.entry | bits.DIRTY)
    assert guest.entry & bits.WRITE == 0


def test_a_read_only_entry_is_never_made_dirty_by_a_walk() -> None:
    world = World()
    world.set_slot(1, 0x300, 1, world.map(1), flags=2)
    vcpu = world.create_vcpu()
    world.guest_read(vcpu, 0x30_0000, 1)
    world.guest_write(vcpu, 0x30_0000, b"x")
    (met,) = world.vm.mmu.leaves(world.vm.mmu.roots[0])
    assert met.entry & (bits.DIRTY | bits.WRITE) == 0
    assert (met.gfn, met.level) == (Gfn(0x300), Level(1))
