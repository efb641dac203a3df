"""Deleting a memslot under a large exported root: bounded work a turn, and nothing unflushed in between."""

from __future__ import annotations

import pytest

from kvmd import config
from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.invariants import check_vm
from kvmd.core.mm.madvise import dontneed
from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.flush import Flusher
from kvmd.core.tables.tdp_table import Role, Root, TdpMmu
from kvmd.core.tables.zap import Zapper
from protocol.flow import Wait
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.pt.walk import ept_rules
from protocol.units import Gfn, GfnSpan, Hpa, Level, Pfn
from tests.kit.importer import SlowImporter
from tests.kit.kvmd import WRITE, World
from tests.planted.plugin import Plants
from tests.unit.kvmd.in_turns import FIRST, PAGES, InTurns

PAGE = 4096


class Deleted(InTurns):
    """The first slot goes."""

    def delete(self) -> Wait[None]:
        return self.start(self.vm.slots_change.set_memory_region(self.region(0, 0, 0, 0)))


def lent(mmu: TdpMmu) -> Root:
    root = mmu.exported_root(0)
    assert root is not None
    return root


def work_is_bounded(rig: Deleted) -> None:
    over, left = rig.delete(), []
    while not over.done:
        left.append(len(rig.table()))
        if rig.importer.pending:
            rig.ack(rig.importer)
        else:
            rig.next_turn()
    assert left == [13, 13, 9, 9, 5, 5, 1, 1, 0], "each batch, then its flush, then a turn for the others"
    assert rig.table() == {}
    assert check_vm(rig.vm) == []


@pytest.mark.rfc("RFC-95")
@pytest.mark.defect("B-33")
def test_a_slot_is_deleted_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    work_is_bounded(Deleted(monkeypatch))


@pytest.mark.defect("B-33")
def test_clearing_a_whole_root_in_one_turn_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(self: Zapper, *slot: object) -> None:
        tdp_mmu.zap_leafs(self._mmu, lent(self._mmu).everything)
        await self._flusher.flush(None)

    monkeypatch.setattr(Zapper, "zap_all_fast", at_once)
    with pytest.raises(AssertionError, match="each batch"):
        work_is_bounded(Deleted(monkeypatch))


def test_between_the_turns_of_a_slot_that_goes_what_was_pinned_is_nothing_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its entries lead to where the host has nothing any more, until they are zapped."""
    rig = Deleted(monkeypatch)
    last = GfnSpan.of_pages(Gfn(FIRST + PAGES - 2), 2)
    rig.do(rig.vm.pinning.pin(rig.vm.pinning.open(), last))
    rig.do(dontneed(rig.mm, rig.hva_of(last.start), 2 * PAGE))
    over, seen = rig.delete(), set()
    while not over.done:
        seen.add(len(rig.table()))
        assert check_vm(rig.vm) == []
        rig.go_on()
    assert {13, 5} <= seen, "some are left, of which the pinned are the last"
    assert check_vm(rig.vm) == []


def host_takes_a_page_meanwhile(rig: Deleted) -> None:
    """It finds the entry cleared already, nothing to flush, and must not free the frame under the unit."""
    rig.delete()
    gone = rig.start(dontneed(rig.mm, rig.hva, PAGE))
    assert not gone.done, "the frame is free and the importer was not even told"
    rig.settle(gone)


def test_what_was_cleared_is_flushed_before_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    host_takes_a_page_meanwhile(Deleted(monkeypatch))


@pytest.mark.defect("B-33")
def test_a_turn_given_before_the_flush_is_noticed(monkeypatch: pytest.MonkeyPatch, plant: Plants) -> None:
    plant("B-33-turn-before-flush")
    with pytest.raises(AssertionError, match="not even told"):
        host_takes_a_page_meanwhile(Deleted(monkeypatch))


def test_faults_of_other_slots_go_on_and_those_of_the_slot_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Deleted(monkeypatch)
    over = rig.delete()
    rig.ack(rig.importer)
    vcpu = rig.vm.vcpus[0]
    assert rig.guest_write(vcpu, 0x20_0000, b"x").done == 1
    waits = rig.start(rig.exported.fault(rig.vm.fault_path, 77, Gfn(0x100), WRITE))
    assert not waits.done
    while not over.done:
        if rig.importer.pending:
            rig.ack(rig.importer)
        else:
            rig.next_turn()
    assert waits.result() is FaultResult.NO_SLOT
    assert check_vm(rig.vm) == []


def test_no_turn_clears_more_than_4096_leaves() -> None:
    """With the real size of a batch, not one that a test chose."""
    world, importer, pages = World(), SlowImporter(), 2 * 4096 + 3
    world.set_slot(0, 0, pages, world.map(pages))
    exported = world.export()
    for gfn in range(pages):
        assert world.io_fault(exported, gfn) is FaultResult.FIXED
    exported.register_importer("unit", importer)
    over, left = world.start(world.vm.slots_change.set_memory_region(world.region(0, 0, 0, 0))), []
    while not over.done:
        left.append(exported.root.leaves[1])
        world.ack(importer)
    assert left == [4096 + 3, 3, 0]


def test_a_batch_is_as_small_as_kvmd_is_told() -> None:
    _, settings = config.parse(["--socket", "x", "--zap-batch", "1"])
    assert settings.zap_batch == 1
    with pytest.raises(SystemExit):
        config.parse(["--socket", "x", "--zap-batch", "0"])


def a_table_goes_between_two_batches(batch: int = 768, level: int = 2) -> list[str]:
    """Two tables' worth of leaves, and a batch that ends between two runs or within one.  While others have
    their turn a huge leaf of `level` takes the place of the table there, and its page is used again, for the
    same below another entry; then the rest is zapped."""
    first = 0x200 if level == 2 else 0
    elsewhere = 1 << 9 * (level - 1) + 2
    memory = bytearray(64 * 4096)
    writer = TableWriter(Hpa(0x10_0000), memoryview(memory))
    pool = TablePool(writer, len(memory))
    flusher = Flusher(1, pool, lambda span, epoch: [])
    mmu = TdpMmu(1, writer, pool, ept_rules(46, Level(3)), flusher.next_epoch)
    root = mmu.get_root(Role(Level(4), 0, True))

    def map_pages(first: int, count: int) -> None:
        for gfn in range(first, first + count):
            tdp_mmu.map_page(mmu, root, Gfn(gfn), Pfn(0x10_0000 + gfn), Level(1), writable=True)

    map_pages(0, 1024)
    turns = 0

    async def others() -> None:
        nonlocal turns
        turns += 1
        if turns == 1:
            tdp_mmu.map_page(mmu, root, Gfn(first), Pfn(0x40_0000 + first), Level(level), writable=True)
            await flusher.flush(None)  # the pages of the tables are free
            map_pages(elsewhere, 1024)  # and taken for others, outside of the span

    zapper = Zapper(mmu, flusher, lambda: others(), batch)  # type: ignore[arg-type,return-value]
    flow = zapper.zap([GfnSpan(Gfn(0), Gfn(0x400))])
    with pytest.raises(StopIteration):
        flow.send(None)
    assert turns
    left = [met.gfn for met in mmu.leaves(root)]
    found = [f"gfn {gfn:#x} was not zapped" for gfn in left if gfn < 0x400]
    missing = set(range(elsewhere, elsewhere + 1024)) - set(left)
    return found + [f"gfn {gfn:#x} was zapped" for gfn in sorted(missing)]


@pytest.mark.parametrize(("batch", "level"), [(768, 2), (512, 3)], ids=["within a run", "between two"])
def test_a_table_that_goes_between_two_batches_is_not_walked_on(batch: int, level: int) -> None:
    assert a_table_goes_between_two_batches(batch, level) == []


def test_a_zap_that_goes_on_where_it_was_is_noticed(plant: Plants) -> None:
    plant("B-33-cursor-goes-on")
    found = a_table_goes_between_two_batches(512, 3)
    assert "gfn 0x0 was not zapped" in found
    assert any("was zapped" in complaint for complaint in found)
