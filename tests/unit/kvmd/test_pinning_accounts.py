"""Who pins, how often and how much; slots that come and go; and I22, broken on purpose."""

from __future__ import annotations

import errno

import pytest

from kvmd.core.invariants import check_vm
from kvmd.core.mm.madvise import dontneed
from kvmd.core.mm.vma import Prot
from kvmd.core.slots.guest_memfd import MemfdFlag
from kvmd.core.slots.pinned import PinnedGfns
from kvmd.core.vm import VmType
from protocol.errors import UapiError
from protocol.pt import bits
from protocol.units import Gfn, GfnSpan, Gpa
from tests.unit.kvmd.pinned import BASE, PAGE, PAGES, WORD, PinnedRam


def broken(guest: PinnedRam) -> set[str]:
    return {found.split(":")[0] for found in check_vm(guest.vm)}


def test_pins_count_and_the_last_one_gives_the_page_back() -> None:
    guest = PinnedRam()
    other = guest.vm.pinning.open()
    guest.pin(WORD)
    guest.pin(WORD)
    guest.pin(WORD, account=other)
    assert guest.mm.pinned_pages == 1
    assert guest.unpin(WORD) == 1
    assert guest.unpin(WORD) == 1
    with pytest.raises(UapiError) as caught:
        guest.do(guest.vm.pinning.unpin(guest.account, 2))  # taken back already; and the third is not ours
    assert caught.value.errno == errno.EINVAL
    assert guest.vm.pinning.pinned[Gfn(WORD)].count == 1
    assert guest.unpin(WORD, account=other) == 1
    assert (len(guest.vm.pinning.pinned), guest.mm.pinned_pages) == (0, 0)


def test_an_unpinned_page_the_host_still_has_stays_mapped_and_can_be_taken_again() -> None:
    guest = PinnedRam()
    guest.pin(WORD)
    guest.unpin(WORD)
    assert guest.entry_of(WORD) & bits.WRITE
    assert guest.importer.heard == []
    guest.do(dontneed(guest.mm, guest.hva_of(WORD), PAGE))
    assert guest.entry_of(WORD) == 0
    assert guest.sound()


def test_an_unpinned_frame_is_freed_only_after_the_ack() -> None:
    guest = PinnedRam()
    guest.pin(WORD)
    guest.do(guest.mm.munmap(guest.hva_of(WORD), PAGE))
    frames = guest.host.frames.in_use
    wait = guest.start(guest.vm.pinning.unpin(guest.account, guest.asked[0][2]))
    assert (wait.done, guest.host.frames.in_use) == (False, frames)
    assert guest.settle(wait) == 1
    assert guest.host.frames.in_use == frames - 1


def test_what_cannot_be_pinned_is_refused_and_the_pages_before_it_are_given_back() -> None:
    guest = PinnedRam()
    guest.change_slot(1, 0x800, 16, guest.map(16), 2)
    guest.change_slot(2, 0x900, 16, guest.map(16, prot=Prot.READ))
    assert guest.refused(BASE + PAGES - 2, 3) == errno.EINVAL  # the last one is in no slot
    assert guest.refused(0x800) == errno.EFAULT  # a read-only slot
    assert guest.refused(0x900) == errno.EFAULT  # a host that may not write
    assert guest.refused(BASE, 0) == errno.EINVAL
    assert guest.refused(1 << 36) == errno.EINVAL
    assert (guest.account.requests, guest.mm.pinned_pages) == ({}, 0)
    assert guest.sound()


def test_private_memory_is_not_pinned_and_what_is_pinned_does_not_become_private() -> None:
    guest = PinnedRam()
    guest.vm.type = VmType.SW_PROTECTED
    guest.vm.private.attributes.supported = True
    guest.pin(WORD)
    with pytest.raises(UapiError) as caught:
        guest.do(guest.vm.private.set_attributes(Gpa(BASE << 12), PAGES << 12, 8, 0))
    assert caught.value.errno == errno.EBUSY
    guest.unpin(WORD)
    guest.do(guest.vm.private.set_attributes(Gpa(BASE << 12), PAGES << 12, 8, 0))
    assert guest.refused(WORD) == errno.EINVAL
    assert MemfdFlag.MMAP in guest.vm.private.memfd_flags


def test_a_process_pins_no_more_than_it_may_and_each_page_once() -> None:
    guest = PinnedRam()
    guest.mm.locked.limit = 4
    guest.pin(BASE, 4)
    guest.pin(BASE, 4)
    assert guest.refused(BASE + 3, 2) == errno.ENOMEM
    assert guest.mm.pinned_pages == 4
    guest.unpin(BASE, 4)
    guest.unpin(BASE, 4)
    guest.pin(BASE + 8, 4)
    assert guest.sound()


def test_a_closed_account_leaves_nothing_not_even_of_a_pin_that_sleeps() -> None:
    guest = PinnedRam()
    guest.pin(WORD, 4)
    going = guest.start(dontneed(guest.mm, guest.hva_of(WORD + 8), PAGE))
    guest.guest_write(guest.vcpu, (WORD + 9) << 12, b"x")
    going = guest.start(dontneed(guest.mm, guest.hva_of(WORD + 9), PAGE))
    sleeping = guest.start(
        guest.vm.pinning.pin(guest.account, GfnSpan.of_pages(Gfn(WORD + 9), 1)),
    )
    assert not sleeping.done
    guest.do(guest.vm.pinning.close_all())
    guest.settle(going)
    with pytest.raises(UapiError) as caught:
        guest.settle(sleeping)
    assert caught.value.errno == errno.ENODEV
    assert (len(guest.vm.pinning.pinned), guest.mm.pinned_pages) == (0, 0)
    assert guest.sound()


# -- every slot -------------------------------------------------------------------------------------------


def test_pinning_everything_pins_what_slots_have_and_what_comes_and_lets_go_with_them() -> None:
    guest = PinnedRam(level=2)
    guest.change_slot(1, 0x800, 16, guest.map(16), 2)
    everything = guest.do(guest.vm.pinning.pin_all(guest.account))
    assert len(guest.vm.pinning.pinned) == PAGES  # not the read-only slot
    guest.change_slot(2, 0x900, 16, guest.map(16))
    assert set(range(0x900, 0x910)) <= set(guest.table())
    guest.change_slot(2, 0xA00, 16, guest.vm.slots.numbered(2).hva)  # type: ignore[union-attr]
    assert guest.vm.pinning.pinned.within(0, GfnSpan(Gfn(0x900), Gfn(0xB00))) == list(range(0xA00, 0xA10))
    guest.change_slot(2, 0, 0, 0)
    assert len(guest.vm.pinning.pinned) == guest.mm.pinned_pages == PAGES
    assert guest.sound()
    guest.do(guest.vm.pinning.unpin(guest.account, everything))
    assert guest.mm.pinned_pages == 0
    guest.change_slot(2, 0x900, 16, guest.map(16))
    assert not guest.vm.pinning.pinned


def test_a_slot_that_cannot_be_pinned_is_not_added_while_everything_is() -> None:
    guest = PinnedRam()
    guest.mm.locked.limit = PAGES + 8
    guest.do(guest.vm.pinning.pin_all(guest.account))
    with pytest.raises(UapiError) as caught:
        guest.change_slot(1, 0x800, 16, guest.map(16))
    assert caught.value.errno == errno.ENOMEM
    assert guest.vm.slots.find(Gfn(0x800)) is None
    assert guest.mm.pinned_pages == PAGES
    assert guest.sound()


def test_pinning_everything_is_all_or_nothing() -> None:
    guest = PinnedRam()
    guest.mm.locked.limit = PAGES - 1
    with pytest.raises(UapiError) as caught:
        guest.do(guest.vm.pinning.pin_all(guest.account))
    assert caught.value.errno == errno.ENOMEM
    assert guest.mm.pinned_pages == 0
    guest.change_slot(1, 0x800, 16, guest.map(16))
    assert not guest.vm.pinning.pinned


# -- broken on purpose ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["absent", "another frame", "no W", "page not pinned"])
def test_the_check_finds_a_pin_that_does_not_hold(what: str) -> None:
    guest = PinnedRam()
    guest.pin(WORD)
    assert broken(guest) == set()
    met = guest.vm.mmu.leaf_at(guest.exported.root, Gfn(WORD))
    assert met is not None
    if what == "page not pinned":
        guest.vm.pinning.put([guest.vm.pinning.pinned[Gfn(WORD)].page])
    new = {"absent": 0, "another frame": met.entry + PAGE, "no W": met.entry & ~bits.WRITE}
    guest.vm.mmu.writer.store64(met.at, new.get(what, met.entry))
    assert "I22" in broken(guest)


def test_a_zap_that_does_not_ask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: the notifier's zap passes by no pin."""
    guest = PinnedRam()
    guest.pin(WORD)
    monkeypatch.setattr(guest.vm.mmu, "is_pinned", lambda root, gfn: False)
    guest.do(dontneed(guest.mm, guest.hva_of(WORD), PAGE))
    assert "I22" in broken(guest)


def test_a_huge_leaf_over_a_pin_is_stopped_at_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: a fault does not ask what is pinned around it."""
    guest = PinnedRam(level=2)
    guest.pin(WORD)
    monkeypatch.setattr(guest.vm.levels, "_needs_small", lambda policy, slot, span: False)
    with pytest.raises(AssertionError, match="I22"):
        guest.guest_write(guest.vcpu, (WORD + 1) << 12, b"x")


def test_the_book_of_regions_says_what_a_look_at_every_gfn_would() -> None:
    guest = PinnedRam()
    guest.pin(BASE + 511)
    pinned: PinnedGfns = guest.vm.pinning.pinned
    assert pinned.any_in(0, GfnSpan(Gfn(BASE), Gfn(BASE + 512)))
    assert pinned.any_in(0, GfnSpan(Gfn(0), Gfn(1 << 18)))
    assert not pinned.any_in(0, GfnSpan(Gfn(BASE + 512), Gfn(BASE + 1024)))
    assert not pinned.any_in(1, GfnSpan(Gfn(BASE), Gfn(BASE + 512)))
    guest.unpin(BASE + 511)
    assert not pinned.any_in(0, GfnSpan(Gfn(0), Gfn(1 << 18)))
