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
from kvmd.core.tables.zap import Zapper
from kvmd.core.vm import Kvm, VmType, create_vm
from protocol.flow import Wait
from tests.kit.importer import SlowImporter
from tests.kit.kvmd import World

PAGE = 4096
BATCH = 4
PAGES = 16
OTHER = 0x200


class Rig:
    """16 pages at gfn 0x100 and one of another slot, mapped by a device; turns and acks are given by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(zap, "ZAP_BATCH", BATCH)
        monkeypatch.setattr(zap, "DISMANTLE_BATCH", 1)
        monkeypatch.setattr(space, "UNMAP_BATCH", BATCH)
        self.world = World()
        self.hva = self.world.map(PAGES)
        self.world.set_slot(0, 0x100, PAGES, self.hva)
        self.world.set_slot(1, OTHER, 1, self.world.map(1))
        self.exported = self.world.export()
        self.importer = SlowImporter()
        self.exported.register_importer("unit", self.importer)
        for gfn in (*range(0x100, 0x100 + PAGES), OTHER):
            assert self.world.io_fault(self.exported, gfn) is FaultResult.FIXED
        self.turns: list[Wait[None]] = []
        self.world.host.cond_resched = self.cond_resched

    def cond_resched(self) -> Wait[None]:
        self.turns.append(Wait())
        return self.turns[-1]

    def munmap(self) -> Coroutine[Any, None, None]:
        return self.world.mm.munmap(self.hva, PAGES * PAGE)

    def go_on(self) -> None:
        if self.importer.pending:
            self.world.ack(self.importer)
        else:
            self.turns.pop().set(None)
            self.world.flows.run_ready()

    def wrong(self) -> list[str]:
        return check_vm(self.world.vm) + check_memory(self.world.host.memory, self.world.host.processes)


def leaves_go_in_turns(rig: Rig) -> None:
    over, leaves, entries = rig.world.start(rig.munmap()), [], []
    while not over.done:
        leaves.append(len(rig.world.table()))
        entries.append(len(rig.world.mm.table.entries()))
        assert rig.wrong() == []
        rig.go_on()
    assert leaves == [13, 13, 9, 9, 5, 5, 1, 1, 1, 1, 1], "a batch, its flush, a turn"
    assert entries == [17] * 8 + [13, 9, 5], "only then the process's entries, in turns as well"
    assert rig.world.host.frames.in_use == 1
    assert rig.wrong() == []


def test_a_range_is_unmapped_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves_go_in_turns(Rig(monkeypatch))


def test_a_range_zapped_in_one_turn_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    monkeypatch.setattr(zap, "ZAP_BATCH", 1 << 20)
    with pytest.raises(AssertionError, match="a batch"):
        leaves_go_in_turns(rig)


def others_find_everything_flushed(rig: Rig, work: Callable[[], Coroutine[Any, None, None]]) -> None:
    """At every turn each frame that some batch took from the table is behind a flush already told."""
    mapped, told = PAGES + 1, len(rig.importer.heard)
    over = rig.world.start(work())
    while not over.done:
        left = len(rig.world.table())
        if left < mapped:
            assert len(rig.importer.heard) > told, f"{mapped - left} leaves are gone, no importer was told"
        mapped, told = left, len(rig.importer.heard)
        rig.go_on()


@pytest.mark.defect("B-19", "B-33")
def test_what_a_munmap_cleared_is_flushed_before_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    others_find_everything_flushed(rig, rig.munmap)


@pytest.mark.defect("B-19")
def test_what_an_exit_cleared_is_flushed_before_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    others_find_everything_flushed(rig, rig.world.mm.exit)
    assert rig.world.host.frames.in_use == 0


@pytest.mark.defect("B-33")
def test_a_turn_given_before_the_flush_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def flush_at_the_end(self: Zapper, spans: Any, roots: Any = None, **rest: Any) -> None:
        for span in spans:
            cursor = self._mmu.cursor(self._mmu.roots[0], span)
            while tdp_mmu.zap_some(self._mmu, self._mmu.roots[0], cursor, BATCH):
                await self._cond_resched()
        await self._flusher.flush(None)

    rig = Rig(monkeypatch)
    monkeypatch.setattr(Zapper, "zap", flush_at_the_end)
    with pytest.raises(AssertionError, match="no importer was told"):
        others_find_everything_flushed(rig, rig.munmap)


def test_others_are_served_between_the_turns_and_those_of_the_range_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    over = rig.world.start(rig.munmap())
    waits = rig.world.start(rig.world.device_fault(0x100))
    served = 0
    while not over.done:
        assert rig.world.io_fault(rig.exported, OTHER) is FaultResult.SPURIOUS
        assert not waits.done, "mapped while the host is taking it away"
        served += 1
        rig.go_on()
    assert served == 11
    assert waits.result() is FaultResult.NO_PAGE
    assert rig.wrong() == []


# -- tables --------------------------------------------------------------------------------------------


def a_vm_ends_in_turns(rig: Rig) -> None:
    """A second VM of the host faults between all of its turns, and never gets a page that is still held."""
    world = rig.world
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
    a_vm_ends_in_turns(Rig(monkeypatch))


def test_a_vm_that_ends_in_one_turn_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    dismantle = tdp_mmu.dismantle

    def at_once(mmu: TdpMmu, root: Any) -> Any:
        return iter(list(dismantle(mmu, root))[:1])

    monkeypatch.setattr(tdp_mmu, "dismantle", at_once)
    with pytest.raises(AssertionError, match="turns"):
        a_vm_ends_in_turns(Rig(monkeypatch))


def test_obsolete_roots_go_in_turns_and_their_pages_only_after_the_flush(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """System-management mode runs on a root of its own, which a memslot change makes obsolete."""
    rig = Rig(monkeypatch)
    world = rig.world
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
    rig = Rig(monkeypatch)
    unmapped = rig.world.start(rig.munmap())
    while not rig.turns:
        rig.go_on()
    made = rig.world.start(create_vm(rig.world.host, rig.world.mm, VmType.DEFAULT))
    assert not made.done
    while not unmapped.done:
        rig.go_on()
    late = made.result()
    assert late.host_changes in rig.world.mm.notifiers
