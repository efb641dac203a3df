"""I25: a store in a slot that logs is in the bitmap, a ring or a report on its way; each way to lose one."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from kvmd.core.cpu.cpu import Cpu
from kvmd.core.cpu.guest_ram import GuestRam
from kvmd.core.cpu.msr import MSR_KVM_WALL_CLOCK_NEW, set_msr
from kvmd.core.faults.fault_path import FaultPath
from kvmd.core.host import CpuFeatures
from kvmd.core.invariants import check_vm
from kvmd.core.mm.vma import Prot
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.dirty_ring import DirtyRing
from kvmd.core.tables import tdp_log
from kvmd.core.vm import Kvm
from protocol.errors import UapiError
from protocol.units import Gfn, Gpa, Hva
from tests.kit.kvmd import BITMAP
from tests.unit.kvmd.asleep import GPA, LOG, Asleep
from tests.unit.kvmd.asleep import PAGE as PAGE_BYTES
from tests.unit.kvmd.logged import GFN, HVA, NO_PML, Logged

PML = CpuFeatures(pml=True)


def lost(vm: Kvm) -> list[str]:
    """Where I25 says that a store was lost."""
    return [found.split()[2] for found in check_vm(vm) if found.startswith("I25:")]


def gfn(page: int) -> str:
    return f"{GFN + page:#x}"


# -- what is told is not lost --------------------------------------------------------------------------


@pytest.mark.parametrize("features", [PML, NO_PML], ids=["pml", "wp"])
@pytest.mark.parametrize("export", [False, True])
@pytest.mark.parametrize("manual", [0, 1, 3])
@pytest.mark.parametrize("ring", [0, 16384])
def test_nothing_is_lost_by_any_way_to_log(
    features: CpuFeatures, export: bool, manual: int, ring: int
) -> None:
    guest = Logged(features, export=export, manual=manual, ring=ring)

    def finish(flow: Any) -> None:
        over = guest.start(flow)
        while guest.importer.pending:
            assert lost(guest.vm) == []
            guest.ack(guest.importer)
        over.result()

    for rounds in range(3):
        guest.write(0, 1, 5, 64 + rounds)
        for code in (("w", GFN + 7 << 12, b"x"), ("add", GFN + 8 << 12, 8, 1), ("stos", GFN + 9 << 12, 1, 3)):
            assert guest.run(guest.vcpu.run([code], 0)).done
            assert guest.run(guest.vcpu.run([code], 3)).done
        assert check_vm(guest.vm) == []
        finish(guest.get())
        finish(guest.clear(0, 128, {0, 1, 7}) if manual else guest.get())
        if ring:
            struct.pack_into("<I", guest.ring, rounds * 16, 2)
            finish(guest.vm.dirty_log.reset_rings())
        assert check_vm(guest.vm) == []


def test_a_store_while_a_report_is_on_its_way_is_told_by_it() -> None:
    """The device has its translation until it acks."""
    guest = Logged(export=True)
    guest.write(3)
    asked = guest.start(guest.get())
    guest.vm.dirty_log.stores.stored(0, Gfn(GFN + 3))
    assert lost(guest.vm) == []
    guest.ack(guest.importer)
    assert asked.done
    assert lost(guest.vm) == []
    guest.vm.dirty_log.stores.stored(0, Gfn(GFN + 3))
    assert lost(guest.vm) == [gfn(3)], "its translation is gone: this store must not be possible"


def test_a_report_of_another_page_tells_nothing() -> None:
    guest = Logged(export=True)
    guest.write(3)
    guest.start(guest.get())
    guest.vm.dirty_log.stores.stored(0, Gfn(GFN + 4))
    assert lost(guest.vm) == [gfn(4)]


def test_a_report_that_cannot_be_copied_is_an_error_told() -> None:
    guest = Logged()
    guest.write(3)
    with pytest.raises(UapiError):
        guest.run(guest.get(where=0x10))
    assert lost(guest.vm) == []


def test_a_moved_slot_keeps_what_is_untold_and_a_deleted_one_does_not() -> None:
    guest = Logged()
    guest.write(3)
    guest.set_slot(0, 0x1000, guest.pages, HVA, 1)
    slot = guest.vm.slots.find(Gfn(0x1000))
    assert slot is not None
    assert slot.dirty is not None
    assert lost(guest.vm) == []
    slot.dirty.take()
    assert lost(guest.vm) == ["0x1003"]
    guest.set_slot(0, 0x2000, guest.pages, HVA, 0)
    assert lost(guest.vm) == [], "moved, and logs no more"
    guest.set_slot(0, 0x1000, guest.pages, HVA, 1)
    assert lost(guest.vm) == []
    guest.guest_write(guest.vcpu, 0x1003 << 12, b"x")
    guest.set_slot(0, 0, 0, 0)
    guest.log(1)
    assert lost(guest.vm) == []


def test_what_user_space_does_to_its_ring_is_its_own_loss() -> None:
    guest = Logged(ring=16384, bitmap=False)
    guest.write(3)
    struct.pack_into("<IIQ", guest.ring, 0, 2, 0, 5)
    guest.run(guest.vm.dirty_log.reset_rings())
    assert lost(guest.vm) == []
    guest.write(3, 5)
    assert lost(guest.vm) == []


def test_a_ring_that_ran_over_lost_what_user_space_would_not_take() -> None:
    """A store KVM makes for user space does not wait for room."""
    guest = Logged(ring=16384, bitmap=False)
    for page in range(1026):
        at = GFN + page % guest.pages << 12
        assert guest.run(set_msr(guest.vcpu.ram, guest.vm.wall_clock_epoch_ns, MSR_KVM_WALL_CLOCK_NEW, at))
    assert lost(guest.vm) == []


# -- planted bugs --------------------------------------------------------------------------------------


def store_of_cpu(guest: Logged) -> None:
    guest.write(3)


def store_of_cpu_again(guest: Logged) -> None:
    """To a page that was told of and protected."""
    guest.write(3)
    guest.dirty()
    guest.write(3)


def store_at_privilege_0(guest: Logged) -> None:
    guest.run(guest.vcpu.run([("w", GFN + 3 << 12, b"x")], 0))


def store_to_tracked(guest: Logged) -> None:
    guest.run(guest.vm.write_track.add(Gpa(GFN + 3 << 12)))
    guest.write(3)


def store_of_register(guest: Logged) -> None:
    guest.run(set_msr(guest.vcpu.ram, guest.vm.wall_clock_epoch_ns, MSR_KVM_WALL_CLOCK_NEW, GFN + 3 << 12))


def copy(guest: Logged) -> None:
    guest.run(guest.vcpu.run([("movs", GFN + 3 << 12, GFN + 4 << 12, 64)]))


def modify(guest: Logged) -> None:
    guest.run(guest.vcpu.run([("add", GFN + 3 << 12, 8, 1)]))


def unmarked_by_kvm(patch: pytest.MonkeyPatch) -> None:
    """The stores of KVM itself are told to nobody."""

    async def store(self: GuestRam, gpa: Gpa, data: bytes) -> bool:
        found = await self._reach(gpa, len(data), write=True)
        if found is None:
            return False
        found[1][:] = data
        self._dirty_log.stores.stored(self._as_id, Gfn(gpa >> 12))
        return True

    patch.setattr(GuestRam, "store", store)


def no_marks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DirtyLog, "mark", lambda *_: None)


def no_pml(patch: pytest.MonkeyPatch) -> None:
    """A CPU sets D and logs nothing."""
    patch.setattr(Cpu, "_log", lambda *_: None)


def no_tlb_flush(patch: pytest.MonkeyPatch) -> None:
    """A CPU goes on storing through what it has cached."""
    patch.setattr(Kvm, "_tell_walkers", lambda *_: [])


def silent_fast_fault(patch: pytest.MonkeyPatch) -> None:
    def fast(self: FaultPath, fault: Any, slot: Any, vcpu: Any) -> bool:
        return tdp_log.fast_page_fault(self._mmu, self._fault_root(vcpu, 0), fault.gfn, logs=slot.logs)

    patch.setattr(FaultPath, "_fast_page_fault", fast)


def bits_of_another_page(patch: pytest.MonkeyPatch) -> None:
    mark = DirtyLog.mark

    def off_by_one(self: DirtyLog, slot: Any, gfn: Any, vcpu_id: Any, npages: int = 1) -> None:
        mark(self, slot, Gfn(gfn + 1), vcpu_id, npages)

    patch.setattr(DirtyLog, "mark", off_by_one)


@pytest.mark.parametrize(
    ("plant", "store", "features"),
    [
        (unmarked_by_kvm, store_at_privilege_0, PML),
        (unmarked_by_kvm, store_to_tracked, NO_PML),
        (unmarked_by_kvm, store_of_register, NO_PML),
        (no_marks, store_of_cpu, NO_PML),
        (no_marks, copy, PML),
        (no_marks, modify, PML),
        (no_pml, store_of_cpu_again, PML),
        (no_tlb_flush, store_of_cpu_again, PML),
        (no_tlb_flush, store_of_cpu_again, NO_PML),
        (silent_fast_fault, store_of_cpu_again, NO_PML),
        (bits_of_another_page, store_of_cpu, NO_PML),
        (bits_of_another_page, store_at_privilege_0, NO_PML),
    ],
)
def test_the_check_finds_a_store_that_is_told_to_nobody(
    plant: Callable[[pytest.MonkeyPatch], None],
    store: Callable[[Logged], None],
    features: CpuFeatures,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest = Logged(features)
    store(guest)
    assert check_vm(guest.vm) == []
    plant(monkeypatch)
    guest = Logged(features)
    store(guest)
    assert lost(guest.vm) == [gfn(3)]


def test_the_check_finds_a_push_that_never_came(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Logged(ring=16384, bitmap=False)
    monkeypatch.setattr(DirtyRing, "push", lambda *_: True)
    guest.write(3)
    assert lost(guest.vm) == [gfn(3)]


def test_the_check_finds_a_store_that_is_marked_in_a_bitmap_nobody_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted bug: an access marks the slot it found before it slept."""

    async def store(self: GuestRam, gpa: Gpa, data: bytes) -> bool:
        slot = await self._slot(gpa)
        assert slot is not None
        hva = Hva(slot.hva_of(Gfn(gpa >> 12)) + gpa % PAGE_BYTES)
        await self._mm.write(hva, data, user=False)
        self._dirty_log.mark(slot, Gfn(gpa >> 12), self._vcpu.id)
        self._dirty_log.stores.stored(self._as_id, Gfn(gpa >> 12))
        return True

    monkeypatch.setattr(GuestRam, "store", store)
    guest = Asleep()
    guest.access(GPA, b"x" * 8, cpl=0)
    guest.slot(flags=LOG)
    guest.page_comes()
    assert lost(guest.vm) == [f"{guest.gfn:#x}"]


def test_pages_that_were_never_stored_to_are_not_asked_for() -> None:
    guest = Logged()
    guest.read(3)
    guest.run(guest.mm.write(Hva(HVA), b"the VMM's own store"))
    assert list(guest.vm.dirty_log.stores.untold()) == []
    guest.log(0)
    guest.write(3)
    assert list(guest.vm.dirty_log.stores.untold()) == []
    guest.run(guest.mm.mprotect(Hva(BITMAP), 4096, Prot.READ))
