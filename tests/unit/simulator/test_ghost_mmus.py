"""The ghost's book on MMUs that a host tells of its changes."""

from __future__ import annotations

import pytest

from protocol.pt.bits import READ, WRITE
from simulator.ghost.backing import Backing, Shown
from simulator.ghost.mmus import Mmus
from simulator.ghost.spans import Translation
from simulator.ghost.violation import Verdicts

PAGES = ("mm", 0x80, 0x82)


class Book:
    def __init__(self) -> None:
        self.verdicts = Verdicts()
        self.backing = Backing()
        self.mmus = Mmus(self.verdicts, self.backing)

    @property
    def found(self) -> list[str]:
        return [violation.invariant for violation in self.verdicts.found]


def test_who_left_is_asked_nothing_and_has_nothing() -> None:
    book = Book()
    book.mmus.registers("vm1")
    book.mmus.is_asked("vm1")
    book.mmus.pins("mirror0", PAGES)
    assert book.found == []
    book.mmus.leaves("vm1")
    book.mmus.is_asked("vm1")
    assert book.found == ["R26"]
    book.mmus.leaves("mirror0")
    book.mmus.pins("mirror0", PAGES)
    assert book.found == ["R26", "R26"]


def test_the_next_host_s_are_others() -> None:
    book = Book()
    book.mmus.leaves("vm1")
    book.mmus.forget()
    book.mmus.is_asked("vm1")
    book.mmus.leaves("vm1")
    book.mmus.registers("vm1")
    book.mmus.is_asked("vm1")
    assert book.found == []


@pytest.mark.parametrize(
    ("who", "pages", "wrong"),
    [
        ("mirror0", ("mm", 0x81, 0x84), True),
        ("mirror0", ("mm", 0x7F, 0x81), True),
        ("mirror0", ("mm", 0x82, 0x84), False),
        ("mirror0", ("other", 0x80, 0x82), False),
        ("mirror1", ("mm", 0x80, 0x82), False),  # it was not told of the change
    ],
)
def test_what_is_being_changed_is_not_answered(who: str, pages: tuple[str, int, int], wrong: bool) -> None:
    book = Book()
    book.mmus.hears("mirror0", PAGES)
    book.mmus.hears("mirror0", PAGES)  # two changes of the same
    book.mmus.hears_of_the_end("mirror0", PAGES)
    book.mmus.is_answered(who, pages)
    assert book.found == ["I5"] * wrong
    book.mmus.hears_of_the_end("mirror0", PAGES)
    book.mmus.is_answered("mirror0", PAGES)
    assert book.found == ["I5"] * wrong


@pytest.mark.parametrize(
    ("pages", "wrong"),
    [
        (("mm", 0x80, 0x82), True),
        (("mm", 0x70, 0x90), True),
        (("mm", 0x7F, 0x80), False),
        (("mm", 0x82, 0x90), False),
        (("other", 0x80, 0x82), False),
    ],
)
def test_where_a_guest_has_private_memory_nobody_else_maps(pages: tuple[str, int, int], wrong: bool) -> None:
    book = Book()
    book.mmus.turns("vm", 0x10, 0x12, Shown("mm", 0x80, 0))
    book.mmus.maps("mirror0", pages)
    assert book.found == ["I27"] * wrong
    book.mmus.turns("vm", 0x10, 0x12, None)
    book.mmus.maps("mirror1", pages)
    assert book.found == ["I27"] * wrong

    book = Book()
    book.mmus.watches("mirror0", pages)
    book.mmus.turns("vm", 0x10, 0x12, Shown("mm", 0x80, 0))
    assert book.found == ["I27"] * wrong, "whoever comes first"


def test_what_is_watched_no_more_may_turn_private() -> None:
    book = Book()
    for who in ("mirror0", "mirror1"):
        book.mmus.watches(who, PAGES)
    book.mmus.unwatches("mirror0", PAGES)
    book.mmus.leaves("mirror1")
    book.mmus.turns("vm", 0x10, 0x12, Shown("mm", 0x80, 0))
    assert book.found == []


def test_of_private_memory_that_is_shared_again_in_part_the_rest_is_private() -> None:
    book = Book()
    book.mmus.turns("vm", 0x10, 0x12, Shown("mm", 0x80, 0))
    book.mmus.turns("vm", 0x10, 0x11, None)
    book.mmus.pins("mirror0", ("mm", 0x80, 0x81))
    assert book.found == []
    book.mmus.pins("mirror0", ("mm", 0x81, 0x82))
    assert book.found == ["I27"]


@pytest.mark.parametrize(("frame", "wrong"), [(0x500, True), (0x501, True), (0x502, False)])
def test_what_turns_private_nobody_has_pinned_by_whatever_name(frame: int, wrong: bool) -> None:
    book = Book()
    book.backing.space("mm").put(0x80, 0x83, Translation(0x500, READ | WRITE))
    book.backing.pin("files of mirror0", 3, frame)
    book.mmus.turns("vm", 0x10, 0x12, Shown("mm", 0x80, 0))
    assert book.found == ["I27"] * wrong
