"""A userfaultfd: who sleeps, what is read, what an answer makes of a page, and how it ends."""

from __future__ import annotations

import errno
from functools import partial
from typing import Any

import pytest

from kvmd.core.mm.check import check_memory
from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.fork import fork
from kvmd.core.mm.madvise import ADVICE, dontneed
from kvmd.core.mm.mremap import mremap
from kvmd.core.mm.page import Pte
from kvmd.core.mm.reclaim import swap_out
from kvmd.core.mm.userfaultfd import UffdFault, Userfaultfd
from protocol.flow import Wait
from protocol.units import Hva, Level
from tests.kit.kvmd import RW, World
from tests.kit.refusals import errno_of

PAGE = 4096


class Registered(World):
    """8 pages under a userfaultfd."""

    def __init__(self, *, missing: bool = True, wp: bool = False, user_mode_only: bool = False) -> None:
        super().__init__()
        self.hva = self.map(8)
        self.uffd = Userfaultfd(self.mm, user_mode_only=user_mode_only)
        self.register(missing=missing, wp=wp)

    def register(self, **modes: bool) -> None:
        self.run(self.uffd.register(self.hva, 8 * PAGE, **modes))

    def gup(self, page: int, *, write: bool = False) -> Wait[Any]:
        return self.start(self.mm.get_user_page(self.at(page), write=write))

    def at(self, page: int) -> Hva:
        return Hva(self.hva + page * PAGE)

    def event(self) -> UffdFault:
        return self.run(self.uffd.next_event())

    def copy(self, page: int, data: bytes = b"from uffd", *, wp: bool = False) -> None:
        self.run(self.uffd.copy(self.at(page), data.ljust(PAGE, b"\0"), wp=wp))

    def protected(self, page: int) -> bool:
        entry = self.mm.present_page(self.at(page))
        return isinstance(entry, Pte) and entry.uffd_wp

    def protect(self, page: int, pages: int = 1, *, on: bool = True) -> None:
        self.run(self.uffd.writeprotect(self.at(page), pages * PAGE, on=on))


# -- missing pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [False, True])
def test_a_missing_page_waits_for_a_copy_which_maps_it_writable(write: bool) -> None:
    rig = Registered()
    fault = rig.gup(3, write=write)
    assert not fault.done
    assert rig.event() == UffdFault(rig.at(3), write, False)
    rig.copy(3)
    assert fault.result().writable, "so even a guest's read is logged dirty"
    assert rig.run(rig.mm.read(rig.at(3), 9)) == b"from uffd"


def test_a_zeropage_answer_is_read_only_until_written() -> None:
    rig = Registered()
    fault = rig.gup(0)
    rig.run(rig.uffd.zeropage(rig.hva, PAGE))
    assert not fault.result().writable
    rig.run(rig.mm.write(rig.hva, b"x"))
    assert rig.run(rig.mm.read(rig.hva, 2)) == b"x\0"


def test_each_fault_is_read_once_and_one_answered_before_is_not_read_at_all() -> None:
    rig = Registered()
    faults = [rig.gup(1), rig.gup(1, write=True), rig.gup(2)]
    rig.copy(1)
    assert [fault.done for fault in faults] == [True, True, False]
    assert rig.event().address == rig.at(2)
    reader = rig.start(rig.uffd.next_event())
    assert not reader.done
    rig.gup(5)
    assert reader.result().address == rig.at(5)


def test_the_processs_own_accesses_sleep_too() -> None:
    rig = Registered()
    read = rig.start(rig.mm.read(rig.at(1), 4))
    write = rig.start(rig.mm.write(rig.at(2), b"over"))
    rig.copy(1)
    rig.copy(2)
    assert read.result() == b"from"
    assert write.done
    assert rig.run(rig.mm.read(rig.at(2), 9)) == b"over uffd"


def test_a_sleeping_fault_holds_no_lock() -> None:
    rig = Registered()
    rig.gup(1)
    rig.map(1)
    rig.run(rig.mm.mprotect(rig.hva, PAGE, RW))


def test_present_pages_raise_no_event_until_they_are_dropped() -> None:
    rig = Registered(missing=False, wp=True)
    rig.run(rig.mm.write(rig.hva, b"here"))
    rig.register(missing=True, wp=False)
    assert rig.gup(0).done
    rig.run(dontneed(rig.mm, rig.hva, PAGE))
    assert not rig.gup(0).done


def test_who_registers_for_less_loses_nothing() -> None:
    rig = Registered(missing=True, wp=True)
    rig.copy(0, wp=True)
    rig.register(missing=True, wp=False)
    assert not rig.gup(0, write=True).done
    assert rig.event() == UffdFault(rig.at(0), True, True)
    assert not rig.gup(1).done


def test_user_mode_only_fails_the_kernels_faults_and_serves_the_processs() -> None:
    rig = Registered(user_mode_only=True)
    for write in (False, True):
        assert errno_of(lambda write=write: rig.gup(0, write=write).result()) == errno.EFAULT  # type: ignore[misc]
    read = rig.start(rig.mm.read(rig.hva, 4))
    rig.copy(0)
    assert read.result() == b"from"


@pytest.mark.parametrize("how", ["close", "unregister", "munmap", "exit"])
def test_what_ends_it_wakes_everybody(how: str) -> None:
    rig = Registered()
    unread, read = rig.gup(1), rig.gup(2)
    rig.event()
    flow = {
        "close": rig.uffd.close,
        "unregister": lambda: rig.uffd.unregister(rig.hva, 8 * PAGE),
        "munmap": lambda: rig.mm.munmap(rig.hva, 8 * PAGE),
        "exit": rig.mm.exit,
    }[how]()
    rig.run(flow)
    rig.flows.run_ready()
    for fault in (unread, read):
        if how in ("close", "unregister"):
            assert not fault.result().writable, "an ordinary read: the zero page"
        else:
            assert errno_of(fault.result) == errno.EFAULT
    assert check_memory(rig.host.memory, [rig.mm]) == []


def test_close_ends_a_read() -> None:
    rig = Registered()
    reader = rig.start(rig.uffd.next_event())
    rig.run(rig.uffd.close())
    rig.flows.run_ready()
    assert errno_of(reader.result) == errno.EBADF


def test_a_files_page_is_missing_only_if_the_file_has_none() -> None:
    rig = Registered()
    file = MemoryFile(rig.host.memory, "f", 4 * PAGE)
    rig.run(file.pwrite(PAGE, b"there"))
    hva = rig.run(rig.mm.mmap(None, 4 * PAGE, RW, shared=True, file=file))
    rig.run(rig.uffd.register(hva, 4 * PAGE, missing=True, wp=False))
    assert rig.run(rig.mm.read(Hva(hva + PAGE), 5)) == b"there"
    fault = rig.start(rig.mm.get_user_page(hva, write=False))
    rig.run(rig.uffd.copy(hva, b"filled".ljust(PAGE, b"\0"), wp=False))
    assert fault.result().writable
    assert file.pread(0, 6) == b"filled"


def test_a_files_page_that_is_protected_before_it_is_there_is_missing_all_the_same() -> None:
    rig = Registered()
    file = MemoryFile(rig.host.memory, "f", 4 * PAGE)
    hva = rig.run(rig.mm.mmap(None, 4 * PAGE, RW, shared=True, file=file))
    rig.run(rig.uffd.register(hva, 4 * PAGE, missing=True, wp=True))
    rig.run(rig.uffd.writeprotect(hva, 4 * PAGE, on=True))
    fault = rig.start(rig.mm.get_user_page(hva, write=False))
    assert rig.event() == UffdFault(hva, False, False)
    rig.run(rig.uffd.copy(hva, b"filled".ljust(PAGE, b"\0"), wp=True))
    assert not fault.result().writable
    assert rig.run(rig.mm.read(hva, 6)) == b"filled"


# -- write protection ---------------------------------------------------------------------------------------


def test_a_protected_page_can_be_read_and_a_write_waits() -> None:
    rig = Registered(missing=False, wp=True)
    rig.run(rig.mm.write(rig.hva, b"x" * 8 * PAGE))
    rig.protect(0, 8)
    assert not rig.gup(1).result().writable
    fault = rig.gup(1, write=True)
    assert rig.event() == UffdFault(rig.at(1), True, True)
    rig.protect(1, on=False)
    assert fault.result().writable
    assert not rig.gup(2).result().writable, "still protected"


def test_pages_not_there_are_not_protected_in_anonymous_memory() -> None:
    rig = Registered(missing=False, wp=True)
    rig.protect(0, 8)
    assert rig.gup(0, write=True).result().writable


def test_a_copy_may_come_protected() -> None:
    rig = Registered(wp=True)
    fault = rig.gup(3, write=True)
    rig.event()
    rig.copy(3, wp=True)
    assert not fault.done
    assert rig.event() == UffdFault(rig.at(3), True, True)
    rig.protect(3, on=False)
    assert fault.result().writable


def test_a_files_page_is_writable_at_once_unless_writes_are_waited_for() -> None:
    rig = Registered()
    world = rig
    file = MemoryFile(world.host.memory, "f", 4 * PAGE)
    hva = world.run(rig.mm.mmap(None, 4 * PAGE, RW, shared=True, file=file))
    assert world.run(rig.mm.get_user_page(hva, write=False)).writable
    world.run(rig.uffd.register(hva, 4 * PAGE, missing=False, wp=True))
    second = Hva(hva + PAGE)
    assert not world.run(rig.mm.get_user_page(second, write=False)).writable
    assert world.run(rig.mm.get_user_page(second, write=True)).writable


@pytest.mark.parametrize("what", ["swap", "dontneed", "dontneed twice", "fault"])
def test_protection_of_a_files_page_survives_its_absence(what: str) -> None:
    rig = Registered()
    world = rig
    file = MemoryFile(world.host.memory, "f", 4 * PAGE)
    hva = world.run(rig.mm.mmap(None, 4 * PAGE, RW, shared=True, file=file))
    world.run(rig.uffd.register(hva, 4 * PAGE, missing=False, wp=True))
    if what != "fault":
        world.run(rig.mm.write(hva, b"kept"))
    world.run(rig.uffd.writeprotect(hva, 4 * PAGE, on=True))
    if what == "swap":
        world.run(swap_out(rig.mm, hva, PAGE))
    for _ in range({"dontneed": 1, "dontneed twice": 2}.get(what, 0)):
        world.run(dontneed(rig.mm, hva, PAGE))
    assert world.run(rig.mm.read(hva, 4)) == (bytes(4) if what == "fault" else b"kept")
    fault = world.start(rig.mm.get_user_page(hva, write=True))
    assert rig.event() == UffdFault(hva, True, True)
    world.run(rig.uffd.writeprotect(hva, 4 * PAGE, on=False))
    assert fault.result().writable


@pytest.mark.parametrize("swapped", [False, True])
def test_protection_of_a_copy_survives_its_end(swapped: bool) -> None:
    """In a private mapping of a file it is the file's page that comes next."""
    rig = Registered()
    file = MemoryFile(rig.host.memory, "f", 4 * PAGE)
    hva = rig.run(rig.mm.mmap(None, 4 * PAGE, RW, file=file))
    rig.run(rig.uffd.register(hva, 4 * PAGE, missing=False, wp=True))
    rig.run(rig.mm.write(hva, b"copy"))
    rig.run(rig.uffd.writeprotect(hva, PAGE, on=True))
    if swapped:
        assert rig.run(swap_out(rig.mm, hva, PAGE)) == 1
    rig.run(dontneed(rig.mm, hva, PAGE))
    assert rig.run(rig.mm.read(hva, 4)) == bytes(4)
    assert not rig.start(rig.mm.get_user_page(hva, write=True)).done
    assert rig.event() == UffdFault(hva, True, True)


def test_protection_survives_swap() -> None:
    rig = Registered(missing=False, wp=True)
    rig.run(rig.mm.write(rig.hva, b"x" * PAGE))
    rig.protect(0)
    assert rig.run(swap_out(rig.mm, rig.hva, PAGE)) == 1
    assert not rig.gup(0).result().writable
    assert not rig.gup(0, write=True).done


def test_closing_takes_the_protection_away() -> None:
    rig = Registered(missing=False, wp=True)
    rig.run(rig.mm.write(rig.hva, b"x" * PAGE))
    rig.protect(0)
    rig.run(rig.uffd.close())
    assert rig.gup(0).result().writable


def test_protection_passes_holes_by_and_stops_at_what_is_not_registered() -> None:
    """[mm userfaultfd.c, mwriteprotect_range] What comes before is protected all the same."""
    rig = Registered(missing=False, wp=True)
    rig.run(rig.mm.write(rig.hva, bytes(8 * PAGE)))
    rig.run(rig.mm.munmap(rig.at(2), PAGE))
    rig.protect(0, 8)
    assert [rig.protected(page) for page in (0, 1, 3, 7)] == [True, True, True, True]
    rig.protect(0, 8, on=False)
    rig.run(rig.uffd.unregister(rig.at(4), PAGE))
    assert errno_of(lambda: rig.protect(0, 8)) == errno.ENOENT
    assert [rig.protected(page) for page in (0, 1, 3, 4, 5)] == [True, True, True, False, False]
    rig.run(rig.mm.munmap(rig.at(0), 2 * PAGE))
    assert errno_of(lambda: rig.protect(0, 3)) == errno.ENOENT, "nothing is mapped there"


@pytest.mark.parametrize("how", ["fork", "mremap"])
def test_a_child_and_a_moved_range_are_not_registered(how: str) -> None:
    rig = Registered()
    if how == "fork":
        child = rig.host.create_mm()
        rig.run(fork(rig.mm, child))
        assert rig.run(child.get_user_page(rig.hva, write=True)).writable
    else:
        moved = rig.run(mremap(rig.mm, rig.hva, 8 * PAGE, 8 * PAGE, Hva(0x7000_0000)))
        assert rig.run(rig.mm.get_user_page(moved, write=True)).writable


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_what_was_protected_is_not_where_it_is_moved_to(swapped: bool, shared: bool) -> None:
    """[mm mremap.c, move_ptes] Whoever registers there later has protected nothing yet."""
    rig = Registered()
    file = MemoryFile(rig.host.memory, "f", 4 * PAGE) if shared else None
    hva = rig.run(rig.mm.mmap(None, 4 * PAGE, RW, shared=shared, file=file))
    rig.run(rig.uffd.register(hva, 4 * PAGE, missing=False, wp=True))
    rig.run(rig.mm.write(hva, b"x"))
    rig.run(rig.uffd.writeprotect(hva, 4 * PAGE, on=True))
    if swapped:
        assert rig.run(swap_out(rig.mm, hva, PAGE)) == 1
    moved = rig.run(mremap(rig.mm, hva, 4 * PAGE, 4 * PAGE, Hva(0x7000_0000)))
    rig.run(rig.uffd.register(moved, 4 * PAGE, missing=False, wp=True))
    rig.run(rig.mm.write(moved, b"y" * 4 * PAGE))
    assert rig.run(rig.mm.read(moved, 4 * PAGE)) == b"y" * 4 * PAGE


# -- what is refused -------------------------------------------------------------------------------------


def test_answers_that_are_refused() -> None:
    rig = Registered()
    run, uffd = rig.run, rig.uffd
    rig.copy(0)
    other = rig.map(2)
    data = bytes(PAGE)
    assert errno_of(lambda: rig.copy(0)) == errno.EEXIST
    assert errno_of(lambda: run(uffd.zeropage(rig.hva, PAGE))) == errno.EEXIST
    assert errno_of(lambda: rig.copy(1, wp=True)) == errno.EINVAL
    assert errno_of(lambda: run(uffd.copy(rig.at(1), b"short", wp=False))) == errno.EINVAL
    assert errno_of(lambda: run(uffd.copy(other, data, wp=False))) == errno.ENOENT
    assert errno_of(lambda: run(uffd.copy(rig.at(7), 2 * data, wp=False))) == errno.ENOENT
    assert errno_of(lambda: rig.protect(1)) == errno.ENOENT
    assert errno_of(lambda: run(uffd.zeropage(rig.hva, 1 << 40))) == errno.ENOMEM


def test_an_answer_that_meets_a_page_on_its_way_has_filled_those_before() -> None:
    """[userfaultfd.c] EEXIST is only of the first."""
    rig = Registered()
    rig.copy(2)
    rig.copy(6)
    assert errno_of(lambda: rig.run(rig.uffd.copy(rig.hva, b"x" * 4 * PAGE, wp=False))) == errno.EAGAIN
    assert rig.run(rig.mm.read(rig.at(1), 1)) == b"x"
    assert rig.run(rig.mm.read(rig.at(2), 4)) == b"from"
    assert not rig.gup(3).done
    assert errno_of(lambda: rig.run(rig.uffd.zeropage(rig.at(4), 4 * PAGE))) == errno.EAGAIN
    assert rig.run(rig.mm.read(rig.at(5), 1)) == b"\0"
    assert errno_of(lambda: rig.run(rig.uffd.zeropage(rig.at(6), 2 * PAGE))) == errno.EEXIST


def test_registrations_that_are_refused() -> None:
    rig = Registered()
    run = rig.run
    other = Userfaultfd(rig.mm, user_mode_only=False)
    huge = rig.map(1, 2)
    refused = (
        (other, rig.hva, PAGE, True, errno.EBUSY),
        (rig.uffd, Hva(rig.hva + 1), PAGE, True, errno.EINVAL),
        (rig.uffd, Hva(0x1000), PAGE, True, errno.EINVAL),
        (rig.uffd, huge, 2 << 20, True, errno.EINVAL),
        (rig.uffd, rig.hva, PAGE, False, errno.EINVAL),
    )
    for uffd, start, size, missing, number in refused:
        assert errno_of(partial(run, uffd.register(start, size, missing=missing, wp=False))) == number


def test_a_transparent_huge_page_is_not_made_where_pages_are_awaited() -> None:
    rig = Registered()
    hva = rig.run(rig.mm.mmap(Hva(0x4000_0000), 2 << 20, RW, Level(1)))
    rig.run(ADVICE["hugepage"](rig.mm, hva, 2 << 20))
    rig.run(rig.uffd.register(hva, 2 << 20, missing=True, wp=False))
    fault = rig.start(rig.mm.get_user_page(hva, write=True))
    rig.run(rig.uffd.copy(hva, bytes(PAGE), wp=False))
    assert fault.result().level == 1


def test_an_answer_that_fails_wakes_nobody_but_for_what_is_there() -> None:
    """[userfaultfd.c, userfaultfd_copy] Nobody reads of a fault again that was not answered."""
    rig = Registered()
    rig.copy(2)
    rig.gup(0), rig.gup(3)
    assert [rig.event().address, rig.event().address] == [rig.at(0), rig.at(3)]
    again = rig.start(rig.uffd.next_event())
    assert errno_of(lambda: rig.copy(0, wp=True)) == errno.EINVAL
    rig.flows.run_ready()
    assert not again.done
    assert errno_of(lambda: rig.run(rig.uffd.copy(rig.hva, b"x" * 4 * PAGE, wp=False))) == errno.EAGAIN
    rig.flows.run_ready()
    assert not again.done, "the last page was not filled"
    assert errno_of(lambda: rig.copy(3, wp=True)) == errno.EINVAL
    rig.copy(3)
    assert not again.done


def test_an_answer_for_a_page_that_came_otherwise_wakes_who_sleeps_for_it() -> None:
    """There is no UFFDIO_WAKE."""
    rig = Registered()
    file = MemoryFile(rig.host.memory, "f", PAGE)
    hva = rig.run(rig.mm.mmap(None, PAGE, RW, shared=True, file=file))
    rig.run(rig.uffd.register(hva, PAGE, missing=True, wp=False))
    fault = rig.start(rig.mm.get_user_page(hva, write=False))
    rig.run(file.pwrite(0, b"written"))
    assert errno_of(lambda: rig.run(rig.uffd.copy(hva, bytes(PAGE), wp=False))) == errno.EEXIST
    rig.flows.run_ready()
    assert fault.done
    assert rig.run(rig.mm.read(hva, 7)) == b"written"
