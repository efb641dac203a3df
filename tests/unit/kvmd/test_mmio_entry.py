"""MMIO entries: what a gfn without a slot leaves in the table, and that no device can walk it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.invariants import check_vm
from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.spte import make_mmio_entry, mmio_generation, mmio_is_fresh
from protocol.kvm_run import ExitReason
from protocol.pt import bits
from protocol.pt.check import check_table, frozen_or_mmio
from protocol.pt.entry import is_frozen, is_mmio, is_present, mmio_gfn
from protocol.pt.walk import Outcome, ept_rules, second_stage_rules, walk
from protocol.units import LEVEL_1G, Gfn
from tests.kit.kvmd import WRITE, World
from tests.kit.lent import Backed
from tests.oracle.table import Machine, RawTables, second_stage_walk

GENERATIONS = 1 << 19
RULES = (ept_rules(46, LEVEL_1G), second_stage_rules(46, LEVEL_1G, snoop_control=True))
MMIO = 0x66_6000


class Holed(Backed):
    """16 pages at gfn 0x100, and no slot elsewhere."""

    def __init__(self) -> None:
        super().__init__(0x100, 16)
        self.exported = self.export()

    def touch(self, gpa: int = MMIO) -> None:
        assert self.guest_write(self.vcpu, gpa, b"x").exit.reason is ExitReason.MMIO

    def entry(self, gpa: int = MMIO) -> int:
        """As a walk of the raw bytes finds it."""
        tables = RawTables(self.host.writer.base, self.bare.tables)
        return second_stage_walk(tables, Machine(), self.exported.root.hpa, 4, gpa).entry

    @property
    def taken(self) -> int:
        return sum(
            count for (source, _), count in self.vm.fault_path.faults.items() if source.value == "vcpu"
        )


@pytest.mark.rfc("RFC-29")
@given(st.integers(0, GENERATIONS - 1), st.integers(0, (1 << 40) - 1))
def test_generation_and_gfn_round_trip(generation: int, gfn: int) -> None:
    entry = make_mmio_entry(Gfn(gfn), generation)
    assert mmio_generation(entry) == generation
    assert mmio_gfn(entry) == gfn
    assert mmio_is_fresh(entry, generation)
    assert mmio_is_fresh(entry, generation + GENERATIONS), "19 bits of it are kept"
    assert not mmio_is_fresh(entry, generation + 1)


@pytest.mark.parametrize(
    ("generation", "entry"),
    [
        (0x001, 1 << 63 | 1 << 3),
        (0x0FF, 1 << 63 | 0xFF << 3),
        (0x100, 1 << 63 | 1 << 11),  # the bit the unit reserves in entries that it looks at
        (0x200, 1 << 63 | 1 << 52),
        (0x8000, 1 << 63 | 1 << 58),
        (0x1_0000, 1 << 63 | 1 << 60),
        (0x7_FFFF, 1 << 63 | 7 << 60 | 0x7F << 52 | 0x1FF << 3),
    ],
)
@pytest.mark.rfc("RFC-29")
def test_the_generation_is_split_9_7_3_around_bit_59(generation: int, entry: int) -> None:
    assert make_mmio_entry(Gfn(0), generation) == entry


@pytest.mark.rfc("RFC-28", "RFC-27")
@pytest.mark.defect("B-22")
@given(st.integers(0, GENERATIONS - 1), st.integers(0, (1 << 34) - 1))
def test_no_walker_takes_an_mmio_entry_of_any_generation_for_present(generation: int, gfn: int) -> None:
    """Presence is looked at first, so bit 11, the address and the rest are nobody's business."""
    entry = make_mmio_entry(Gfn(gfn), generation)
    assert not is_present(entry)
    assert not is_frozen(entry)
    assert not any(entry & rule.present for rule in RULES)
    table = bytearray(4096)
    table[:8] = entry.to_bytes(8, "little")
    raw = RawTables(0x1000, table)
    for levels in (1, 2, 3, 4):  # wherever the walk meets it
        assert second_stage_walk(raw, Machine(), 0x1000, levels, 0).kind == "absent"


@pytest.mark.rfc("RFC-104")
@pytest.mark.defect("B-22")
def test_the_posted_encoding_would_be_a_translation_for_a_device_and_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted bug: W and X without R, as the series has it: the unit reads W, and maps hpa = gpa."""
    guest = Holed()
    monkeypatch.setattr(
        "kvmd.core.tables.tdp_mmu.make_mmio_entry", lambda gfn, gen: 0b110 | gen << 3 | gfn << 12
    )
    guest.touch()
    writer, root = guest.host.writer, guest.exported.root
    found = walk(writer, RULES[1], root.hpa, root.role.level, MMIO)
    assert found.outcome is Outcome.MAPPED
    assert found.hpa(MMIO) == MMIO
    assert walk(writer, RULES[0], root.hpa, root.role.level, MMIO).outcome is Outcome.RESERVED
    complaints = check_table(writer, root.format, root.hpa, root.role.level, RULES, frozen_or_mmio)
    assert any("present by second stage rules" in complaint for complaint in complaints)


@pytest.mark.rfc("RFC-104", "RFC-71")
def test_a_device_s_access_beside_an_mmio_entry_is_refused_and_leaves_none() -> None:
    guest = Holed()
    guest.touch()
    entry = guest.entry()
    assert is_mmio(entry)
    assert guest.io_fault(guest.exported, MMIO >> 12, WRITE) is FaultResult.NO_SLOT
    assert guest.entry() == entry
    assert guest.io_fault(guest.exported, 0x777, WRITE) is FaultResult.NO_SLOT
    assert guest.entry(0x77_7000) == bits.EMPTY
    assert guest.table() == {}
    assert check_vm(guest.vm) == []


def test_a_fresh_entry_saves_the_fault_and_a_stale_one_does_not() -> None:
    guest = Holed()
    guest.touch()
    guest.touch()
    guest.touch(MMIO + 0xFF8)
    assert (guest.taken, guest.vcpu.arch.mmio_sptes_made) == (1, 1)
    guest.set_slot(1, 0x900, 1, guest.map(1))  # the generation moves on
    stale = guest.entry()
    guest.touch()
    assert (guest.taken, guest.vcpu.arch.mmio_sptes_made) == (2, 2)
    assert guest.entry() != stale
    assert check_vm(guest.vm) == []


def test_a_slot_that_comes_takes_the_place_of_the_entry() -> None:
    guest = Holed()
    guest.touch()
    guest.set_slot(1, MMIO >> 12, 1, guest.map(1))
    assert guest.guest_write(guest.vcpu, MMIO, b"ram").done
    assert guest.guest_read(guest.vcpu, MMIO, 3).reads == [b"ram"]
    assert set(guest.table()) == {MMIO >> 12}
    guest.set_slot(1, 0, 0, 0)
    guest.touch()
    assert check_vm(guest.vm) == []


def test_a_huge_leaf_over_a_table_of_mmio_entries_counts_right() -> None:
    guest = Holed()
    guest.touch(0x60_1000)
    guest.set_slot(1, 0x600, 512, guest.map(1, 2))
    assert guest.guest_write(guest.vcpu, 0x60_1000, b"x").done
    assert guest.exported.root.leaves == [0, 0, 1, 0]
    assert check_vm(guest.vm) == []


def turn_generation_round(guest: Holed) -> None:
    """2^19 changes of memslots later."""
    slots = guest.vm.slots
    slots.generation = (slots.generation // GENERATIONS + 1) * GENERATIONS - 1
    guest.set_slot(7, 0xA00, 1, guest.map(1))
    assert slots.generation % GENERATIONS == 0


def test_when_the_generation_wraps_every_entry_goes_even_in_a_lent_root() -> None:
    """Leaves are zapped with a slot, MMIO entries are not, and a root that is lent out stays."""
    guest = Holed()
    guest.touch()
    root = guest.exported.root.hpa
    turn_generation_round(guest)
    assert guest.entry() == bits.EMPTY
    assert guest.exported.root.hpa == root
    guest.touch()
    assert mmio_generation(guest.entry()) == 0


def test_without_the_zap_an_entry_of_the_last_round_would_hide_a_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted bug: no zap at the wrap."""
    guest = Holed()
    guest.vm.slots.generation = GENERATIONS + 1
    guest.touch()
    monkeypatch.setattr(tdp_mmu, "zap_mmio", lambda mmu: None)
    turn_generation_round(guest)
    guest.set_slot(1, MMIO >> 12, 1, guest.map(1))
    assert guest.vm.slots.generation % GENERATIONS == 1
    assert guest.guest_write(guest.vcpu, MMIO, b"ram").done, "the emulator knows the slot"
    assert guest.table() == {}, "the CPU will not get the page, ever"


def test_beyond_what_an_entry_can_say_nothing_is_remembered() -> None:
    guest = Holed()
    tables = guest.exported.root.tables
    for gpa in (1 << 46, 1 << 47, 1 << 51, (1 << 64) - 8):
        guest.touch(gpa)
    assert guest.exported.root.tables == tables
    assert guest.vcpu.arch.mmio_sptes_made == 0


def test_with_no_page_left_for_a_table_the_guest_still_gets_its_exit() -> None:
    world = World(tables=2 * 4096)
    vcpu = world.create_vcpu()
    assert world.guest_write(vcpu, MMIO, b"x").exit.reason is ExitReason.MMIO
    assert vcpu.arch.mmio_sptes_made == 0
