"""The ghost beside the host's memory: what is pinned of it, who may write it, and what was stored there."""

from __future__ import annotations

import pytest

from protocol.pt.bits import READ, WRITE
from simulator.ghost.backing import Name, Shown
from simulator.ghost.ghost import Ghost
from simulator.ghost.spans import Translation
from simulator.ghost.violation import Verdicts

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
    ghost.used("dsa0", "ioas", 0x10, FRAME, write=False)
    assert heard(ghost.verdicts) == []
    ghost.entry_stored(ROOT + 8 * 0x10, FRAME << 12 | RW)
    assert heard(ghost.verdicts) == (["I21"] if wrong else [])
    ghost.used("dsa0", "ioas", 0x10, FRAME, write=True)
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
