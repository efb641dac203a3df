"""Ageing: what KVM does to a leaf the host wants to know the use of, and that everybody recovers (RFC-99)."""

from __future__ import annotations

import pytest

from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.host import CpuFeatures
from kvmd.core.invariants import check_vm
from kvmd.core.mm.madvise import dontneed
from kvmd.core.mm.reclaim import age
from kvmd.core.tables import tdp_log
from kvmd.core.tables.map_record import WRITABLE, ZAPPED
from protocol.flow import Wait
from protocol.hostmem import LOW_RAM_START
from protocol.units import WHOLE_SIZE, Gfn, GfnSpan, Hva
from tests.kit.kvmd import READ
from tests.kit.lent import Lent
from tests.oracle.table import Machine, RawTables, ept_walk, leaves, second_stage_walk

PAGE = 4096
MACHINE = Machine(address_width=46, snoop_control=True)


class Aged(Lent):
    """One leaf of `level` at gfn 0x200, which a device mapped."""

    def __init__(self, *, ad_bits: bool, level: int = 1) -> None:
        pages, features = 4 if level == 1 else 512, CpuFeatures(ept_ad_bits=ad_bits)
        super().__init__(0x200, pages, level=level, features=features)
        self.ad_bits = ad_bits
        self.raw = RawTables(LOW_RAM_START, self.bare.tables)
        self.root = int(self.exported.meta.root_hpa)
        self.io_fault(self.exported, 0x200)

    def age(self) -> Wait[int]:
        return self.start(age(self.mm, Hva(self.hva), PAGE << 9))

    def leaf(self) -> int:
        """The raw entry of gfn 0x200."""
        return ept_walk(self.raw, MACHINE, self.root, 4, 0x20_0000).entry

    def young(self) -> list[bool]:
        """Of each leaf: does it say it was used, by its A, or by being there at all?"""
        return [
            bool(entry & (1 << 8 if self.ad_bits else 7)) for _, _, entry in leaves(self.raw, self.root, 4)
        ]

    def walks(self) -> list[str]:
        walkers = ept_walk, second_stage_walk
        return [walk(self.raw, MACHINE, self.root, 4, 0x20_0000).kind for walk in walkers]


@pytest.mark.rfc("RFC-99")
@pytest.mark.parametrize("level", [1, 2])
def test_without_ad_bits_an_aged_leaf_is_absent_for_both_walkers_and_recovers_at_the_next_fault(
    level: int,
) -> None:
    rig = Aged(ad_bits=False, level=level)
    before = rig.leaf()
    over = rig.age()
    assert rig.walks() == ["absent", "absent"]
    assert rig.leaf() == before & ~7 | 0b101 << 54, "R and X are saved at bits 54 and 56"
    assert rig.importer.heard == [(0, WHOLE_SIZE, 1)]
    assert not over.done, "somebody may still use the old translation"
    rig.ack(rig.importer)
    assert over.result() == 1
    assert check_vm(rig.vm) == []
    assert rig.io_fault(rig.exported, 0x200) is FaultResult.FIXED
    assert rig.leaf() == before
    assert check_vm(rig.vm) == []


@pytest.mark.rfc("RFC-99")
def test_a_part_of_an_aged_huge_leaf_recovers_when_the_slot_asks_for_small_ones() -> None:
    rig = Aged(ad_bits=False, level=2)
    rig.age()
    rig.ack(rig.importer)
    rig.run(rig.mm.write(rig.hva, b"kept"))
    vcpu = rig.vm.vcpus[0]
    assert rig.guest_read(vcpu, 0x20_0000, 4).reads == [b"kept"]
    assert vcpu.arch.ept_violations == 1


def test_with_ad_bits_the_accessed_bit_goes_and_the_translation_stays() -> None:
    rig = Aged(ad_bits=True)
    before = rig.leaf()
    over = rig.age()
    rig.ack(rig.importer)
    assert over.result() == 1
    assert rig.leaf() == before & ~(1 << 8)
    assert rig.walks() == ["mapped", "mapped"]
    assert check_vm(rig.vm) == []


@pytest.mark.parametrize("ad_bits", [False, True])
def test_a_leaf_nobody_used_since_is_old_and_nobody_is_told(ad_bits: bool) -> None:
    rig = Aged(ad_bits=ad_bits)
    assert rig.young() == [True]
    rig.age()
    rig.ack(rig.importer)
    assert not any(rig.young())
    assert rig.age().result() == 0
    assert len(rig.importer.heard) == 1
    assert rig.io_fault(rig.exported, 0x201, READ) is FaultResult.FIXED
    assert any(rig.young())


def test_an_aged_leaf_is_zapped_like_any_other() -> None:
    rig = Aged(ad_bits=False)
    rig.age()
    rig.ack(rig.importer)
    gone = rig.start(dontneed(rig.mm, rig.hva, PAGE))
    rig.ack(rig.importer)
    assert gone.done
    assert list(leaves(rig.raw, rig.root, 4)) == []
    assert check_vm(rig.vm) == []


def test_a_store_to_an_aged_page_that_was_protected_once_makes_a_legal_entry() -> None:
    """Logging took W from something, so a store may only put it back: R and X must come back with it."""
    rig = Aged(ad_bits=False)
    tdp_log.protect(rig.vm.mmu, rig.exported.root, GfnSpan.of_pages(Gfn(0x203), 1))
    before = rig.leaf()
    rig.age()
    rig.ack(rig.importer)
    assert rig.vm.exports.tdps[0].root.record.state(Gfn(0x200)) == ZAPPED, "a dump expects it absent"
    assert rig.io_fault(rig.exported, 0x200) is FaultResult.FAST
    assert rig.leaf() == before
    assert rig.vm.exports.tdps[0].root.record.state(Gfn(0x200)) == WRITABLE
    assert rig.walks() == ["mapped", "mapped"]
    assert check_vm(rig.vm) == []
