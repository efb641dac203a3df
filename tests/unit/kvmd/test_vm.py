"""The VM's three flows against each other: faults, invalidations by the host, memslot changes.

Waits are set by hand, so each test is one schedule written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmd.core.faults.page_fault import MAX_TRIES, RESOLVED, FaultResult
from kvmd.core.invariants import check_vm
from kvmd.core.mm.fault import FaultCounts
from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.madvise import dontneed
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.page import MappedPage
from kvmd.core.mm.reclaim import migrate
from kvmd.core.vm import Kvm
from protocol.kvm_run import ExitReason
from protocol.units import Gfn, GfnSpan, Hva
from tests.kit.importer import HandLease, SlowImporter
from tests.kit.kvmd import MM_CHANGES, WRITE, World
from tests.kit.lent import Lent

PAGE = 4096


class Scheduled(Lent):
    """16 pages at gfn 0x100."""

    def __init__(self, **host: Any) -> None:
        super().__init__(0x100, 16, **host)

    def fault(self, gfn: int = 0x100) -> FaultResult:
        return self.io_fault(self.exported, gfn)

    def tag(self, gfn: int) -> int:
        """Of the frame the host has for `gfn` now."""
        page = self.mm.present_page(self.hva_of(gfn))
        assert page is not None
        return self.bare.tags.read(page.pfn)


@pytest.fixture
def rig() -> Scheduled:
    return Scheduled()


class PreemptedMm:
    """The process's memory, whose lookups take long: `while_asleep` happens before they return."""

    def __init__(self, mm: Mm, while_asleep: Callable[[], object]) -> None:
        self._mm = mm
        self._while_asleep = while_asleep

    async def get_user_page(self, hva: Hva, *, write: bool, tally: FaultCounts | None = None) -> MappedPage:
        snapshot = await self._mm.get_user_page(hva, write=write, tally=tally)
        self._while_asleep()
        return snapshot

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mm, name)


@pytest.mark.rfc("RFC-87")
def test_the_table_is_zapped_before_importers_are_told_and_the_frame_kept_until_they_acked(
    rig: Scheduled,
) -> None:
    rig.fault(0x100)
    rig.fault(0x101)
    tag = rig.tag(0x100)
    over = rig.start(dontneed(rig.mm, rig.hva, PAGE))
    assert set(rig.table()) == {0x101}
    assert rig.importer.heard == [(0, (1 << 64) - 1, 1)]
    assert not over.done
    assert rig.tag(0x100) == tag
    rig.ack(rig.importer)
    assert over.done
    assert rig.mm.present_page(rig.hva) is None
    assert check_vm(rig.vm) == []


@pytest.mark.defect("B-18")
def test_who_finds_nothing_to_zap_still_waits_for_who_zapped_it(rig: Scheduled) -> None:
    """Two ranges overlap; the second has no entry left to clear, and the first is not acked."""
    rig.fault(0x100)
    first = rig.start(dontneed(rig.mm, rig.hva, 2 * PAGE))
    second = rig.start(rig.mm.munmap(rig.hva, PAGE))
    assert len(rig.importer.pending) == 1
    assert not second.done
    assert rig.mm.present_page(rig.hva) is not None
    rig.ack(rig.importer)
    assert first.done
    assert second.done


def test_acks_in_the_wrong_order_free_nothing_early(rig: Scheduled) -> None:
    rig.fault(0x100)
    rig.fault(0x105)
    tags = rig.tag(0x100), rig.tag(0x105)
    first = rig.start(dontneed(rig.mm, rig.hva, PAGE))
    second = rig.start(dontneed(rig.mm, Hva(rig.hva + 5 * PAGE), PAGE))
    rig.ack(rig.importer, 1)
    assert not first.done
    assert (rig.tag(0x100), rig.tag(0x105)) == tags, "the second waits for the first flush too"
    rig.ack(rig.importer)
    assert first.done
    assert second.done


def test_a_fault_in_a_range_that_changes_waits_and_finds_the_new_page(rig: Scheduled) -> None:
    rig.run(rig.mm.write(rig.hva, b"moved"))
    rig.fault()
    old = rig.table()[0x100]
    move = rig.start(migrate(rig.mm, rig.hva, PAGE))
    read = rig.start(rig.vcpu.run([("r", 0x10_0000, 5)]))
    assert not read.done
    assert 0x100 not in rig.table()
    rig.ack(rig.importer)
    assert move.done
    assert read.result().reads == [b"moved"]
    assert rig.table()[0x100] != old


@pytest.mark.defect("B-26")
def test_a_fault_beside_a_range_that_changes_does_not_wait(rig: Scheduled) -> None:
    rig.fault()
    rig.start(dontneed(rig.mm, rig.hva, PAGE))
    assert rig.guest_write(rig.vcpu, 0x10_1000, b"x").done == 1
    rig.ack(rig.importer)


def test_who_waits_for_a_change_does_not_tire_of_others_beside_it(rig: Scheduled) -> None:
    """Another MMU of the process takes its time to let go of one page, and meanwhile others change often."""
    slow, mirror = SlowImporter(), Mirror(rig.mm)
    rig.run(mirror.register(slow, HandLease()))
    mirror.watch(rig.hva, PAGE)
    rig.fault()
    over = rig.start(dontneed(rig.mm, rig.hva, PAGE))
    rig.ack(rig.importer)
    fault = rig.start(rig.exported.fault(rig.vm.fault_path, rig.mm.cookie, Gfn(0x100), WRITE))
    pin = rig.start(rig.vm.pinning.pin(rig.vm.pinning.open(), GfnSpan.of_pages(Gfn(0x100), 1)))
    for _ in range(MAX_TRIES + 1):
        rig.do(dontneed(rig.mm, rig.hva_of(0x102), PAGE))
    assert (over.done, fault.done, pin.done) == (False, False, False)
    slow.ack()
    rig.flows.run_ready()
    assert over.done
    assert fault.result() is FaultResult.FIXED
    pin.result()
    assert rig.vm.fault_path.retries == 1
    assert check_vm(rig.vm) == []


@pytest.mark.parametrize("seq_start", [0, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("change", ["madvise_dontneed", "migrate", "munmap"])
@pytest.mark.rfc("RFC-77")
def test_a_page_looked_up_before_an_invalidation_is_not_mapped_after_it(change: str, seq_start: int) -> None:
    """I5, also where the sequence wraps: the whole invalidation happens while the lookup sleeps (R1, R2)."""
    rig = Scheduled(seq_start=seq_start)
    world, left = rig, [1]

    def invalidate_once() -> None:
        if left:
            left.pop()
            world.run(MM_CHANGES[change](world.mm, rig.hva, PAGE))

    world.vm.mm = world.vm.frames.mm = PreemptedMm(world.mm, invalidate_once)  # type: ignore[assignment]
    result = rig.fault()
    assert result is (FaultResult.NO_PAGE if change == "munmap" else FaultResult.FIXED)
    assert check_vm(world.vm) == []
    assert world.vm.fault_path.retries == 1


@pytest.mark.parametrize("seq_start", [0, 2**31 - 2, 2**32 - 2, 2**63 - 2, 2**64 - 2])
def test_a_fault_with_nothing_in_its_way_takes_one_try_whatever_the_sequence(seq_start: int) -> None:
    rig = Scheduled(seq_start=seq_start)
    for i in range(6):
        assert rig.fault(0x100 + i) is FaultResult.FIXED
        over = rig.start(dontneed(rig.mm, rig.hva, PAGE))
        if rig.importer.pending:
            rig.ack(rig.importer)
        assert over.done
    assert rig.vm.fault_path.retries == 0


@pytest.mark.defect("B-14")
def test_a_fault_that_an_invalidation_always_overtakes_gives_up(rig: Scheduled) -> None:
    """Defect B-14: the series retried for ever."""
    world = rig
    asleep = PreemptedMm(world.mm, lambda: world.run(migrate(world.mm, rig.hva, PAGE)))
    world.vm.mm = world.vm.frames.mm = asleep  # type: ignore[assignment]
    assert rig.fault() is FaultResult.UNSTABLE
    assert world.vm.fault_path.retries == 64
    assert check_vm(world.vm) == []


@pytest.mark.rfc("RFC-103")
@pytest.mark.defect("B-19")
def test_exit_tells_importers_before_frames_go(rig: Scheduled) -> None:
    """Defect B-19: the series freed them under a live IOTLB."""
    rig.fault()
    over = rig.start(rig.mm.exit())
    assert not over.done
    assert rig.host.frames.in_use == 1
    rig.ack(rig.importer)
    assert over.done
    assert rig.host.frames.in_use == 0


# -- memslots ------------------------------------------------------------------------------------------


@pytest.mark.rfc("RFC-95")
def test_deleting_a_slot_clears_the_exported_root_and_keeps_it(rig: Scheduled) -> None:
    world = rig
    world.set_slot(1, 0x200, 4, world.map(4))
    rig.fault(0x100)
    rig.fault(0x200)
    root, tables = rig.exported.meta.root_hpa, rig.exported.root.tables
    over = world.start(world.vm.slots_change.set_memory_region(world.region(0, 0, 0, 0)))
    assert world.table(root) == {}
    assert not over.done
    assert (rig.exported.root.hpa, rig.exported.root.tables, rig.exported.root.invalid) == (
        root,
        tables,
        False,
    )
    assert rig.fault(0x200) is FaultResult.FIXED, "the other slot works on while the flush is out"
    world.ack(rig.importer)
    assert over.done
    assert rig.fault(0x100) is FaultResult.NO_SLOT
    assert world.guest_read(rig.vcpu, 0x10_0000, 1).exit.reason is ExitReason.MMIO


def test_a_frame_whose_slot_is_being_deleted_is_not_freed_before_the_ack(rig: Scheduled) -> None:
    """The host finds no slot and nothing to zap, yet importers may still use the frame."""
    rig.fault()
    tag = rig.tag(0x100)
    slot = rig.start(rig.vm.slots_change.set_memory_region(rig.region(0, 0, 0, 0)))
    drop = rig.start(rig.mm.munmap(rig.hva, 16 * PAGE))
    assert not drop.done
    assert rig.tag(0x100) == tag
    rig.ack(rig.importer)
    assert slot.done
    assert drop.done


def test_memslot_changes_happen_one_after_the_other_in_order(rig: Scheduled) -> None:
    rig.fault()
    world = rig
    done: list[str] = []

    async def change(name: str, *args: int) -> None:
        await world.vm.slots_change.set_memory_region(world.region(*args))
        done.append(name)

    world.start(change("delete", 0, 0, 0, 0))
    world.start(change("create", 0, 0x500, 16, rig.hva))
    world.start(change("move", 0, 0x600, 16, rig.hva))
    assert done == []
    world.ack(rig.importer)
    assert done == ["delete", "create", "move"]
    slot = world.vm.slots.find(Gfn(0x600))
    assert slot is not None
    assert slot.hva == rig.hva


def test_a_moved_slot_is_found_at_its_new_place_only(rig: Scheduled) -> None:
    world = rig
    world.guest_write(rig.vcpu, 0x10_0000, b"moved")
    over = world.start(world.vm.slots_change.set_memory_region(world.region(0, 0x300, 16, rig.hva)))
    world.ack(rig.importer)
    assert over.done
    assert world.guest_read(rig.vcpu, 0x30_0000, 5).reads == [b"moved"]
    assert world.guest_read(rig.vcpu, 0x10_0000, 5).exit.reason is ExitReason.MMIO
    assert check_vm(world.vm) == []


def test_a_refused_change_does_not_block_the_next_one(rig: Scheduled) -> None:
    wait = rig.start(rig.vm.slots_change.set_memory_region(rig.region(3, 0x100, 1, rig.hva)))
    with pytest.raises(Exception, match="overlaps"):
        wait.result()
    rig.set_slot(3, 0x400, 1, rig.hva)


def test_an_obsolete_root_is_left_at_the_next_run_and_its_pages_return() -> None:
    """Nobody is told a second time: the flush of the memslot change covered it."""
    world = World()
    hva = world.map(16)
    world.set_slot(0, 0x100, 16, hva)
    one, other = world.create_vcpu(0), world.create_vcpu(1)
    world.guest_write(one, 0x10_0000, b"before")
    world.guest_read(other, 0x10_0000, 1)
    old = one.arch.roots[0]
    world.set_slot(1, 0x200, 1, world.map(1))
    world.set_slot(1, 0, 0, 0)
    assert old is not None
    assert old.invalid
    assert world.guest_read(one, 0x10_0000, 6).reads == [b"before"]
    assert one.arch.roots[0] is not old
    assert world.host.pool.held(world.vm.id) == 0
    assert world.guest_read(other, 0x10_0000, 6).reads == [b"before"]
    assert old not in world.vm.mmu.roots
    assert check_vm(world.vm) == []
    assert world.host.pool.in_use == 4


# -- huge pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gfn", "pages", "offset", "level", "largest"),
    [
        (0x200, 512, 0, 2, {2}),
        (0x200, 1024, 0, 2, {2}),
        (0x201, 512, 0, 2, {1}),  # gfn and hva are not aligned alike
        (0x200, 511, 0, 2, {1}),  # the slot ends inside
        (0x1FF, 513, 511, 2, {1, 2}),  # the first page alone, the rest huge
        (0x200, 512, 0, 1, {1}),  # the host has small pages
    ],
)
@pytest.mark.rfc("RFC-86")
def test_a_leaf_is_as_large_as_slot_and_host_page_allow(
    gfn: int, pages: int, offset: int, level: int, largest: set[int]
) -> None:
    world = World()
    hva = world.map(3, 2) if level == 2 else world.map(1024, hva=0x4000_0000)
    world.set_slot(0, gfn, pages, hva + offset * PAGE)
    exported = world.export()
    for at in (gfn, gfn + pages - 1):
        assert world.io_fault(exported, at) in RESOLVED
    root = exported.root
    assert {size for size in (1, 2, 3) if root.leaves[size]} == largest
    assert check_vm(world.vm) == []


def test_a_huge_page_comes_where_small_ones_were_and_the_importer_hears_of_it() -> None:
    """Tables stay after a zap; the huge leaf replaces one, whose page is held until the ack."""
    world = World()
    hva = world.map(2, 2)
    world.set_slot(0, 0x200, 512, hva + PAGE)
    exported, importer = world.lend(), world.importer
    world.io_fault(exported, 0x205)
    world.start(world.vm.slots_change.set_memory_region(world.region(0, 0, 0, 0)))
    world.ack(importer)
    world.set_slot(0, 0x200, 512, hva)
    fault = world.start(exported.fault(world.vm.fault_path, 77, Gfn(0x205), WRITE))
    assert importer.heard[-1] == (0x20_0000, 0x20_0000, 2)
    assert not fault.done
    assert world.host.pool.held(world.vm.id) == 1
    world.ack(importer)
    assert fault.result() is FaultResult.FIXED
    assert world.host.pool.held(world.vm.id) == 0
    assert check_vm(world.vm) == []


def test_two_vms_of_one_process_each_lose_their_entries(rig: Scheduled) -> None:
    other = Kvm(rig.host, rig.mm)
    vcpu = other.vcpus.create(0)
    rig.run(other.slots_change.set_memory_region(rig.region(0, 0x900, 16, rig.hva)))
    rig.run(vcpu.run([("w", 0x90_0000, b"x")]))
    rig.fault()
    rig.start(dontneed(rig.mm, rig.hva, PAGE))
    assert rig.exported.root.leaves == [0, 0, 0, 0]
    rig.ack(rig.importer)
    assert other.mmu.roots[0].leaves == [0, 0, 0, 0]
    assert check_vm(other) == check_vm(rig.vm) == []
