"""The ghost beside the host's memory: what is pinned of it, who may write it, and what was stored there."""

from __future__ import annotations

from contextlib import suppress

import pytest

from protocol.pt.bits import READ, WRITE
from simulator.ghost.backing import Name, Shown
from simulator.ghost.ghost import Ghost
from simulator.ghost.probes.watching import watching
from simulator.ghost.spans import Translation
from simulator.ghost.violation import Verdicts
from simulator.planted.plant import Edit, Plant
from tests.unit.kvmd.mm.test_history import soak

RW = READ | WRITE
ROOT, FRAME, OTHER = 0x1000, 0x500, 0x600


def heard(verdicts: Verdicts) -> list[str]:
    return [violation.invariant for violation in verdicts.found]


def showing(space: Name | None, rights: int) -> Ghost:
    """Page 16 of a view is page 128 of a process, or of a file that is not watched."""
    ghost = Ghost(Verdicts())
    ghost.root_made(ROOT, 1, "ioas", "hwpt")
    ghost.backs("mm", 0x80, 0x81, Translation(FRAME, RW))
    ghost.shows("ioas", 0x10, 0x11, Shown(space, 0x80, rights))
    return ghost


# -- pins ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["mm", None])
@pytest.mark.parametrize(("shown", "wrong"), [(RW, False), (READ, True)])
def test_a_pin_makes_nothing_writable_that_is_shown_to_be_read(
    space: str | None, shown: int, wrong: bool
) -> None:
    ghost = showing(space, shown)
    ghost.pinned("mm", 0x80, FRAME)
    ghost.entry_stored(ROOT + 8 * 0x10, FRAME << 12 | READ)
    ghost.accesses.used("dsa0", "ioas", 0x10, FRAME, write=False)
    assert heard(ghost.verdicts) == []
    ghost.entry_stored(ROOT + 8 * 0x10, FRAME << 12 | RW)
    assert heard(ghost.verdicts) == (["I21"] if wrong else [])
    ghost.accesses.used("dsa0", "ioas", 0x10, FRAME, write=True)
    assert heard(ghost.verdicts) == (["I21", "I21"] if wrong else [])


@pytest.mark.parametrize(("name", "page"), [("mm", 0x80), ("ioas", 0x10)])
@pytest.mark.parametrize(("frame", "wrong"), [(FRAME, False), (OTHER, True)])
def test_a_pin_is_of_what_the_host_has_there(name: str, page: int, frame: int, wrong: bool) -> None:
    ghost = showing("mm", RW)
    ghost.pinned(name, page, frame)
    assert heard(ghost.verdicts) == (["I5"] if wrong else [])


@pytest.mark.parametrize(("name", "page"), [("mm", 0x80), ("ioas", 0x10)])
def test_a_pin_of_what_was_taken_meanwhile_is_found(name: str, page: int) -> None:
    ghost = showing("mm", RW)
    ghost.backs("mm", 0x80, 0x81, None)
    ghost.pinned(name, page, FRAME)
    assert heard(ghost.verdicts) == ["I5"]


def test_of_a_file_that_is_not_watched_nothing_is_known() -> None:
    ghost = showing(None, RW)
    ghost.pinned("files of mirror0", 0x80, OTHER)
    ghost.pinned("ioas", 0x10, OTHER)
    assert heard(ghost.verdicts) == []


# -- who may write -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "wrong"),
    [
        (("mm1", 0x80, FRAME, RW), ("mm2", 0x80, FRAME, RW), True),
        (("mm1", 0x80, FRAME, READ), ("mm2", 0x90, FRAME, RW), True),
        (("mm1", 0x80, FRAME, RW), ("mm2", 0x80, FRAME + 1, READ), True),  # a part of it
        (("mm1", 0x80, FRAME, READ), ("mm2", 0x80, FRAME, READ), False),
        (("mm1", 0x80, FRAME, RW), ("mm2", 0x80, FRAME + 2, RW), False),
        (("mm1", 0x80, FRAME, RW), ("mm1", 0x90, FRAME, RW), False),  # both are its own
        (("mm1", 0x80, FRAME, RW), ("mm1", 0x80, OTHER, RW), False),
    ],
)
@pytest.mark.parametrize("of_file", [False, True])
def test_what_several_have_is_writable_to_none_unless_a_file_s(
    first: tuple[str, int, int, int], second: tuple[str, int, int, int], wrong: bool, of_file: bool
) -> None:
    ghost = Ghost(Verdicts())
    for space, page, frame, rights in (first, second):
        ghost.backs(space, page, page + 2, Translation(frame, rights), of_file=of_file)
    assert heard(ghost.verdicts)[:1] == (["I21"] if wrong and not of_file else [])


@pytest.mark.parametrize("given_up", [False, True])
def test_whose_it_was_before_does_not_count(given_up: bool) -> None:
    ghost = Ghost(Verdicts())
    ghost.backs("mm1", 0x80, 0x82, Translation(FRAME, READ))
    ghost.backs("mm1", 0x80, 0x81, None if given_up else Translation(OTHER, RW))
    ghost.backs("mm2", 0x80, 0x81, Translation(FRAME, RW))
    assert heard(ghost.verdicts) == []
    ghost.backs("mm2", 0x81, 0x82, Translation(FRAME + 1, RW))
    assert heard(ghost.verdicts) == ["I21"]


def test_the_next_host_s_frames_are_others() -> None:
    ghost = Ghost(Verdicts())
    ghost.backs("mm1", 0x80, 0x81, Translation(FRAME, RW))
    ghost.process_gone("kvmd")
    ghost.backs("mm2", 0x80, 0x81, Translation(FRAME, RW))
    assert heard(ghost.verdicts) == []


# -- histories of a host -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_found_in_any_history_of_a_host_s_memory(seed: int) -> None:
    ghost = Ghost(Verdicts())
    with watching(ghost):
        soak(seed)
    assert ghost.verdicts.found == []


MISTAKES = {
    "a child may write what its parent has": (
        Edit(
            "kvmd.core.mm.fork:_share",
            "return type(entry)(entry.hva, entry.pfn, entry.level, False, page)",
            "return type(entry)(entry.hva, entry.pfn, entry.level, vma.writable, page)",
        ),
        "I21",
    ),
    "who has a page with others writes it in place": (
        Edit(
            "kvmd.core.mm.fault:_may_reuse",
            "all(table is space.table for table, _ in page.entries)",
            "True",
        ),
        "I21",
    ),
    "merging leaves the page writable that others are merged with": (
        Edit("kvmd.core.mm.reclaim:_make_stable", "writable=False", "writable=entry.writable"),
        "I21",
    ),
    "merging leaves those writable that are merged": (
        Edit("kvmd.core.mm.reclaim:_merge", "writable=False", "writable=entry.writable"),
        "I21",
    ),
    "a private mapping stores into its file": (
        Edit(
            "kvmd.core.mm.fault:_write",
            "if not vma.shared and not",
            "if not vma.shared and entry.page.kind is not PageKind.FILE and not",
        ),
        "I21",
    ),
    "a page moves and its contents do not": (
        Edit(
            "kvmd.core.mm.memory:PageAllocator.move",
            "self.view(page.pfn, size)[:] = self.view(old, size)",
            "pass",
        ),
        "I6",
    ),
    "a copy on write is of zeroes": (
        Edit(
            "kvmd.core.mm.memory:PageAllocator.copy",
            "self.view(page.pfn, size)[:] = self.view(entry.pfn, size)",
            "pass",
        ),
        "I6",
    ),
    "what is swapped out are zeroes": (
        Edit(
            "kvmd.core.mm.memory:PageAllocator.swap_out",
            "Swap(self.contents(page), count)",
            "Swap(bytes(PAGE_SIZE), count)",
        ),
        "I6",
    ),
    "what is swapped in are zeroes": (
        Edit(
            "kvmd.core.mm.memory:PageAllocator.swap_in",
            "self.view(page.pfn, PAGE_SIZE)[:] = swap.data",
            "pass",
        ),
        "I6",
    ),
    "pages that become a huge one leave there what they had": (
        Edit(
            "kvmd.core.mm.thp:_collapse",
            "isinstance(entry, Pte):\n            view",
            "False:\n            view",
        ),
        "I6",
    ),
    "what was swapped out becomes zeroes of a huge page": (
        Edit("kvmd.core.mm.thp:_collapse", "elif isinstance(entry, Swapped):", "elif False:"),
        "I6",
    ),
    "pages are merged that are not equal": (
        Edit("kvmd.core.mm.reclaim:_merge", "memory.contents(page)", "memory.contents(page)[8:]"),
        "I6",
    ),
    "a frame goes to the next with what was in it": (
        Edit(
            "kvmd.core.mm.frames:Frames.release", "= _ZERO_PAGE", "= self.view[offset : offset + PAGE_SIZE]"
        ),
        "I6",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_host_s_is_found_where_it_is_made(mistake: str) -> None:
    edit, invariant = MISTAKES[mistake]
    verdicts = Verdicts()
    with Plant(mistake, mistake, invariant, [edit]).apply():
        for seed in range(12):
            with watching(Ghost(verdicts)), suppress(AssertionError, KeyError):
                soak(seed)
            if verdicts.found:
                break
    assert heard(verdicts)[:1] == [invariant]
