"""A mirror follows a process's memory: what it is told, what it is answered, and when."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kvmd.core.mm import hmm
from kvmd.core.mm.failure import poison
from kvmd.core.mm.fork import fork
from kvmd.core.mm.hmm import MAX_PAGES, Mirror
from kvmd.core.mm.madvise import collapse, dontneed
from kvmd.core.mm.memory import low_watermark
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.page import MappedPage
from kvmd.core.mm.reclaim import age, migrate, swap_out
from kvmd.core.mm.userfaultfd import Userfaultfd
from kvmd.core.mm.vma import Prot
from protocol.errors import EHWPOISON
from protocol.flow import Wait, done
from protocol.uapi import hmm as uapi
from protocol.units import Hva
from tests.kit.importer import HandLease, SlowImporter
from tests.kit.refusals import errno_of
from tests.unit.kvmd.mm.mirrors import MIB2, PAGE, PAGES, SIZE, MirroredPages


@pytest.fixture
def rig() -> MirroredPages:
    return MirroredPages()


CHANGES: dict[str, Callable[[Mm, Hva], Coroutine[Any, None, Any]]] = {
    "munmap": lambda mm, hva: mm.munmap(hva, PAGE),
    "madvise": lambda mm, hva: dontneed(mm, hva, PAGE),
    "migrate": lambda mm, hva: migrate(mm, hva, PAGE),
    "swap_out": lambda mm, hva: swap_out(mm, hva, PAGE),
    "exit": lambda mm, hva: mm.exit(),
}


# -- told --------------------------------------------------------------------------------------------------


def test_a_change_is_told_as_far_as_it_is_watched_in_one_message(rig: MirroredPages) -> None:
    rig.mirror.unwatch(rig.hva, SIZE)
    for first, pages in ((2, 2), (8, 1), (4, 2)):
        rig.mirror.watch(rig.at(first), pages * PAGE)
    for page, pages in ((0, 2), (0, 3), (3, 6), (6, 2), (0, PAGES), (9, 7)):
        rig.drop(page, pages)
    assert rig.told == [(2, 1), (3, 6), (2, 7)]
    assert [seq for *_, seq in rig.importer.heard] == [1, 2, 3]
    assert rig.memory.counters.hmm_invalidations == 3


def test_what_is_not_watched_any_more_is_not_told(rig: MirroredPages) -> None:
    rig.write(0)
    rig.mirror.unwatch(rig.hva, SIZE)
    rig.drop()
    assert rig.told == []


@pytest.mark.parametrize("what", list(CHANGES))
def test_a_frame_is_given_up_only_when_the_range_is_acked(rig: MirroredPages, what: str) -> None:
    rig.write(0)
    (page,) = rig.fault().pages
    tag = rig.tag(page.pfn)
    over = rig.start(CHANGES[what](rig.mm, rig.hva))
    assert not over.done
    assert rig.tag(page.pfn) == tag, "I6: it was given up too early"
    rig.ack(rig.importer)
    assert over.done
    assert rig.tag(page.pfn) != tag


def test_an_mmu_without_accessed_bits_is_never_young_and_hears_nothing_of_ageing(rig: MirroredPages) -> None:
    rig.fault()
    assert rig.run(age(rig.mm, rig.hva, SIZE)) == 0
    assert rig.told == []


def test_a_mirror_that_registers_while_a_large_range_goes_sees_none_of_it(rig: MirroredPages) -> None:
    """The clearing lets others have turns, and was announced before."""
    turn: Wait[None] = Wait()
    rig.host.cond_resched = lambda: turn
    pages = 8192
    large = rig.map(pages)
    rig.run(rig.mm.write(large, bytes(pages * PAGE)))
    rig.mirror.watch(large, pages * PAGE)
    gone = rig.start(rig.mm.munmap(large, pages * PAGE))
    rig.ack(rig.importer)
    assert not gone.done
    assert rig.mm.present_page(Hva(large + (pages - 1) * PAGE)) is not None, "some of it is still there"
    late = Mirror(rig.mm)
    registered = rig.start(late.register(SlowImporter(), HandLease()))
    assert not registered.done
    turn.set(None)
    rig.flows.run_ready()
    assert gone.done
    assert registered.done


# -- answered ----------------------------------------------------------------------------------------------


def test_pages_come_in_order_with_their_own_sizes_however_much_was_asked(rig: MirroredPages) -> None:
    rig.host.cond_resched = lambda: rig.host.clock.tick()
    large = rig.map(2, 2)
    rig.mirror.watch(Hva(large + 3 * PAGE), 600 * PAGE)
    found = rig.run(rig.mirror.range_fault(Hva(large + 4 * PAGE), 590 * PAGE, write=True))
    assert [(page.hva, page.level, page.writable) for page in found.pages] == [
        (large, 2, True),
        (large + MIB2, 2, True),
    ]
    assert found.end == large + 594 * PAGE
    small = rig.fault(3, 2)
    assert [(page.hva, page.level) for page in small.pages] == [(rig.at(3), 1), (rig.at(4), 1)]


def test_an_answer_has_at_most_so_many_pages_and_says_where_it_stopped(rig: MirroredPages) -> None:
    assert MAX_PAGES == uapi.MAX_PAGES
    size = (MAX_PAGES + 5) * PAGE
    many = rig.map(MAX_PAGES + 5)
    rig.mirror.watch(many, size)
    found = rig.run(rig.mirror.range_fault(many, size, write=True))
    assert (len(found.pages), found.end) == (MAX_PAGES, many + MAX_PAGES * PAGE)
    rest = rig.run(rig.mirror.range_fault(found.end, 5 * PAGE, write=True))
    assert (len(rest.pages), rest.end) == (5, many + size)


def test_a_look_faults_nothing_in_and_leaves_absent_pages_out(rig: MirroredPages) -> None:
    rig.write(2)
    rig.write(5)
    frames = rig.host.frames.in_use
    found = rig.look()
    assert [page.hva for page in found.pages] == [rig.at(2), rig.at(5)]
    assert (found.end, found.major, rig.host.frames.in_use) == (rig.at(PAGES), 0, frames)
    assert rig.memory.counters.hmm_faults == 0


def test_a_look_at_much_of_nothing_stops_and_goes_on(rig: MirroredPages) -> None:
    size = (hmm.MAX_LOOKS + 2) * PAGE
    hole = rig.map(hmm.MAX_LOOKS + 2)
    rig.mirror.watch(hole, size)
    found = rig.run(rig.mirror.range_fault(hole, size, write=False, fault=False))
    assert (found.pages, found.end) == ([], hole + hmm.MAX_LOOKS * PAGE)


def test_a_read_fault_of_untouched_memory_is_not_writable_and_a_write_fault_makes_it_so(
    rig: MirroredPages,
) -> None:
    (zero,) = rig.fault(write=False).pages
    asked = rig.start(rig.faulting())
    assert rig.told == [(0, 1)]  # the zero page goes
    rig.ack(rig.importer)
    (own,) = asked.result().pages
    assert (zero.writable, own.writable, zero.pfn == own.pfn) == (False, True, False)


def test_what_was_swapped_out_counts_as_major_and_nothing_else_does(rig: MirroredPages) -> None:
    for page in range(4):
        rig.write(page)
    rig.do(swap_out(rig.mm, rig.hva, 3 * PAGE))
    rig.run(rig.mm.read(rig.hva, 1))  # somebody else's
    assert rig.fault(0, 5).major == 2
    assert rig.fault(0, 5).major == 0
    counters = rig.memory.counters
    assert (counters.swap_outs, counters.swap_ins) == (3, 3)
    assert (counters.hmm_faults, counters.hmm_faults_major) == (2, 2)


def test_pages_are_counted_that_a_fault_took_from_the_host_copies_too(rig: MirroredPages) -> None:
    rig.write(0)
    rig.fault(0, 3)
    assert rig.memory.counters.hmm_faults_allocated == 2
    rig.pin(5)
    assert rig.memory.counters.hmm_faults_allocated == 2, "a pin's are its own"
    rig.fault(8, write=False)  # the zero page, which is one too
    asked = rig.start(rig.faulting(8))
    rig.ack(rig.importer)
    assert asked.result().pages
    assert rig.memory.counters.hmm_faults_allocated == 4
    assert rig.memory.counters.pages_allocated == 1 + 2 + 1 + 2


# -- guesses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gib", "pages"),
    [(1, 1024 + 262), (4, 2048 + 1048), (64, 8192 + 16777), (4096, 65536 + 1073741)],
)
def test_the_low_watermark_is_the_kernels(gib: int, pages: int) -> None:
    """min_free_kbytes is 4 times the square root of the KiB there are, 256 MiB at most; low is that and a
    thousandth of the memory, or a quarter of min.
    """
    assert low_watermark(gib << 18) == pages


def test_a_page_that_nobody_waits_for_is_not_taken_of_the_last_frames(rig: MirroredPages) -> None:
    """Down to the watermark pages come along, from there on only the one that was asked for, and what is
    there already.
    """
    frames = rig.memory.frames
    frames.in_use = frames.total - low_watermark(frames.total) - 4
    assert len(rig.fault(0, 8).pages) == 5, "the fifth makes it low"
    assert rig.memory.is_low
    assert len(rig.fault(8, 4).pages) == 1
    rig.write(9)
    assert len(rig.fault(8, 4).pages) == 2
    frames.in_use -= frames.total - low_watermark(frames.total) - 4


# -- current when answered ---------------------------------------------------------------------------------


def test_a_fault_waits_while_the_range_changes_and_is_answered_what_is_there_then(rig: MirroredPages) -> None:
    rig.write(0)
    old = rig.fault().pages[0].pfn
    moving = rig.start(migrate(rig.mm, rig.hva, PAGE))
    waits = [
        rig.start(rig.faulting(0, 2)),
        rig.start(rig.mirror.range_fault(rig.hva, PAGE, write=False, fault=False)),
    ]
    beside = rig.start(rig.faulting(1))
    assert [wait.done for wait in (*waits, beside)] == [False, False, True]
    rig.ack(rig.importer)
    assert moving.result() == 1
    for wait in waits:
        page = wait.result().pages[0]
        assert page.pfn != old
        assert rig.frame(page.pfn, 7) == b"written"


def test_a_range_watched_while_it_changes_is_looked_at_after_the_change(rig: MirroredPages) -> None:
    """The notifier was called before: nothing would tell of it again."""
    rig.write(0)
    first = SlowImporter()
    other = Mirror(rig.mm)
    rig.run(other.register(first, HandLease()))
    other.watch(rig.hva, SIZE)
    rig.mirror.unwatch(rig.hva, SIZE)
    rig.dropping()
    assert (rig.told, len(first.pending)) == ([], 1)
    rig.mirror.watch(rig.hva, SIZE)
    look = rig.start(rig.mirror.range_fault(rig.hva, PAGE, write=False, fault=False))
    assert not look.done
    rig.ack(first)
    assert look.result().pages == []


def test_a_page_that_changed_while_another_slept_is_not_answered(rig: MirroredPages) -> None:
    """The first page is looked up again when the answer is given."""
    uffd = Userfaultfd(rig.mm, user_mode_only=False)
    rig.write(0)
    rig.run(uffd.register(rig.at(1), PAGE, missing=True, wp=False))
    old = rig.fault().pages[0].pfn
    asked = rig.start(rig.faulting(0, 2))
    assert not asked.done
    assert rig.do(migrate(rig.mm, rig.hva, PAGE)) == 1
    rig.run(uffd.copy(rig.at(1), bytes(PAGE), wp=False))
    rig.flows.run_ready()
    first, second = asked.result().pages
    assert first.pfn != old
    assert rig.frame(first.pfn, 7) == b"written"
    assert second.hva == rig.at(1)


def test_a_range_unwatched_while_its_fault_slept_is_einval(rig: MirroredPages) -> None:
    """The importer would not be told of the page any more."""
    rig.write(0)
    rig.dropping()
    asked = rig.start(rig.faulting())
    rig.mirror.unwatch(rig.hva, SIZE)
    rig.ack(rig.importer)
    assert errno_of(asked.result) == errno.EINVAL


def test_a_page_taken_away_each_time_is_ebusy_in_the_end_not_a_livelock(rig: MirroredPages) -> None:
    looked_up = rig.mm.get_user_page
    rig.mirror.unwatch(rig.hva, SIZE)
    rig.mirror.watch(rig.hva, PAGE)
    rig.importer.invalidate = lambda *_: done(None)  # type: ignore[method-assign]

    async def fleeting(hva: Hva, **how: Any) -> MappedPage:
        page = await looked_up(hva, **how)
        await dontneed(rig.mm, hva, PAGE)
        return page

    rig.mm.get_user_page = fleeting  # type: ignore[method-assign]
    assert errno_of(lambda: rig.fault()) == errno.EBUSY
    assert rig.mirror.seq == hmm.LOOKUP_TRIES


def test_a_collapse_is_told_and_then_seen_as_one_page(rig: MirroredPages) -> None:
    rig.run(rig.mm.mmap(Hva(1 << 40), 2 * MIB2, Prot.READ | Prot.WRITE))
    start = Hva(1 << 40)
    rig.run(rig.mm.write(start, bytes(MIB2)))
    rig.mirror.watch(start, MIB2)
    assert len(rig.run(rig.mirror.range_fault(start, MIB2, write=True)).pages) == 512
    rig.do(collapse(rig.mm, start, MIB2))
    (huge,) = rig.run(rig.mirror.range_fault(start, MIB2, write=True)).pages
    assert huge.level == 2


# -- refused -----------------------------------------------------------------------------------------------


def test_watched_ranges_are_apart_and_unwatched_as_they_were_watched(rig: MirroredPages) -> None:
    mirror, end = rig.mirror, rig.at(PAGES)
    for start, size in ((rig.hva, SIZE), (rig.at(15), 2 * PAGE), (Hva(rig.hva - PAGE), 2 * PAGE)):
        assert errno_of(lambda: mirror.watch(start, size)) == errno.EEXIST  # noqa: B023
    mirror.watch(end, PAGE)
    for start, size in ((rig.hva, PAGE), (rig.hva, SIZE + PAGE), (rig.at(1), PAGE), (Hva(0), PAGE)):
        assert errno_of(lambda: mirror.unwatch(start, size)) == errno.ENOENT  # noqa: B023
    assert errno_of(lambda: rig.fault(15, 2)) == errno.EINVAL, "two watched ranges are not one"
    mirror.unwatch(end, PAGE)
    assert errno_of(lambda: mirror.unwatch(end, PAGE)) == errno.ENOENT


def test_the_number_of_watched_ranges_is_bounded(rig: MirroredPages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hmm, "MAX_WATCHED", 2)
    rig.mirror.watch(rig.at(PAGES), PAGE)
    assert errno_of(lambda: rig.mirror.watch(rig.at(PAGES + 1), PAGE)) == errno.ENOMEM


def test_a_fault_fails_as_the_hosts_does(rig: MirroredPages) -> None:
    rig.write(0)
    rig.do(poison(rig.mm, rig.hva, PAGE))
    assert errno_of(lambda: rig.fault()) == EHWPOISON
    assert errno_of(lambda: rig.pin()) == EHWPOISON
    readonly = rig.map(1, prot=Prot.READ)
    rig.mirror.watch(readonly, PAGE)
    assert errno_of(lambda: rig.run(rig.mirror.range_fault(readonly, PAGE, write=True))) == errno.EFAULT
    assert rig.run(rig.mirror.range_fault(readonly, PAGE, write=False)).pages[0].writable is False
    hole = Hva(1 << 45)
    rig.mirror.watch(hole, PAGE)
    assert errno_of(lambda: rig.run(rig.mirror.range_fault(hole, PAGE, write=False))) == errno.EFAULT


def test_before_it_is_registered_a_mirror_gives_nothing_and_it_registers_once(rig: MirroredPages) -> None:
    mirror = Mirror(rig.mm)
    asks = [
        lambda: mirror.watch(rig.hva, PAGE),
        lambda: mirror.unwatch(rig.hva, PAGE),
        lambda: rig.run(mirror.range_fault(rig.hva, PAGE, write=True)),
        lambda: rig.run(mirror.pin(rig.hva, PAGE, write=True)),
        lambda: rig.run(mirror.unpin(rig.hva, PAGE)),
    ]
    assert [errno_of(ask) for ask in asks] == [errno.EINVAL] * 5
    assert errno_of(lambda: rig.run(rig.mirror.register(rig.importer, HandLease()))) == errno.EBUSY


def test_after_the_exit_what_is_held_goes_back_and_nothing_more_is_had(rig: MirroredPages) -> None:
    rig.pin(3)
    rig.do(rig.mm.exit())
    asks = [
        lambda: rig.mirror.watch(rig.at(PAGES), PAGE),
        lambda: rig.fault(),
        lambda: rig.look(),
        lambda: rig.run(Mirror(rig.mm).register(rig.importer, HandLease())),
    ]
    assert [errno_of(ask) for ask in asks] == [errno.EPERM] * 4
    assert errno_of(lambda: rig.pin()) == errno.EFAULT
    assert rig.host.frames.in_use == 1
    assert (rig.unpin(), rig.host.frames.in_use) == (1, 0)
    rig.mirror.unwatch(rig.hva, SIZE)


def test_a_process_that_exits_under_a_waiting_fault_is_eperm(rig: MirroredPages) -> None:
    rig.write(0)
    rig.dropping()
    asked = rig.start(rig.faulting())
    over = rig.start(rig.mm.exit())
    rig.settle(over)
    assert errno_of(asked.result) == errno.EPERM


def test_a_process_gone_before_its_turn_is_eperm(rig: MirroredPages) -> None:
    forking = rig.start(fork(rig.mm, rig.host.create_mm()))  # has the lock, awaits the ack
    registered = rig.start(Mirror(rig.mm).register(SlowImporter(), HandLease()))
    over = rig.start(rig.mm.exit())
    rig.settle(over)
    assert forking.done
    assert errno_of(registered.result) == errno.EPERM
    assert rig.mm.notifiers == [rig.vm.host_changes, rig.mirror]


def test_a_mirror_closed_before_its_turn_is_no_notifier(rig: MirroredPages) -> None:
    forking = rig.start(fork(rig.mm, rig.host.create_mm()))  # has the lock, awaits the ack
    mirror = Mirror(rig.mm)
    registered = rig.start(mirror.register(SlowImporter(), HandLease()))
    rig.run(mirror.close())
    rig.ack(rig.importer)
    assert forking.done
    assert errno_of(registered.result) == errno.ENODEV
    assert rig.mm.notifiers == [rig.vm.host_changes, rig.mirror]


# -- the end of its channel ------------------------------------------------------------------------------


def keeps_all_until_its_lease_ends(rig: MirroredPages) -> None:
    mirror, ops, lease = Mirror(rig.mm), SlowImporter(), HandLease()
    rig.run(mirror.register(ops, lease))
    mirror.watch(rig.hva, SIZE)
    rig.run(mirror.pin(rig.at(3), PAGE, write=True))
    rig.mirror.unwatch(rig.hva, SIZE)
    released = rig.start(rig.host.release_mirror(mirror))
    over = rig.start(migrate(rig.mm, rig.hva, SIZE))
    assert (len(ops.pending), rig.mm.pinned_pages) == (1, 1), "something may still walk for it"
    rig.ack(ops)
    assert over.done
    assert not released.done
    lease.ended.set(None)
    rig.flows.run_ready()
    assert released.done
    assert (rig.mm.pinned_pages, mirror in rig.mm.notifiers) == (0, False)


def test_a_mirror_is_told_and_has_its_pins_until_its_lease_ends(rig: MirroredPages) -> None:
    keeps_all_until_its_lease_ends(rig)


def test_a_mirror_that_is_closed_before_its_lease_ends_is_noticed(
    rig: MirroredPages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I13 broken."""
    monkeypatch.setattr(Mirror, "release", Mirror.close)
    with pytest.raises(AssertionError, match="may still walk for it"):
        keeps_all_until_its_lease_ends(rig)


def test_a_process_that_exited_is_forgotten_with_its_last_mirror(rig: MirroredPages) -> None:
    mirror, lease = Mirror(rig.mm), HandLease()
    rig.run(mirror.register(SlowImporter(), lease))
    rig.run(rig.mirror.close())
    rig.mm.notifiers.remove(rig.vm.host_changes)
    rig.run(rig.host.exit_mm(rig.mm))
    assert rig.host.processes == [rig.mm]
    lease.ended.set(None)
    rig.run(rig.host.release_mirror(mirror))
    assert rig.host.processes == []


def test_a_mirror_closes_once(rig: MirroredPages) -> None:
    rig.run(rig.mirror.close())
    with pytest.raises(AssertionError, match="CLOSE happened to one that is CLOSED"):
        rig.run(rig.mirror.close())
