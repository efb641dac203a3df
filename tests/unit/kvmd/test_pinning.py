"""On-demand pinning: what the host, the VMM and the guest do, and what a pinned page keeps through it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.host import CpuFeatures
from kvmd.core.invariants import check_vm
from kvmd.core.mm.failure import poison
from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.fork import fork
from kvmd.core.mm.madvise import dontneed
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.mremap import mremap
from kvmd.core.mm.reclaim import age, merge, migrate, numa_hint, swap_out
from kvmd.core.mm.thp import split
from kvmd.core.mm.vma import Prot
from kvmd.core.slots.dirty_log import ClearDirtyLog
from kvmd.core.stats import vm_stats
from protocol.errors import UapiError
from protocol.pt import bits
from protocol.units import Gfn, GfnSpan, Gpa, Hva, Level
from tests.kit.kvmd import WRITE
from tests.unit.kvmd.logged import Logged
from tests.unit.kvmd.pinned import BASE, PAGE, PAGES, WORD, PinnedRam

Flow = Coroutine[Any, None, Any]


def refusal(action: Callable[[], object]) -> int:
    with pytest.raises(UapiError) as caught:
        action()
    return caught.value.errno


def test_a_pin_maps_its_pages_at_once_writable_for_a_device_that_never_asks() -> None:
    guest = PinnedRam()
    guest.pin(WORD, 3)
    assert {gfn: writable for gfn, (_, writable) in guest.table().items()} == {
        WORD: True,
        WORD + 1: True,
        WORD + 2: True,
    }
    assert guest.importer.heard == []
    assert vm_stats(guest.vm)["pinned_pages"] == 3
    assert guest.sound()


def test_a_pin_of_what_was_only_read_breaks_copy_on_write_first() -> None:
    guest = PinnedRam()
    guest.do(guest.vcpu.run([("r", WORD << 12, 1)]))
    zeroes = guest.table()[WORD]
    guest.pin(WORD)
    assert zeroes[1] is False
    assert guest.table()[WORD] != zeroes
    assert guest.table()[WORD][1] is True
    assert guest.importer.heard  # of the zero page's end
    assert guest.sound()


def test_a_pin_that_meets_an_entry_of_another_frame_is_a_bug_of_ours() -> None:
    """The host tells before it changes a page, so what is mapped there is what is pinned (I11)."""
    guest = PinnedRam()
    guest.do(guest.vcpu.run([("w", WORD << 12, b"x")]))
    root = guest.exported.root
    met = guest.vm.mmu.leaf_at(root, Gfn(WORD))
    assert met is not None
    guest.vm.mmu.change(root, met.gfn, met.level, met.at, met.entry, met.entry ^ 1 << 20)
    with pytest.raises(AssertionError, match=f"I11: gfn {WORD:#x}"):
        guest.pin(WORD)


# -- a. entries change atomically -------------------------------------------------------------------------


def test_rule_a_a_pin_in_a_huge_leaf_splits_it_without_a_flush_and_keeps_every_translation() -> None:
    guest = PinnedRam(level=2)
    guest.guest_write(guest.vcpu, WORD << 12, b"x")
    before = guest.table()
    guest.pin(WORD)
    assert guest.exported.root.leaves == [0, 512, 0, 0]
    assert guest.table() == before
    assert guest.importer.heard == []
    assert guest.sound()


def test_rule_a_a_fault_beside_a_pin_in_a_huge_host_page_maps_a_small_page() -> None:
    guest = PinnedRam(level=2)
    guest.pin(WORD)
    guest.guest_write(guest.vcpu, (WORD + 1) << 12, b"x")
    assert guest.exported.root.leaves == [0, 2, 0, 0]
    assert guest.sound()


def test_rule_a_logging_that_ends_collapses_no_table_that_maps_a_pinned_gfn() -> None:
    guest = PinnedRam(level=2)
    guest.guest_write(guest.vcpu, WORD << 12, b"x")
    guest.pin(WORD)
    kept = guest.entry_of(WORD)
    guest.change_slot(0, BASE, PAGES, guest.hva, 1)
    guest.change_slot(0, BASE, PAGES, guest.hva)
    assert guest.entry_of(WORD) == kept
    assert guest.exported.root.leaves == [0, 512, 0, 0]
    assert guest.unpin(WORD) == 1
    guest.change_slot(0, BASE, PAGES, guest.hva, 1)
    guest.change_slot(0, BASE, PAGES, guest.hva)
    assert guest.exported.root.leaves == [0, 0, 0, 0]
    assert guest.sound()


def test_rule_a_without_a_table_page_to_split_into_the_pin_is_refused_and_leaves_nothing() -> None:
    guest = PinnedRam(level=2, tables=3 * PAGE)
    guest.guest_write(guest.vcpu, WORD << 12, b"x")
    assert guest.refused(WORD) == errno.ENOMEM
    assert guest.exported.root.leaves == [0, 0, 1, 0]
    assert (len(guest.vm.pinning.pinned), guest.mm.pinned_pages) == (0, 0)
    assert guest.sound()


@pytest.mark.parametrize("what", ["absent", "another frame", "no W", "no D", "huge"])
def test_rule_a_the_one_place_that_stores_entries_asserts_it(what: str) -> None:
    """Each store I22 forbids, made on purpose."""
    guest = PinnedRam()
    guest.pin(WORD)
    met = guest.vm.mmu.leaf_at(guest.exported.root, Gfn(WORD))
    assert met is not None
    new = {
        "absent": 0,
        "another frame": met.entry + PAGE,
        "no W": met.entry & ~bits.WRITE,
        "no D": met.entry & ~bits.DIRTY,
        "huge": bits.FROZEN,
    }[what]
    level = Level(2 if what == "huge" else 1)
    with pytest.raises(AssertionError, match="I22"):
        guest.vm.mmu.change(guest.exported.root, Gfn(WORD), level, met.at, met.entry, new)


# -- b. only the slot's removal zaps ----------------------------------------------------------------------


def drop(mm: Mm, hva: Hva) -> Flow:
    return dontneed(mm, hva, PAGE)


HOST: dict[str, Callable[[Mm, Hva], Flow]] = {
    "DONTNEED": drop,
    "munmap": lambda mm, hva: mm.munmap(hva, PAGE),
    "mprotect none": lambda mm, hva: mm.mprotect(hva, PAGE, Prot.NONE),
    "mprotect read": lambda mm, hva: mm.mprotect(hva, PAGE, Prot.READ),
    "mremap": lambda mm, hva: mremap(mm, hva, PAGE, PAGE, Hva(0x7000_0000_0000)),
    "poison": lambda mm, hva: poison(mm, hva, PAGE),
    "exit": lambda mm, hva: mm.exit(),
}


@pytest.mark.parametrize("what", list(HOST))
def test_rule_b_the_host_s_mapping_goes_and_entry_frame_and_bytes_stay(what: str) -> None:
    guest = PinnedRam()
    guest.guest_write(guest.vcpu, WORD << 12, b"kept")
    guest.pin(WORD)
    kept = guest.entry_of(WORD)
    guest.do(HOST[what](guest.mm, guest.hva_of(WORD)))
    assert guest.entry_of(WORD) == kept
    assert guest.guest_read(guest.vcpu, WORD << 12, 4).reads == [b"kept"]
    assert guest.sound()
    assert guest.unpin(WORD) == 1
    assert guest.entry_of(WORD) == 0  # the host has it no more, or not to write
    assert guest.sound()


def test_rule_b_a_pin_outlives_the_truncation_of_its_file() -> None:
    guest = PinnedRam()
    file = MemoryFile(guest.host.memory, "f", PAGE)
    hva = guest.run(guest.mm.mmap(None, PAGE, Prot.READ | Prot.WRITE, shared=True, file=file))
    guest.change_slot(1, 0x800, 1, hva)
    guest.pin(0x800)
    kept = guest.entry_of(0x800)
    guest.do(file.truncate(0))
    assert guest.entry_of(0x800) == kept
    assert guest.sound()
    guest.unpin(0x800)
    assert guest.entry_of(0x800) == 0
    assert guest.sound()


@pytest.mark.parametrize("how", ["delete", "move"])
def test_rule_b_a_slot_that_goes_is_zapped_flushed_acked_and_only_then_unpinned(how: str) -> None:
    guest = PinnedRam()
    guest.pin(WORD)
    guest.do(drop(guest.mm, guest.hva_of(WORD)))
    frames = guest.host.frames.in_use
    pages = 0 if how == "delete" else PAGES
    region = guest.region(0, 0x800, pages, guest.hva)
    wait = guest.start(guest.vm.slots_change.set_memory_region(region))
    assert guest.entry_of(WORD) == 0
    assert guest.host.frames.in_use == frames  # not acked: the device may still be writing
    guest.settle(wait)
    assert guest.host.frames.in_use == frames - 1
    assert (guest.unpin(WORD), guest.mm.pinned_pages) == (0, 0)
    assert guest.sound()


def test_rule_b_the_removal_of_another_slot_zaps_all_but_what_is_pinned() -> None:
    guest = PinnedRam()
    guest.change_slot(1, 0x800, 16, guest.map(16))
    guest.guest_write(guest.vcpu, 0x800 << 12, b"x")
    guest.guest_write(guest.vcpu, (WORD + 1) << 12, b"x")
    guest.pin(WORD)
    kept = guest.entry_of(WORD)
    guest.change_slot(1, 0, 0, 0)
    assert set(guest.table()) == {WORD}
    assert guest.entry_of(WORD) == kept
    assert guest.sound()


def test_rule_b_a_move_that_is_refused_takes_no_pin() -> None:
    """The kernel zaps before it finds the new place beyond what the TDP maps; the slot stays where it was."""
    guest = PinnedRam()
    guest.pin(WORD)
    guest.do(guest.vcpu.run([("w", (WORD + 1) << 12, b"x")]))
    pinned = guest.entry_of(WORD)
    beyond = guest.vm.slots.gfn_limit - 1
    assert refusal(lambda: guest.change_slot(0, beyond, PAGES, guest.hva)) == errno.EINVAL
    assert (guest.entry_of(WORD), guest.entry_of(WORD + 1)) == (pinned, 0)
    assert vm_stats(guest.vm)["pinned_pages"] == 1
    assert guest.sound()
    assert guest.unpin(WORD) == 1, "the importer's account still has it"
    assert guest.io_fault(guest.exported, WORD + 1) is FaultResult.FIXED


def test_rule_b_who_faults_on_a_pinned_gfn_gets_the_pinned_frame_not_the_host_s_new_one() -> None:
    guest = PinnedRam()
    guest.pin(WORD)
    guest.guest_write(guest.vcpu, WORD << 12, b"device")
    guest.do(drop(guest.mm, guest.hva_of(WORD)))
    guest.run(guest.mm.write(guest.hva_of(WORD), b"host's"))
    result = guest.do(guest.exported.fault(guest.vm.fault_path, 77, Gfn(WORD), WRITE))
    assert result is FaultResult.SPURIOUS
    assert guest.guest_read(guest.vcpu, WORD << 12, 6).reads == [b"device"]


def test_rule_b_an_invalidation_in_progress_is_waited_for_and_its_page_is_not_pinned() -> None:
    """Or the pin would hold the page that goes, and the process have another."""
    guest = PinnedRam()
    guest.guest_write(guest.vcpu, WORD << 12, b"old")
    going = guest.start(drop(guest.mm, guest.hva_of(WORD)))
    span = GfnSpan.of_pages(Gfn(WORD), 1)
    pinning = guest.start(guest.vm.pinning.pin(guest.account, span))
    assert not pinning.done
    guest.settle(going)
    guest.settle(pinning)
    assert guest.sound()
    guest.guest_write(guest.vcpu, WORD << 12, b"new")
    assert guest.run(guest.mm.read(guest.hva_of(WORD), 3)) == b"new"


# -- c. nothing write-protects ----------------------------------------------------------------------------


@pytest.mark.parametrize("manual", [0, 1, 3])
def test_rule_c_dirty_logging_reports_a_pinned_page_in_every_get_and_never_protects_it(manual: int) -> None:
    guest = PinnedRam()
    guest.vm.dirty_log.manual_protect = manual
    guest.pin(WORD)
    guest.guest_write(guest.vcpu, (WORD + 1) << 12, b"x")
    kept = guest.entry_of(WORD)
    bitmap = guest.map(1)
    guest.change_slot(0, BASE, PAGES, guest.hva, 1)
    for _ in range(3):
        guest.do(guest.vm.dirty_log.get(0, bitmap))
        seen = guest.run(guest.mm.read(bitmap, PAGES // 8))
        assert seen[0] & 1 << WORD - BASE
        guest.run(guest.mm.write(bitmap, b"\xff" * (PAGES // 8)))
        if manual:
            guest.do(guest.vm.dirty_log.clear(ClearDirtyLog(0, PAGES, 0, bitmap)))
        assert guest.entry_of(WORD) == kept
        assert not guest.entry_of(WORD + 1) & bits.WRITE
        assert guest.sound()


def test_rule_c_a_pin_in_a_slot_that_logs_is_dirty_from_then_on() -> None:
    guest = PinnedRam()
    guest.change_slot(0, BASE, PAGES, guest.hva, 1)
    guest.pin(WORD)
    slot = guest.vm.slots.find(Gfn(WORD))
    assert slot is not None
    assert guest.vm.dirty_log.is_dirty(slot, Gfn(WORD))
    guest.unpin(WORD)
    assert guest.sound()


def test_rule_c_tracking_and_pinning_refuse_each_other() -> None:
    guest = PinnedRam()
    guest.pin(WORD)
    assert refusal(lambda: guest.do(guest.vm.write_track.add(Gpa(WORD << 12)))) == errno.EBUSY
    guest.do(guest.vm.write_track.add(Gpa((WORD + 1) << 12)))
    assert guest.refused(WORD, 2) == errno.EBUSY
    assert guest.vm.pinning.pinned[Gfn(WORD)].count == 1
    guest.unpin(WORD)
    guest.do(guest.vm.write_track.add(Gpa(WORD << 12)))
    assert guest.sound()


# -- d. the host leaves the page alone --------------------------------------------------------------------

HOST_ACTIONS = {"migrate": migrate, "swap": swap_out, "merge": merge, "hint": numa_hint, "split": split}


@pytest.mark.parametrize("what", list(HOST_ACTIONS))
@pytest.mark.parametrize("level", [1, 2])
def test_rule_d_the_host_passes_a_pinned_page_by_and_takes_its_neighbour(what: str, level: int) -> None:
    guest = PinnedRam(level=level)
    guest.guest_write(guest.vcpu, WORD << 12, b"x")
    guest.pin(WORD)
    kept = guest.entry_of(WORD)
    guest.do(HOST_ACTIONS[what](guest.mm, guest.hva, PAGES * PAGE))
    assert guest.entry_of(WORD) == kept
    assert guest.sound()


@pytest.mark.parametrize("ad", [True, False])
def test_rules_c_and_d_ageing_takes_nothing_from_a_pinned_page(ad: bool) -> None:
    guest = PinnedRam(features=CpuFeatures(ept_ad_bits=ad, pml=ad))
    guest.pin(WORD)
    kept = guest.entry_of(WORD)
    assert guest.do(age(guest.mm, guest.hva, PAGES * PAGE)) == 0
    assert guest.entry_of(WORD) == kept


def test_rule_d_a_fork_leaves_the_pinned_frame_to_the_parent_and_copies_it_for_the_child() -> None:
    guest = PinnedRam()
    guest.guest_write(guest.vcpu, WORD << 12, b"before")
    guest.pin(WORD)
    kept = guest.entry_of(WORD)
    child = guest.host.create_mm()
    guest.do(fork(guest.mm, child))
    assert guest.entry_of(WORD) == kept
    guest.guest_write(guest.vcpu, WORD << 12, b"after!")
    assert guest.run(guest.mm.read(guest.hva_of(WORD), 6)) == b"after!"
    assert guest.run(child.read(guest.hva_of(WORD), 6)) == b"before"
    assert guest.sound()


def test_rule_c_with_rings_a_store_to_a_pinned_page_is_told_by_the_bitmap() -> None:
    logged = Logged(ring=4096, export=True)
    pinning, gfn = logged.vm.pinning, next(iter(logged.vm.slots)).base_gfn
    logged.run(pinning.pin(pinning.open(), GfnSpan.of_pages(gfn, 1)))
    logged.guest_write(logged.vm.vcpus[0], gfn << 12, b"x")
    assert not any(logged.ring)
    slot = logged.vm.slots.find(gfn)
    assert slot is not None
    assert logged.vm.dirty_log.is_dirty(slot, gfn)
    assert check_vm(logged.vm) == []
