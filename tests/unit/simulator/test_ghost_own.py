"""The ghost's judge of roots that devices alone walk (I23): told by hand, and of kvmd with mistakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmd.core.mm.madvise import dontneed
from kvmd.core.mm.reclaim import age
from protocol.pt.bits import READ, WRITE
from protocol.units import Hva
from simulator.ghost.backing import Shown
from simulator.ghost.ghost import Ghost
from simulator.ghost.probes.watching import watching
from simulator.ghost.spans import Translation
from simulator.ghost.violation import Verdicts
from tests.planted.plugin import Plants
from tests.unit.kvmd.own_root import PAGE, Managed

ROOT, CPUS, VIEW = 0x1000, 0x2000, ("vm", 1, 0)
RW = READ | WRITE
LEAF = 0x500 << 12 | RW


def heard(ghost: Ghost) -> list[str]:
    return [violation.invariant for violation in ghost.verdicts.found]


def lending(*, beside: bool = True) -> Ghost:
    """Two roots of one table page each; frame 0x500 is page 3 of the view and page 0x83 of the process."""
    ghost = Ghost(Verdicts())
    for root in (ROOT, CPUS):
        ghost.root_made(root, 1, VIEW, "vm1")
    ghost.shows(VIEW, 0, 8, Shown("mm", 0x80, RW))
    ghost.backs("mm", 0x83, 0x84, Translation(0x500, RW))
    ghost.own.lends(ROOT, VIEW, "vm1", beside=beside)
    ghost.entry_stored(ROOT + 8 * 3, LEAF)
    return ghost


@pytest.mark.parametrize("entry", [0, LEAF & ~WRITE])
def test_what_nobody_takes_stays(entry: int) -> None:
    ghost = lending()
    ghost.entry_stored(ROOT + 8 * 3, entry)
    assert heard(ghost) == ["I23"]


def test_a_root_of_cpus_may_lose_anything() -> None:
    ghost = lending()
    for entry in (LEAF, 0):
        ghost.entry_stored(CPUS + 8 * 3, entry)
    ghost.own.takes_back(ROOT)
    ghost.entry_stored(ROOT + 8 * 3, 0)
    assert heard(ghost) == []


def _announced(ghost: Ghost) -> None:
    ghost.lets_go("vm1", "mm", 0x83, 0x84)


def _shows_private(ghost: Ghost) -> None:
    """The view shows another page than the process has there."""
    ghost.own.lies_at(VIEW, 0, 8, Shown("mm", 0x80, 0))
    ghost.backs("file", 0, 1, Translation(0x500, RW), of_file=True)
    ghost.shows(VIEW, 3, 4, Shown("file", 0, RW))


def _of_a_private_page(ghost: Ghost) -> None:
    _shows_private(ghost)
    _announced(ghost)


TAKEN: tuple[Callable[[Ghost], None], ...] = (
    _announced,
    _of_a_private_page,
    lambda ghost: ghost.own.takes(VIEW, (0, 8)),
)


@pytest.mark.parametrize("begins", TAKEN)
def test_what_is_taken_goes(begins: Callable[[Ghost], None]) -> None:
    ghost = lending()
    begins(ghost)
    ghost.entry_stored(ROOT + 8 * 3, 0)
    assert heard(ghost) == []


def test_a_private_page_stays_while_others_are_taken() -> None:
    ghost = lending()
    _shows_private(ghost)
    ghost.lets_go("vm1", "mm", 0x84, 0x86)
    ghost.entry_stored(ROOT + 8 * 3, 0)
    assert heard(ghost) == ["I23"]


def test_a_change_that_is_over_takes_nothing() -> None:
    ghost = lending()
    ghost.own.takes(VIEW, (0, 8))
    ghost.own.has_taken(VIEW, (0, 8))
    ghost.own.takes(("vm", 2, 0), (0, 8))
    ghost.entry_stored(ROOT + 8 * 3, 0)
    assert heard(ghost) == ["I23"]


@pytest.mark.parametrize(
    ("beside", "page", "wrong"), [(True, 3, []), (True, 4, ["I23"]), (False, 4, []), (True, 512, [])]
)
def test_what_comes_for_cpus_comes_beside(beside: bool, page: int, wrong: list[str]) -> None:
    """Page 512 is beyond what the root translates."""
    ghost = lending(beside=beside)
    ghost.root_made(2 * CPUS, 2, VIEW, "vm1")
    ghost.entry_stored(2 * CPUS, 0x600 << 12 | 1 << 7 | RW)
    ghost.entry_stored(2 * CPUS + 8, 0x800 << 12 | 1 << 7 | RW)
    before = len(heard(ghost))  # of what the host has
    ghost.own.mapped(VIEW, 2 * CPUS, page)
    assert heard(ghost)[before:] == wrong


# -- kvmd as it would be wrong -----------------------------------------------------------------------------


def _life() -> None:
    guest = Managed()
    guest.write(*range(4))
    guest.change_slot(5, 0x9000, 1, guest.map(1))
    guest.change_slot(5, 0, 0, 0)
    guest.log()
    guest.write(*range(6))
    guest.dirty()
    guest.do(age(guest.mm, Hva(guest.hva), 4 * PAGE))
    guest.settle(guest.start(dontneed(guest.mm, Hva(guest.hva), 2 * PAGE)))
    guest.change_slot(0, 0, 0, 0)


@pytest.mark.parametrize(
    "bug", ["other-root-not-filled", "R21-all-slots-lose-their-leaves", "I23-logging-protects-every-root"]
)
def test_what_is_planted_is_seen_where_a_root_loses_it(bug: str, plant: Plants) -> None:
    for wanted in ([], ["I23"]):
        ghost = Ghost(Verdicts())
        with watching(ghost):
            _life()
        assert heard(ghost)[:1] == wanted
        if not wanted:
            plant(bug)
