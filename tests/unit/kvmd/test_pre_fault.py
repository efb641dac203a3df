"""KVM_PRE_FAULT_MEMORY while the slot it asks for goes."""

from __future__ import annotations

import errno

import pytest

from kvmd.core.cpu.pre_fault import pre_fault_memory
from kvmd.core.invariants import check_vm
from protocol.errors import UapiError
from protocol.units import Gpa
from tests.unit.kvmd.asleep import ELSEWHERE, GFN, GPA, HVA, PAGE, PAGES, Asleep


def going(guest: Asleep, gfn: int) -> None:
    """The slot is deleted (gfn 0) or moved, and the importer has not acked."""
    pages, hva = (PAGES, HVA) if gfn else (0, 0)
    guest.start(guest.vm.slots_change.set_memory_region(guest.region(0, gfn, pages, hva)))
    assert guest.importer.pending


@pytest.fixture
def guest() -> Asleep:
    made = Asleep(export=True)
    for page in range(3):
        made.page_comes(GPA + page * PAGE)
    made.io_fault(made.vm.exports.tdps[0], GFN)
    return made


@pytest.mark.parametrize("gfn", [0, ELSEWHERE], ids=["delete", "move"])
def test_a_slot_that_goes_is_eagain_and_not_waited_for(guest: Asleep, gfn: int) -> None:
    going(guest, gfn)
    with pytest.raises(UapiError) as caught:
        guest.run(pre_fault_memory(guest.vcpu, guest.vm.fault_path, Gpa(GPA), PAGE, 0))
    assert caught.value.errno == errno.EAGAIN
    assert not guest.vcpu.running
    guest.ack(guest.importer)
    with pytest.raises(UapiError) as caught:
        guest.run(pre_fault_memory(guest.vcpu, guest.vm.fault_path, Gpa(GPA), PAGE, 0))
    assert caught.value.errno == errno.ENOENT


def test_a_slot_that_goes_while_a_page_is_awaited_is_eagain(guest: Asleep) -> None:
    """Nothing was done by then."""
    asked = guest.start(pre_fault_memory(guest.vcpu, guest.vm.fault_path, Gpa(GPA + 3 * PAGE), PAGE, 0))
    assert not asked.done
    going(guest, 0)
    guest.page_comes(GPA + 3 * PAGE)
    with pytest.raises(UapiError) as caught:
        asked.result()
    assert caught.value.errno == errno.EAGAIN


def test_what_was_done_before_the_slot_goes_is_told(guest: Asleep) -> None:
    asked = guest.start(pre_fault_memory(guest.vcpu, guest.vm.fault_path, Gpa(GPA + PAGE), 4 * PAGE, 0))
    assert not asked.done, "page 3 sleeps"
    going(guest, 0)
    guest.page_comes(GPA + 3 * PAGE)
    assert asked.result() == (GPA + 3 * PAGE, 2 * PAGE)
    guest.ack(guest.importer)
    assert guest.table() == {}
    assert check_vm(guest.vm) == []


def test_a_guest_s_own_fault_waits_for_the_change(guest: Asleep) -> None:
    going(guest, 0)
    running = guest.start(guest.vcpu.run([("r", GPA, 8)]))
    assert not running.done
    guest.ack(guest.importer)
    assert running.result().exit.mmio == (GPA, 8, False, b"")
