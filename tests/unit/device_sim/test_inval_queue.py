"""The invalidation queue as memory: its ends, what stops it, who lies about it, who dies in the middle."""

from __future__ import annotations

import pytest

from device_sim.core.function import DmaRange
from device_sim.core.traits import InvalidateCompletion, Traits
from protocol.hw.qi import IQEI
from protocol.units import Iova
from tests.kit.raw_driver import (
    ENTRIES,
    FSTS,
    GCMD,
    GSTS,
    ICE,
    ICS,
    IECTL,
    IM,
    IP,
    IQA,
    IQE,
    IQERCD,
    IQH,
    IQT,
    ITE,
    IWC,
    QIE,
    QUEUES,
    STRUCTURES,
    TE,
    Stopped,
)
from tests.kit.silicon import (
    DID,
    FRAMES,
    RID,
    Silicon,
    descriptor,
    devtlb_page,
    iotlb_domain,
    iotlb_pages,
    wait,
)


@pytest.fixture
def silicon() -> Silicon:
    """Pages 0 and 1 are mapped and in the IOTLB."""
    attached = Silicon()
    attached.attach()
    for page in (0, 1):
        attached.map(page, page)
        attached.translate(page)
    return attached


def cached(silicon: Silicon) -> list[int]:
    return sorted(page for page, _ in silicon.unit.iotlb.entries(DID))


def kick(silicon: Silicon, tail: int) -> None:
    silicon.driver.store(IQT, tail)
    silicon.unit.kick()


def error(silicon: Silicon) -> int | None:
    """Why it stopped."""
    driver = silicon.driver
    return driver.load(IQERCD) & 0xF if driver.load(FSTS) & IQE else None


# -- the ring ------------------------------------------------------------------------------------------


def test_the_ring_wraps_at_its_end(silicon: Silicon) -> None:
    for turn in range(60):
        raw = iotlb_pages(DID, 0) + iotlb_pages(DID, 1) + wait(turn + 1)
        assert silicon.execute(raw + wait(1000 + turn)) == [turn + 1, 1000 + turn]
        assert silicon.driver.load(IQH) == 4 * (turn + 1) % ENTRIES * 32
    assert silicon.unit.iotlb_invalidations == 120


def test_where_head_is_tail_nothing_is_executed(silicon: Silicon) -> None:
    silicon.driver.put(silicon.driver.ring_at, *[0xFF] * 4)
    silicon.unit.kick()
    assert (error(silicon), silicon.driver.load(IQH)) == (None, 0), "nothing was even decoded"


def test_a_ring_holds_one_less_than_its_entries_at_once(silicon: Silicon) -> None:
    raws = [wait(n + 1) for n in range(ENTRIES - 1)]
    assert silicon.execute(b"".join(raws)) == list(range(1, ENTRIES))


def test_a_queue_that_is_switched_off_executes_nothing_and_on_again_starts_at_its_start(
    silicon: Silicon,
) -> None:
    silicon.execute(wait(1))
    silicon.driver.store(GCMD, TE)
    silicon.unit.kick()
    assert silicon.driver.load(GSTS) & QIE == 0
    assert silicon.driver.load(IQH) == 0
    assert silicon.execute(iotlb_domain(DID)) == []
    assert cached(silicon) == [0, 1]
    silicon.driver.tail = 0
    silicon.driver.store(IQT, 0)
    silicon.driver.store(GCMD, QIE | TE)
    silicon.unit.kick()
    assert silicon.driver.load(IQH) == 0
    assert silicon.execute(iotlb_domain(DID) + wait(2)) == [2]
    assert cached(silicon) == []


def test_iqa_is_latched_when_the_queue_is_switched_on(silicon: Silicon) -> None:
    silicon.driver.store(IQA, 0)
    assert silicon.execute(wait(1)) == [1]
    assert silicon.driver.load(IQA) == silicon.driver.ring_at | 1 << 11


# -- some at once --------------------------------------------------------------------------------------


def one_by_one() -> Silicon:
    """Pages 0 and 1 are mapped; of the queue one descriptor is executed at a kick."""
    attached = Silicon(descriptors_at_once=1)
    attached.attach()
    for page in (0, 1):
        attached.map(page, page)
    return attached


def test_a_function_may_ask_between_any_two_descriptors_and_gets_what_the_iotlb_has_still() -> None:
    """R7: so what a device TLB has lost comes back, if it is told before the IOTLB is."""
    silicon = one_by_one()
    before = silicon.translate(0)
    silicon.map(0, 1)
    ((status, _),) = silicon.driver.queue(devtlb_page(RID, 0) + iotlb_pages(DID, 0) + wait(7))
    assert (silicon.unit.kick(), silicon.driver.load(IQH)) == (True, 32)
    assert silicon.translate(0) == before, "the IOTLB was not told yet"
    assert (silicon.unit.kick(), silicon.driver.load(IQH)) == (True, 64)
    assert silicon.translate(0) != before
    assert silicon.driver.status(status) != 7, "the wait's turn has not come"
    assert (silicon.unit.kick(), silicon.driver.load(IQH)) == (False, 96)
    assert silicon.driver.status(status) == 7


def test_what_is_late_aborts_the_wait_behind_it_however_many_run_at_once() -> None:
    silicon = one_by_one()
    silicon.function.traits = Traits(invalidate_completion=InvalidateCompletion.NEVER)
    waits = silicon.driver.queue(devtlb_page(RID, 5) + wait(1) + wait(2))
    assert (silicon.unit.kick(), silicon.driver.load(FSTS) & ITE) == (True, 0), "its wait may come yet"
    assert (silicon.unit.kick(), silicon.driver.load(FSTS) & ITE) == (False, ITE)
    silicon.driver.clear(FSTS, ITE)
    assert (silicon.unit.kick(), silicon.driver.load(IQH)) == (False, 96)
    assert [silicon.driver.status(at) == data for at, data in waits] == [False, True]


def test_a_queue_that_is_switched_off_between_two_descriptors_has_no_more() -> None:
    silicon = one_by_one()
    silicon.translate(0)
    silicon.translate(1)
    silicon.driver.queue(iotlb_pages(DID, 0) + iotlb_pages(DID, 1))
    assert silicon.unit.kick()
    silicon.driver.store(GCMD, TE)
    assert (silicon.unit.kick(), silicon.driver.load(IQH)) == (False, 0)
    assert cached(silicon) == [1]


# -- waits ---------------------------------------------------------------------------------------------


def test_a_wait_with_if_sets_iwc_and_the_event_goes_out_once_until_it_is_cleared(silicon: Silicon) -> None:
    event = descriptor(5 | 1 << 4)
    silicon.execute(event + event)
    assert (silicon.driver.load(ICS), silicon.driver.completions) == (IWC, 1)
    silicon.driver.clear(ICS, IWC)
    silicon.execute(event)
    assert (silicon.driver.load(ICS), silicon.driver.completions) == (IWC, 2), "no kick was needed for it"
    silicon.driver.clear(ICS, IWC)
    silicon.unit.kick()
    assert silicon.driver.load(ICS) == 0


def test_im_holds_the_completion_event_back_and_the_status_is_stored_all_the_same(silicon: Silicon) -> None:
    silicon.driver.store(IECTL, IM)
    assert silicon.execute(descriptor(5 | 3 << 4 | 7 << 32)) == [7]
    assert (silicon.driver.completions, silicon.driver.load(IECTL)) == (0, IM | IP)
    silicon.driver.store(IECTL, 0)
    silicon.unit.kick()
    assert (silicon.driver.completions, silicon.driver.load(IECTL)) == (1, 0)


@pytest.mark.parametrize(
    "at", [0, STRUCTURES, FRAMES, QUEUES - 4, QUEUES + (1 << 24), 1 << 51, (1 << 64) - 4], ids=hex
)
def test_a_status_is_stored_in_a_queue_window_or_nowhere(silicon: Silicon, at: int) -> None:
    before = [bytes(memory) for memory in (silicon.frames, silicon.tables.memory, silicon.driver.queues)]
    silicon.driver.put(silicon.driver.ring_at, 5 | 1 << 5 | 7 << 32, at, 0, 0)
    ring = bytes(silicon.driver.structures)
    kick(silicon, 32)
    assert silicon.driver.load(IQH) == 32
    assert [
        bytes(memory) for memory in (silicon.frames, silicon.tables.memory, silicon.driver.queues)
    ] == before
    assert bytes(silicon.driver.structures) == ring


def test_a_status_is_stored_up_to_the_last_word_of_a_queue_window_and_only_where_it_is_asked_for(
    silicon: Silicon,
) -> None:
    driver = silicon.driver
    last = QUEUES + len(driver.queues) - 4
    driver.put(driver.ring_at, 5 | 1 << 5 | 7 << 32, last, 0, 0)
    driver.put(driver.ring_at + 32, 5 | 9 << 32, last - 4, 0, 0)
    kick(silicon, 64)
    assert (driver.status(last - QUEUES), driver.status(last - QUEUES - 4)) == (7, 0)


# -- IQE -----------------------------------------------------------------------------------------------


def test_the_head_stays_on_a_bad_descriptor_until_software_has_made_another_of_it(silicon: Silicon) -> None:
    with pytest.raises(Stopped) as caught:
        silicon.execute(iotlb_pages(DID, 0) + descriptor(15) + iotlb_pages(DID, 1) + wait(5))
    assert caught.value.iqei is IQEI.BAD_TYPE
    assert (silicon.driver.load(IQH), silicon.driver.fault_events) == (32, 1)
    assert cached(silicon) == [1]
    silicon.unit.kick()
    assert (silicon.driver.load(IQH), silicon.driver.fault_events) == (32, 1), "a kick alone changes nothing"
    silicon.driver.recover()
    assert (silicon.driver.load(FSTS) & IQE, silicon.driver.load(IQH)) == (0, 128)
    assert cached(silicon) == []
    assert silicon.driver.status(silicon.driver.requests_bytes + 4 * 3) == 5


def test_iqe_cleared_over_the_same_descriptor_stops_at_it_again(silicon: Silicon) -> None:
    with pytest.raises(Stopped):
        silicon.execute(descriptor(15))
    silicon.driver.clear(FSTS, IQE)
    silicon.unit.kick()
    assert (error(silicon), silicon.driver.load(IQH), silicon.driver.fault_events) == (3, 0, 2)


@pytest.mark.parametrize(
    ("tail", "iqei"),
    [
        (ENTRIES * 32, IQEI.INVALID_TAIL),
        (ENTRIES * 32 + 1, IQEI.INVALID_TAIL),
        ((1 << 64) - 32, IQEI.INVALID_TAIL),
        (1 << 63, IQEI.INVALID_TAIL),
        (16, IQEI.TAIL_MISALIGNED),
        (1, IQEI.TAIL_MISALIGNED),
        (33, IQEI.TAIL_MISALIGNED),
    ],
)
def test_a_tail_that_names_no_entry_stops_the_queue_before_anything_runs(
    silicon: Silicon, tail: int, iqei: IQEI
) -> None:
    silicon.driver.queue(iotlb_domain(DID))
    kick(silicon, tail)
    assert (error(silicon), silicon.driver.load(IQH)) == (iqei, 0)
    assert cached(silicon) == [0, 1]
    silicon.driver.store(IQT, 32)
    silicon.driver.clear(FSTS, IQE)
    silicon.unit.kick()
    assert (error(silicon), cached(silicon)) == (None, [])


@pytest.mark.parametrize(
    ("iqa", "iqei"),
    [
        (0x7000_0000 | 1 << 11, IQEI.FETCH_ERROR),
        (FRAMES | 1 << 11, IQEI.FETCH_ERROR),
        (QUEUES | 1 << 11, IQEI.FETCH_ERROR),
        ((1 << 64) - 4096 | 1 << 11, IQEI.FETCH_ERROR),
        (STRUCTURES + 0x1000, IQEI.BAD_WIDTH),
    ],
)
def test_a_ring_outside_table_memory_or_of_narrow_entries_stops_the_queue(
    silicon: Silicon, iqa: int, iqei: IQEI
) -> None:
    silicon.driver.store(GCMD, TE)
    silicon.unit.kick()
    silicon.driver.store(IQA, iqa)
    silicon.driver.store(GCMD, QIE | TE)
    silicon.unit.kick()
    kick(silicon, 32)
    assert error(silicon) == iqei


def test_a_ring_that_leaves_table_memory_is_run_as_far_as_that_goes(silicon: Silicon) -> None:
    silicon.driver.store(GCMD, TE)
    silicon.unit.kick()
    last = STRUCTURES + len(silicon.driver.structures) - 4096
    silicon.driver.store(IQA, last | 1 << 11 | 7)
    for n in range(ENTRIES):
        silicon.driver.put(last + 32 * n, 5, 0, 0, 0)
    silicon.driver.store(IQT, (ENTRIES + 5) * 32)
    silicon.driver.store(GCMD, QIE | TE)
    silicon.unit.kick()
    assert (error(silicon), silicon.driver.load(IQH)) == (IQEI.FETCH_ERROR, ENTRIES * 32)


# -- ITE -----------------------------------------------------------------------------------------------


@pytest.fixture
def late(silicon: Silicon) -> Silicon:
    """The function completes no invalidation."""
    silicon.function.traits = Traits(invalidate_completion=InvalidateCompletion.NEVER)
    return silicon


def test_a_device_that_does_not_complete_aborts_the_wait_behind_it_and_nothing_else(late: Silicon) -> None:
    driver = late.driver
    assert late.execute(wait(1) + devtlb_page(RID, 5) + iotlb_pages(DID, 0) + wait(2) + wait(3)) == [1]
    assert driver.load(FSTS) & (ITE | IQE) == ITE
    assert driver.load(IQERCD) >> 32 & 0xFFFF == RID
    assert driver.load(IQH) == 4 * 32, "behind the wait that is never done"
    assert driver.fault_events == 1
    assert cached(late) == [1]
    late.unit.kick()
    assert driver.load(IQH) == 4 * 32, "nothing is fetched before it is cleared"
    driver.clear(FSTS, ITE)
    late.unit.kick()
    assert (driver.load(IQH), driver.load(FSTS) & ITE) == (5 * 32, 0)
    assert driver.status(driver.requests_bytes + 4 * 4) == 3


def test_without_a_wait_behind_it_a_time_out_shows_at_the_tail(late: Silicon) -> None:
    late.execute(devtlb_page(RID, 5))
    assert late.driver.load(FSTS) & ITE == ITE
    late.driver.clear(FSTS, ITE)
    assert late.execute(wait(9)) == [9], "what was late is over"


def test_another_function_and_another_unit_go_on(late: Silicon) -> None:
    other = Silicon()
    other.attach()
    late.execute(devtlb_page(RID, 5) + wait(1))
    assert other.execute(devtlb_page(RID, 5) + wait(1)) == [1]
    late.driver.clear(FSTS, ITE)
    late.unit.kick()
    assert late.execute(devtlb_page(0x6A10, 5) + wait(2)) == [2]


def test_a_completion_behind_its_time_out_is_reported_and_stops_nothing(silicon: Silicon) -> None:
    """[VT-d 11.4.8.1]: ITE with ITESID, then, when it comes after all, ICE with ICESID."""
    silicon.function.traits = Traits(invalidate_completion=InvalidateCompletion.LATE)
    driver = silicon.driver
    assert silicon.execute(devtlb_page(RID, 5) + wait(1)) == []
    assert driver.load(FSTS) & (ITE | ICE) == ITE
    driver.clear(FSTS, ITE)
    assert silicon.execute(devtlb_page(RID, 5) + wait(2) + wait(3)) == [2, 3]
    assert driver.load(FSTS) & (ITE | ICE | IQE) == ICE
    assert driver.load(IQERCD) >> 48 == RID
    assert driver.fault_events == 2
    driver.clear(FSTS, ICE)
    assert silicon.execute(devtlb_page(RID, 5) + wait(4)) == [], "every other one is late"
    assert driver.load(FSTS) & (ITE | ICE) == ITE


@pytest.mark.parametrize("invalidations", [0, 1, 2])
def test_what_is_late_for_a_driver_that_is_gone_is_not_told_to_the_next(
    silicon: Silicon, invalidations: int
) -> None:
    silicon.function.traits = Traits(invalidate_completion=InvalidateCompletion.LATE)
    for number in range(invalidations):
        silicon.execute(devtlb_page(RID, 5) + wait(number))
        silicon.driver.clear(FSTS, ITE | ICE)
    silicon.function.stop()
    silicon.unit.reset()
    silicon.function.traits = Traits()
    silicon.driver.come_back()
    silicon.attach()
    assert silicon.execute(devtlb_page(RID, 5) + wait(2)) == [2]
    assert not silicon.driver.load(FSTS) & (ITE | ICE | IQE)


def test_what_times_out_is_in_the_device_tlb_still(silicon: Silicon) -> None:
    silicon.function.traits = Traits(invalidate_completion=InvalidateCompletion.LATE)
    silicon.attach()
    silicon.map(5, 1)
    done = silicon.start(silicon.function.make_accessible([DmaRange(Iova(5 << 12), 8, True)], block=True))
    assert done.done
    for left in ({5}, set()):
        silicon.execute(devtlb_page(RID, 5))
        assert {page for page, *_ in silicon.function.devtlb.entries()} == left
        silicon.driver.clear(FSTS, ITE)
        silicon.unit.kick()


# -- who dies in the middle ----------------------------------------------------------------------------


def test_what_lies_behind_the_tail_of_a_driver_that_died_never_runs(silicon: Silicon) -> None:
    """It had written one descriptor, and half of another; its tail it had not stored."""
    ring = silicon.driver.ring_at
    silicon.driver.put(ring, 2 | 2 << 4 | DID << 16, 0, 0, 0)
    silicon.driver.put(ring + 32, 5 | 1 << 5 | 7 << 32)
    silicon.unit.kick()
    assert cached(silicon) == [0, 1]
    silicon.unit.reset()
    silicon.driver.come_back()
    silicon.attach()
    assert silicon.execute(wait(1)) == [1]


def test_a_unit_that_is_reset_before_its_wait_stores_nothing_for_it(silicon: Silicon) -> None:
    waits = silicon.driver.queue(iotlb_domain(DID) + wait(7))
    before = bytes(silicon.driver.queues)
    silicon.unit.reset()
    silicon.unit.kick()
    assert bytes(silicon.driver.queues) == before
    assert [data for at, data in waits if silicon.driver.status(at) == data] == []


def test_a_stopped_queue_is_not_stopped_for_the_next_driver(late: Silicon) -> None:
    late.execute(devtlb_page(RID, 5) + wait(1))
    late.unit.reset()
    late.driver.come_back()
    late.attach()
    assert late.execute(wait(1)) == [1]
