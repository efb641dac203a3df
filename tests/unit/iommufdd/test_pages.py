"""Pages that several areas show: pinned once, read back from a table, unpinned with the last of them."""

from __future__ import annotations

import errno
import random

import pytest

from iommufdd.core.area import Area, Span
from iommufdd.core.hmm import HmmPage, UserFd
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.ioas import Ioas
from iommufdd.core.ioas_check import check_ioas
from iommufdd.core.pages import Pages, Pins
from protocol.units import LEVEL_4K, Hpa, Hva, Iova
from tests.kit.host_memory import FRAMES, FakeHost
from tests.unit.iommufdd.spaces import HVA, Space, mapped, mm_of, outcome

K4, M2 = 4 << 10, 2 << 20


def two(*, page_size: int = K4, table_pages: int = 64) -> tuple[Space, Ioas, HwptPaging, HwptPaging]:
    """Two IOASes of one iommufd, an HWPT on each."""
    space = Space(table_pages=table_pages)
    space.host.page_size = page_size
    other = space.space()
    return space, other, space.hwpt(), space.hwpt(on=other)


def violations(space: Space, *others: Ioas) -> list[str]:
    return [why for ioas in (space.ioas, *others) for why in ioas.check()]


def pins_of(space: Space) -> int:
    return sum(len(pages) for pages in space.host.pins.values())


def test_a_copy_shows_the_same_frames_and_pins_nothing_more() -> None:
    space, other, first, second = two()
    space.map(0, 4 * K4)
    space.asked()
    assert space.copy(space.ioas, K4, 2 * K4, other, M2) == M2
    assert mapped(second) == [(M2 + n * K4, 1, FRAMES + (n + 1) * K4, True) for n in range(2)]
    assert (space.asked(), space.counts.pinned_pages, violations(space, other)) == ([], 4, [])
    space.unmap(0, 4 * K4)
    assert (mapped(first), len(mapped(second)), space.counts.pinned_pages, pins_of(space)) == ([], 2, 2, 2)
    assert violations(space, other) == []
    space.world.run(other.unmap(Iova(M2), 2 * K4))
    assert (space.counts.pinned_pages, space.host.pins) == (0, {})


def test_a_copy_within_an_ioas_is_one_more_area() -> None:
    space, other, first, _ = two()
    space.map(0, K4)
    space.copy(space.ioas, 0, K4, space.ioas, K4)
    assert [leaf[2] for leaf in mapped(first)] == [FRAMES, FRAMES]
    space.unmap(0, K4)
    assert (len(mapped(first)), space.counts.pinned_pages, violations(space, other)) == (1, 1, [])


@pytest.mark.parametrize("of_file", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_an_area_goes_when_the_units_have_forgotten_it_whatever_it_shows(
    *, copied: bool, of_file: bool
) -> None:
    space = Space()
    space.hwpt()
    at, file = (Hva(0), UserFd(5)) if of_file else (Hva(HVA), None)
    space.world.run(space.ioas.map(mm_of(), at, K4, Iova(0), writable=True, file=file))
    if copied:
        space.copy(space.ioas, 0, K4, space.ioas, M2)
    space.asked()
    space.world.hold()
    unmapped = space.world.start(space.ioas.unmap(Iova(0), K4))
    assert (unmapped.done, space.asked()) == (False, ["submit"])


def test_areas_side_by_side_are_copied_as_one_and_keep_what_they_are_of() -> None:
    space, other, _, second = two()
    for n in (2, 0, 1):
        space.map(n * K4, K4, HVA + 8 * n * K4)
    space.copy(space.ioas, 0, 3 * K4, other, None)
    hpas = [space.host.frame_of(HVA + 8 * n * K4) for n in range(3)]
    assert [leaf[2] for leaf in mapped(second)] == hpas
    assert len(list(other.areas)) == 3
    assert violations(space, other) == []


def test_what_nobody_has_mapped_is_pinned_for_the_copy_alone() -> None:
    """As far as the copy goes: the source has no HWPT."""
    space = Space()
    other = space.space()
    hwpt = space.hwpt(on=other)
    space.map(0, 4 * K4)
    space.copy(space.ioas, K4, K4, other, 0)
    assert (len(mapped(hwpt)), space.counts.pinned_pages) == (1, 1)
    first = space.hwpt()
    assert [leaf[2] for leaf in mapped(first)] == [space.host.frame_of(HVA + n * K4) for n in range(4)]
    assert (space.counts.pinned_pages, pins_of(space), violations(space, other)) == (4, 4, [])
    space.destroy(first)
    assert (space.counts.pinned_pages, violations(space, other)) == (1, [])


@pytest.mark.parametrize(
    ("at", "size", "number"),
    [
        (0, 0, errno.EINVAL),
        (K4, (1 << 64) - 1, errno.EOVERFLOW),
        (0, 5 * K4, errno.ENOENT),
        (3 * K4, 3 * K4, errno.ENOENT),
        (8 * K4, K4, errno.ENOENT),
        (0, 4 * K4, 0),
    ],
)
def test_a_source_with_a_gap_is_refused(at: int, size: int, number: int) -> None:
    space, other, _, second = two()
    space.map(0, 2 * K4)
    space.map(2 * K4, 2 * K4, HVA + M2)
    space.map(5 * K4, K4)
    assert outcome(lambda: space.copy(space.ioas, at, size, other, 0)) == number
    assert len(mapped(second)) == (0 if number else 4)
    assert outcome(lambda: space.unmap(0, (1 << 64) - 1)) == 0
    assert violations(space, other) == []


def test_a_copy_may_have_fewer_rights_and_not_more() -> None:
    space, other, _, second = two()
    space.map(0, K4)
    space.copy(space.ioas, 0, K4, other, 0, writable=False)
    assert [leaf[3] for leaf in mapped(second)] == [False]
    space.copy(other, 0, K4, other, K4)  # of the pages, which are writable
    assert [leaf[3] for leaf in mapped(second)] == [False, True]
    space.map(K4, K4, HVA + K4, writable=False)
    assert outcome(lambda: space.copy(space.ioas, K4, K4, other, M2)) == errno.EPERM
    space.copy(space.ioas, K4, K4, other, M2, writable=False)
    assert violations(space, other) == []


@pytest.mark.parametrize(("at", "size", "number"), [(1, K4, errno.EINVAL), (0, K4 + 1, errno.EINVAL)])
def test_parts_of_pages_are_not_copied(at: int, size: int, number: int) -> None:
    space, other, _, second = two()
    space.map(0, 4 * K4)
    assert outcome(lambda: space.copy(space.ioas, at, size, other, 0)) == number
    assert mapped(second) == []


def test_a_copy_that_finds_no_room_for_tables_leaves_nothing() -> None:
    space, other, first, second = two(table_pages=8)
    for n in range(3):
        space.map(n * K4, K4)
    space.pool.allocate()
    assert outcome(lambda: space.copy(space.ioas, 0, 3 * K4, other, (1 << 30) - K4)) == errno.ENOMEM
    assert (mapped(second), list(other.areas), len(mapped(first))) == ([], [], 3)
    assert (space.counts.pinned_pages, pins_of(space), violations(space, other)) == (3, 3, [])


def test_a_huge_page_is_held_until_the_last_byte_that_is_shown_of_it_goes() -> None:
    space, other, _, second = two(page_size=M2)
    space.map(0, 2 * M2)
    space.copy(space.ioas, K4, K4, other, 0)
    frame = space.host.frame_of(HVA + K4)
    assert [leaf[1:3] for leaf in mapped(second)] == [(LEVEL_4K, frame)]
    space.unmap(0, 2 * M2)
    assert (pins_of(space), space.counts.pinned_pages, violations(space, other)) == (1, 512, [])
    space.world.run(other.unmap(Iova(0), K4))
    assert (space.host.pins, space.counts.pinned_pages) == ({}, 0)


def test_of_a_huge_page_only_what_was_pinned_is_mapped() -> None:
    """What lies before it was pinned when other pages were there, and another area shows it."""
    space = Space(table_pages=256)
    other = space.space()
    second = space.hwpt(on=other)
    space.map(0, M2)
    space.copy(space.ioas, 0, M2 // 2, other, 0)
    old = [leaf[2] for leaf in mapped(second)]
    space.host.pages.clear()
    space.host.page_size = M2
    first = space.hwpt()
    new = space.host.frame_of(HVA)
    assert new is not None
    assert [leaf[2] for leaf in mapped(first)] == [*old, *range(new + M2 // 2, new + M2, K4)]
    assert (space.world.run(check_ioas(space.ioas)), violations(space, other)) == ([], [])


def test_the_host_is_gone_before_a_copy_and_it_is_enodev() -> None:
    space, other, _, second = two()
    space.map(0, K4)
    space.world.run(space.ioas.lose_host())
    assert outcome(lambda: space.copy(space.ioas, 0, K4, other, 0)) == errno.ENODEV
    assert mapped(second) == []


# -- histories ---------------------------------------------------------------------------------------------

PAGES = 24  # of each iova space
UNIT = M2 // 4


class HalfHuge(FakeHost):
    def fault_in(self, hva: int) -> HmmPage:
        self.page_size = K4 if hva // M2 % 2 else M2
        return super().fault_in(hva)


class PagesHistory:
    """Maps, copies, unmaps, HWPTs that come and go on three IOASes; every other 2 MiB is a huge page.

    Against what was asked for: each (IOAS, iova) leads to the process's byte that it was mapped to.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.space = Space(table_pages=256)
        self.space.host = HalfHuge(self.space.world.log)
        self.ioases = [self.space.ioas, self.space.space(), self.space.space()]
        self.hwpts: list[list[HwptPaging]] = [[], [], []]
        self.expected: list[dict[int, tuple[int, bool]]] = [{}, {}, {}]

    def step(self) -> None:
        which = self.random.randrange(3)
        act = self.random.choice(
            [self.map, self.copy, self.copy, self.copy, self.copy, self.unmap, self.hwpt]
        )
        act(which)
        self.check()

    def map(self, which: int) -> None:
        at, pages = self.span()
        source = self.random.randrange(PAGES) * UNIT
        call = self.ioases[which].map(
            mm_of(), Hva(HVA + source), pages * UNIT, Iova(at * UNIT), writable=True
        )
        if outcome(lambda: self.space.world.run(call)) == 0:
            for n in range(pages):
                self.expected[which][at + n] = HVA + source + n * UNIT, True

    def copy(self, which: int) -> None:
        """Of what is mapped, mostly; it may reach into what follows."""
        (at, pages), target, to = self.span(), self.random.randrange(3), self.random.randrange(PAGES)
        mine = list(self.expected[which])
        if mine and self.random.random() < 0.9:
            at = self.random.choice(mine)
        writable = self.random.random() < 0.7
        found = [self.expected[which].get(at + n) for n in range(pages)]
        call = self.space.copying(
            self.ioases[which], at * UNIT, pages * UNIT, self.ioases[target], to * UNIT, writable=writable
        )
        if outcome(lambda: self.space.world.run(call)) == 0:
            for n, entry in enumerate(found):
                assert entry is not None
                self.expected[target][to + n] = entry[0], writable

    def unmap(self, which: int) -> None:
        areas = list(self.ioases[which].areas)
        if areas:
            area = self.random.choice(areas)
            self.space.world.run(self.ioases[which].unmap(area.iova, area.size))
            for at in range(area.iova // UNIT, area.end // UNIT):
                del self.expected[which][at]

    def hwpt(self, which: int) -> None:
        mine = self.hwpts[which]
        if mine and self.random.random() < 0.5:
            self.space.destroy(mine.pop(self.random.randrange(len(mine))))
        elif len(mine) < 2:
            mine.append(self.space.hwpt(on=self.ioases[which]))

    def span(self) -> tuple[int, int]:
        return self.random.randrange(PAGES), self.random.choice([1, 1, 2, 4, 5])

    def check(self) -> None:
        host = self.space.host
        assert [why for ioas in self.ioases for why in ioas.check()] == []
        held = [(page.hpa, page.hpa + page.size) for pages in host.pins.values() for page in pages]
        for which, hwpts in enumerate(self.hwpts):
            for hwpt in hwpts:
                seen = {}
                for iova, level, hpa, writable in mapped(hwpt):
                    for at in range(iova, iova + (K4 << 9 * (level - 1)), UNIT):
                        if at % UNIT == 0:
                            seen[at // UNIT] = hpa + at - iova, writable
                wanted = {
                    at: (host.frame_of(hva), writable) for at, (hva, writable) in self.expected[which].items()
                }
                assert seen == wanted, f"IOAS {which}"
                for hpa, _ in seen.values():
                    assert any(first <= hpa < last for first, last in held), f"{hpa:#x} is not pinned"

    def end(self) -> None:
        for ioas, hwpts in zip(self.ioases, self.hwpts, strict=True):
            for hwpt in hwpts:
                self.space.destroy(hwpt)
            self.space.world.run(ioas.destroy())
        assert (self.space.host.pins, self.space.counts.pinned_pages) == ({}, 0)
        assert self.space.host.released


def run(seed: int, steps: int = 100) -> None:
    history = PagesHistory(seed)
    for _ in range(steps):
        history.step()
    history.end()


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_mapped_copied_and_unmapped_leads_to_what_is_pinned(seed: int) -> None:
    run(seed)


def released_for_all(self: Pages, area: Area) -> list[Span[Hva]]:
    shown, self.shown = self.shown, {}
    try:
        return released(self, area)
    finally:
        self.shown = shown


def pinned_as_small(self: Pages, start: Hva, end: Hva, page: HmmPage) -> None:
    self.pins.append(Pins(start, end, K4))
    self.pins.sort()


def pinned_elsewhere(self: Pages, start: Hva, end: Hva, page: HmmPage) -> None:
    pinned(self, start, end, page._replace(hpa=Hpa(page.hpa + M2)))


released, pinned = Pages._release, Pages._pinned
PLANTED = {
    "a pin goes with the first area": ("_release", released_for_all),
    "a huge page is taken for small ones": ("_pinned", pinned_as_small),
    "a huge page is elsewhere": ("_pinned", pinned_elsewhere),
    "nothing is unpinned": ("_release", lambda self, area: []),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_histories_find_what_is_planted(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pages, *PLANTED[bug])

    def all_of_them() -> None:
        for seed in range(12):
            run(seed)

    with pytest.raises((AssertionError, KeyError, IndexError)):
        all_of_them()


@pytest.mark.parametrize(
    ("pins", "why"),
    [
        ([], "shown and not pinned"),
        ([(0, K4)], "shown and not pinned"),
        ([(0, 2 * K4), (0, K4)], "pinned twice"),
        ([(0, 2 * K4), (M2, M2 + K4)], "pinned for no area"),
    ],
)
def test_the_check_sees_wrong_books(pins: list[tuple[int, int]], why: str) -> None:
    space, _, _, _ = two()
    space.map(0, 2 * K4)
    (pages,) = space.ioas.pages
    assert space.ioas.check() == []
    pages.pins = [Pins(Hva(HVA + start), Hva(HVA + end), K4) for start, end in pins]
    assert any(why in said for said in space.ioas.check())
