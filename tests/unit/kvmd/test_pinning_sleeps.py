"""A pin sleeps until its page is there, and the VMM does not: what was asked before is asked again after."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from kvmd.core.export.pinning import Pinning
from kvmd.core.invariants import check_vm
from kvmd.core.mm.madvise import dontneed
from kvmd.core.mm.userfaultfd import Userfaultfd
from kvmd.core.vm import VmType
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.units import Gfn, GfnSpan, Gpa, Hva
from tests.unit.kvmd.pinned import BASE, PAGE, PAGES, WORD, PinnedRam


class Sleepy(PinnedRam):
    """A guest whose memory comes from a userfaultfd, page by page; `private`: it may be."""

    def __init__(self) -> None:
        super().__init__()
        self.vm.type = VmType.SW_PROTECTED
        self.vm.private.attributes.supported = True
        self.uffd = Userfaultfd(self.mm, user_mode_only=False)
        self.run(self.uffd.register(self.hva, PAGES * PAGE, missing=True, wp=False))

    def sleep(self, pages: int = 1) -> Wait[int]:
        """A pin from WORD on, whose last page is not there."""
        for page in range(pages - 1):
            self.give(WORD + page)
        span = GfnSpan.of_pages(Gfn(WORD), pages)
        pin = self.start(self.vm.pinning.pin(self.account, span))
        assert not pin.done
        return pin

    def give(self, gfn: int) -> None:
        self.do(self.uffd.copy(self.hva_of(gfn), b"y" * PAGE, wp=False))

    def reslot(self, gfn: int, pages: int, flags: int = 0) -> None:
        super().change_slot(0, gfn, pages, self.hva, flags)


def track(guest: Sleepy, gfn: int) -> None:
    guest.do(guest.vm.write_track.add(Gpa(gfn << 12)))


def convert(guest: Sleepy, gfn: int) -> None:
    guest.do(guest.vm.private.set_attributes(Gpa(gfn << 12), PAGE, 8, 0))


def delete(guest: Sleepy, gfn: int = 0) -> None:
    guest.reslot(0, 0)


def move(guest: Sleepy, gfn: int) -> None:
    guest.reslot(BASE + PAGES, PAGES)


def make_readonly(guest: Sleepy, gfn: int) -> None:
    delete(guest)
    guest.reslot(BASE, PAGES, 2)


def close(guest: Sleepy, gfn: int = 0) -> None:
    guest.do(guest.vm.pinning.close(guest.account))


def release(guest: Sleepy, gfn: int) -> None:
    guest.do(guest.vm.exports.close(guest.exported))


def unpin(guest: Sleepy, gfn: int) -> None:
    guest.do(guest.vm.pinning.unpin(guest.account, guest.account.asked))


# What the VMM does while the pin sleeps, and what the pin is answered then, as if it were asked only now.
CHANGES: dict[str, tuple[Callable[[Sleepy, int], None], int]] = {
    "write tracking": (track, errno.EBUSY),
    "private": (convert, errno.EINVAL),
    "slot deleted": (delete, errno.EINVAL),
    "slot moved": (move, errno.EINVAL),
    "slot read-only": (make_readonly, errno.EFAULT),
    "importer gone": (close, errno.ENODEV),
    "export gone": (release, errno.ENODEV),
    "unpinned": (unpin, errno.ENODEV),
}


@pytest.mark.parametrize("what", list(CHANGES))
@pytest.mark.parametrize("pages", [1, 3])
def test_a_pin_is_refused_by_what_came_later(what: str, pages: int) -> None:
    """A pin across which its range changes or its account closes."""
    guest, (change, number) = Sleepy(), CHANGES[what]
    last = WORD + pages - 1
    pin = guest.sleep(pages)
    change(guest, last)
    guest.give(last)
    with pytest.raises(UapiError) as caught:
        guest.settle(pin)
    assert caught.value.errno == number
    assert (len(guest.vm.pinning.pinned), guest.mm.pinned_pages) == (0, 0)
    assert guest.account.requests == {}
    assert guest.sound()


def test_a_slot_deleted_and_made_again_while_a_pin_sleeps_is_pinned_as_it_is_now() -> None:
    guest = Sleepy()
    pin = guest.sleep()
    delete(guest)
    other = guest.map(PAGES)
    guest.change_slot(0, BASE, PAGES, other)
    guest.give(WORD)
    guest.settle(pin)
    page = guest.mm.present_page(Hva(other + (WORD - BASE) * PAGE))
    assert page is not None
    assert guest.vm.pinning.pinned[Gfn(WORD)].pfn == page.pfn
    assert guest.mm.pinned_pages == 1
    assert guest.sound()


def test_a_pin_whose_first_pages_went_is_none() -> None:
    """All of the span or none: the last page would be pinned in the slot that was made again."""
    guest = Sleepy()
    pin = guest.sleep(3)
    delete(guest)
    guest.reslot(BASE, PAGES)
    guest.give(WORD + 2)
    with pytest.raises(UapiError) as caught:
        guest.settle(pin)
    assert caught.value.errno == errno.EAGAIN
    assert (len(guest.vm.pinning.pinned), guest.mm.pinned_pages) == (0, 0)
    assert guest.sound()


def test_logging_that_starts_while_a_pin_sleeps_has_the_page_dirty() -> None:
    guest = Sleepy()
    pin = guest.sleep()
    guest.reslot(BASE, PAGES, 1)
    guest.give(WORD)
    guest.settle(pin)
    slot = guest.vm.slots.find(Gfn(WORD))
    assert slot is not None
    assert guest.vm.dirty_log.is_dirty(slot, Gfn(WORD))
    assert guest.sound()


def test_two_pins_that_sleep_for_one_page_are_two_pins_of_it() -> None:
    guest = Sleepy()
    pins = [guest.sleep(), guest.sleep()]
    guest.give(WORD)
    names = [guest.settle(pin) for pin in pins]
    assert (guest.vm.pinning.pinned[Gfn(WORD)].count, guest.mm.pinned_pages) == (2, 1)
    for name in names:
        guest.do(guest.vm.pinning.unpin(guest.account, name))
    assert guest.mm.pinned_pages == 0
    assert guest.sound()


def test_a_page_that_is_about_to_go_when_it_comes_is_not_the_one_that_is_pinned() -> None:
    guest = Sleepy()
    pin = guest.sleep()
    guest.give(WORD + 1)
    guest.guest_write(guest.vcpu, (WORD + 1) << 12, b"x")  # so that there is an ack to wait for
    going = guest.start(dontneed(guest.mm, guest.hva_of(WORD), 2 * PAGE))
    assert not going.done
    guest.run(guest.uffd.copy(guest.hva_of(WORD), b"n" * PAGE, wp=False))
    guest.settle(going)
    assert not pin.done
    guest.give(WORD)
    guest.settle(pin)
    page = guest.mm.present_page(guest.hva_of(WORD))
    assert page is not None
    assert guest.vm.pinning.pinned[Gfn(WORD)].pfn == page.pfn
    assert guest.sound()


def test_a_page_that_comes_as_its_slot_goes() -> None:
    guest = Sleepy()
    pin = guest.sleep()
    guest.give(WORD + 1)
    guest.guest_write(guest.vcpu, (WORD + 1) << 12, b"x")
    going = guest.start(guest.vm.slots_change.set_memory_region(guest.region(0, 0, 0, 0)))
    assert not going.done
    guest.run(guest.uffd.copy(guest.hva_of(WORD), b"y" * PAGE, wp=False))
    assert not guest.vm.pinning.pinned
    guest.settle(going)
    with pytest.raises(UapiError) as caught:
        guest.settle(pin)
    assert caught.value.errno == errno.EINVAL
    assert guest.mm.pinned_pages == 0
    assert guest.sound()


def test_an_importer_that_goes_with_a_slot_pins_nothing() -> None:
    """The slot stays, after all: its move is refused."""
    guest = PinnedRam()
    guest.guest_write(guest.vcpu, WORD << 12, b"x")
    beyond = guest.region(0, 1 << 40, PAGES, guest.hva)
    moving = guest.start(guest.vm.slots_change.set_memory_region(beyond))
    span = GfnSpan.of_pages(Gfn(WORD), 1)
    pin = guest.start(guest.vm.pinning.pin(guest.account, span))
    assert (moving.done, pin.done) == (False, False)
    closed = guest.start(guest.vm.pinning.close(guest.account))
    with pytest.raises(UapiError):
        guest.settle(moving)
    closed.result()
    with pytest.raises(UapiError) as caught:
        pin.result()
    assert caught.value.errno == errno.ENODEV
    assert guest.mm.pinned_pages == 0
    assert guest.sound()


def test_what_is_tracked_meanwhile_is_not_pinned() -> None:
    guest = PinnedRam()
    guest.guest_write(guest.vcpu, WORD << 12, b"x")
    going = guest.start(dontneed(guest.mm, guest.hva_of(WORD), PAGE))
    span = GfnSpan.of_pages(Gfn(WORD), 1)
    pin = guest.start(guest.vm.pinning.pin(guest.account, span))
    tracked = guest.start(guest.vm.write_track.add(Gpa(WORD << 12)))
    assert (going.done, pin.done) == (False, False)
    guest.settle(going)
    tracked.result()
    with pytest.raises(UapiError) as caught:
        pin.result()
    assert caught.value.errno == errno.EBUSY
    assert guest.mm.pinned_pages == 0
    assert guest.sound()


def test_an_importer_that_comes_as_the_export_goes_is_refused() -> None:
    """Its pins would outlive the table they are of."""
    guest = PinnedRam()
    guest.pin(WORD)
    guest.do(guest.mm.munmap(guest.hva_of(WORD), PAGE))
    closing = guest.start(guest.vm.exports.close(guest.exported))
    assert not closing.done
    with pytest.raises(UapiError) as caught:
        guest.exported.register_importer("late", guest.importer)
    assert caught.value.errno == errno.ENODEV
    late = guest.vm.pinning.open()  # it had just been let in
    guest.pin(WORD + 1, account=late)
    guest.settle(closing)
    assert (len(guest.vm.pinning.pinned), guest.mm.pinned_pages) == (0, 0)
    assert guest.sound()


def test_a_slot_that_goes_while_its_importer_leaves_has_nothing_left_to_take_back() -> None:
    """The importer of several requests waits for the acks of what the host gave up: it waits once, with all
    of them taken back."""
    guest = PinnedRam()
    guest.change_slot(1, 0x800, 4, guest.map(4))
    guest.pin(0x800, 2)
    guest.pin(WORD)
    guest.guest_write(guest.vcpu, (WORD + 1) << 12, b"x")
    going = guest.start(dontneed(guest.mm, guest.hva_of(WORD + 1), PAGE))
    leaving = guest.start(guest.vm.pinning.close(guest.account))
    assert (going.done, leaving.done) == (False, False)
    assert guest.sound()
    guest.change_slot(1, 0, 0, 0)
    guest.settle(leaving)
    assert (len(guest.vm.pinning.pinned), guest.mm.pinned_pages) == (0, 0)
    assert guest.sound()


@pytest.mark.parametrize("everything", [False, True])
def test_who_is_registered_still_when_the_export_goes_pins_no_more(everything: bool) -> None:
    """Its lease has ended, so nothing waits for it; but its channel is open."""
    guest = PinnedRam()
    guest.pin(WORD)
    guest.do(guest.mm.munmap(guest.hva_of(WORD), PAGE))
    closing = guest.start(guest.vm.exports.close(guest.exported))
    assert not closing.done
    span = GfnSpan.of_pages(Gfn(WORD + 1), 1)
    pinning = guest.vm.pinning
    with pytest.raises(UapiError) as caught:
        guest.do(pinning.pin_all(guest.account) if everything else pinning.pin(guest.account, span))
    assert caught.value.errno == errno.ENODEV
    guest.settle(closing)
    assert (len(pinning.pinned), guest.mm.pinned_pages) == (0, 0)
    assert guest.sound()


# -- everything, and slots that come ----------------------------------------------------------------------


def waiting_slot(guest: Sleepy) -> tuple[Wait[None], Hva]:
    """Slot 1 comes while everything is pinned, and its page is not there."""
    for gfn in range(BASE, BASE + PAGES):
        guest.give(gfn)
    guest.do(guest.vm.pinning.pin_all(guest.account))
    hva = guest.map(1)
    guest.run(guest.uffd.register(hva, PAGE, missing=True, wp=False))
    coming = guest.start(guest.vm.slots_change.set_memory_region(guest.region(1, 0x800, 1, hva)))
    assert not coming.done
    return coming, hva


def test_a_slot_comes_though_its_pinner_went() -> None:
    """Nobody is there to need it pinned: that is no reason to delete it again."""
    guest = Sleepy()
    coming, hva = waiting_slot(guest)
    close(guest)
    guest.do(guest.uffd.copy(hva, b"y" * PAGE, wp=False))
    guest.settle(coming)
    assert guest.vm.slots.find(Gfn(0x800)) is not None
    assert guest.mm.pinned_pages == 0
    assert guest.sound()


def test_a_slot_that_comes_pins_nothing_for_who_was_refused_meanwhile() -> None:
    guest = Sleepy()
    everything = guest.start(guest.vm.pinning.pin_all(guest.account))
    hva = guest.map(1)
    guest.run(guest.uffd.register(hva, PAGE, missing=True, wp=False))
    coming = guest.start(guest.vm.slots_change.set_memory_region(guest.region(1, 0x800, 1, hva)))
    guest.mm.locked.limit = 0
    guest.give(BASE)
    with pytest.raises(UapiError):
        guest.settle(everything)
    guest.mm.locked.limit = None
    assert not coming.done
    guest.do(guest.uffd.copy(hva, b"y" * PAGE, wp=False))
    guest.settle(coming)
    assert (len(guest.vm.pinning.pinned), guest.mm.pinned_pages) == (0, 0)
    assert guest.sound()


def test_a_slot_that_is_refused_late_takes_no_slot_of_that_number_along() -> None:
    """Its deletion, and a new slot 1, wait until it is known whether it can be pinned."""
    guest = Sleepy()
    coming, hva = waiting_slot(guest)
    guest.mm.locked.limit = PAGES
    deleted = guest.start(guest.vm.slots_change.set_memory_region(guest.region(1, 0, 0, 0)))
    again = guest.start(guest.vm.slots_change.set_memory_region(guest.region(1, 0x900, 1, guest.hva, 2)))
    guest.do(guest.uffd.copy(hva, b"y" * PAGE, wp=False))
    with pytest.raises(UapiError) as caught:
        guest.settle(coming)
    assert caught.value.errno == errno.ENOMEM
    with pytest.raises(UapiError):
        guest.settle(deleted)  # it is gone already
    guest.settle(again)
    assert guest.vm.slots.find(Gfn(0x900)) is not None
    assert guest.sound()


def test_everything_leaves_out_the_private() -> None:
    guest = Sleepy()
    for gfn in range(BASE, BASE + PAGES - 1):
        guest.give(gfn)
    last = BASE + PAGES - 1
    everything = guest.start(guest.vm.pinning.pin_all(guest.account))
    assert not everything.done
    guest.do(guest.vm.private.set_attributes(Gpa(last << 12), PAGE, 8, 0))
    guest.give(last)
    guest.settle(everything)
    assert guest.mm.pinned_pages == PAGES - 1
    assert guest.sound()


# -- one unpin, one request -------------------------------------------------------------------------------


def test_an_unpin_of_what_went_with_its_slot_takes_nothing_from_who_pinned_there_since() -> None:
    """Two devices on one HWPT share its account."""
    guest = PinnedRam()
    guest.pin(WORD, 4)
    guest.change_slot(0, 0, 0, 0)
    guest.change_slot(0, BASE, PAGES, guest.hva)
    assert len(guest.vm.pinning.pinned) == 0
    guest.pin(WORD, 4)
    assert guest.unpin(WORD, 4) == 0  # the first request's
    assert (len(guest.vm.pinning.pinned), guest.mm.pinned_pages) == (4, 4)
    assert guest.unpin(WORD, 4) == 4
    assert guest.sound()


def test_everything_goes_on_past_a_lost_slot() -> None:
    guest = PinnedRam()
    guest.change_slot(1, 0x800, 4, guest.map(4))
    guest.change_slot(2, 0x900, 4, guest.map(4))
    turns = Turns(guest)
    everything = guest.start(guest.vm.pinning.pin_all(guest.account))
    assert not everything.done
    guest.change_slot(1, 0, 0, 0)
    turns.go_on()
    guest.settle(everything)
    assert guest.vm.pinning.pinned.within(0, GfnSpan(Gfn(0x800), Gfn(0xA00))) == list(range(0x900, 0x904))
    assert guest.sound()


class Turns:
    """Long work waits for its next turn."""

    def __init__(self, guest: PinnedRam) -> None:
        self.guest = guest
        self.waiting: list[Wait[None]] = []
        guest.host.cond_resched = self.cond_resched

    def cond_resched(self) -> Wait[None]:
        self.waiting.append(Wait())
        return self.waiting[-1]

    def go_on(self) -> None:
        while self.waiting:
            self.waiting.pop().set(None)
            self.guest.flows.run_ready()


def test_who_stops_pinning_everything_does_not_stop_another_who_has_only_begun() -> None:
    guest = PinnedRam()
    first = guest.do(guest.vm.pinning.pin_all(guest.account))
    turns = Turns(guest)
    second = guest.start(guest.vm.pinning.pin_all(guest.account))
    assert not second.done
    guest.do(guest.vm.pinning.unpin(guest.account, first))
    turns.go_on()
    name = guest.settle(second)
    assert guest.mm.pinned_pages == PAGES
    guest.do(guest.vm.pinning.unpin(guest.account, name))
    assert guest.mm.pinned_pages == 0
    assert guest.sound()


@pytest.mark.parametrize("everything", [True, False])
def test_a_request_over_at_its_end_is_none(everything: bool) -> None:
    guest = PinnedRam()
    turns, pinning = Turns(guest), guest.vm.pinning
    span = GfnSpan.of_pages(Gfn(BASE), PAGES)
    flow = pinning.pin_all(guest.account) if everything else pinning.pin(guest.account, span)
    pin = guest.start(flow)
    assert guest.do(pinning.unpin(guest.account, guest.account.asked)) == PAGES
    turns.go_on()
    with pytest.raises(UapiError):
        guest.settle(pin)
    assert guest.mm.pinned_pages == 0
    assert guest.sound()


# -- broken on purpose ------------------------------------------------------------------------------------


def test_the_check_finds_a_pin_that_did_not_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: what was asked before the sleep is taken to be true after it."""
    guest = Sleepy()
    pin = guest.sleep()
    track(guest, WORD)
    slot = guest.vm.slots.find(Gfn(WORD))
    monkeypatch.setattr(Pinning, "_stands", lambda self, request, held, gfn: held is slot)
    guest.give(WORD)
    guest.settle(pin)
    assert [found for found in check_vm(guest.vm) if "pinned and write-tracked" in found]


def test_the_check_finds_an_unpin_that_takes_another_s_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: requests go on believing in pins that went with their slot."""
    guest = PinnedRam()
    guest.pin(WORD)
    slot = guest.vm.slots.find(Gfn(WORD))
    assert slot is not None
    monkeypatch.setattr(guest.vm.pinning, "requests", lambda: iter(()))
    guest.change_slot(0, 0, 0, 0)
    monkeypatch.undo()
    assert "I22: gfn 0x205 is not pinned, a request believes it is" in check_vm(guest.vm)
