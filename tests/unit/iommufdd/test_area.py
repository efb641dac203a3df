"""Where an area may lie, and which leaves map a page of the host in it."""

from __future__ import annotations

import errno
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iommufdd.core.area import Area, Areas, check_memory, check_user, without
from iommufdd.core.hmm import HmmPage
from protocol.errors import UapiError
from protocol.units import LEVEL_1G, LEVEL_2M, LEVEL_4K, Hpa, Hva, Iova, Level, size_of_level

K4, M2, G1 = 4 << 10, 2 << 20, 1 << 30
TOP = (1 << 64) - 1


def areas_of(*spans: tuple[int, int]) -> Areas:
    areas = Areas()
    for iova, size in spans:
        areas.add(Area(Iova(iova), size, Hva(0x7000_0000_0000 + iova), True))
    return areas


def allow(areas: Areas, *spans: tuple[int, int]) -> None:
    areas.allow([(Iova(first), Iova(last)) for first, last in spans])


@pytest.mark.parametrize(
    ("iova", "size", "number"),
    [
        (0x1001, K4, errno.EINVAL),
        (TOP - K4 + 1, 2 * K4, errno.EOVERFLOW),
        (0xFEE0_0000, K4, errno.EINVAL),
        (0xFEE0_0000 - K4, 2 * K4, errno.EINVAL),
        (0xFEEF_F000, 2 * K4, errno.EINVAL),
        (0, G1 * 8, errno.EINVAL),
        (M2, K4, errno.EEXIST),
        (M2 - K4, 2 * K4, errno.EEXIST),
        (2 * M2 - K4, K4, errno.EEXIST),
        (0xFEE0_0000 - K4, K4, 0),
        (0xFEF0_0000, K4, 0),
        (M2 - K4, K4, 0),
        (2 * M2, K4, 0),
        (TOP - K4 + 1, K4, 0),
    ],
)
def test_where_an_area_may_lie(iova: int, size: int, number: int) -> None:
    areas = areas_of((M2, M2))
    try:
        areas.check(Iova(iova), size)
        found = 0
    except UapiError as error:
        found = error.errno
    assert found == number


def test_what_no_hwpt_reaches_is_not_allowed() -> None:
    areas = areas_of()
    areas.width = 48
    areas.check(Iova((1 << 48) - K4), K4)
    with pytest.raises(UapiError, match="not in"):
        areas.check(Iova((1 << 48) - K4), 2 * K4)
    assert areas.available == [(0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1)]


@pytest.mark.parametrize(
    ("taken", "hva", "size", "iova"),
    [
        ([], 0x7000_0000_0000, K4, K4),  # 0 is given to nobody who did not ask for it
        ([(0, K4)], 0x7000_0000_0000, K4, K4),
        ([(0, K4)], 0x7000_0000_0000, M2, M2),  # aligned as the memory is, up to the size
        ([(0, K4)], 0x7000_0000_1000, M2, K4),
        ([(0, K4), (3 * K4, K4)], 0x7000_0000_1000, 2 * K4, K4),
        ([(0, K4), (2 * K4, K4)], 0x7000_0000_1000, 2 * K4, 3 * K4),
        ([(0, 0xFEE0_0000 - K4)], 0x7000_0000_1000, 2 * K4, 0xFEF0_0000),
        ([(0, 0xFEE0_0000)], 0x7000_0000_0000, M2, 0xFF00_0000),
    ],
)
def test_the_first_room_that_fits_is_taken(
    taken: list[tuple[int, int]], hva: int, size: int, iova: int
) -> None:
    areas = areas_of(*taken)
    assert areas.room(hva, size) == iova
    areas.check(Iova(iova), size)


def test_no_room_is_enospc() -> None:
    areas = areas_of((0, 0xFEE0_0000))
    areas.width = 32
    with pytest.raises(UapiError) as caught:
        areas.room(0, 0x0110_0000)
    assert caught.value.errno == errno.ENOSPC


def test_room_is_in_what_is_to_stay_available_and_a_given_iova_anywhere() -> None:
    areas = areas_of()
    allow(areas, (8 * K4, 12 * K4 - 1), (4 * K4, 6 * K4 - 1), (6 * K4, 8 * K4 - 2))
    assert areas.room(K4, 4 * K4) == 4 * K4 + 4 * K4  # the first two touch, and are a byte too short
    allow(areas, (6 * K4, 12 * K4 - 1), (4 * K4, 6 * K4 - 1))
    assert areas.room(K4, 8 * K4) == 4 * K4
    areas.add(Area(Iova(6 * K4), K4, Hva(0), True))
    assert areas.room(K4, 4 * K4) == 7 * K4
    with pytest.raises(UapiError, match="no room") as caught:
        areas.room(K4, 6 * K4)
    assert caught.value.errno == errno.ENOSPC
    areas.check(Iova(100 * M2), M2)
    areas.allow([])
    assert areas.room(K4, 6 * K4) == 7 * K4


def test_what_is_reserved_cannot_be_kept_and_what_was_allowed_before_still_is() -> None:
    areas = areas_of()
    allow(areas, (M2, 2 * M2))
    for last in (0xFEE0_0000, 0xFEF0_0000, TOP):
        with pytest.raises(UapiError, match="cannot be kept") as caught:
            allow(areas, (0, K4 - 1), (G1, last))
        assert caught.value.errno == errno.EADDRINUSE
    assert areas.room(0, K4) == M2


@pytest.mark.parametrize(("size", "number"), [(TOP // 2, errno.EOVERFLOW), (1 << 62, 0)])
def test_no_room_is_looked_for_half_of_all_iovas(size: int, number: int) -> None:
    found = 0
    try:
        areas_of().room(0, size)
    except UapiError as error:
        found = error.errno
    assert found == number


def test_the_ends_of_all_iovas_are_given_to_nobody_who_did_not_ask() -> None:
    areas = areas_of()
    allow(areas, (0, K4 - 1), (TOP - K4 + 1, TOP))
    with pytest.raises(UapiError, match="no room"):
        areas.room(0, K4)


@pytest.mark.parametrize("width", [39, 48])
def test_an_hwpt_must_reach_all_that_is_to_stay_available(width: int) -> None:
    areas = areas_of()
    allow(areas, (1 << 38, (1 << width) - 1))
    areas.check_reach(width)
    allow(areas, (1 << 38, 1 << width))
    with pytest.raises(UapiError, match="stay available") as caught:
        areas.check_reach(width)
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize(
    ("hva", "size", "number"),
    [
        (0, 0, errno.EINVAL),
        (1, K4, errno.EINVAL),
        (0, K4 + 1, errno.EINVAL),
        (TOP - K4 + 1, K4, errno.EOVERFLOW),
        (TOP - 3 * K4 + 1, K4, errno.EFAULT),
        (1 << 57, K4, errno.EFAULT),
    ],
)
def test_what_no_process_has_is_refused(hva: int, size: int, number: int) -> None:
    found = []
    for check in (check_memory, check_user):
        try:
            check(Hva(hva), size)
        except UapiError as error:
            found.append(error.errno)
    assert found[0] == number


PAGES = st.sampled_from([K4, M2, G1])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_leaves_map_each_address_to_the_byte_the_page_has_there(data: st.DataObject) -> None:
    """Against the sum done byte by byte; and no leaf could have been larger."""
    page_size = data.draw(PAGES)
    page = HmmPage(Hva(4 * G1), Hpa(8 * G1), page_size, True)
    first = data.draw(st.integers(-600, page_size // K4 - 1)) * K4
    area = Area(
        Iova(data.draw(st.integers(0, 2048)) * K4),
        data.draw(st.integers(1, 2048)) * K4,
        Hva(4 * G1 + first),
        True,
    )
    start = area.iova + data.draw(st.integers(0, area.size // K4 - 1)) * K4
    end = start + data.draw(st.integers(1, 600)) * K4
    covered: dict[int, int] = {}
    for iova, hpa, level in area.leaves(page, Iova(start), Iova(end), LEVEL_1G):
        size = size_of_level(level)
        assert iova % size == hpa % size == 0
        assert area.iova <= iova
        assert iova + size <= area.end
        larger = size_of_level(Level(level + 1))
        base = iova & -larger
        could = (
            level < LEVEL_1G
            and area.iova <= base
            and base + larger <= area.end
            and page.hva <= area.hva_of(Iova(base))
            and area.hva_of(Iova(base)) + larger <= page.end
            and (hpa - iova) % larger == 0
        )
        assert not could, f"a leaf of level {level} at {iova:#x}"
        covered.update((at, hpa + at - iova) for at in range(iova, iova + size, K4))
    for at in range(start, min(end, area.end), K4):
        inside = page.hva <= area.hva_of(Iova(at)) < page.end
        assert covered.get(at) == (page.hpa + area.hva_of(Iova(at)) - page.hva if inside else None)


def test_a_unit_with_small_leaves_alone_gets_no_other() -> None:
    area = Area(Iova(0), M2, Hva(4 * G1), True)
    page = HmmPage(Hva(4 * G1), Hpa(8 * G1), M2, True)
    assert [level for *_, level in area.leaves(page, Iova(0), Iova(3 * K4), LEVEL_4K)] == [LEVEL_4K] * 3
    assert [level for *_, level in area.leaves(page, Iova(0), Iova(3 * K4), LEVEL_2M)] == [LEVEL_2M]


@given(
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6),
)
def test_what_is_left_of_a_span_is_what_no_hole_has(
    span: tuple[int, int], holes: list[tuple[int, int]]
) -> None:
    holes = [hole for hole in holes if hole[0] < hole[1]]
    left = {at for start, end in without(span, holes) for at in range(start, end)}
    assert left == {at for at in range(*span) if not any(first <= at < last for first, last in holes)}


@pytest.mark.parametrize("seed", range(20))
def test_areas_are_found_by_iova_and_by_address_as_who_looks_at_all_finds_them(seed: int) -> None:
    random, areas = Random(seed), Areas()
    there: list[Area] = []
    for _ in range(200):
        iova, size = K4 * random.randrange(1, 200), K4 * random.choice((1, 1, 2, 9, 40))
        hva = Hva(0x7000_0000_0000 + K4 * random.randrange(60))
        if any(area.iova < iova + size and iova < area.end for area in there):
            with pytest.raises(UapiError, match="is mapped"):
                areas.check(Iova(iova), size)
            gone = there.pop(random.randrange(len(there)))
            areas.remove(gone)
            assert gone not in areas
        else:
            areas.check(Iova(iova), size)
            there.append(Area(Iova(iova), size, hva, True))
            areas.add(there[-1])
        there.sort(key=lambda area: area.iova)
        assert list(areas) == there
        start, end = sorted(K4 * random.randrange(260) for _ in range(2))
        assert areas.within(Iova(start), Iova(end)) == [
            area for area in there if area.iova < end and start < area.end
        ]
        low, high = Hva(0x7000_0000_0000 + start), Hva(0x7000_0000_0000 + end)
        parts = [(area, max(low, area.hva), min(high, area.hva_end)) for area in there]
        assert list(areas.of_hva(low, high)) == [
            (area, (area.iova_of(Hva(first)), area.iova_of(Hva(last))))
            for area, first, last in parts
            if first < last
        ]
