"""Pins of a mirror: they count on the page that is mapped, stay whatever the host does, end one by one."""

from __future__ import annotations

import errno
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufdd.core.ioas_check import check_ioas
from iommufdd.core.ioas_on_demand import IoasOnDemand
from protocol.flow import Wait
from protocol.units import LEVEL_2M, Iova
from tests.unit.iommufdd.mirrors import K4, M2, RAM, Mirrored, Raced
from tests.unit.iommufdd.spaces import HVA, INVALID, SUCCESS, outcome, request


def pin(space: Mirrored, iova: int, size: int) -> int:
    return space.world.run(space.hwpt_.pin(Iova(iova), size))


def unpin(space: Mirrored, name: int) -> None:
    space.world.run(space.hwpt_.unpin(name))


def drop(space: Mirrored, iova: int, size: int) -> None:
    """MADV_DONTNEED."""
    space.world.run(space.host.give_up(HVA + iova, HVA + iova + size))


def refused(space: Mirrored, iova: int, size: int) -> int:
    return outcome(lambda: pin(space, iova, size))


def test_a_pinned_page_stays_mapped_whatever_the_host_does() -> None:
    space = Mirrored()
    name = pin(space, K4, 2 * K4)
    before = space.leaves
    assert [leaf[0] for leaf in before] == [K4, 2 * K4]
    space.world.run(space.host.give_up(HVA, HVA + RAM))
    assert (space.leaves, space.counts.pinned_pages) == (before, 2)
    space.world.run(space.hwpt_.unpin(name))
    assert (space.leaves, space.host.pins, space.counts.pinned_pages) == ([], {}, 0)


@pytest.mark.parametrize("by_area", [False, True])
def test_what_a_unit_refused_to_forget_is_unpinned_with_the_next_it_forgets(*, by_area: bool) -> None:
    space = Mirrored()
    name, other = pin(space, 0, K4), pin(space, K4, K4)
    space.world.fails.after(0, errno.EIO, lasting=False)
    gone = (lambda: space.unmap(0, RAM)) if by_area else (lambda: unpin(space, name))
    assert outcome(gone) == errno.EIO
    assert (len(space.host.pins), space.world.run(check_ioas(space.ioas))) == (2, [])
    if by_area:
        assert (space.unmap(0, RAM), space.host.watched) == (RAM, [])
    else:
        unpin(space, other)
    assert (space.host.pins, space.counts.pinned_pages) == ({}, 0)


def test_a_pinned_page_stays_under_faults_beside_it() -> None:
    space = Mirrored(page_size=M2)
    pin(space, K4, K4)
    (held,) = space.leaves
    space.world.run(space.host.give_up(HVA, HVA + M2))
    assert space.fault(0) == SUCCESS
    assert held in space.leaves
    assert len(space.leaves) == 2


@pytest.mark.parametrize(
    ("iova", "size", "number"),
    [
        (1, K4, errno.EINVAL),
        (0, 0, errno.EINVAL),
        (0, K4 + 1, errno.EINVAL),
        (1 << 48, K4, errno.EINVAL),
        (RAM, K4, errno.EFAULT),
        (RAM - K4, 2 * K4, errno.EFAULT),
    ],
)
def test_a_pin_that_fails_leaves_nothing(iova: int, size: int, number: int) -> None:
    space = Mirrored()
    assert refused(space, iova, size) == number
    assert (space.leaves, space.host.pins, space.counts.pinned_pages) == ([], {}, 0)


def test_a_pin_beyond_the_limit_leaves_nothing() -> None:
    space = Mirrored()
    space.host.room = 100
    assert refused(space, 0, 200 * K4) == errno.ENOMEM
    assert (space.leaves, space.host.pins, space.host.room) == ([], {}, 100)


def test_a_page_that_goes_meanwhile_is_pinned_anew() -> None:
    space = Raced()
    pin(space, 3 * K4, K4)
    assert space.leaves == [(3 * K4, 1, space.host.frame_of(HVA + 3 * K4), True)]
    assert [len(pages) for pages in space.host.pins.values()] == [1]


def test_who_pins_everything_pins_what_is_mapped_later() -> None:
    space = Mirrored()
    space.unmap(0, RAM)
    space.map(0, 2 * K4)
    everything = space.world.run(space.hwpt_.pin_all())
    space.map(8 * K4, 3 * K4, HVA + M2)
    assert (len(space.leaves), space.counts.pinned_pages) == (5, 5)
    space.host.room = 1
    assert outcome(lambda: space.map(32 * K4, 2 * K4, HVA + 2 * M2)) == errno.ENOMEM
    assert (len(space.leaves), len(space.host.watched)) == (5, 2)
    space.unmap(0, 2 * K4)
    assert (len(space.leaves), space.counts.pinned_pages) == (3, 3)
    space.world.run(space.hwpt_.unpin(everything))
    assert (space.leaves, space.counts.pinned_pages, space.host.pins) == ([], 0, {})


# -- pins over pins ------------------------------------------------------------------------------------


def test_a_pin_over_a_pinned_page_counts_on_the_page_that_is_mapped_and_ends_with_it() -> None:
    """Case 1: the second request pinned what the process had by then, the first one's name kept it mapped."""
    space = Mirrored()
    first = pin(space, 0, K4)
    ((_, _, old, _),) = space.leaves
    drop(space, 0, K4)
    new = space.host.fault_in(HVA)
    second = pin(space, 0, 2 * K4)
    assert space.leaves[0][2] == old != new.hpa
    assert [page.hpa for pages in space.host.pins.values() for page in pages].count(new.hpa) == 0
    unpin(space, second)
    assert [leaf[:3] for leaf in space.leaves] == [(0, 1, old)], "the first still holds it, and only it"
    drop(space, 0, K4)
    assert [leaf[:3] for leaf in space.leaves] == [(0, 1, old)]
    unpin(space, first)
    assert (space.leaves, space.host.pins, space.counts.pinned_pages) == ([], {}, 0)
    space.host.fault_in(HVA)
    assert space.fault(0) == SUCCESS
    assert space.leaves[0][2] == space.host.frame_of(HVA)


def test_the_request_that_pinned_may_end_before_those_that_hold_its_page_too() -> None:
    space = Mirrored()
    first, second = pin(space, 0, 3 * K4), pin(space, K4, 4 * K4)
    drop(space, 0, RAM)
    before = space.leaves
    unpin(space, first)
    assert space.leaves == before[1:]
    assert space.counts.pinned_pages == 4
    unpin(space, second)
    assert (space.leaves, space.host.pins, space.counts.pinned_pages) == ([], {}, 0)


def test_a_huge_page_that_is_pinned_stays_whole_while_any_of_it_is_held() -> None:
    """The host knows one pin of it, which cannot be given back by parts."""
    space = Mirrored(page_size=M2)
    whole, part = pin(space, 0, M2), pin(space, 5 * K4, K4)
    unpin(space, whole)
    assert [leaf[:2] for leaf in space.leaves] == [(0, LEVEL_2M)]
    unpin(space, part)
    assert (space.leaves, space.host.pins, space.counts.pinned_pages) == ([], {}, 0)


PAGES = 8
SPANS = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES)).map(
    lambda s: (s[0], min(s[1], PAGES - s[0]))
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("pin"), SPANS),
        st.tuples(st.just("unpin"), st.integers(0, 5)),
        st.tuples(st.just("drop"), SPANS),
        st.tuples(st.sampled_from(["touch", "fault"]), st.integers(0, PAGES - 1)),
    ),
    max_size=14,
)


@given(STEPS)
def test_whatever_overlaps_a_pinned_page_is_mapped_to_its_frame_and_any_other_to_the_hosts(
    steps: list[tuple[str, Any]],
) -> None:
    """Against a model of what is held: page -> the frame it had when the first of its holders came."""
    space = Mirrored()
    requests: list[tuple[int, range]] = []
    holders: Counter[int] = Counter()
    frames: dict[int, int | None] = {}
    for what, arg in steps:
        if what == "pin":
            pages = range(arg[0], sum(arg))
            requests.append((pin(space, pages.start * K4, len(pages) * K4), pages))
            for page in pages:
                if not holders[page]:
                    frames[page] = space.host.frame_of(HVA + page * K4)
            holders.update(pages)
        elif what == "unpin" and requests:
            name, pages = requests.pop(arg % len(requests))
            unpin(space, name)
            holders.subtract(pages)
        elif what == "drop":
            drop(space, arg[0] * K4, arg[1] * K4)
        elif what == "touch":
            space.host.fault_in(HVA + arg * K4)
        elif what == "fault":
            assert space.fault(arg * K4, write=True) == SUCCESS
        mapped = {iova // K4: hpa for iova, _, hpa, _ in space.leaves}
        held = {page: frames[page] for page in +holders}
        assert held.items() <= mapped.items(), "I22: pinned is what was, once somebody held it"
        for page in mapped.keys() - held.keys():
            assert mapped[page] == space.host.frame_of(HVA + page * K4), f"I11: page {page}"
        pinned = [page.hpa for pages in space.host.pins.values() for page in pages]
        assert sorted(pinned) == sorted(frame for frame in held.values() if frame is not None)
        assert space.counts.pinned_pages == len(held)


def test_pins_of_part_of_huge_pages_overlap_too() -> None:
    space = Mirrored(page_size=M2)
    middle = pin(space, M2 - 2 * K4, 4 * K4)
    drop(space, 0, 2 * M2)
    around = pin(space, M2 - 4 * K4, 8 * K4)
    pinned = {page.hpa & -M2 for pages in space.host.pins.values() for page in pages}
    assert len(pinned) == 4, "two huge pages then, and two new ones beside"
    unpin(space, middle)
    assert len(space.leaves) == 8
    unpin(space, around)
    assert (space.leaves, space.host.pins, space.counts.pinned_pages) == ([], {}, 0)


# -- whose they are ------------------------------------------------------------------------------------


def test_an_unpin_whose_pins_went_with_their_area_takes_nobody_elses() -> None:
    """Case 7: the same range of another area, pinned by another request, is not meant."""
    space = Mirrored()
    first = pin(space, 0, 4 * K4)
    space.unmap(0, RAM)
    space.map(0, RAM)
    pin(space, 0, 4 * K4)
    unpin(space, first)
    assert (len(space.leaves), space.counts.pinned_pages, len(space.host.pins)) == (4, 4, 4)


def test_a_request_over_two_areas_keeps_what_the_other_has() -> None:
    space = Mirrored()
    space.map(RAM, RAM, HVA + RAM)
    name = pin(space, RAM - K4, 2 * K4)
    space.unmap(0, RAM)
    assert [leaf[0] for leaf in space.leaves] == [RAM]
    unpin(space, name)
    assert (space.leaves, space.host.pins, space.counts.pinned_pages) == ([], {}, 0)


def test_the_same_range_pinned_twice_is_held_twice() -> None:
    space = Mirrored()
    first, second = pin(space, 0, K4), pin(space, 0, K4)
    unpin(space, second)
    unpin(space, second)
    assert (len(space.leaves), space.counts.pinned_pages) == (1, 1)
    unpin(space, first)
    assert (space.leaves, space.counts.pinned_pages) == ([], 0)


def test_pins_end_with_their_mirror_and_who_waited_for_its_turn_has_none() -> None:
    """Case 5: a pin whose device is detached and whose HWPT is destroyed while it waits for the lock, or
    after it has it, holds nothing; and giving it back later is no use of a table that is somebody else's.
    """
    space = Mirrored()
    hops: list[Wait[None]] = []

    async def hop() -> None:
        hops.append(Wait())
        await hops[-1]

    at_once, space.host.hop = space.host.hop, hop
    first = space.world.start(space.hwpt_.pin(Iova(0), K4))
    space.hwpt_.attached.clear()
    gone = space.world.start(space.hwpt_.destroy())
    late = space.world.start(space.hwpt_.pin(Iova(K4), K4))
    all_late = space.world.start(space.hwpt_.pin_all())
    while hops:
        hops.pop().set(None)
        space.world.flows.run_ready()
    assert gone.done
    assert [outcome(wait.result) for wait in (late, all_late)] == [errno.EINVAL] * 2
    assert (space.host.pins, space.counts.pinned_pages) == ({}, 0)
    space.host.hop = at_once
    other = space.mirror()
    space.world.run(other.pin(Iova(0), K4))
    space.unmap(0, RAM)
    unpin(space, first.result())
    assert (space.host.pins, space.counts.pinned_pages) == ({}, 0)


def test_a_unit_that_refuses_to_forget_an_area_leaves_no_mirror_with_pins_of_it() -> None:
    """It is an assertion no more: what the other mirrors held of the area ended with it."""
    space = Mirrored()
    other = space.mirror()
    name = space.world.run(other.pin(Iova(0), K4))
    pin(space, 0, K4)
    space.world.fails.after(0, errno.EIO, lasting=False)
    assert outcome(lambda: space.unmap(0, RAM)) == errno.EIO
    space.world.run(other.unpin(name))
    assert [list(hwpt.pins) for hwpt in (space.hwpt_, other)] == [[], []]
    assert len(space.host.pins) == 2, "what a unit may still reach stays pinned"


# -- the order of taking away --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unpin", "unmap", "unmap of two mirrors"])
def test_the_host_hears_of_an_unpin_once_entries_and_units_are_without_it(how: str) -> None:
    space = Mirrored()
    name = pin(space, 0, 3 * K4)
    mirrors = [space.hwpt_]
    if how == "unmap of two mirrors":
        mirrors.append(space.mirror())
        space.world.run(mirrors[1].pin(Iova(0), K4))
    drop(space, 0, RAM)
    space.asked()
    space.world.hold()
    flow = space.hwpt_.unpin(name) if how == "unpin" else space.ioas.unmap(Iova(0), RAM)
    gone = space.world.start(flow)
    assert (space.leaves, gone.done) == ([], False)
    assert len(space.host.pins) == 3 + (len(mirrors) - 1)
    while not gone.done:
        flushed = space.asked()
        assert "unpin" not in flushed[: flushed.index("submit")]
        space.world.let_go()
    assert (space.host.pins, space.counts.pinned_pages) == ({}, 0)


def test_an_unpin_waits_for_who_took_the_page_out_before() -> None:
    """`lose` finds a mapped page that is not pinned beside one that is; the unit has not forgotten it yet."""
    space = Mirrored()
    name = pin(space, 0, K4)
    space.fault(K4)
    space.asked()
    space.world.hold()
    lost = space.world.start(space.host.give_up(HVA, HVA + 2 * K4))
    gone = space.world.start(space.hwpt_.unpin(name))
    assert (lost.done, gone.done, len(space.host.pins)) == (False, False, 1)
    space.world.let_go()
    assert (lost.done, gone.done, space.host.pins) == (True, True, {})


def test_a_unit_that_refuses_keeps_an_unpinned_page_with_the_host() -> None:
    space = Mirrored()
    name = pin(space, 0, K4)
    space.world.fails.after(0, errno.EIO, lasting=False)
    assert outcome(lambda: unpin(space, name)) == errno.EIO
    assert (len(space.host.pins), space.counts.pinned_pages) == (1, 1)


@pytest.mark.parametrize("room", range(5))
def test_a_pin_without_pages_for_its_tables_leaves_no_entry_of_what_the_host_gets_back(room: int) -> None:
    """Small pages, a huge one and small ones again take a table after each other; what was mapped before
    one could not be had is taken out and flushed before it is unpinned.
    """
    space = Mirrored(page_size=M2)
    space.host.fault_in(HVA + M2)
    space.host.page_size = K4
    taken = [space.pool.allocate() for _ in range(64 - space.pool.in_use - room)]
    space.asked()
    done = refused(space, M2 - K4, M2 + 2 * K4)
    asked = space.asked()
    if room == 4:
        assert (done, len(space.leaves), "unpin" in asked) == (0, 3, False)
        return
    assert done == errno.ENOMEM
    assert (space.leaves, space.host.pins, space.counts.pinned_pages) == ([], {}, 0)
    assert asked == (["pin", "submit", "unpin"] if room == 3 else ["pin", "unpin"])
    space.pool.free(taken)
    assert refused(space, M2 - K4, M2 + 2 * K4) == 0


def test_a_pinned_page_under_a_huge_leaf_gets_one_of_its_own_and_the_rest_goes_alone() -> None:
    """Else it would go with the rest, when there is no page to split the leaf then."""
    space = Mirrored(page_size=M2)
    space.fault(0)
    space.asked()
    pin(space, 3 * K4, K4)
    assert (len(space.leaves), space.asked()) == (512, ["pin", "submit"])
    while outcome(space.pool.allocate) == 0:
        pass
    space.world.run(space.host.change(HVA, HVA + K4, lambda: space.host.remove(HVA, HVA + K4)))
    drop(space, 0, M2)
    assert [leaf[0] for leaf in space.leaves] == [3 * K4]


def test_a_note_of_what_the_process_has_by_now_leaves_a_pinned_page_mapped() -> None:
    space = Mirrored()
    pin(space, 0, K4)
    before = space.leaves
    drop(space, 0, K4)
    for page in (0, 1):
        space.host.fault_in(HVA + page * K4)
    assert isinstance(space.ioas, IoasOnDemand)
    assert space.world.run(space.ioas.look(Iova(0), 2 * K4))
    assert (space.leaves[0], len(space.leaves)) == (before[0], 2)


def test_who_pinned_everything_and_gave_it_back_pins_nothing_that_is_mapped_later() -> None:
    space = Mirrored()
    space.unmap(0, RAM)
    name = space.world.run(space.hwpt_.pin_all())
    for _ in range(3):
        space.map(0, 2 * K4)
        assert space.counts.pinned_pages == 2
        space.unmap(0, 2 * K4)
    assert space.hwpt_.pins._requests == {name: []}, "nothing is kept of areas that went"
    unpin(space, name)
    space.map(0, 2 * K4)
    assert (space.leaves, space.counts.pinned_pages) == ([], 0)


def test_a_fault_over_a_pinned_page_is_served_by_it_and_one_beyond_the_area_is_not() -> None:
    space = Mirrored()
    pin(space, RAM - K4, K4)
    space.asked()
    assert (space.fault(RAM - K4, write=True), space.fault(RAM)) == (SUCCESS, INVALID)
    assert space.asked() == []
    assert space.world.run(space.hwpt_.fault(request(RAM - K4))) == SUCCESS
