"""The check of an IOAS's tables against the host: silent while all is well, and broken clause by clause."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

import pytest

from iommufdd.core.hmm import HmmPage
from iommufdd.core.ioas_check import check_ioas
from protocol.pt.cursor import seek
from protocol.pt.second_stage import SECOND_STAGE
from protocol.units import LEVEL_4K, Hpa, Hva, Iova, Level
from tests.kit.host_memory import FRAMES
from tests.unit.iommufdd.mirrors import K4, M2, RAM, Mirrored
from tests.unit.iommufdd.spaces import HVA, SUCCESS, Space, request

ELSEWHERE = Hpa(FRAMES - M2)


def check(space: Space) -> list[str]:
    return space.world.run(check_ioas(space.ioas))


def a_mirror(page_size: int = K4) -> Mirrored:
    """Pages 0..3 pinned by two requests, 4 and 5 faulted in, the rest of them not."""
    space = Mirrored(page_size=page_size)
    for first, pages in ((0, 3), (2, 2)):
        space.world.run(space.hwpt_.pin(Iova(first * K4), pages * K4))
    for page in (4, 5):
        assert space.fault(page * K4, write=True) == SUCCESS
    return space


def an_area() -> Space:
    space = Space()
    space.hwpt()
    space.map(0, 200 * K4)
    space.hwpt()
    return space


@pytest.mark.parametrize("page_size", [K4, M2])
def test_nothing_is_found_where_leaves_and_pins_are_the_hosts(page_size: int) -> None:
    space = a_mirror(page_size)
    assert check(space) == []
    space.world.run(space.host.give_up(HVA, HVA + 8 * K4))
    assert check(space) == []
    other = space.mirror()
    space.world.run(other.pin_all())
    assert check(space) == []
    space.unmap(0, RAM)
    assert check(space) == []


@pytest.mark.parametrize(
    ("entry", "number"),
    [
        (FRAMES | 3 | 1 << 11, "I2"),  # bit 11
        (FRAMES | 2, "I3"),  # write-only
        (FRAMES | 3 | 1 << 62, "I17"),
        (0x5A0, "I3"),  # KVM's frozen entry
    ],
)
def test_an_entry_that_no_unit_may_meet_is_said(entry: int, number: str) -> None:
    space = an_area()
    assert space.ioas.check() == []
    hwpt = space.ioas.hwpts[0]
    _, at, _ = seek(space.writer, SECOND_STAGE, hwpt.table.root, Level(4), 300)
    space.writer.store64(at, entry)
    assert {why.split(":")[0] for why in space.ioas.check()} >= {number}


def test_a_table_of_an_hwpt_that_is_linked_twice_is_said() -> None:
    space = an_area()
    hwpt = space.ioas.hwpts[0]
    _, at, entry = seek(space.writer, SECOND_STAGE, hwpt.table.root, Level(4), 0, Level(2))
    space.writer.store64(at + 8, entry)
    assert [why.split(":")[0] for why in space.ioas.check()] == ["I18"]


@pytest.mark.parametrize("page_size", [K4, M2])
def test_nothing_is_found_in_a_pinned_area(page_size: int) -> None:
    space = Space()
    space.host.page_size = page_size
    hwpts = space.hwpt(), space.hwpt(max_leaf=LEVEL_4K)
    space.map(K4, 3 * K4, HVA)
    space.map(M2, M2, HVA + M2)
    assert check(space) == []
    for hwpt in hwpts:
        space.destroy(hwpt)
    assert check(space) == []
    assert check(Space()) == []


def remap(space: Space, iova: int, hpa: Hpa = ELSEWHERE) -> None:
    space.ioas.hwpts[-1].table.map(Iova(iova), hpa, LEVEL_4K, writable=True)


def take(space: Space, iova: int) -> None:
    space.ioas.hwpts[-1].table.unmap(Iova(iova), K4)


def forget_pin(space: Space) -> None:
    space.host.pins.popitem()


def another_pin(space: Space) -> None:
    space.host.pins[99, HVA + M2] = [HmmPage(Hva(HVA + M2), ELSEWHERE, K4, True)]


def moved(space: Space, iova: int, *, writable: bool = True, hpa: int | None = None) -> None:
    """The host changes a page and tells nobody."""
    page = space.host.pages[HVA + iova]
    space.host.pages[HVA + iova] = page._replace(writable=writable, hpa=Hpa(page.hpa if hpa is None else hpa))


BREAKS: dict[str, tuple[Callable[[], Space], Callable[[Space], object], str]] = {
    "a leaf of a pinned area maps another frame": (an_area, lambda s: remap(s, 7 * K4), "0x7000 -> "),
    "a leaf of a pinned area is absent": (an_area, lambda s: take(s, 199 * K4), "0xc7000 is .* absent"),
    "the host lost a pin of an area": (
        an_area,
        forget_pin,
        "0xc7000 -> 0x1000c7000, nothing there is pinned",
    ),
    "a pin that nobody asked for": (an_area, another_pin, "the host has 201 pins, .* 200"),
    "a pinned page maps another frame": (a_mirror, lambda s: remap(s, K4), "0x1000 -> .* is pinned"),
    "a pinned page is absent": (a_mirror, lambda s: take(s, K4), "0x1000 is pinned, and absent"),
    "the host lost a pin of a mirror": (a_mirror, forget_pin, "is pinned, not so at the host"),
    "a mirror's pin is of another page at the host": (
        a_mirror,
        lambda s: s.host.pins.update({next(iter(s.host.pins)): [HmmPage(Hva(HVA), ELSEWHERE, K4, True)]}),
        "0x0.* is pinned, not so at the host",
    ),
    "an entry stayed when its page was unpinned and given away": (
        a_mirror,
        lambda s: s.host.pages.pop(HVA + 4 * K4),
        "0x4000 -> .* nothing there is the host's",
    ),
    "an entry stayed when the host moved the page": (
        a_mirror,
        lambda s: moved(s, 5 * K4, hpa=ELSEWHERE),
        f"0x5000 -> .* {ELSEWHERE:#x} is the host's",
    ),
    "a right stayed when the host took it": (
        a_mirror,
        lambda s: moved(s, 5 * K4, writable=False),
        "0x5000 -> .* is writable",
    ),
    "an entry stayed when its area went": (a_mirror, lambda s: remap(s, RAM), f"{RAM:#x} -> .* in no area"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_each_clause_is_broken_on_purpose(what: str) -> None:
    make, break_it, sentence = BREAKS[what]
    space = make()
    assert check(space) == []
    break_it(space)
    found = check(space)
    assert all(each.startswith("I28: ") for each in found)
    assert any(re.search(sentence, each) for each in found), found


def test_what_went_behind_the_answer_is_not_wrong() -> None:
    space = a_mirror()
    hops = 0

    async def hop() -> None:
        nonlocal hops
        hops += space.host.log[-1:] == [("look", HVA + 4 * K4, 1024 * K4)]
        if hops == 2:  # it has looked; a fault maps what is there by now
            await space.host.give_up(HVA + 4 * K4, HVA + 5 * K4)
            assert await space.hwpt_.fault(request(4 * K4)) == SUCCESS

    moved(space, 5 * K4, hpa=ELSEWHERE)
    space.asked()
    space.host.hop = hop
    (found,) = check(space)
    assert "iova 0x5000" in found


def test_pins_do_not_come_or_go_while_they_are_compared() -> None:
    space = a_mirror()
    space.host.hop = lambda: space.world._take("hop")
    space.world.hold()
    checked = space.world.start(check_ioas(space.ioas))
    unpinned = space.world.start(space.ioas.unmap(Iova(0), RAM))
    while not (checked.done and unpinned.done):
        space.world.let_go()
    assert checked.result() == []


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EPERM])
def test_a_host_that_is_gone_is_asked_nothing(number: int) -> None:
    space = a_mirror()
    space.host.errno = number
    assert check(space) == []


@pytest.mark.parametrize("asks", range(1, 8))
def test_pages_let_go_of_meanwhile_are_not_wrong(asks: int) -> None:
    """Of an IOAS of pinned areas: unmapped while the host is asked for the first, the second or the total."""
    space = Space()
    space.hwpt()
    for n in range(2):
        space.map(n * M2, 2 * K4, HVA + n * M2)
    space.host.hop = lambda: space.world._take("hop")
    space.world.hold()
    unmapped = space.world.start(space.ioas.unmap(Iova(0), (1 << 64) - 1))
    for _ in range(asks - 1):
        space.world.let_go()
        space.world.hold()
    checked = space.world.start(check_ioas(space.ioas))
    while not (checked.done and unmapped.done):
        space.world.let_go()
        space.world.hold()
    assert checked.result() == []
