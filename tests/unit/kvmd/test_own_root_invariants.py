"""What must hold of a root of the IOMMU's own, broken on purpose, is found by its number; and pins in it."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.invariants import check_vm
from kvmd.core.slots.memslot import SlotFlag
from kvmd.core.tables.spte import make_mmio_entry
from kvmd.core.tables.tdp_table import RootState
from protocol.pt import bits
from protocol.units import Gfn, Gpa, Hva
from tests.kit.kvmd import READ
from tests.unit.kvmd.own_root import BASE, PAGE, PAGES, Managed

TABLES = 0x10_0000


@pytest.fixture
def guest() -> Managed:
    made = Managed()
    made.write(0, 1)
    made.fault(2)
    made.fault(3, READ)
    assert check_vm(made.vm) == []
    return made


def numbers(guest: Managed) -> set[str]:
    return {sentence.split(":")[0] for sentence in check_vm(guest.vm)}


def change(guest: Managed, root: int, page: int, edit: Callable[[int], int], level: int = 1) -> None:
    """One entry of a table, in its raw bytes."""
    tables, gfn, table = guest.bare.tables, BASE + page, root - TABLES
    for at in range(4, level, -1):
        (entry,) = struct.unpack_from("<Q", tables, table + 8 * (gfn >> 9 * (at - 1) & 511))
        table = (entry & 0xF_FFFF_FFFF_F000) - TABLES
    at = table + 8 * (gfn >> 9 * (level - 1) & 511)
    (entry,) = struct.unpack_from("<Q", tables, at)
    struct.pack_into("<Q", tables, at, edit(entry))


BROKEN: dict[str, tuple[int, Callable[[int], int], set[str]]] = {
    "a frame that is free": (0, lambda entry: entry + 5 * PAGE, {"I6", "I11"}),
    "writable where the host's page is not": (3, lambda entry: entry | 0x0600_0000_0000_0002, {"I11"}),
    "W taken": (0, lambda entry: entry & ~2, {"I23"}),
    "W and its way back taken": (0, lambda entry: entry & ~bits.MMU_WRITABLE & ~2, {"I23"}),
    "the way back taken": (2, lambda entry: entry & ~bits.MMU_WRITABLE, {"I23"}),
    "A taken": (2, lambda entry: entry & ~bits.ACCESSED, {"I23"}),
    "an MMIO entry": (9, lambda entry: make_mmio_entry(Gfn(BASE + 9), 5), {"I23"}),
    "a frozen entry": (9, lambda entry: bits.FROZEN, {"I23"}),
    "a leaf nobody counted": (9, lambda entry: 0x0E00_0001_0000_9377, {"I6", "I11", "I16"}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_entry_of_the_iommus_root_is_found(guest: Managed, what: str) -> None:
    page, edit, expected = BROKEN[what]
    change(guest, guest.exported.root.hpa, page, edit)
    assert numbers(guest) == expected


@pytest.mark.parametrize("what", ["W taken", "W and its way back taken", "the way back taken", "A taken"])
def test_the_same_in_a_cpus_root_is_nothing(guest: Managed, what: str) -> None:
    page, edit, _ = BROKEN[what]
    change(guest, guest.cpu_root.hpa, page, edit)
    assert numbers(guest) == set()


def test_a_tracked_gfn_that_a_cpu_can_write_is_found_and_one_a_device_can_is_none(guest: Managed) -> None:
    guest.do(guest.vm.write_track.add(Gpa(BASE << 12)))
    assert guest.iommu[0]
    assert numbers(guest) == set()
    change(guest, guest.cpu_root.hpa, 0, lambda entry: entry | 2)
    assert numbers(guest) == {"I19"}


def test_a_page_a_device_can_write_whose_bit_is_clear_is_found_with_rings_too(guest: Managed) -> None:
    guest.log()
    slot = guest.vm.slots.find(Gfn(BASE))
    assert slot is not None
    assert slot.dirty is not None
    assert SlotFlag.LOG_DIRTY_PAGES in slot.flags
    assert numbers(guest) == set()
    slot.dirty.take()
    assert numbers(guest) == {"I20"}
    guest.vm.dirty_log.rings[0] = None  # type: ignore[assignment]
    assert numbers(guest) == {"I20"}


def test_an_own_root_that_became_invalid_while_it_is_lent_is_found(guest: Managed) -> None:
    guest.exported.root.state = RootState.INVALID
    assert numbers(guest) == {"I10"}


# -- pins ------------------------------------------------------------------------------------------------


def test_a_pinned_gfn_is_writable_for_the_device_and_survives_the_host_in_both_roots(guest: Managed) -> None:
    account = guest.vm.pinning.open()
    names = [guest.do(guest.vm.pinning.pin(account, guest.span(page))) for page in (0, 9)]
    guest.write(9)
    before = guest.entry(0), guest.entry(9)
    guest.do(guest.mm.munmap(Hva(guest.hva), 10 * PAGE))
    assert guest.iommu == guest.cpu == {0: True, 9: True}
    assert (guest.entry(0), guest.entry(9)) == before
    assert numbers(guest) == set()
    assert [guest.do(guest.vm.pinning.unpin(account, name)) for name in names] == [1, 1]
    assert guest.iommu == guest.cpu == {}
    assert guest.sound()


def test_a_pin_splits_the_huge_leaf_of_both_roots() -> None:
    guest = Managed(level=2)
    guest.fault(5)
    assert guest.exported.root.leaves == guest.cpu_root.leaves == [0, 0, 1, 0]
    account = guest.vm.pinning.open()
    guest.do(guest.vm.pinning.pin(account, guest.span(7)))
    assert guest.exported.root.leaves == guest.cpu_root.leaves == [0, 512, 0, 0]
    guest.log()
    assert guest.dirty() == set(range(PAGES)), "all of the leaf was writable when logging began"
    assert guest.fault(8) is FaultResult.SPURIOUS
    assert guest.sound()


def test_a_pinned_frame_that_the_own_root_lost_is_found(guest: Managed) -> None:
    account = guest.vm.pinning.open()
    guest.do(guest.vm.pinning.pin(account, guest.span(0)))
    change(guest, guest.exported.root.hpa, 0, lambda entry: entry + 7 * PAGE)
    assert numbers(guest) == {"I6", "I22"}


@pytest.mark.parametrize("page", [0, 1, 7, 63, 64, 300, 511])
def test_a_clear_bit_anywhere_under_a_huge_leaf_that_devices_write_is_found(page: int) -> None:
    guest = Managed(level=2, pages=512)
    guest.touch(0)
    assert guest.fault(0) is FaultResult.FIXED
    assert guest.exported.root.leaves[2] == 1
    guest.log()
    assert numbers(guest) == set()
    slot = guest.vm.slots.find(Gfn(BASE))
    assert slot is not None
    assert slot.dirty is not None
    slot.dirty.clear(0, (1 << page).to_bytes(64, "little"))
    assert numbers(guest) == {"I20"}
