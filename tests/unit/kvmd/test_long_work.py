"""Unmapping, an exit, a VM's end: bounded work a turn, others answered meanwhile, nothing unflushed left."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.invariants import check_vm
from kvmd.core.mm import space
from kvmd.core.mm.check import check_memory
from kvmd.core.tables import tdp_mmu, zap
from kvmd.core.tables.tdp_table import RootState, TdpMmu
from kvmd.core.vm import Kvm, VmType, create_vm
from tests.planted.plugin import Plants
from tests.unit.kvmd.in_turns import BATCH, OTHER, PAGES, InTurns

PAGE = 4096


class LongWork(InTurns):
    """Unmapping and taking a table apart go in turns as well."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(zap, "DISMANTLE_BATCH", 1)
        monkeypatch.setattr(space, "UNMAP_BATCH", BATCH)
        super().__init__(monkeypatch)

    def munmap(self) -> Coroutine[Any, None, None]:
        return self.mm.munmap(self.hva, PAGES * PAGE)

    def wrong(self) -> list[str]:
        return check_vm(self.vm) + check_memory(self.host.memory, self.host.processes)


def leaves_go_in_turns(rig: LongWork) -> None:
    over, leaves, entries = rig.start(rig.munmap()), [], []
    while not over.done:
        leaves.append(len(rig.table()))
        entries.append(len(rig.mm.table.entries()))
        assert rig.wrong() == []
        rig.go_on()
    assert leaves == [13, 13, 9, 9, 5, 5, 1, 1, 1, 1, 1], "a batch, its flush, a turn"
    assert entries == [17] * 8 + [13, 9, 5], "only then the process's entries, in turns as well"
    assert rig.host.frames.in_use == 1
    assert rig.wrong() == []


def test_a_range_is_unmapped_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves_go_in_turns(LongWork(monkeypatch))


def test_a_range_zapped_in_one_turn_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = LongWork(monkeypatch)
    rig.vm.tdp.zapper.batch = 1 << 20
    with pytest.raises(AssertionError, match="a batch"):
        leaves_go_in_turns(rig)


def others_find_everything_flushed(rig: LongWork, work: Callable[[], Coroutine[Any, None, None]]) -> None:
    """At every turn each frame that some batch took from the table is behind a flush already told."""
    mapped, told = PAGES + 1, len(rig.importer.heard)
    over = rig.start(work())
    while not over.done:
        left = len(rig.table())
        if left < mapped:
            assert len(rig.importer.heard) > told, f"{mapped - left} leaves are gone, no importer was told"
        mapped, told = left, len(rig.importer.heard)
        rig.go_on()


@pytest.mark.defect("B-19", "B-33")
def test_what_a_munmap_cleared_is_flushed_before_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = LongWork(monkeypatch)
    others_find_everything_flushed(rig, rig.munmap)


@pytest.mark.defect("B-19")
def test_what_an_exit_cleared_is_flushed_before_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = LongWork(monkeypatch)
    others_find_everything_flushed(rig, rig.mm.exit)
    assert rig.host.frames.in_use == 0


@pytest.mark.defect("B-33")
def test_a_turn_given_before_the_flush_is_noticed(monkeypatch: pytest.MonkeyPatch, plant: Plants) -> None:
    rig = LongWork(monkeypatch)
    plant("B-33-turn-before-flush")
    with pytest.raises(AssertionError, match="no importer was told"):
        others_find_everything_flushed(rig, rig.munmap)


def test_others_are_served_between_the_turns_and_those_of_the_range_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = LongWork(monkeypatch)
    over = rig.start(rig.munmap())
    waits = rig.start(rig.device_fault(0x100))
    served = 0
    while not over.done:
        assert rig.io_fault(rig.exported, OTHER) is FaultResult.SPURIOUS
        assert not waits.done, "mapped while the host is taking it away"
        served += 1
        rig.go_on()
    assert served == 11
    assert waits.result() is FaultResult.NO_PAGE
    assert rig.wrong() == []


# -- tables --------------------------------------------------------------------------------------------


def a_vm_ends_in_turns(rig: LongWork) -> None:
    """A second VM of the host faults between all of its turns, and never gets a page that is still held."""
    world = rig
    for slot in range(2, 6):
        world.set_slot(slot, 0x10_0000 * slot, 1, rig.hva)
        assert world.io_fault(rig.exported, 0x10_0000 * slot) is FaultResult.FIXED
    rig.exported.unregister_importer("unit", rig.importer)
    world.run(world.vm.exports.close(rig.exported))
    over = world.start(world.vm.destroy())
    world.vm = Kvm(world.host, world.mm)
    world.set_slot(0, 0x100, PAGES, rig.hva)
    cpu, served = world.create_vcpu(), 0
    while not over.done:
        assert world.guest_write(cpu, 0x10_0000 + served % PAGES * PAGE, b"x").done == 1
        assert check_vm(world.vm) == []
        served += 1
        rig.go_on()
    assert served > 10, f"all tables went in {served} turns"
    assert world.host.pool.in_use == sum(root.tables for root in world.vm.mmu.roots)


def test_a_vm_ends_in_turns_and_its_neighbour_runs_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    a_vm_ends_in_turns(LongWork(monkeypatch))


def test_a_vm_that_ends_in_one_turn_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    dismantle = tdp_mmu.dismantle

    def at_once(mmu: TdpMmu, root: Any) -> Any:
        return iter(list(dismantle(mmu, root))[:1])

    monkeypatch.setattr(tdp_mmu, "dismantle", at_once)
    with pytest.raises(AssertionError, match="turns"):
        a_vm_ends_in_turns(LongWork(monkeypatch))


def test_obsolete_roots_go_in_turns_and_their_pages_only_after_the_flush(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """System-management mode runs on a root of its own, which a memslot change makes obsolete."""
    rig = LongWork(monkeypatch)
    world = rig
    world.set_slot(1 << 16, 0x100, PAGES, rig.hva)
    cpu = world.vm.vcpus[0]
    assert world.run(cpu.run([("w", 0x10_0000, b"x")], smm=True)).done
    old = cpu.arch.load_root(1)
    over = world.start(world.vm.slots_change.set_memory_region(world.region(1, 0, 0, 0)))
    while rig.importer.pending or old.state is not RootState.DISMANTLED:
        if rig.importer.pending:
            assert old.tables == 4, "taken apart while an importer may still walk"
        rig.go_on()
        assert rig.wrong() == []
    while not over.done:
        rig.go_on()
    assert (old.tables, old in world.vm.mmu.roots) == (1, True), "the vCPU still has it loaded"
    assert world.run(cpu.run([("w", 0x10_0000, b"y")], smm=True)).done
    assert old not in world.vm.mmu.roots
    assert rig.wrong() == []


def test_a_vm_made_in_the_middle_of_an_unmap_begins_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its notifier would not be told: it could map a page that is cleared in the next turn."""
    rig = LongWork(monkeypatch)
    unmapped = rig.start(rig.munmap())
    while not rig.turns:
        rig.go_on()
    made = rig.start(create_vm(rig.host, rig.mm, VmType.DEFAULT))
    assert not made.done
    while not unmapped.done:
        rig.go_on()
    late = made.result()
    assert late.host_changes in rig.mm.notifiers
