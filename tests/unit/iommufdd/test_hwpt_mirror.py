"""A mirror between a host that changes its mind and a unit that forgets late."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from iommufdd.core.hmm import MIRROR_TRIES, HmmRange, Lookup
from protocol.errors import EHWPOISON
from protocol.flow import Flows
from protocol.units import LEVEL_2M, LEVEL_4K, Hva, Iova
from tests.kit.host_memory import FRAMES
from tests.kit.iommufdd import GONE, RID, Surroundings
from tests.unit.iommufdd.mirrors import K4, M2, RAM, Mirrored, Raced
from tests.unit.iommufdd.spaces import (
    FAILURE,
    HVA,
    INVALID,
    SUCCESS,
    Space,
    mapped,
    outcome,
    request,
)


def test_nothing_is_mapped_or_pinned_before_a_device_asks() -> None:
    space = Mirrored()
    assert (space.leaves, space.host.pages, space.counts.pinned_pages) == ([], {}, 0)


def test_a_fault_maps_the_page_the_host_has_there_and_flushes_nothing() -> None:
    space = Mirrored()
    assert space.fault(5 * K4 + 8) == SUCCESS
    assert space.leaves == [(5 * K4, 1, FRAMES, True)]
    assert space.asked() == ["fault"]


def test_a_fault_maps_as_many_pages_as_it_may_and_none_beyond_the_area() -> None:
    space = Mirrored(premap_pages=8)
    assert (space.fault(5 * K4), space.fault(RAM - 3 * K4), space.fault(12 * K4)) == (SUCCESS,) * 3
    assert [leaf[0] // K4 for leaf in space.leaves] == [*range(5, 13), *range(RAM // K4 - 3, RAM // K4)]
    assert (space.counts.io_faults_spurious, space.asked()) == (1, ["fault", "fault"])


@pytest.mark.parametrize(("overtaken", "code"), [(MIRROR_TRIES - 1, SUCCESS), (MIRROR_TRIES, FAILURE)])
def test_a_fault_that_the_host_overtakes_every_time_ends(
    monkeypatch: pytest.MonkeyPatch, overtaken: int, code: int
) -> None:
    space = Mirrored()
    look = space.host.range_fault
    times = iter(range(overtaken))

    async def overtook(hva: int, size: int, *, write: bool, fault: bool) -> HmmRange:
        found = await look(hva, size, write=write, fault=fault)
        if next(times, None) is not None:
            space.demand.watched.lookups.invalidate(Hva(hva), Hva(hva + size))
        return found

    monkeypatch.setattr(space.host, "range_fault", overtook)
    assert (space.fault(0), len(space.leaves)) == (code, code == SUCCESS)
    assert space.counts.io_fault_retries == overtaken


def test_a_page_is_had_although_those_behind_it_cannot_be() -> None:
    space = Mirrored(premap_pages=8)
    space.host.hole = HVA + 6 * K4
    assert (space.fault(5 * K4), space.fault(6 * K4)) == (SUCCESS, INVALID)
    assert [leaf[0] // K4 for leaf in space.leaves] == [5]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EFAULT, INVALID),
        (errno.EPERM, FAILURE),
        (errno.ENODEV, FAILURE),
        (errno.ENOMEM, FAILURE),
        (EHWPOISON, INVALID),
    ],
)
def test_what_the_host_says_becomes_the_code_a_kvm_hwpt_gives(number: int, code: int) -> None:
    space = Mirrored()
    space.host.errno = number
    assert (space.fault(0), space.leaves) == (code, [])
    space.host.errno = 0
    assert space.fault(0) == SUCCESS


def test_outside_every_area_and_beyond_the_table_is_invalid_and_asks_nobody() -> None:
    space = Mirrored()
    assert [space.fault(iova) for iova in (RAM, 0xFEE0_0000, 1 << 48, (1 << 64) - K4)] == [INVALID] * 4
    assert space.asked() == []


def test_a_read_only_area_gives_reads_and_refuses_writes() -> None:
    space = Mirrored(writable=False)
    assert (space.fault(0), space.fault(0, write=True)) == (SUCCESS, INVALID)
    assert [leaf[3] for leaf in space.leaves] == [False]


def test_a_page_the_host_has_read_only_is_asked_for_again_to_write() -> None:
    space = Mirrored()
    space.host.writable = False
    assert space.fault(0) == SUCCESS
    page = space.host.pages[HVA]
    space.host.pages[HVA] = page._replace(writable=True)
    assert space.fault(0, write=True) == SUCCESS
    assert (space.leaves, space.asked()) == ([(0, 1, FRAMES, True)], ["fault", "fault"])


def test_a_page_that_is_there_costs_no_message() -> None:
    space = Mirrored()
    space.fault(0)
    space.asked()
    assert (space.fault(0, write=True), space.asked(), space.counts.io_faults_spurious) == (SUCCESS, [], 1)


def test_two_faults_on_one_page_map_it_once() -> None:
    space = Mirrored()
    space.host.hop = lambda: space.world._take("hop")
    space.world.hold()
    waits = [space.world.start(space.hwpt_.fault(request(0))) for _ in range(2)]
    while not all(wait.done for wait in waits):
        space.world.let_go()
    assert (len(space.leaves), space.counts.io_faults_spurious, space.counts.io_fault_retries) == (1, 1, 0)


def test_a_huge_page_of_the_host_is_one_leaf() -> None:
    space = Mirrored(page_size=M2)
    assert space.fault(M2 + 5 * K4) == SUCCESS
    assert [leaf[:2] for leaf in space.leaves] == [(M2, LEVEL_2M)]
    assert space.fault(M2 + 9 * K4) == SUCCESS
    assert space.asked() == ["fault"]


def test_memory_that_lies_askew_is_mapped_by_small_leaves() -> None:
    space = Space(on_demand=True)
    space.host.page_size = M2
    space.map(K4, 4 * M2, HVA)
    hwpt = space.mirror()
    assert space.world.run(hwpt.fault(request(3 * M2))) == SUCCESS
    ((iova, level, hpa, _),) = mapped(hwpt)
    assert (iova, level) == (3 * M2, LEVEL_4K)
    assert hpa == space.host.frame_of(HVA + 3 * M2 - K4)


# -- the host takes away -----------------------------------------------------------------------------


def test_an_invalidation_is_acked_after_the_unit_forgot_and_leaves_nothing_of_its_range() -> None:
    space = Mirrored()
    for n in range(4):
        space.fault(n * K4)
    space.asked()
    space.world.hold()
    acked = space.world.start(space.invalidate(HVA + K4, 2 * K4))
    assert ([leaf[0] for leaf in space.leaves], acked.done, space.asked()) == ([0, 3 * K4], False, ["submit"])
    assert (space.hwpt_.iotlb_syncs, space.hwpt_.acked) == (1, 0)
    space.world.let_go()
    assert (acked.done, space.hwpt_.acked, space.counts.hmm_invalidations) == (True, 1, 1)


def test_what_nobody_mapped_needs_no_flush() -> None:
    space = Mirrored()
    space.world.run(space.invalidate(HVA, RAM))
    assert space.asked() == []


def test_who_finds_nothing_left_waits_for_the_flush_of_who_took_it() -> None:
    """Else the host would free a page that the unit still has: I6."""
    space = Mirrored()
    space.fault(0)
    space.world.hold()
    first, second = (space.world.start(space.invalidate(HVA, K4)) for _ in range(2))
    assert (first.done, second.done) == (False, False)
    space.world.let_go()
    assert (first.done, second.done) == (True, True)


def test_a_unit_that_refuses_is_no_ack() -> None:
    space = Mirrored()
    space.fault(0)
    space.world.fails.after(0, errno.EIO)
    assert outcome(lambda: space.world.run(space.invalidate(HVA, K4))) == errno.EIO
    assert space.hwpt_.acked == 0


def test_what_a_unit_refused_to_forget_is_asked_of_it_again_before_anything_is_acked() -> None:
    space = Mirrored()
    space.fault(0)
    space.world.fails.after(0, errno.EIO, lasting=False)
    for number, submits in ((errno.EIO, 0), (0, 1), (0, 0)):
        space.asked()
        assert outcome(lambda: space.world.run(space.invalidate(HVA, K4))) == number
        assert space.asked() == ["submit"] * submits
    assert space.hwpt_.acked == 2


def test_a_unit_that_is_gone_has_forgotten() -> None:
    space = Mirrored()
    space.fault(0)
    space.world.fails.after(0, GONE)
    space.world.run(space.invalidate(HVA, K4))
    assert space.hwpt_.acked == 1


def test_a_part_of_a_huge_page_goes_and_the_rest_stays_where_it_was() -> None:
    space = Mirrored(page_size=M2)
    space.fault(0)
    space.lose_a_part()
    assert [leaf[0] // K4 for leaf in space.leaves] == [n for n in range(512) if n != 7]
    assert all(hpa == space.host.frame_of(HVA + iova) for iova, _, hpa, _ in space.leaves)
    assert (space.counts.splits, space.counts.collapses) == (1, 0)


def test_without_a_page_for_the_split_the_whole_leaf_goes() -> None:
    space = Mirrored(page_size=M2, table_pages=3)
    space.fault(0)
    space.lose_a_part()
    assert (space.leaves, space.counts.splits, space.asked()) == ([], 0, ["fault", "submit"])


def test_small_leaves_of_a_page_that_is_whole_again_become_one() -> None:
    space = Mirrored(page_size=M2)
    space.fault(0)
    space.lose_a_part()
    hpa = space.host.pages[HVA].hpa
    for address in [address for address in space.host.pages if address < HVA + M2]:
        del space.host.pages[address]
    space.host.pages[HVA] = space.host.fault_in(HVA + M2)._replace(hva=Hva(HVA), hpa=hpa)
    space.asked()
    tables = space.pool.in_use
    assert space.fault(7 * K4) == SUCCESS
    assert space.leaves == [(0, LEVEL_2M, hpa, True)]
    assert (space.asked(), space.counts.collapses) == (["fault", "submit"], 1)
    assert space.pool.in_use == tables - 1, "I7: flushed, the table that was cut off is free"


# -- races -------------------------------------------------------------------------------------------


def test_what_went_behind_the_answer_is_not_mapped() -> None:
    space = Raced()
    assert space.fault(3 * K4) == SUCCESS
    assert space.leaves == [(3 * K4, 1, space.host.frame_of(HVA + 3 * K4), True)]
    assert space.counts.io_fault_retries == 1


def test_a_huge_page_of_which_a_part_went_is_not_mapped_whole() -> None:
    space = Raced(page_size=M2)
    assert space.fault(0) == SUCCESS
    assert space.leaves == [(0, LEVEL_4K, space.host.frame_of(HVA), True)]


def test_another_page_that_goes_meanwhile_costs_no_second_look() -> None:
    space = Raced()
    assert space.fault(0) == SUCCESS
    assert (space.counts.io_fault_retries, len(space.leaves)) == (0, 1)


@pytest.fixture
def _no_check() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lookup, "stale", lambda *_: False)
        yield


@pytest.mark.usefixtures("_no_check")
def test_without_the_check_the_page_given_up_is_mapped() -> None:
    """The planted bug of the two tests above."""
    space = Raced()
    space.fault(3 * K4)
    assert space.leaves != [(3 * K4, 1, space.host.frame_of(HVA + 3 * K4), True)]


def test_an_area_gone_under_a_fault_is_not_mapped() -> None:
    space = Mirrored()
    space.host.hop = lambda: space.world._take("hop")
    space.world.hold()
    fault = space.world.start(space.hwpt_.fault(request(0)))
    gone = space.world.start(space.ioas.unmap(Iova(0), RAM))
    while not (fault.done and gone.done):
        space.world.let_go()
    assert (fault.result(), gone.result(), space.leaves) == (INVALID, RAM, [])


def test_a_host_that_takes_the_page_away_each_time_ends_in_failure() -> None:
    space = Mirrored()

    async def again() -> None:
        await space.host.give_up(HVA, HVA + K4)

    space.host.hop = again
    assert (space.fault(0), space.leaves) == (FAILURE, [])


# -- areas and mirrors -------------------------------------------------------------------------------


def test_memory_is_watched_once_and_until_its_area_goes() -> None:
    space = Mirrored()
    assert outcome(lambda: space.map(1 << 30, K4)) == errno.EEXIST
    assert len(list(space.ioas.areas)) == 1
    space.unmap(0, RAM)
    assert space.host.watched == []
    space.map(1 << 30, K4)


def test_every_mirror_of_an_ioas_loses_what_the_host_takes() -> None:
    space = Mirrored()
    other = space.mirror()
    space.fault(0)
    space.world.run(other.fault(request(0)))
    space.world.run(space.host.give_up(HVA, HVA + K4))
    assert (space.leaves, mapped(other), space.counts.hmm_invalidations) == ([], [], 1)


def test_what_one_mirror_s_unit_refuses_to_forget_no_other_mirror_forgets_to_flush() -> None:
    """Both lost the page in one turn; the ack of the next change speaks for both."""
    space = Mirrored()
    far = Surroundings()
    other = space.mirror()
    other.attached = {RID: far}
    for hwpt in (space.hwpt_, other):
        space.world.run(hwpt.fault(request(0)))
    space.world.fails.after(0, errno.EIO, lasting=False)
    assert outcome(lambda: space.world.run(space.invalidate(HVA, K4))) == errno.EIO
    assert far.log == []
    space.world.run(space.invalidate(HVA, K4))
    assert [what for what, *_ in far.log] == ["submit"]


class LastFirst(Flows):
    def _pick(self) -> Any:
        return self._ready.pop()


def test_who_finds_nothing_left_waits_for_a_flush_that_has_not_begun() -> None:
    """Who took the page out of the second mirror still waits at the first, and gets its turn later."""
    space = Mirrored()
    space.world.flows = LastFirst()
    other, far = space.mirror(), Surroundings()
    other.attached = {RID: far}
    space.world.run(space.hwpt_.fault(request(K4)))
    space.world.run(other.fault(request(0)))
    space.world.hold()
    far.hold()
    waits = [space.world.start(space.invalidate(hva, K4)) for hva in (HVA + K4, HVA, HVA)]
    assert (mapped(other), [wait.done for wait in waits]) == ([], [False] * 3)
    space.world.let_go()
    assert [what for what, *_ in far.log] == ["submit"]
    assert [wait.done for wait in waits] == [False] * 3, "I6: acked, the far unit has it still"
    far.let_go()
    space.world.flows.run_ready()
    assert all(wait.done for wait in waits)


def test_a_page_gone_in_a_flush_is_asked_for_again() -> None:
    """A fault makes one leaf of small ones, and waits for the units to forget those; the host takes it."""
    space = Mirrored(page_size=M2)
    space.fault(0)
    space.lose_a_part()
    for page in range(512):
        space.host.pages.pop(HVA + page * K4, None)
    space.host.fault_in(HVA)
    space.asked()
    space.world.hold()
    fault = space.world.start(space.hwpt_.fault(request(7 * K4)))
    assert ([leaf[:2] for leaf in space.leaves], fault.done) == ([(0, LEVEL_2M)], False)
    gone = space.world.start(space.host.give_up(HVA, HVA + M2))
    while not (fault.done and gone.done):
        space.world.let_go()
    assert fault.result() == SUCCESS
    assert [leaf[2] for leaf in space.leaves] == [space.host.frame_of(HVA)]
    assert space.counts.io_fault_retries == 1


def test_a_mirror_destroyed_while_it_is_flushed() -> None:
    """The table that was cut off went back with the rest of its table, and not a second time; of the second
    mirror, which is destroyed before its flush has begun, neither.
    """
    space = Mirrored(page_size=M2)
    mirrors = [space.hwpt_, space.mirror()]
    for hwpt in mirrors:
        space.world.run(hwpt.fault(request(0)))
    space.lose_a_part()
    space.world.hold()
    acked = space.world.start(space.invalidate(HVA, M2))
    held, space.world.held = space.world.held, None
    for hwpt in mirrors:
        space.destroy(hwpt)
    assert (space.pool.in_use, acked.done) == (0, False)
    for wait in held or []:
        wait.set(None)
    space.world.flows.run_ready()
    acked.result()
    assert space.pool.in_use == 0
