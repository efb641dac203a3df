"""An access that KVM makes for the guest sleeps in a page fault, and its slot changes meanwhile.

The kernel makes it under kvm->srcu, which a change of the memslots waits for; here the change returns at
once and the access looks its slot up again (docs/decisions/0017).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmd.core.cpu.msr import MSR_KVM_WALL_CLOCK_NEW, set_msr
from kvmd.core.invariants import check_vm
from protocol.units import Gpa
from tests.unit.kvmd.asleep import (
    GFN,
    GPA,
    HVA,
    LOG,
    OURS,
    PAGE,
    PAGES,
    READONLY,
    SLOT_GOES,
    Asleep,
    left_by,
    mmio,
)

X = bytes(range(1, 9))
ACCESS = pytest.mark.parametrize("data", [X, None], ids=["store", "load"])
EXPORTED = pytest.mark.parametrize("export", [False, True])


@ACCESS
@EXPORTED
@SLOT_GOES
def test_slot_goes_while_it_sleeps(
    change: Callable[[Asleep], None], data: bytes | None, export: bool
) -> None:
    """Case 3: the store would end in memory that the VMM maps there for itself."""
    guest = Asleep(export=export)
    running = guest.access(GPA, data, cpl=0)
    change(guest)
    guest.vmm_maps_its_own()
    assert left_by(running.result()) == mmio(GPA, data)
    assert guest.seen(HVA, len(OURS)) == OURS
    assert check_vm(guest.vm) == []


@EXPORTED
def test_slot_is_made_anew_read_only_while_a_store_sleeps(export: bool) -> None:
    guest = Asleep(export=export)
    running = guest.access(GPA, X, cpl=0)
    guest.delete()
    guest.slot(flags=READONLY)
    guest.vmm_maps_its_own()
    assert left_by(running.result()) == mmio(GPA, X)
    assert guest.seen(HVA, len(OURS)) == OURS


@ACCESS
def test_slot_is_made_anew_over_other_memory_while_it_sleeps(data: bytes | None) -> None:
    guest = Asleep()
    running = guest.access(GPA, data, cpl=0)
    other = guest.map(PAGES)
    guest.run(guest.mm.write(other, b"the new "))
    guest.delete()
    guest.slot(hva=other)
    guest.vmm_maps_its_own()
    ran = running.result()
    assert ran.done
    assert ran.reads == ([] if data else [b"the new "])
    assert guest.seen(other, 8) == (data or b"the new ")
    assert guest.seen(HVA, len(OURS)) == OURS


def test_slot_is_going_when_the_page_comes() -> None:
    """It is deleted, and not every importer has acked: the access waits, then finds none."""
    guest = Asleep(export=True)
    guest.page_comes(GPA + PAGE)
    guest.io_fault(guest.vm.exports.tdps[0], GFN + 1)
    running = guest.access(GPA, X, cpl=0)
    deleted = guest.start(guest.vm.slots_change.set_memory_region(guest.region(0, 0, 0, 0)))
    guest.page_comes()
    assert not deleted.done
    assert not running.done
    guest.ack(guest.importer)
    assert deleted.done
    assert left_by(running.result()) == mmio(GPA, X)
    assert guest.seen(HVA, 4) == b"uffd"


def test_the_page_never_comes_and_the_slot_is_another_by_then() -> None:
    """The lookup fails for the old slot's memory; what counts is the new one's."""
    guest = Asleep()
    running = guest.access(GPA, X, cpl=0)
    other = guest.map(PAGES)
    guest.delete()
    guest.slot(hva=other)
    guest.run(guest.mm.munmap(HVA, PAGES * PAGE))
    guest.flows.run_ready()
    assert running.result().done
    assert guest.seen(other, 8) == X


def test_the_page_never_comes_and_the_slot_is_still_there() -> None:
    guest = Asleep()
    running = guest.access(GPA, X, cpl=0)
    guest.run(guest.mm.munmap(HVA, PAGES * PAGE))
    guest.flows.run_ready()
    assert left_by(running.result()) == mmio(GPA, X)


def test_an_access_across_two_pages_looks_for_each() -> None:
    """The first page's slot goes while the second sleeps: what is done stays done."""
    guest = Asleep()
    guest.page_comes()
    running = guest.access(GPA + PAGE - 4, X, cpl=0)
    guest.delete()
    guest.vmm_maps_its_own()
    ran = running.result()
    assert left_by(ran) == (GPA + PAGE, 4, True, X[4:])
    assert guest.seen(HVA, len(OURS)) == OURS


# -- the log -------------------------------------------------------------------------------------------


def by_the_emulator(guest: Asleep) -> None:
    guest.access(GPA + 2 * PAGE, X, cpl=0)


def to_a_tracked_gfn(guest: Asleep) -> None:
    guest.do(guest.vm.write_track.add(Gpa(GPA + 2 * PAGE)))
    guest.access(GPA + 2 * PAGE, X, cpl=3)


def read_modify_write(guest: Asleep) -> None:
    guest.start(guest.vcpu.run([("add", GPA + 2 * PAGE, 8, 1)], 0))


def of_a_register(guest: Asleep) -> None:
    guest.start(set_msr(guest.vcpu.ram, guest.vm.wall_clock_epoch_ns, MSR_KVM_WALL_CLOCK_NEW, GPA + 2 * PAGE))


STORES = pytest.mark.parametrize(
    "store", [by_the_emulator, to_a_tracked_gfn, read_modify_write, of_a_register]
)


@STORES
@EXPORTED
def test_logging_begins_while_a_store_sleeps(store: Callable[[Asleep], None], export: bool) -> None:
    """Case 4: the page is in the bitmap of one of two GETs."""
    guest = Asleep(export=export)
    store(guest)
    guest.slot(flags=LOG)
    assert guest.dirty() == set()
    guest.page_comes(GPA + 2 * PAGE)
    assert guest.seen(HVA + 2 * PAGE, 4) != b"uffd", "the store has landed"
    assert guest.dirty() == {2}
    assert guest.dirty() == set()
    assert check_vm(guest.vm) == []


@pytest.mark.parametrize("store", [by_the_emulator, read_modify_write, of_a_register])
def test_an_equal_slot_is_made_while_a_store_sleeps(store: Callable[[Asleep], None]) -> None:
    """Equal, yet another: it logs into a bitmap of its own."""
    guest = Asleep(LOG)
    store(guest)
    guest.delete()
    guest.slot(flags=LOG)
    guest.page_comes(GPA + 2 * PAGE)
    assert guest.dirty() == {2}


@STORES
def test_the_bitmap_is_taken_while_a_store_sleeps(store: Callable[[Asleep], None]) -> None:
    guest = Asleep(LOG)
    store(guest)
    assert guest.dirty() == set()
    guest.page_comes(GPA + 2 * PAGE)
    assert guest.dirty() == {2}


def test_logging_ends_while_a_store_sleeps() -> None:
    guest = Asleep(LOG)
    by_the_emulator(guest)
    guest.slot()
    guest.page_comes(GPA + 2 * PAGE)
    assert guest.seen(HVA + 2 * PAGE, 8) == X
    guest.slot(flags=LOG)
    assert guest.dirty() == set()
