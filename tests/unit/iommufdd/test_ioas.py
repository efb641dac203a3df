"""An IOAS that pins: what is mapped is there in every HWPT, what fails leaves nothing."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from iommufdd.core.area import ULONG_MAX
from iommufdd.core.source import Source
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.hw.qi import Descriptor
from protocol.units import LEVEL_2M, LEVEL_4K, Hva, Iova
from tests.kit.host_memory import FRAMES, MAX_PAGES
from tests.kit.iommufdd import GONE, RID, Surroundings
from tests.unit.iommufdd.spaces import HVA, MEMORY, Space, mapped, mm_of, outcome

K4, M2 = 4 << 10, 2 << 20


def refused(space: Space, iova: int | None, size: int, hva: int = HVA, mm: int = 77) -> int:
    return outcome(lambda: space.map(iova, size, hva, mm=mm))


def test_nothing_is_pinned_before_there_is_an_hwpt() -> None:
    space = Space()
    space.map(0, 4 * K4)
    assert (space.asked(), space.counts.pinned_pages) == ([], 0)
    hwpt = space.hwpt()
    assert space.asked() == ["pin"]
    assert mapped(hwpt) == [(n * K4, 1, FRAMES + n * K4, True) for n in range(4)]
    assert space.counts.pinned_pages == 4


def test_what_is_mapped_later_is_pinned_at_once_in_as_many_answers_as_it_takes() -> None:
    space = Space()
    hwpt = space.hwpt()
    space.map(K4, 200 * K4)
    assert space.asked() == ["pin"] * 4
    assert [leaf[0] for leaf in mapped(hwpt)] == [K4 * n for n in range(1, 201)]


def test_pages_are_pinned_once_for_all_hwpts_and_go_with_the_last() -> None:
    space = Space()
    first = space.hwpt()
    space.map(0, 4 * K4)
    second = space.hwpt()
    first.memory = second.memory = MEMORY
    assert mapped(second) == mapped(first)
    assert (space.asked(), space.counts.pinned_pages) == (["pin"], 4)
    space.destroy(first)
    assert (space.asked(), space.counts.pinned_pages) == (["remove_memory"], 4)
    assert len(mapped(second)) == 4
    space.destroy(second)
    assert (space.asked(), space.counts.pinned_pages) == (["remove_memory", "unpin"], 0)
    assert (space.host.pins, space.pool.in_use) == ({}, 0)


def test_a_huge_page_is_one_leaf_unless_the_unit_has_none() -> None:
    space = Space()
    space.host.page_size = M2
    huge = space.hwpt()
    space.map(M2, 2 * M2)
    small = space.hwpt(max_leaf=LEVEL_4K)
    assert [leaf[:2] for leaf in mapped(huge)] == [(M2, LEVEL_2M), (2 * M2, LEVEL_2M)]
    assert [leaf[:2] for leaf in mapped(small)] == [(M2 + n * K4, LEVEL_4K) for n in range(1024)]
    assert mapped(small)[513][2] == mapped(huge)[1][2] + K4


def test_a_read_only_area_is_read_only_in_the_table() -> None:
    space = Space()
    hwpt = space.hwpt()
    space.map(0, K4, writable=False)
    assert [leaf[3] for leaf in mapped(hwpt)] == [False]


def test_unmap_clears_then_flushes_every_unit_then_unpins() -> None:
    space = Space()
    hwpt, far = space.hwpt(), Surroundings()
    hwpt.attached[RID + 8] = far
    space.map(0, 4 * K4)
    space.asked()
    space.world.hold()
    unmapped = space.world.start(space.ioas.unmap(Iova(0), 4 * K4))
    assert (mapped(hwpt), space.asked(), far.log) == ([], ["submit"], [])
    space.world.let_go()
    assert (unmapped.result(), space.asked()) == (4 * K4, ["unpin"])
    assert [what for what, *_ in far.log] == ["submit"]


def test_a_unit_that_refuses_to_forget_keeps_the_pages_pinned() -> None:
    space = Space()
    space.hwpt()
    space.map(0, K4)
    space.world.fails.after(0, errno.EIO)
    with pytest.raises(UapiError):
        space.unmap(0, K4)
    assert (len(space.host.pins), space.counts.pinned_pages) == (1, 1)


def test_what_a_unit_refused_to_forget_can_be_unmapped_again() -> None:
    """Its iova is not free before, nor does another IOAS find its pages anywhere."""
    space = Space()
    hwpt, other = space.hwpt(), space.space()
    space.map(0, 2 * K4)
    space.copy(space.ioas, 0, K4, other, 0)
    space.world.fails.after(0, errno.EIO, lasting=False)
    assert outcome(lambda: space.unmap(0, 2 * K4)) == errno.EIO
    assert (mapped(hwpt), space.ioas.check(), len(space.host.pins)) == ([], [], 2)
    assert outcome(lambda: space.map(0, K4)) == errno.EEXIST
    assert outcome(lambda: space.hwpt(on=other)) == errno.ENODEV
    assert space.unmap(0, 2 * K4) == 2 * K4
    assert (len(space.host.pins), list(space.ioas.areas)) == (0, [])
    second = space.hwpt(on=other)
    assert [leaf[2] for leaf in mapped(second)] == [space.host.frame_of(HVA)]


def test_what_a_unit_refused_to_forget_goes_with_its_ioas() -> None:
    space = Space()
    hwpt = space.hwpt()
    space.map(0, K4)
    space.world.fails.after(0, errno.EIO, lasting=False)
    assert outcome(lambda: space.unmap(0, K4)) == errno.EIO
    space.destroy(hwpt)
    space.world.run(space.ioas.destroy())
    assert (space.host.released, space.host.pins, space.counts.pinned_pages) == (True, {}, 0)


def test_what_was_half_mapped_and_a_unit_does_not_forget_is_an_area() -> None:
    """There is no table for what the second answer of the host has, and the unit refuses: what it may have
    cached of the first is pinned.
    """
    space = Space(table_pages=8)
    hwpt = space.hwpt()
    for _ in range(3):
        space.pool.allocate()
    edge, size = (1 << 30) - MAX_PAGES * K4, (MAX_PAGES + 1) * K4
    space.world.fails.after(0, errno.EIO, lasting=False)
    assert outcome(lambda: space.map(edge, size)) == errno.EIO
    assert (mapped(hwpt), len(space.host.pins), len(list(space.ioas.areas))) == ([], MAX_PAGES + 1, 1)
    assert (space.unmap(edge, size), space.host.pins) == (size, {})


def test_who_waited_for_a_flush_that_failed_flushes_again() -> None:
    space = Space()
    hwpt = space.hwpt()
    for n in range(2):
        space.map(n * K4, K4, HVA + n * K4)
    late, asked = Wait[None](), list[Sequence[Descriptor]]()

    async def submit(descriptors: Sequence[Descriptor]) -> None:
        asked.append(descriptors)
        if len(asked) == 1:
            await late
            raise UapiError(errno.EIO, "told to fail")

    space.world.submit = submit  # type: ignore[method-assign]
    hwpt.take(Iova(0), Iova(K4))
    first = space.world.start(hwpt.flush())
    second = space.world.start(space.ioas.unmap(Iova(K4), K4))
    late.set(None)
    space.world.flows.run_ready()
    assert (outcome(first.result), second.result(), len(asked)) == (errno.EIO, K4, 3)
    assert asked[0] == asked[2] != asked[1]


def test_of_two_who_waited_for_a_flush_that_failed_none_is_told_before_it_is_made_good() -> None:
    """The first takes what is stale again; the second finds nothing left, and waits for the first."""
    space = Space()
    hwpt = space.hwpt()
    space.map(0, K4)
    waits = list[Wait[None]]()

    async def submit(descriptors: Sequence[Descriptor]) -> None:
        waits.append(Wait())
        await waits[-1]

    space.world.submit = submit  # type: ignore[method-assign]
    hwpt.take(Iova(0), Iova(K4))
    first = space.world.start(hwpt.flush())
    both = [space.world.start(hwpt.give_up()) for _ in range(2)]
    waits[0].fail(UapiError(errno.EIO, "told to fail"))
    space.world.flows.run_ready()
    assert (outcome(first.result), [wait.done for wait in both]) == (errno.EIO, [False, False])
    waits[1].set(None)
    space.world.flows.run_ready()
    assert [wait.done for wait in both] == [True, True]


def test_a_unit_that_is_gone_caches_nothing() -> None:
    space = Space()
    space.hwpt()
    space.map(0, K4)
    space.world.fails.after(0, GONE)
    assert space.unmap(0, K4) == K4
    assert space.host.pins == {}


@pytest.mark.parametrize("room", [0, 1, 63, 64, 65, 199])
def test_a_map_that_cannot_be_pinned_leaves_nothing(room: int) -> None:
    space = Space()
    hwpt = space.hwpt()
    space.host.room = room
    assert refused(space, 0, 200 * K4) == errno.ENOMEM
    assert (mapped(hwpt), space.host.pins, space.host.room) == ([], {}, room)
    assert (space.counts.pinned_pages, list(space.ioas.areas)) == (0, [])
    space.host.room = 200
    space.map(0, 200 * K4)


@pytest.mark.parametrize("pages", range(1, 9))
def test_a_map_without_room_for_tables_leaves_nothing(pages: int) -> None:
    """Two HWPTs: whichever runs out, both are as they were."""
    space = Space(table_pages=10)
    hwpts = space.hwpt(), space.hwpt()
    taken = [space.pool.allocate() for _ in range(8 - pages)]
    if outcome(lambda: space.map(1 << 30, 600 * K4)):
        assert [mapped(hwpt) for hwpt in hwpts] == [[], []]
        assert (space.host.pins, space.counts.pinned_pages, list(space.ioas.areas)) == ({}, 0, [])
    else:
        assert pages == 8
    space.pool.free(taken)


def test_an_hwpt_that_cannot_be_filled_pins_nothing() -> None:
    space = Space()
    space.map(0, K4)
    space.map(M2, 100 * K4)
    space.host.room = 50
    with pytest.raises(UapiError):
        space.hwpt()
    assert (space.host.pins, space.counts.pinned_pages, space.ioas.hwpts) == ({}, 0, [])


def test_an_area_out_of_an_hwpts_reach_is_eaddrinuse() -> None:
    space = Space()
    space.map(1 << 48, K4)
    with pytest.raises(UapiError) as caught:
        space.hwpt()
    assert caught.value.errno == errno.EADDRINUSE
    space.unmap(1 << 48, K4)
    space.hwpt()
    assert refused(space, 1 << 48, K4) == errno.EINVAL


def test_a_process_is_connected_to_once_and_let_go_of_with_the_last_ioas_that_mapped_it() -> None:
    space = Space()
    other = space.space()
    space.map(0, K4)
    space.world.run(other.map(mm_of(), Hva(HVA), K4, Iova(0), writable=True))
    space.map(K4, K4, mm=78)
    assert space.connected == 2
    space.world.run(space.ioas.destroy())
    assert (space.host.released, space.world.log) == (True, [("remove_memory", MEMORY)])  # of mm 78
    space.world.run(other.destroy())
    assert space.world.log == [("remove_memory", MEMORY)] * 2


def test_processes_are_let_go_of_in_the_order_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what others see of it depends on where their objects lie."""
    space, gone = Space(), list[Source]()

    async def let_go(source: Source) -> None:
        gone.append(source)

    monkeypatch.setattr(Source, "let_go", let_go)
    for number in range(16):
        space.map(number * K4, K4, mm=100 + number)
    came = list(space.sources._mms)
    assert space.ioas.sources == came
    space.world.run(space.ioas.destroy())
    assert gone == came


def test_an_ioas_on_demand_maps_one_process() -> None:
    space = Space(on_demand=True)
    space.map(0, K4)
    assert refused(space, K4, K4, mm=78) == errno.EINVAL
    space.unmap(0, K4)
    assert refused(space, K4, K4, mm=78) == errno.EINVAL


@pytest.mark.parametrize("on_demand", [False, True])
def test_what_waits_for_an_ioas_that_is_destroyed_maps_nothing(on_demand: bool) -> None:
    """The iommufd was closed meanwhile: its objects go whoever uses them."""
    space = Space(on_demand=on_demand)
    space.world.run(space.ioas.lock.acquire(write=True))
    ended = space.world.start(space.ioas.destroy())
    waiting = space.world.start(space.ioas.map(mm_of(), Hva(HVA), K4, Iova(0), writable=True))
    space.ioas.lock.release()
    space.world.flows.run_ready()
    assert ended.done
    assert outcome(waiting.result) == errno.EBADF
    assert (space.connected, list(space.ioas.areas)) == (0, [])


@pytest.mark.parametrize(
    ("iova", "size", "number", "left"),
    [
        (0, 0, errno.EINVAL, 3),
        (K4, ULONG_MAX - 1, errno.EOVERFLOW, 3),
        (8 * K4, K4, errno.ENOENT, 3),
        (0, 3 * K4, errno.ENOENT, 2),  # cuts the second; the first is gone
        (K4, 5 * K4, errno.ENOENT, 3),
        (0, 4 * K4, 0, 1),
        (0, ULONG_MAX, 0, 0),
    ],
)
def test_unmap_takes_whole_areas(iova: int, size: int, number: int, left: int) -> None:
    space = Space()
    hwpt = space.hwpt()
    for n in range(3):
        space.map(2 * n * K4, 2 * K4, HVA + 2 * n * K4)
    assert outcome(lambda: space.unmap(iova, size)) == number
    assert (len(list(space.ioas.areas)), len(mapped(hwpt))) == (left, 2 * left)


@pytest.mark.parametrize("everything", [True, False])
def test_unmap_reaches_the_last_byte_of_all(everything: bool) -> None:
    """All ones is a length that no range has: the byte at 2^64-1 belongs to everything."""
    space = Space()
    space.map(0, K4)
    space.map(ULONG_MAX + 1 - 2 * K4, 2 * K4, HVA + K4)
    if not everything:
        assert outcome(lambda: space.unmap(K4, ULONG_MAX - K4)) == errno.ENOENT, "a byte short"
    asked = (0, ULONG_MAX) if everything else (K4, ULONG_MAX + 1 - K4)
    assert space.unmap(*asked) == (3 if everything else 2) * K4
    assert [area.iova for area in space.ioas.areas] == ([] if everything else [0])


def test_unmap_of_everything_finds_nothing_and_is_success() -> None:
    assert Space().unmap(0, ULONG_MAX) == 0


def test_destruction_unpins_gives_the_frames_back_and_lets_go_of_the_process() -> None:
    space = Space()
    hwpt = space.hwpt()
    space.map(0, K4)
    space.destroy(hwpt)
    space.asked()
    space.world.run(space.ioas.destroy())
    assert (space.world.log, space.host.released) == ([("remove_memory", MEMORY)], True)


def test_what_a_lost_host_had_is_reached_by_nobody() -> None:
    space = Space()
    hwpt = space.hwpt(attached=False)
    space.map(0, 4 * K4)
    space.host.errno = errno.ENODEV
    space.world.run(space.ioas.lose_host())
    assert mapped(hwpt) == []
    assert refused(space, M2, K4) == errno.ENODEV
    assert space.unmap(0, 4 * K4) == 4 * K4


def test_unmapping_waits_for_a_map_that_is_under_way() -> None:
    space = Space()
    hwpt = space.hwpt()
    space.world.hold()
    space.host.hop = lambda: space.world._take("hop")
    made = space.world.start(space.ioas.map(mm_of(), Hva(HVA), K4, Iova(0), writable=True))
    gone = space.world.start(space.ioas.unmap(Iova(0), ULONG_MAX))
    assert (made.done, gone.done) == (False, False)
    while not gone.done:
        space.world.let_go()
    assert (made.result(), gone.result(), mapped(hwpt)) == (0, K4, [])
