"""What the host does to pages on its own: reclaim, merging, migration, hints, poison; and who is told of it.

A page that several processes have is taken from all of them; what is lost is told apart from what was never
there; and the books say it when a page's mappings and the page disagree.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from kvmd.core.mm.check import check_memory
from kvmd.core.mm.failure import poison
from kvmd.core.mm.madvise import ADVICE, dontneed
from kvmd.core.mm.page import Page, PageKind, Pte
from kvmd.core.mm.reclaim import age, merge, migrate, numa_hint, swap_out
from protocol.errors import EHWPOISON
from protocol.flow import Wait
from protocol.units import Hva, Level, Pfn
from tests.kit.kvmd import MM_CHANGES, RW, World
from tests.kit.refusals import errno_of
from tests.unit.kvmd.mm.test_mm import Notifier
from tests.unit.kvmd.mm.test_pages import (
    books_are_right,
    child_of,
    file_at,
    gup,
    huge,
    touched,
    watch,
)

PAGE = 4096
MIB2 = 2 << 20
HUGE_AT = Hva(0x4000_0000)


@pytest.fixture
def world() -> World:
    return World()


# -- what the host does ----------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [migrate, swap_out, merge])
def test_a_page_of_two_processes_is_taken_from_both(world: World, act: Callable[..., Any]) -> None:
    hva = touched(world, 2)
    world.run(ADVICE["mergeable"](world.mm, hva, 2 * PAGE))
    child = child_of(world)
    notifiers = watch(world.mm), watch(child)
    assert world.run(act(world.mm, hva, 2 * PAGE)) >= 1
    for notifier in notifiers:
        assert notifier.log == [("start", hva, hva + 2 * PAGE), ("end", hva, hva + 2 * PAGE)]
    for mm in (world.mm, child):
        assert world.run(mm.read(hva, 2)) == b"xx"
    books_are_right(world, child)


@pytest.mark.parametrize("act", [migrate, swap_out, merge, dontneed])
def test_a_frame_is_given_up_behind_the_last_entry_that_named_it(
    world: World, act: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hva = touched(world, 2)
    world.run(ADVICE["mergeable"](world.mm, hva, 2 * PAGE))
    child = child_of(world)
    frames, given_up = world.host.frames, set[Pfn]()
    release = frames.release

    def released(pfn: Pfn, level: Level) -> None:
        named = [entry for mm in (world.mm, child) for entry in mm.table.within(hva, Hva(hva + 2 * PAGE))]
        assert pfn not in [entry.pfn for entry in named if isinstance(entry, Pte)]
        given_up.add(pfn)
        release(pfn, level)

    monkeypatch.setattr(frames, "release", released)
    for mm in (world.mm, child):
        world.run(act(mm, hva, 2 * PAGE))
    assert given_up


def test_merged_pages_are_one_and_read_only_until_written(world: World) -> None:
    hva = touched(world, 4)
    world.run(ADVICE["mergeable"](world.mm, hva, 4 * PAGE))
    assert world.run(merge(world.mm, hva, 4 * PAGE)) == 3
    assert world.host.frames.in_use == 1
    assert not gup(world, hva).writable
    world.run(world.mm.munmap(Hva(hva + PAGE), 3 * PAGE))
    last = gup(world, hva)
    assert gup(world, hva, write=True).pfn != last.pfn, "even the last owner gets a copy"
    assert world.host.memory.merged == {}


def test_another_process_joins_what_was_merged(world: World) -> None:
    hva = touched(world, 2)
    other = world.host.create_mm()
    world.run(other.mmap(hva, 2 * PAGE, RW))
    world.run(other.write(hva, b"x" * 2 * PAGE))
    for mm in (world.mm, other):
        world.run(ADVICE["mergeable"](mm, hva, 2 * PAGE))
        world.run(merge(mm, hva, 2 * PAGE))
    assert world.host.frames.in_use == 1
    books_are_right(world, other)


def test_swapped_pages_come_back_with_their_contents(world: World) -> None:
    hva = touched(world, 3)
    assert world.run(swap_out(world.mm, hva, 3 * PAGE)) == 3
    assert (world.host.frames.in_use, world.mm.present_page(hva)) == (0, None)
    assert gup(world, hva).writable
    assert world.run(world.mm.read(hva, 3 * PAGE)) == b"x" * 3 * PAGE
    assert world.host.memory.swapped == 0


def test_a_files_swapped_page_is_the_same_for_all_when_it_comes_back(world: World) -> None:
    file, hva = file_at(world, 1, shared=True)
    world.run(world.mm.write(hva, b"data"))
    world.run(swap_out(world.mm, hva, PAGE))
    assert world.host.frames.in_use == 0
    assert file.pread(0, 4) == b"data"
    assert gup(world, hva).writable
    world.run(world.mm.write(hva, b"DATA"))
    assert file.pread(0, 4) == b"DATA"


@pytest.mark.parametrize("size", [PAGE, MIB2])
def test_advice_to_page_out_leaves_what_others_have_too(world: World, size: int) -> None:
    """[mm madvise.c, madvise_cold_or_pageout_pte_range] Nor are they told of anything."""
    hva = huge(world) if size == MIB2 else touched(world)
    world.run(world.mm.write(hva, b"x"))
    child = child_of(world)
    other = watch(world.mm)
    assert world.run(ADVICE["pageout"](child, hva, size)) == 0
    assert world.mm.present_page(hva) is not None
    assert other.log == []
    world.run(child.exit())
    assert world.run(ADVICE["pageout"](world.mm, hva, size)) == size // PAGE
    books_are_right(world)


def test_advice_to_page_out_with_the_swap_area_full_does_what_it_can(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it cannot is no error; the host, which must have the memory, is told."""
    hva = touched(world, 3)
    monkeypatch.setattr("kvmd.core.mm.memory.MAX_SWAP_PAGES", 2)
    assert world.run(ADVICE["pageout"](world.mm, hva, 3 * PAGE)) == 2
    assert world.host.frames.in_use == 1
    assert errno_of(lambda: world.run(swap_out(world.mm, hva, 3 * PAGE))) == errno.ENOMEM
    assert world.run(world.mm.read(hva, 3 * PAGE)) == b"x" * 3 * PAGE
    books_are_right(world)


def test_lazily_freed_pages_go_when_memory_is_wanted_unless_used_again(world: World) -> None:
    hva = touched(world, 2)
    world.run(ADVICE["free"](world.mm, hva, 2 * PAGE))
    world.run(world.mm.write(hva, b"again"))
    world.run(swap_out(world.mm, hva, 2 * PAGE))
    assert world.run(world.mm.read(hva, 6)) == b"againx"
    assert world.run(world.mm.read(Hva(hva + PAGE), 1)) == b"\0"


def test_a_hinted_page_is_absent_until_the_next_lookup(world: World) -> None:
    hva = touched(world)
    before = gup(world, hva)
    assert world.run(numa_hint(world.mm, hva, PAGE)) == 1
    assert world.mm.present_page(hva) is None
    after = gup(world, hva)
    assert (after.pfn, after.writable) == (before.pfn, True)


def test_ageing_asks_every_notifier(world: World) -> None:
    hva = touched(world)
    notifier = watch(world.mm)
    assert world.run(age(world.mm, hva, 4 * PAGE)) == 1, "the VM has nothing mapped, the other says it had"
    assert notifier.log == [("age", hva, hva + 4 * PAGE)]


# -- poison --------------------------------------------------------------------------------------------


def test_poisoned_memory_is_told_apart_and_not_used_again_while_somebody_has_it(world: World) -> None:
    hva = touched(world, 2)
    child = child_of(world)
    pfn = gup(world, hva).pfn
    assert world.run(poison(world.mm, hva, PAGE)) == 1
    for mm in (world.mm, child):
        for write in (False, True):
            assert errno_of(lambda mm=mm, write=write: gup(world, hva, write=write, mm=mm)) == EHWPOISON  # type: ignore[misc]
    world.run(world.mm.exit())
    books_are_right(world, child)
    taken = [world.host.frames.allocate(Level(1), 1) for _ in range(600)]
    assert pfn not in taken
    for frame in taken:
        world.host.frames.release(frame, Level(1))
    world.run(child.exit())
    assert world.host.frames.in_use == 0, "given back in the end"
    assert world.host.memory.pages == {}


@pytest.mark.parametrize("end", ["munmap", "madvise_dontneed", "exit"])
def test_a_poisoned_frame_goes_with_the_last_entry_that_names_it(world: World, end: str) -> None:
    hva = touched(world, 1)
    child = child_of(world)
    world.run(poison(world.mm, hva, PAGE))
    for left, mm in ((1, world.mm), (0, child)):
        world.run(mm.exit() if end == "exit" else MM_CHANGES[end](mm, hva, PAGE))
        assert world.host.frames.in_use == left


def test_the_check_of_who_names_a_failed_frame_can_fail(world: World) -> None:
    hva = touched(world, 1)
    page = world.mm.table.find(hva)
    assert isinstance(page, Pte)
    world.run(poison(world.mm, hva, PAGE))
    assert check_memory(world.host.memory, [world.mm]) == []
    page.page.marks += 1
    (found,) = check_memory(world.host.memory, [world.mm])
    assert found.startswith("I21")
    assert "1 entries say it failed, it knows of 2" in found


def test_of_a_huge_page_only_the_bad_part_is_lost(world: World) -> None:
    hva = huge(world, 1)
    world.run(world.mm.write(hva, b"h" * MIB2))
    world.run(poison(world.mm, Hva(hva + 7 * PAGE), PAGE))
    assert errno_of(lambda: gup(world, hva + 7 * PAGE)) == EHWPOISON
    assert world.run(world.mm.read(hva, 7 * PAGE)) == b"h" * 7 * PAGE
    world.run(world.mm.exit())
    assert world.host.frames.in_use == 0


def test_a_file_keeps_its_bad_page(world: World) -> None:
    file, hva = file_at(world, 1, shared=True)
    world.run(world.mm.write(hva, b"lost"))
    world.run(poison(world.mm, hva, PAGE))
    world.run(dontneed(world.mm, hva, PAGE))
    assert errno_of(lambda: gup(world, hva)) == EHWPOISON
    assert errno_of(lambda: file.pread(0, 1)) == errno.EIO


def test_the_zero_page_is_not_given_up(world: World) -> None:
    assert errno_of(lambda: world.run(poison(world.mm, world.map(1), PAGE))) == errno.EBUSY


# -- notifiers -----------------------------------------------------------------------------------------


def test_a_notifier_that_registers_during_a_change_is_told_before_the_edit(world: World) -> None:
    hva = touched(world)
    gates = [Wait[None](), Wait[None]()]
    world.mm.notifiers.append(Notifier(gates[0]))
    over = world.start(migrate(world.mm, hva, PAGE))
    late = Notifier(gates[1])
    world.mm.notifiers.append(late)
    gates[0].set(None)
    world.flows.run_ready()
    assert not over.done
    assert [what for what, *_ in late.log] == ["start"]
    gates[1].set(None)
    world.flows.run_ready()
    assert over.result() == 1
    assert [what for what, *_ in late.log] == ["start", "end"]


def test_the_books_show_what_is_wrong(world: World) -> None:
    hva = touched(world, 2)
    page = world.mm.table.find(hva)
    assert isinstance(page, Pte)
    memory = world.host.memory

    def found() -> str:
        return " ".join(check_memory(memory, [world.mm]))

    assert found() == ""
    page.page.exclusive = False
    assert "I21: mm 1 hva" in found()
    page.page.exclusive = True
    entries, page.page.entries = page.page.entries, {}
    assert "does not know of the entry" in found()
    page.page.entries = entries
    lost = Page(page.pfn, Level(1), PageKind.ANON)
    memory.pages[lost] = None
    assert "I6: pfn" in found()
    assert "I6: 2 frames are in use, the pages have 3" in found()
