"""Dirty logging, flow by flow: what is protected when, what is waited for, and which errno comes first."""

from __future__ import annotations

import errno

import pytest

from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.host import CpuFeatures
from kvmd.core.invariants import check_vm
from kvmd.core.slots.dirty_log import ClearDirtyLog
from kvmd.core.tables import tdp_mmu
from protocol.errors import UapiError
from protocol.pt import bits
from protocol.units import MIB, Hva
from tests.kit.kvmd import BITMAP, READ
from tests.unit.kvmd.logged import GFN, HVA, NO_PML, Logged, refusal_of

# -- marks and protection ------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [NO_PML, CpuFeatures()], ids=["write protection", "PML"])
def test_get_tells_what_was_written_since_the_last_get(features: CpuFeatures) -> None:
    logged = Logged(features)
    logged.write(3, 64, 127)
    assert logged.dirty() == {3, 64, 127}
    assert logged.dirty() == set()
    logged.read(3, 64)  # still mapped: no fault, no mark
    logged.write(64)
    assert logged.dirty() == {64}


def test_write_protection_takes_w_and_the_next_store_only_puts_it_back() -> None:
    logged = Logged()
    logged.write(3)
    before = logged.entry(3)
    logged.dirty()
    assert logged.entry(3) == before & ~bits.WRITE
    host_lookups: list[int] = []
    logged.mm.get_user_page = lambda hva, **_: host_lookups.append(hva)  # type: ignore[method-assign, assignment]
    logged.write(3)
    assert logged.entry(3) == before
    assert host_lookups == [], "a fast page fault looks no host page up"


def test_pml_takes_d_and_the_next_store_sets_it_without_a_fault() -> None:
    logged = Logged(CpuFeatures())
    logged.write(3)
    before, violations = logged.entry(3), logged.vcpu.arch.ept_violations
    logged.dirty()
    assert logged.entry(3) == before & ~bits.DIRTY
    logged.read(3)
    assert logged.entry(3) == before & ~bits.DIRTY, "a read sets no D"
    logged.write(3)
    assert logged.entry(3) == before
    assert logged.vcpu.arch.ept_violations == violations
    assert logged.dirty() == {3}


@pytest.mark.rfc("RFC-97")
@pytest.mark.defect("B-35")
def test_under_an_exported_root_only_write_protection_logs_a_device() -> None:
    """B-35: the remapping unit sets no D, so D alone would miss its stores."""
    logged = Logged(CpuFeatures(), export=True)
    assert logged.exported is not None
    assert logged.io_fault(logged.exported, GFN + 9) is FaultResult.FIXED
    wait = logged.start(logged.get())
    assert not logged.entry(9) & bits.WRITE, "the device's next store must fault"
    logged.ack(logged.importer)
    assert wait.done
    assert logged.bits() == {9}
    assert logged.io_fault(logged.exported, GFN + 9) is FaultResult.FAST
    assert logged.entry(9) & bits.WRITE
    logged.start(logged.get())
    logged.ack(logged.importer)
    assert logged.bits() == {9}


@pytest.mark.defect("B-35")
def test_export_in_the_middle_protects_what_d_told_until_then() -> None:
    logged = Logged(CpuFeatures())
    logged.write(3, 4)
    logged.dirty()
    logged.write(4)
    assert logged.entry(3) & bits.WRITE
    logged.exported = logged.export()
    assert not logged.entry(3) & bits.WRITE, "clean by D: a device's store would leave no trace"
    assert check_vm(logged.vm) == []
    assert logged.io_fault(logged.exported, GFN + 3) is FaultResult.FAST
    logged.write(3)
    assert logged.dirty() == {3, 4}


def test_a_device_read_of_an_unmapped_page_marks_it_as_a_cpus_would() -> None:
    """A mapping that may be written is made writable, and that is what a mark means."""
    logged = Logged(export=True)
    assert logged.exported is not None
    logged.touch(1)
    assert logged.io_fault(logged.exported, GFN + 1, READ) is FaultResult.FIXED
    logged.start(logged.get())
    logged.ack(logged.importer)
    assert logged.bits() == {1}


def test_a_readonly_slot_may_log_and_never_has_a_bit() -> None:
    logged = Logged(flags=3)
    logged.read(1)
    assert not logged.entry(1) & bits.WRITE
    assert logged.dirty() == set()


# -- GET and CLEAR -------------------------------------------------------------------------------------


@pytest.mark.rfc("RFC-88")
def test_the_bits_reach_user_space_only_after_every_ack() -> None:
    logged = Logged(export=True)
    logged.write(5)
    logged.run(logged.mm.write(Hva(BITMAP), b"\xa5" * 16))
    wait = logged.start(logged.get())
    assert not wait.done
    assert logged.run(logged.mm.read(Hva(BITMAP), 16)) == b"\xa5" * 16
    assert logged.importer.heard[-1][:2] == (GFN << 12, 128 << 12), "the slot, as bytes of gpa"
    logged.ack(logged.importer)
    assert wait.done
    assert logged.bits() == {5}


def test_a_get_that_finds_nothing_flushes_nothing() -> None:
    logged = Logged(export=True)
    assert logged.start(logged.get()).done
    assert logged.importer.heard == []


def test_a_bad_buffer_loses_the_bits_and_manual_protect_keeps_them() -> None:
    for manual, left in ((0, set()), (1, {5})):
        logged = Logged(manual=manual)
        logged.write(5)
        assert refusal_of(logged.get(0), logged) == errno.EFAULT
        assert logged.dirty() == left


def test_manual_get_clears_nothing_and_clear_only_what_was_set() -> None:
    logged = Logged(manual=1, export=True)
    logged.write(5, 70)
    assert logged.start(logged.get()).done, "nothing is protected, nobody is waited for"
    assert logged.bits() == {5, 70}
    assert logged.start(logged.clear(0, 128, {6, 100})).done, "no bit was set: no flush"
    wait = logged.start(logged.clear(64, 64, {70, 71}))
    assert not wait.done
    logged.ack(logged.importer)
    assert (logged.entry(5) & bits.WRITE, logged.entry(70) & bits.WRITE) == (bits.WRITE, 0)
    assert logged.dirty() == {5}


def test_clear_works_without_manual_protect() -> None:
    logged = Logged()
    logged.write(5, 6)
    logged.run(logged.clear(0, 128, {5}))
    assert logged.dirty() == {6}


@pytest.mark.parametrize(
    ("slot", "first", "count", "number"),
    [
        (0, 32, 64, errno.EINVAL),
        (9, 32, 64, errno.EINVAL),  # before ENOENT
        (9, 0, 64, errno.ENOENT),
        (0x2_0000, 0, 64, errno.EINVAL),
        (0, 0, 63, errno.EINVAL),
        (0, 64, 36, 0),  # ends where the slot ends
        (0, 64, 35, errno.EINVAL),
        (0, 64, 37, errno.EINVAL),
        (0, 64, 0, 0),
        (0, 128, 0, errno.EINVAL),
        (0, (1 << 64) - 64, 64, errno.EINVAL),
    ],
)
def test_clear_takes_whole_words_up_to_the_end(slot: int, first: int, count: int, number: int) -> None:
    logged = Logged(pages=100)
    flow = logged.vm.dirty_log.clear(ClearDirtyLog(slot, count, first, Hva(BITMAP)))
    if number:
        assert refusal_of(flow, logged) == number
    else:
        logged.run(flow)


@pytest.mark.parametrize(
    ("slot", "number"), [(1, errno.ENOENT), (0x7FFC, errno.EINVAL), (0x2_0000, errno.EINVAL)]
)
def test_get_of_what_is_no_logging_slot_is_refused(slot: int, number: int) -> None:
    logged = Logged()
    assert refusal_of(logged.get(slot=slot), logged) == number


# -- a slot starts and stops to log --------------------------------------------------------------------


@pytest.mark.rfc("RFC-86")
@pytest.mark.rfc("RFC-97")
def test_logging_splits_and_protects_what_a_device_wrote_through_a_huge_leaf() -> None:
    logged = Logged(level=2, flags=0, export=True)
    assert logged.exported is not None
    assert logged.io_fault(logged.exported, GFN + 7) is FaultResult.FIXED
    assert logged.level(7) == 2
    region = logged.region(0, GFN, logged.pages, HVA, 1)
    wait = logged.start(logged.vm.slots_change.set_memory_region(region))
    assert not wait.done, "the device may store through the huge leaf until it acks"
    assert (logged.level(7), logged.entry(7) & bits.WRITE) == (1, 0)
    logged.ack(logged.importer)
    assert wait.done
    assert logged.io_fault(logged.exported, GFN + 7) is FaultResult.FAST
    assert logged.io_fault(logged.exported, GFN + 900) is FaultResult.FIXED
    assert logged.level(900) == 1, "4 KiB under dirty tracking"
    logged.start(logged.get())
    logged.ack(logged.importer)
    assert logged.bits() == {7, 900}


@pytest.mark.rfc("RFC-98")
def test_huge_leaves_come_back_by_way_of_a_frozen_entry_and_a_flush_of_its_region() -> None:
    logged = Logged(level=2, export=True)
    logged.write(5, 600, 2047)
    logged.importer.heard.clear()
    region = logged.region(0, GFN, logged.pages, HVA, 0)
    wait = logged.start(logged.vm.slots_change.set_memory_region(region))
    root, held = logged.vm.mmu.roots[0], logged.host.pool.held(logged.vm.id)
    frozen = [met.gfn for met in logged.entries() if met.entry == bits.FROZEN]
    assert frozen == [GFN], "one region at a time"
    assert logged.importer.heard == [(GFN << 12, 2 * MIB, logged.vm.flusher.epoch)]
    assert held == 1, "the table stays as it was until the ack (I7)"
    fault = logged.start(logged.device_fault(GFN + 5))
    assert not fault.done, "what is frozen is somebody else's"
    logged.ack(logged.importer)
    assert fault.done
    assert logged.level(5) == 2
    assert not wait.done
    logged.settle(wait)
    assert [start >> 12 for start, _, _ in logged.importer.heard] == [GFN, GFN + 512, GFN + 1536]
    assert logged.level(600) == 0
    logged.write(600)
    assert (logged.level(600), root.leaves[1]) == (2, 0)
    assert check_vm(logged.vm) == []


def test_what_cannot_be_huge_keeps_its_table_when_logging_stops() -> None:
    logged = Logged()
    logged.write(5)
    entry = logged.entry(5)
    logged.log(0)
    assert logged.entry(5) == entry


def test_initially_set_splits_and_protects_only_what_is_cleared() -> None:
    logged = Logged(level=2, flags=0, manual=3)
    logged.write(0, 600)
    logged.log(1)
    assert (logged.level(0), logged.level(600)) == (2, 2)
    assert logged.dirty() == set(range(2048))
    logged.run(logged.clear(0, 512, {0, 3}))
    assert (logged.level(0), logged.entry(0) & bits.WRITE) == (1, 0)
    assert logged.entry(1) & bits.WRITE, "still reported dirty"
    assert (logged.level(600), logged.entry(600) & bits.WRITE) == (2, bits.WRITE)
    logged.write(3)
    assert logged.dirty() == set(range(2048)) - {0}


def test_what_could_not_be_split_is_split_by_its_first_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager splitting is a try: without a page for a table the leaf stays huge, write-protected."""
    logged = Logged(level=2, flags=0)
    logged.write(7)

    def no_room() -> None:
        raise UapiError(errno.ENOMEM, "no room")

    with monkeypatch.context() as short:
        short.setattr(logged.host.pool, "allocate", no_room)
        logged.log(1)
    assert (logged.level(7), logged.entry(7) & bits.WRITE) == (2, 0)
    logged.write(7)
    assert (logged.level(7), logged.entry(8) & bits.WRITE) == (1, 0)
    assert logged.dirty() == {7}


def test_one_split_makes_at_most_its_budget_of_tables() -> None:
    logged = Logged(level=2, flags=0)
    logged.write(0, 512, 1024, 1536)
    root = logged.vm.mmu.roots[0]
    assert tdp_mmu.split(logged.vm.mmu, root, root.everything, 1, budget=3) == 3  # type: ignore[arg-type]
    assert root.leaves == [0, 3 * 512, 1, 0]


def test_a_move_keeps_the_bits_and_a_refused_one_zaps_all_the_same() -> None:
    logged = Logged()
    logged.write(3, 9)
    logged.set_slot(0, 0x800, 128, HVA, 1)
    assert logged.dirty() == {3, 9}
    logged.guest_write(logged.vcpu, 0x805 << 12, b"x")
    root = logged.vcpu.arch.roots[0]
    beyond = logged.region(0, 1 << 34, 128, HVA, 1)
    assert refusal_of(logged.vm.slots_change.set_memory_region(beyond), logged) == errno.EINVAL
    assert root is not None
    assert root.invalid, "everything was zapped before the last check"
    assert logged.dirty() == {5}
    logged.touch(6)
    logged.guest_read(logged.vcpu, 0x806 << 12, 1)
    assert logged.dirty() == {6}


def test_a_refused_change_keeps_the_bits() -> None:
    logged = Logged()
    logged.write(3)
    for flags, pages, hva in ((9, 128, HVA), (3, 128, HVA), (1, 64, HVA), (1, 128, HVA + 4096)):
        region = logged.region(0, GFN, pages, hva, flags)
        assert refusal_of(logged.vm.slots_change.set_memory_region(region), logged) == errno.EINVAL
    logged.log(1)  # the same again is no change
    assert logged.dirty() == {3}
