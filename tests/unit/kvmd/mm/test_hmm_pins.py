"""Pages pinned for another MMU: where they stay, whose they are, what they count, and how it ends."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.fork import fork
from kvmd.core.mm.hmm import MAX_PAGES, Mirror
from kvmd.core.mm.madvise import collapse
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.reclaim import merge, migrate, numa_hint, swap_out
from kvmd.core.mm.thp import split
from kvmd.core.mm.userfaultfd import Userfaultfd
from kvmd.core.mm.vma import Prot
from protocol.flow import Wait
from protocol.units import Hva, Level, Pfn
from tests.kit.importer import HandLease, SlowImporter
from tests.kit.kvmd import MM_CHANGES, RW
from tests.kit.refusals import errno_of
from tests.unit.kvmd.mm.mirrors import MIB2, PAGE, SIZE, MirroredPages

HOST: list[Callable[[Mm, Hva, int], Coroutine[Any, None, int]]] = [migrate, swap_out, merge, numa_hint]


@pytest.fixture
def rig() -> MirroredPages:
    return MirroredPages()


# -- where they stay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", HOST, ids=lambda act: act.__name__)
def test_the_host_leaves_a_pinned_page_where_it_is(rig: MirroredPages, act: Any) -> None:
    (page,) = rig.pin(2).pages
    tag = rig.tag(page.pfn)
    rig.write(2)
    assert rig.do(act(rig.mm, rig.hva, SIZE)) == 0
    present = rig.mm.present_page(rig.at(2))
    assert present is not None
    assert (present.pfn, rig.tag(page.pfn)) == (page.pfn, tag)
    assert rig.frame(page.pfn, 7) == b"written"
    assert rig.violations() == []


@pytest.mark.parametrize("what", ["madvise_dontneed", "munmap"])
def test_a_process_that_drops_a_pinned_page_leaves_the_frame_to_the_device(
    rig: MirroredPages, what: str
) -> None:
    rig.write(0)
    (page,) = rig.pin(0).pages
    tag = rig.tag(page.pfn)
    rig.do(MM_CHANGES[what](rig.mm, rig.hva, PAGE))
    assert rig.mm.present_page(rig.hva) is None
    assert (rig.tag(page.pfn), rig.frame(page.pfn, 7)) == (tag, b"written")
    assert rig.violations() == []
    assert rig.unpin() == 1
    assert rig.tag(page.pfn) != tag


def test_a_child_gets_a_copy_of_what_is_pinned_and_the_parent_keeps_the_frame(rig: MirroredPages) -> None:
    (page,) = rig.pin(0).pages
    rig.write(0)
    child = rig.host.create_mm()
    rig.do(fork(rig.mm, child))
    rig.write(0, b"parent!")
    assert rig.frame(page.pfn, 7) == b"parent!"
    assert rig.run(child.read(rig.hva, 7)) == b"written"


def test_collapse_of_a_pinned_page_is_eagain_and_a_pinned_huge_page_is_not_split(rig: MirroredPages) -> None:
    start = Hva(1 << 40)
    rig.run(rig.mm.mmap(start, MIB2, RW))
    rig.run(rig.mm.write(start, bytes(MIB2)))
    rig.run(rig.mirror.pin(start, PAGE, write=True))
    assert errno_of(lambda: rig.do(collapse(rig.mm, start, MIB2))) == errno.EAGAIN
    assert rig.run(rig.mirror.unpin(start, PAGE)) == 1
    rig.do(collapse(rig.mm, start, MIB2))
    (huge,) = rig.run(rig.mirror.pin(start, MIB2, write=True)).pages
    rig.do(split(rig.mm, start, MIB2))
    assert rig.do(migrate(rig.mm, start, MIB2)) == 0
    present = rig.mm.present_page(start)
    assert present is not None
    assert (present.level, present.pfn) == (1, huge.pfn)
    assert rig.violations() == []
    assert rig.run(rig.mirror.unpin(start, MIB2)) == 1
    assert rig.mm.pinned_pages == 0


# -- what is pinned to be read -----------------------------------------------------------------------------


def shown(rig: MirroredPages, hva: Hva) -> bytes:
    """The first bytes of the frame that a pin for reading gave, after the process wrote there."""
    (page,) = rig.run(rig.mirror.pin(hva, PAGE, write=False)).pages
    rig.do(rig.mm.mprotect(hva, PAGE, RW))
    rig.do(rig.mm.write(hva, b"later"))
    return rig.frame(page.pfn, 5)


def test_a_pin_to_read_the_zero_page_shows_what_the_process_writes_later(rig: MirroredPages) -> None:
    rig.run(rig.mm.read(rig.hva, 1))
    wait = rig.start(rig.mirror.pin(rig.hva, PAGE, write=False))
    rig.ack(rig.importer)  # a copy replaces what was mapped
    (page,) = wait.result().pages
    assert not page.writable
    rig.write(0, b"later")
    assert rig.frame(page.pfn, 5) == b"later"
    assert rig.violations() == []


def test_a_pin_to_read_a_private_file_page_or_a_readonly_mapping_makes_it_the_process_s_own(
    rig: MirroredPages,
) -> None:
    file = MemoryFile(rig.memory, "data", PAGE)
    rig.run(file.pwrite(0, b"in the file"))
    hva = rig.run(rig.mm.mmap(None, PAGE, Prot.READ, file=file))
    assert shown(rig, hva) == b"later"
    assert file.pread(0, 5) == b"in th"
    assert shown(rig, rig.map(1, prot=Prot.READ)) == b"later"


def test_a_pin_to_read_what_a_fork_shares_gets_the_process_its_own(rig: MirroredPages) -> None:
    rig.write(0)
    child = rig.host.create_mm()
    rig.do(fork(rig.mm, child))
    before = rig.mm.present_page(rig.hva)
    wait = rig.start(rig.mirror.pin(rig.hva, PAGE, write=False))
    rig.ack(rig.importer)
    (page,) = wait.result().pages
    assert before is not None
    assert (page.pfn == before.pfn, rig.frame(page.pfn, 7)) == (False, b"written")
    rig.run(child.exit())
    rig.write(0, b"later")
    assert rig.frame(page.pfn, 5) == b"later"
    assert rig.violations() == []


def test_a_pin_to_read_what_only_this_process_still_has_copies_nothing(rig: MirroredPages) -> None:
    rig.write(0)
    child = rig.host.create_mm()
    rig.do(fork(rig.mm, child))
    rig.run(child.exit())
    before = rig.mm.present_page(rig.hva)
    assert before is not None
    assert rig.pin(0, write=False).pages[0].pfn == before.pfn


def test_a_shared_file_page_is_pinned_as_it_is(rig: MirroredPages) -> None:
    file = MemoryFile(rig.memory, "data", PAGE)
    rig.run(file.pwrite(0, b"in the file"))
    hva = rig.run(rig.mm.mmap(None, PAGE, Prot.READ, file=file, shared=True))
    (page,) = rig.run(rig.mirror.pin(hva, PAGE, write=False)).pages
    rig.run(file.pwrite(0, b"IN"))
    assert rig.frame(page.pfn, 11) == b"IN the file"


# -- accounts ----------------------------------------------------------------------------------------------


def test_pins_count_and_each_is_taken_back_once(rig: MirroredPages) -> None:
    rig.pin(0, 4)
    rig.pin(2, 4)
    assert rig.mm.pinned_pages == rig.memory.counters.pinned_pages == 8
    assert [rig.unpin(), rig.unpin(), rig.unpin()] == [6, 2, 0]
    assert rig.mm.pinned_pages == rig.memory.counters.pinned_pages == 0


def test_a_huge_page_is_one_pin_of_512_pages_found_where_it_was_asked_for(rig: MirroredPages) -> None:
    large = rig.map(2, 2)
    found = rig.run(rig.mirror.pin(Hva(large + 7 * PAGE), MIB2, write=True))
    assert [(page.hva, page.level) for page in found.pages] == [(large, 2), (large + MIB2, 2)]
    assert (found.end, rig.mm.pinned_pages) == (large + 7 * PAGE + MIB2, 1024)
    unpin = rig.mirror.unpin
    assert rig.run(unpin(large, 7 * PAGE)) == 0
    assert rig.run(unpin(Hva(large + 7 * PAGE), PAGE)) == 1
    assert (rig.run(unpin(large, 2 * MIB2)), rig.mm.pinned_pages) == (1, 0)


def test_a_pin_has_at_most_so_many_pages(rig: MirroredPages) -> None:
    many = rig.map(MAX_PAGES + 3)
    found = rig.run(rig.mirror.pin(many, (MAX_PAGES + 3) * PAGE, write=True))
    assert (len(found.pages), found.end, rig.mm.pinned_pages) == (
        MAX_PAGES,
        many + MAX_PAGES * PAGE,
        MAX_PAGES,
    )


def test_an_area_gets_its_own_page_back_though_another_was_mapped_there(rig: MirroredPages) -> None:
    (old,) = rig.pin(0, area=1).pages
    rig.drop()
    (new,) = rig.pin(0, area=2).pages
    tags = rig.tag(old.pfn), rig.tag(new.pfn)
    assert old.pfn != new.pfn
    assert rig.unpin(area=3) == 0
    assert rig.unpin(area=1) == 1
    assert (rig.tag(old.pfn) != tags[0], rig.tag(new.pfn)) == (True, tags[1])
    assert (rig.unpin(area=1), rig.unpin(area=2)) == (0, 1)


def test_a_pin_beyond_the_limit_leaves_none_of_its_call_and_all_of_others() -> None:
    rig = MirroredPages()
    rig.memory.locked.limit = 6
    rig.pin(0, 2)
    assert errno_of(lambda: rig.pin(0, 5)) == errno.ENOMEM
    assert rig.mm.pinned_pages == 2
    rig.pin(8, 4)
    assert errno_of(lambda: rig.pin(0)) == errno.ENOMEM
    large = rig.map(1, 2)
    rig.unpin(8, 4)
    assert errno_of(lambda: rig.run(rig.mirror.pin(large, PAGE, write=True))) == errno.ENOMEM
    assert (rig.mm.pinned_pages, rig.violations()) == (2, [])


def test_a_pin_that_meets_a_hole_leaves_none_of_its_call(rig: MirroredPages) -> None:
    rig.do(rig.mm.munmap(rig.at(5), PAGE))
    assert errno_of(lambda: rig.pin(0, 8)) == errno.EFAULT
    assert (rig.mm.pinned_pages, rig.unpin()) == (0, 0)


def test_pins_that_read_pages_back_from_swap_say_so(rig: MirroredPages) -> None:
    rig.write(0)
    rig.write(1)
    rig.do(swap_out(rig.mm, rig.hva, 2 * PAGE))
    assert rig.pin(0, 3).major == 2
    assert rig.memory.counters.hmm_faults_major == 2


def test_long_pins_and_unpins_let_others_have_turns(rig: MirroredPages) -> None:
    turns: list[Wait[None]] = []

    def cond_resched() -> Wait[None]:
        turns.append(Wait())
        return turns[-1]

    rig.host.cond_resched = cond_resched
    large = rig.map(3, 2)
    pinned = rig.start(rig.mirror.pin(large, 3 * MIB2, write=True))
    for _ in range(3):
        assert not pinned.done
        turns.pop().set(None)
        rig.flows.run_ready()
    assert len(pinned.result().pages) == 3
    closed = rig.start(rig.mirror.close())
    for left in (2, 1, 0):
        assert rig.mm.pinned_pages == left * 512
        turns.pop().set(None)
        rig.flows.run_ready()
    assert closed.done


def test_two_unpins_at_once_take_each_pin_once(rig: MirroredPages) -> None:
    turn: Wait[None] = Wait()
    large = rig.map(2, 2)
    rig.run(rig.mirror.pin(large, 2 * MIB2, write=True))
    rig.host.cond_resched = lambda: turn
    waits = [rig.start(rig.mirror.unpin(large, 2 * MIB2)) for _ in range(3)]
    assert (len(rig.mirror.pins), [wait.done for wait in waits]) == (0, [False, False, True])
    turn.set(None)
    rig.flows.run_ready()
    assert [wait.result() for wait in waits] == [1, 1, 0]
    assert (rig.mm.pinned_pages, rig.violations()) == (0, [])


# -- ends --------------------------------------------------------------------------------------------------


def test_close_unpins_everything_and_nothing_is_told_any_more(rig: MirroredPages) -> None:
    for area in range(3):
        rig.pin(area, 4, area=area)
    rig.run(rig.mirror.close())
    assert rig.mm.pinned_pages == 0
    rig.drop(0, 16)
    assert (rig.told, rig.host.frames.in_use) == ([], 0)


def test_a_pin_asleep_while_its_mirror_closes(rig: MirroredPages) -> None:
    uffd = Userfaultfd(rig.mm, user_mode_only=False)
    rig.run(uffd.register(rig.at(1), PAGE, missing=True, wp=False))
    asked = rig.start(rig.mirror.pin(rig.hva, 2 * PAGE, write=True))
    assert (asked.done, rig.mm.pinned_pages) == (False, 1)
    rig.run(rig.mirror.close())
    assert rig.mm.pinned_pages == 0, "the sleeper may never wake"
    rig.run(uffd.copy(rig.at(1), bytes(PAGE), wp=False))
    rig.flows.run_ready()
    assert errno_of(asked.result) == errno.EINVAL
    assert rig.mm.pinned_pages == 0


def test_a_pin_that_fails_takes_back_its_own(rig: MirroredPages) -> None:
    """While it slept, one pin of the page that both calls pinned was given back."""
    uffd = Userfaultfd(rig.mm, user_mode_only=False)
    rig.run(uffd.register(rig.at(1), PAGE, missing=True, wp=False))
    rig.pin(0, area=5)
    asked = rig.start(rig.mirror.pin(rig.hva, 3 * PAGE, write=True, area=5))
    assert not asked.done
    assert rig.unpin(0, 1, area=5) == 1
    rig.do(rig.mm.munmap(rig.at(2), PAGE))
    rig.run(uffd.copy(rig.at(1), bytes(PAGE), wp=False))
    rig.flows.run_ready()
    assert errno_of(asked.result) == errno.EFAULT
    assert (rig.mm.pinned_pages, len(rig.mirror.pins), rig.violations()) == (1, 1, [])


def test_what_is_pinned_is_told_by_area_in_order_as_it_was_asked_for(rig: MirroredPages) -> None:
    large = rig.map(2, 2)
    rig.run(rig.mirror.pin(Hva(large + 3 * PAGE), MIB2, write=True, area=7))
    rig.pin(2, 2, area=7)
    rig.pin(2, 1, area=8)
    rig.pin(0, 1, area=7)
    pages = {page: rig.mm.present_page(rig.at(page)) for page in (0, 2, 3)}
    runs, end = rig.mirror.pinned_in(rig.hva, SIZE, area=7)
    assert [(run.hva, run.npages) for run in runs] == [(rig.at(page), 1) for page in (0, 2, 3)]
    assert [run.pfn for run in runs] == [page.pfn for page in pages.values() if page is not None]
    assert (end, len(rig.mirror.pins)) == (rig.at(16), 6)
    assert [run.hva for run in rig.mirror.pinned_in(rig.at(2), PAGE, area=7)[0]] == [rig.at(2)]
    huge, _ = rig.mirror.pinned_in(large, 2 * MIB2, area=7)
    first = rig.mm.present_page(large)
    assert first is not None
    assert [(run.hva, run.npages) for run in huge] == [(large + 3 * PAGE, 509), (large + MIB2, 512)]
    assert huge[0].pfn == first.pfn + 3
    assert rig.mirror.pinned_in(rig.hva, SIZE, area=9) == ([], rig.at(16))


def test_an_answer_of_what_is_pinned_stops_after_so_many_and_goes_on(rig: MirroredPages) -> None:
    many = rig.map(MAX_PAGES + 5)
    size = (MAX_PAGES + 5) * PAGE
    done = rig.run(rig.mirror.pin(many, size, write=True)).end
    rig.run(rig.mirror.pin(done, many + size - done, write=True))
    runs, end = rig.mirror.pinned_in(many, size, area=0)
    rest, last = rig.mirror.pinned_in(end, many + size - end, area=0)
    assert (len(runs), len(rest), last) == (MAX_PAGES, 5, many + size)
    far, _ = rig.mirror.pinned_in(rig.hva, 1 << 45, area=0)
    assert far == runs


def test_two_mirrors_pin_apart(rig: MirroredPages) -> None:
    other = Mirror(rig.mm)
    rig.run(other.register(SlowImporter(), HandLease()))
    (page,) = rig.pin(0).pages
    assert rig.run(other.pin(rig.hva, PAGE, write=True)).pages[0].pfn == page.pfn
    rig.run(other.close())
    assert (rig.mm.pinned_pages, rig.violations()) == (1, [])
    assert rig.do(migrate(rig.mm, rig.hva, PAGE)) == 0


def test_the_check_sees_a_pinned_page_that_moved_a_lost_pin_and_a_wrong_account(rig: MirroredPages) -> None:
    rig.pin(0)
    ((_, pinned),) = rig.mirror.pins
    page = pinned.page
    assert rig.violations() == []
    page.pins = 0  # a planted bug: the host moves it after all
    rig.do(migrate(rig.mm, rig.hva, PAGE))
    first, second = rig.violations()
    assert first.startswith("I6: mm 1: pinned at")
    assert second.startswith("I6: pfn")
    page.pins, page.pfn = 1, Pfn(pinned.pfn)
    rig.mm.pinned_pages = rig.memory.locked.pages = 0
    assert any(found.endswith("its mirrors 1") for found in rig.violations())
    assert any(found.endswith("the mirrors it pays for 1") for found in rig.violations())
    assert page.level == Level(1)
