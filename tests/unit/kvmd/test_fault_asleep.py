"""A fault sleeps while its page is looked up, and its slot, its log or its root is another one afterwards.

What it found belongs to a slot that is gone: nothing of it may be mapped, marked or told [KVM mmu.c,
is_page_fault_stale].
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmd.core.cpu.exits import Mmio
from kvmd.core.cpu.vcpu import RunResult
from kvmd.core.export.tdp_fd import TdpFaultType
from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.invariants import check_vm
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.units import Gpa, Hva
from tests.kit.kvmd import READ, WRITE
from tests.unit.kvmd.asleep import (
    ELSEWHERE,
    GFN,
    GPA,
    HVA,
    LOG,
    PAGE,
    PAGES,
    READONLY,
    SLOT_GOES,
    Asleep,
    left_by,
)

X = bytes(range(1, 9))
SMM = 1 << 16  # its slots have the address space in the high half
KINDS = pytest.mark.parametrize("kind", [READ, WRITE], ids=["read", "write"])
EXPORTED = pytest.mark.parametrize("export", [False, True])


def other_memory(guest: Asleep) -> Hva:
    made = guest.map(PAGES)
    guest.run(guest.mm.write(made, b"the new memory" + bytes(PAGES * PAGE - 14)))
    return made


def device(guest: Asleep, kind: TdpFaultType) -> Wait[FaultResult]:
    asked = guest.start(guest.vm.exports.tdps[0].fault(guest.vm.fault_path, 77, guest.gfn, kind))
    assert not asked.done
    return asked


def vcpu(guest: Asleep, kind: TdpFaultType) -> Wait[RunResult]:
    return guest.access(GPA, X if kind.write else None, cpl=3)


def exit_of(kind: TdpFaultType) -> Mmio:
    return Mmio(Gpa(GPA), 8, kind.write, X if kind.write else b"")


# -- the slot ------------------------------------------------------------------------------------------


@KINDS
@SLOT_GOES
def test_slot_goes_under_a_device_s_fault(change: Callable[[Asleep], None], kind: TdpFaultType) -> None:
    guest = Asleep(export=True)
    asked = device(guest, kind)
    change(guest)
    guest.page_comes()
    assert asked.result() is FaultResult.NO_SLOT
    assert GFN not in guest.table()
    assert check_vm(guest.vm) == []


@KINDS
@SLOT_GOES
@EXPORTED
def test_slot_goes_under_a_vcpu_s_fault(
    change: Callable[[Asleep], None], kind: TdpFaultType, export: bool
) -> None:
    """Not exported, the root it began on is invalid by now, too."""
    guest = Asleep(export=export)
    running = vcpu(guest, kind)
    change(guest)
    guest.page_comes()
    assert left_by(running.result()) == exit_of(kind)
    assert check_vm(guest.vm) == []


@KINDS
@EXPORTED
def test_slot_is_made_anew_over_other_memory(kind: TdpFaultType, export: bool) -> None:
    guest = Asleep(export=export)
    running = vcpu(guest, kind)
    made = other_memory(guest)
    guest.delete()
    guest.slot(hva=made)
    guest.page_comes()
    assert running.result().done
    if kind is READ:
        assert running.result().reads == [b"the new "]
    else:
        assert guest.seen(made, 8) == X
    assert guest.seen(HVA, 4) == b"uffd"
    assert check_vm(guest.vm) == []


def test_slot_is_made_anew_over_other_memory_under_a_device_s_fault() -> None:
    guest = Asleep(export=True)
    asked = device(guest, WRITE)
    made = other_memory(guest)
    guest.delete()
    guest.slot(hva=made)
    guest.page_comes()
    assert asked.result() is FaultResult.FIXED
    page = guest.mm.present_page(made)
    assert page is not None
    assert guest.table() == {GFN: (page.pfn, True)}
    assert check_vm(guest.vm) == []


def test_slot_is_made_anew_read_only_under_a_store() -> None:
    guest = Asleep(export=True)
    running, asked = vcpu(guest, WRITE), device(guest, WRITE)
    guest.delete()
    guest.slot(flags=READONLY)
    guest.page_comes()
    assert left_by(running.result()) == exit_of(WRITE)
    assert asked.result() is FaultResult.READONLY
    assert check_vm(guest.vm) == []


@pytest.mark.parametrize("gfn", [0, ELSEWHERE], ids=["delete", "move"])
def test_slot_is_going_when_the_page_comes(gfn: int) -> None:
    """Everything is zapped and not every importer has acked: what is mapped now would stay behind."""
    guest = Asleep(export=True)
    guest.page_comes(GPA + PAGE)
    guest.io_fault(guest.vm.exports.tdps[0], GFN + 1)
    asked, running = device(guest, WRITE), vcpu(guest, WRITE)
    region = guest.region(0, gfn, PAGES if gfn else 0, HVA if gfn else 0)
    changed = guest.start(guest.vm.slots_change.set_memory_region(region))
    guest.page_comes()
    assert [wait.done for wait in (changed, asked, running)] == [False] * 3
    assert guest.table() == {}
    guest.ack(guest.importer)
    assert changed.done
    assert asked.result() is FaultResult.NO_SLOT
    assert left_by(running.result()) == exit_of(WRITE)
    assert check_vm(guest.vm) == []


# -- its log -------------------------------------------------------------------------------------------


@EXPORTED
def test_logging_begins_under_a_store(export: bool) -> None:
    guest = Asleep(export=export)
    running = vcpu(guest, WRITE)
    guest.slot(flags=LOG)
    assert guest.dirty() == set()
    guest.page_comes()
    assert running.result().done
    assert check_vm(guest.vm) == []
    assert guest.dirty() == {0}


@EXPORTED
def test_an_equal_slot_is_made_under_a_store(export: bool) -> None:
    """Equal, yet another: it logs into a bitmap of its own."""
    guest = Asleep(LOG, export=export)
    running = vcpu(guest, WRITE)
    guest.delete()
    guest.slot(flags=LOG)
    guest.page_comes()
    assert running.result().done
    assert check_vm(guest.vm) == []
    assert guest.dirty() == {0}


def test_an_equal_slot_is_made_under_a_device_s_fault() -> None:
    guest = Asleep(LOG, export=True)
    asked = device(guest, WRITE)
    guest.delete()
    guest.slot(flags=LOG)
    guest.page_comes()
    assert asked.result() is FaultResult.FIXED
    assert guest.dirty() == {0}


def test_tracking_begins_under_a_store() -> None:
    guest = Asleep(LOG, export=True)
    running, asked = vcpu(guest, WRITE), device(guest, WRITE)
    guest.do(guest.vm.write_track.add(Gpa(GPA)))
    guest.page_comes()
    assert running.result().done
    assert asked.result() in (FaultResult.FIXED, FaultResult.SPURIOUS), "mapped, and not for write"
    assert guest.table()[GFN][1] is False
    assert check_vm(guest.vm) == []
    assert guest.dirty() == {0}


# -- its root ------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("smm", [False, True])
def test_another_slot_s_removal_makes_the_root_invalid_under_a_vcpu_s_fault(
    kind: TdpFaultType, smm: bool
) -> None:
    """A vCPU goes on on a new root: in the old one nobody finds the page, and it is taken apart."""
    guest = Asleep(export=smm)
    as_id = int(smm)
    if smm:
        guest.set_slot(SMM, GFN, PAGES, HVA)
    guest.set_slot(as_id << 16 | 7, ELSEWHERE, 1, guest.map(1))
    code = [("w", GPA, X) if kind is WRITE else ("r", GPA, 8)]
    running = guest.start(guest.vcpu.run(code, smm=smm))
    old = guest.vcpu.arch.roots[as_id]
    assert old is not None
    guest.do(guest.vm.slots_change.set_memory_region(guest.region(as_id << 16 | 7, 0, 0, 0)))
    assert old.invalid
    guest.page_comes()
    assert running.result().done
    new = guest.vcpu.arch.roots[as_id]
    assert new is not None
    assert new is not old
    assert not new.invalid
    assert sum(new.leaves) == 1
    assert old not in guest.vm.mmu.roots
    assert check_vm(guest.vm) == []


def test_the_export_ends_under_a_device_s_fault() -> None:
    guest = Asleep(export=True)
    asked = device(guest, WRITE)
    guest.do(guest.vm.exports.close(guest.vm.exports.tdps[0]))
    guest.page_comes()
    with pytest.raises(UapiError, match="not exported any more"):
        asked.result()
    assert check_vm(guest.vm) == []


def test_the_process_exits_under_a_fault() -> None:
    guest = Asleep(export=True)
    asked = device(guest, WRITE)
    guest.do(guest.mm.exit())
    assert asked.result() is FaultResult.NO_PAGE
    assert guest.table() == {}
    assert check_vm(guest.vm) == []
