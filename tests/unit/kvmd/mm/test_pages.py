"""What a page is after each kind of fault, and who is told before it becomes another.

The expectations are those of the recorded answers of a real kernel: which reads are clean (the page is not
writable yet) and which are not, what a fork, a protection and a file leave.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from kvmd.core.mm.check import check_memory
from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.fork import fork
from kvmd.core.mm.madvise import ADVICE, collapse, dontneed
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.mremap import mremap
from kvmd.core.mm.page import MappedPage
from kvmd.core.mm.reclaim import migrate, numa_hint, swap_out
from kvmd.core.mm.space import MmState
from kvmd.core.mm.stats import pagemap
from kvmd.core.mm.thp import split
from kvmd.core.mm.vma import Prot
from protocol.flow import Wait
from protocol.units import Hva, Level
from tests.kit.kvmd import RW, World
from tests.kit.refusals import errno_of
from tests.unit.kvmd.mm.test_mm import Notifier

PAGE = 4096
MIB2 = 2 << 20
HUGE_AT = Hva(0x4000_0000)


@pytest.fixture
def world() -> World:
    return World()


def gup(world: World, hva: int, *, write: bool = False, mm: Mm | None = None) -> MappedPage:
    return world.run((mm or world.mm).get_user_page(Hva(hva), write=write))


def child_of(world: World) -> Mm:
    child = world.host.create_mm()
    world.run(fork(world.mm, child))
    return child


def touched(world: World, pages: int = 4) -> Hva:
    hva = world.map(pages)
    world.run(world.mm.write(hva, b"x" * pages * PAGE))
    return hva


def file_at(world: World, pages: int, *, shared: bool, prot: Prot = RW) -> tuple[MemoryFile, Hva]:
    file = MemoryFile(world.host.memory, "m", pages * PAGE)
    return file, world.run(world.mm.mmap(None, pages * PAGE, prot, shared=shared, file=file))


def huge(world: World, pages_of_2m: int = 2) -> Hva:
    world.run(world.mm.mmap(HUGE_AT, pages_of_2m * MIB2, RW, Level(1)))
    world.run(ADVICE["hugepage"](world.mm, HUGE_AT, pages_of_2m * MIB2))
    return HUGE_AT


def watch(mm: Mm) -> Notifier:
    notifier = Notifier()
    mm.notifiers.append(notifier)
    return notifier


def books_are_right(world: World, *others: Mm) -> None:
    assert check_memory(world.host.memory, [world.mm, *others]) == []


# -- which pages are writable --------------------------------------------------------------------------


def test_untouched_pages_read_as_one_zero_page_that_is_not_writable(world: World) -> None:
    hva = world.map(3)
    found = [gup(world, hva + i * PAGE) for i in range(3)]
    assert len({page.pfn for page in found}) == 1
    assert not any(page.writable for page in found)
    assert world.host.frames.in_use == 1


def test_a_write_over_the_zero_page_tells_the_notifiers_first(world: World) -> None:
    hva = world.map(1)
    gup(world, hva)
    notifier = watch(world.mm)
    assert gup(world, hva, write=True).writable
    assert notifier.log == [("start", hva, hva + PAGE), ("end", hva, hva + PAGE)]
    assert gup(world, hva).writable, "a page the process has of its own is writable for a reader too"
    assert world.host.frames.in_use == 1, "the zero page went with its last mapping"


def test_the_copy_is_made_only_when_the_old_page_is_let_go(world: World) -> None:
    hva = world.map(1)
    gup(world, hva)
    gate: Wait[None] = Wait()
    world.mm.notifiers.append(Notifier(gate))
    fault = world.start(world.mm.get_user_page(hva, write=True))
    other = world.start(world.mm.write(hva, b"second"))  # at the same page, at the same time
    assert not fault.done
    gate.set(None)
    world.flows.run_ready()
    assert other.done
    assert world.run(world.mm.read(hva, 6)) == b"second"
    assert gup(world, hva).pfn == fault.result().pfn, "the second found the first one's copy"


def test_a_shared_files_page_is_writable_at_its_first_read(world: World) -> None:
    file, hva = file_at(world, 2, shared=True)
    assert gup(world, hva).writable
    assert not gup(world, file_at(world, 2, shared=True, prot=Prot.READ)[1]).writable
    world.run(world.mm.write(hva, b"through"))
    assert file.pread(0, 7) == b"through"


def test_a_private_files_page_is_the_caches_until_written(world: World) -> None:
    file, hva = file_at(world, 2, shared=False)
    world.run(file.pwrite(0, b"file"))
    assert not gup(world, hva).writable
    world.run(file.pwrite(0, b"FILE"))
    assert world.run(world.mm.read(hva, 4)) == b"FILE"
    world.run(world.mm.write(hva, b"mine"))
    assert (file.pread(0, 4), world.run(world.mm.read(hva, 4))) == (b"FILE", b"mine")
    world.run(dontneed(world.mm, hva, PAGE))
    assert world.run(world.mm.read(hva, 4)) == b"FILE"


def test_a_hugetlb_page_read_first_is_written_in_place(world: World) -> None:
    hva = world.map(1, 2)
    first = gup(world, hva + PAGE)
    assert (first.level, first.writable) == (2, False)
    notifier = watch(world.mm)
    second = gup(world, hva + PAGE, write=True)
    assert (second.pfn, second.writable) == (first.pfn, True)
    assert notifier.log == []


def test_protection_that_is_there_already_is_not_told(world: World) -> None:
    hva = touched(world)
    notifier = watch(world.mm)
    world.run(world.mm.mprotect(hva, 4 * PAGE, RW))
    assert notifier.log == []


@pytest.mark.parametrize("prot", [Prot.READ, Prot.NONE])
def test_protection_that_comes_back_makes_the_processs_own_pages_writable_at_once(
    world: World, prot: Prot
) -> None:
    hva = touched(world)
    zero = world.map(1)
    gup(world, zero)
    for start in (hva, zero):
        world.run(world.mm.mprotect(start, PAGE, prot))
        if prot:
            assert not gup(world, start).writable
        else:
            assert errno_of(lambda start=start: gup(world, start)) == errno.EFAULT  # type: ignore[misc]
        assert errno_of(lambda start=start: gup(world, start, write=True)) == errno.EFAULT  # type: ignore[misc]
        world.run(world.mm.mprotect(start, PAGE, RW))
    assert gup(world, hva).writable
    assert not gup(world, zero).writable


def test_protection_back_and_forth_leaves_one_mapping(world: World) -> None:
    hva = touched(world, 8)
    world.run(world.mm.mprotect(Hva(hva + 2 * PAGE), 2 * PAGE, Prot.READ))
    assert len(world.mm.vmas) == 3
    world.run(world.mm.mprotect(Hva(hva + 2 * PAGE), 2 * PAGE, RW))
    assert len(world.mm.vmas) == 1


# -- fork ----------------------------------------------------------------------------------------------


def test_a_fork_is_told_and_leaves_reads_clean_until_one_writes(world: World) -> None:
    hva = touched(world)
    notifier = watch(world.mm)
    child = child_of(world)
    assert [what for what, *_ in notifier.log] == ["start", "end"]
    before = gup(world, hva)
    assert not before.writable
    assert gup(world, hva, mm=child).pfn == before.pfn
    after = gup(world, hva, write=True)
    assert after.pfn != before.pfn
    assert world.run(child.read(hva, 1)) == b"x"
    books_are_right(world, child)


def test_after_the_child_has_gone_a_page_stays_clean_and_is_then_written_in_place(world: World) -> None:
    hva = touched(world)
    child = child_of(world)
    world.run(child.exit())
    found = gup(world, hva)
    assert not found.writable
    notifier = watch(world.mm)
    assert gup(world, hva, write=True).pfn == found.pfn
    assert notifier.log == []


def test_a_shared_mapping_stays_shared_with_the_child(world: World) -> None:
    hva = world.run(world.mm.mmap(None, PAGE, RW, shared=True))
    child = child_of(world)
    world.run(child.write(hva, b"from the child"))
    world.run(world.mm.exit())
    assert world.run(child.read(hva, 14)) == b"from the child"
    world.run(child.exit())
    assert world.host.frames.in_use == 0


def test_a_pinned_page_stays_the_parents_and_the_child_gets_a_copy(world: World) -> None:
    hva = touched(world)
    pinned = world.run(world.mm.pin_user_page(hva))
    child = child_of(world)
    assert gup(world, hva).pfn == pinned.pfn
    assert gup(world, hva).writable
    assert gup(world, hva, mm=child).pfn != pinned.pfn
    world.mm.unpin(pinned)


def test_a_fork_without_memory_leaves_no_child(world: World) -> None:
    hva = world.map(511, 2)
    for i in range(511):
        gup(world, hva + i * MIB2, write=True)
    pinned = world.run(world.mm.pin_user_page(hva))
    second = world.run(world.mm.pin_user_page(Hva(hva + MIB2)))
    child = world.host.create_mm()
    assert errno_of(lambda: world.run(fork(world.mm, child))) == errno.ENOMEM
    assert child.state is MmState.EXITED
    books_are_right(world, child)
    for page in (pinned, second):
        world.mm.unpin(page)


def test_a_pin_keeps_the_frame_when_the_mapping_goes(world: World) -> None:
    hva = touched(world, 1)
    pinned = world.run(world.mm.pin_user_page(hva))
    for act in (migrate, swap_out, numa_hint):
        assert world.run(act(world.mm, hva, PAGE)) == 0
    tag = world.bare.tags.read(pinned.pfn)
    world.run(world.mm.munmap(hva, PAGE))
    assert (world.host.frames.in_use, world.bare.tags.read(pinned.pfn)) == (1, tag)
    world.mm.unpin(pinned)
    assert world.host.frames.in_use == 0


# -- files -----------------------------------------------------------------------------------------------


def test_truncating_takes_private_copies_too_and_punching_does_not(world: World) -> None:
    file, hva = file_at(world, 4, shared=False)
    world.run(world.mm.write(hva, b"copy" + bytes(4 * PAGE - 4)))
    world.run(file.punch_hole(0, 4 * PAGE))
    assert world.run(world.mm.read(hva, 4)) == b"copy"
    world.run(file.truncate(0))
    assert errno_of(lambda: gup(world, hva)) == errno.EFAULT
    world.run(file.truncate(4 * PAGE))
    assert world.run(world.mm.read(hva, 4)) == bytes(4)


def test_a_hole_is_told_to_who_maps_it_even_if_only_copies_are_there(world: World) -> None:
    """The copy stays, but a secondary MMU lets go of it [unmap_mapping_range]."""
    file, hva = file_at(world, 4, shared=False)
    world.run(world.mm.write(hva, b"copy"))
    notifier = watch(world.mm)
    world.run(file.punch_hole(0, 2 * PAGE))
    assert notifier.log == [("start", hva, hva + 2 * PAGE), ("end", hva, hva + 2 * PAGE)]


def test_truncating_tells_everybody_who_maps_the_end_and_waits(world: World) -> None:
    file, hva = file_at(world, 4, shared=True)
    child = child_of(world)
    for mm in (world.mm, child):
        world.run(mm.write(hva, b"y" * 4 * PAGE))
    gates = [Wait[None](), Wait[None]()]
    notifiers = [Notifier(gate) for gate in gates]
    for mm, notifier in zip((world.mm, child), notifiers, strict=True):
        mm.notifiers.append(notifier)
    over = world.start(file.truncate(2 * PAGE))
    for gate in gates:
        assert not over.done
        assert world.host.frames.in_use == 4
        gate.set(None)
        world.flows.run_ready()
    assert over.done
    assert world.host.frames.in_use == 2
    assert [n.log[0] for n in notifiers] == [("start", hva + 2 * PAGE, hva + 4 * PAGE)] * 2


def test_the_end_of_a_file_inside_a_page_is_cleared_when_it_shrinks(world: World) -> None:
    file, hva = file_at(world, 1, shared=True)
    world.run(world.mm.write(hva, b"0123456789"))
    world.run(file.truncate(4))
    assert world.run(world.mm.read(hva, 10)) == b"0123" + bytes(6)
    assert file.pread(0, 100) == b"0123"


@pytest.mark.parametrize(("offset", "size"), [(100, 200), (4000, 200), (4000, 5000), (0, 4096), (1, 8192)])
def test_a_hole_is_zero_to_the_byte(world: World, offset: int, size: int) -> None:
    file, hva = file_at(world, 4, shared=True)
    world.run(world.mm.write(hva, b"z" * 4 * PAGE))
    world.run(file.punch_hole(offset, size))
    expected = b"z" * offset + bytes(size) + b"z" * (4 * PAGE - offset - size)
    assert file.pread(0, 4 * PAGE) == expected == world.run(world.mm.read(hva, 4 * PAGE))


def test_dropping_shared_pages_keeps_the_data_and_removing_them_does_not(world: World) -> None:
    _, hva = file_at(world, 2, shared=True)
    world.run(world.mm.write(hva, b"data"))
    world.run(dontneed(world.mm, hva, PAGE))
    assert world.run(world.mm.read(hva, 4)) == b"data"
    world.run(ADVICE["remove"](world.mm, hva, PAGE))
    assert world.run(world.mm.read(hva, 4)) == bytes(4)
    assert errno_of(lambda: world.run(ADVICE["remove"](world.mm, world.map(1), PAGE))) == errno.EINVAL
    private = file_at(world, 1, shared=False)[1]
    assert errno_of(lambda: world.run(ADVICE["remove"](world.mm, private, PAGE))) == errno.EACCES


def test_a_file_lives_while_an_fd_or_a_mapping_does(world: World) -> None:
    file, hva = file_at(world, 2, shared=True)
    world.run(file.pwrite(0, b"kept"))
    file.put()
    assert world.run(world.mm.read(hva, 4)) == b"kept"
    world.run(world.mm.munmap(hva, 2 * PAGE))
    assert (world.host.frames.in_use, world.host.memory.pages) == (0, {})


# -- transparent huge pages ----------------------------------------------------------------------------


def test_the_first_write_to_advised_memory_takes_two_megabytes(world: World) -> None:
    hva = huge(world)
    assert gup(world, hva + 5 * PAGE, write=True).level == 2
    assert gup(world, hva + 6 * PAGE).writable
    assert not gup(world, hva + MIB2 + 88 * PAGE).writable
    assert pagemap(world.mm, hva, 2 * MIB2)["anon_huge_kib"] == 2048, "zeroes do not count"


@pytest.mark.parametrize(("first", "last"), [(1, 512), (0, 511)])
def test_a_mapping_without_room_gets_small_pages(world: World, first: int, last: int) -> None:
    hva = huge(world, 1)
    for start, end in ((0, first), (last, 512)):
        if start < end:
            world.run(world.mm.munmap(Hva(hva + start * PAGE), (end - start) * PAGE))
    assert gup(world, hva + 100 * PAGE, write=True).level == 1


@pytest.mark.parametrize("what", ["dontneed", "munmap", "mprotect", "mremap", "nohugepage"])
def test_a_change_of_a_part_splits_the_entry_and_tells_of_all_of_it(world: World, what: str) -> None:
    hva = huge(world)
    world.run(world.mm.write(hva, b"h" * MIB2))
    middle = Hva(hva + 100 * PAGE)
    notifier = watch(world.mm)
    flows: dict[str, Callable[[], Any]] = {
        "dontneed": lambda: dontneed(world.mm, middle, PAGE),
        "munmap": lambda: world.mm.munmap(middle, PAGE),
        "mprotect": lambda: world.mm.mprotect(middle, PAGE, Prot.READ),
        "mremap": lambda: mremap(world.mm, middle, PAGE, PAGE, Hva(0x7000_0000)),
        "nohugepage": lambda: ADVICE["nohugepage"](world.mm, middle, PAGE),
    }
    world.run(flows[what]())
    assert ("start", hva, hva + MIB2) in notifier.log
    assert gup(world, hva).level == 1
    assert world.run(world.mm.read(Hva(middle + PAGE), 4)) == b"hhhh"
    assert pagemap(world.mm, hva, MIB2)["anon_huge_kib"] == 0
    books_are_right(world)


def test_a_whole_one_stays_whole_when_protected_or_moved(world: World) -> None:
    hva = huge(world)
    world.run(world.mm.write(hva, b"h" * MIB2))
    world.run(world.mm.mprotect(hva, MIB2, Prot.READ))
    assert gup(world, hva).level == 2
    moved = world.run(mremap(world.mm, hva, MIB2, MIB2, Hva(0x8000_0000)))
    assert gup(world, moved).level == 2


def test_after_a_fork_a_write_copies_only_four_kilobytes(world: World) -> None:
    hva = huge(world, 1)
    world.run(world.mm.write(hva, b"h" * MIB2))
    child = child_of(world)
    gup(world, hva, write=True)
    assert world.host.frames.in_use == 512 + 1
    assert world.run(child.read(hva, MIB2)) == b"h" * MIB2
    books_are_right(world, child)


def test_collapse_and_split_keep_the_contents(world: World) -> None:
    hva = world.run(world.mm.mmap(HUGE_AT, MIB2, RW, Level(1)))
    for page, data in ((0, b"first"), (17, b"mid"), (511, b"last")):
        world.run(world.mm.write(Hva(hva + page * PAGE), data))
    before = world.run(world.mm.read(hva, MIB2))
    assert world.run(collapse(world.mm, hva, MIB2)) == 1
    assert gup(world, hva).level == 2
    assert world.host.frames.in_use == 512
    assert world.run(split(world.mm, hva, MIB2)) == 1
    assert world.run(world.mm.read(hva, MIB2)) == before
    world.run(dontneed(world.mm, Hva(hva + PAGE), 511 * PAGE))
    assert world.host.frames.in_use == 1, "the parts of a split page go back one by one"


def test_what_cannot_be_collapsed_is_refused(world: World) -> None:
    empty = world.run(world.mm.mmap(HUGE_AT, MIB2, RW, Level(1)))
    assert errno_of(lambda: world.run(collapse(world.mm, empty, MIB2))) == errno.EINVAL
    pinned = world.run(world.mm.pin_user_page(empty))
    assert errno_of(lambda: world.run(collapse(world.mm, empty, MIB2))) == errno.EAGAIN
    world.mm.unpin(pinned)
    world.run(ADVICE["nohugepage"](world.mm, empty, MIB2))
    assert errno_of(lambda: world.run(collapse(world.mm, empty, MIB2))) == errno.EINVAL
