"""The invalidation queue in memory: what lies in the ring, who wakes when, and what the unit may do wrong."""

from __future__ import annotations

import errno

import pytest
from pydantic import ValidationError

from iommufdd.core import qi
from protocol.errors import PeerError, UapiError
from protocol.flow import Wait
from protocol.hw.pasid_entry import RID_PASID, PasidEntry
from protocol.hw.qi import ResponseCode
from protocol.hw.vtd_regs import Register
from protocol.uapi.link import MAX_FUNCTIONS, CapsReply
from protocol.units import WHOLE_SIZE, Iova
from tests.kit.iommufdd import CAP, ECAP, RID
from tests.kit.refusals import errno_of
from tests.unit.iommufdd.hardware import FSTS, ICS, IQERCD, IQH, IQT, QUEUES_AT, MiniatureUnit

DSI = 2 | 2 << 4 | 3 << 6
EVERYTHING = (3 | RID << 32, 0x7FFF_FFFF_FFFF_F001, 0, 0)
STATUS_AT = QUEUES_AT + (1 << 16)
NOTHING = (5, 0, 0, 0)
IQE, ICE, ITE = 1 << 4, 1 << 5, 1 << 6
BAD_TYPE, RESERVED_FIELD = 3, 4


def detach(unit: MiniatureUnit, did: int = 7) -> Wait[None]:
    """Four descriptors."""
    return unit.start(unit.driver.submit(qi.detach(did, RID, ECAP)))


def stop(unit: MiniatureUnit, fsts: int, error: int) -> None:
    unit.show(IQERCD, error, 8)
    unit.show(FSTS, unit.shows(FSTS) | fsts)
    unit.fault_event()


def test_descriptors_lie_side_by_side_and_the_wait_says_where_and_what_it_stores() -> None:
    unit = MiniatureUnit()
    detach(unit)
    assert unit.tail == 4
    assert [unit.descriptor(n) for n in range(3)] == [
        (7 | 1 << 4 | 7 << 16, 0, 0, 0),
        (DSI | 7 << 16, 0, 0, 0),
        EVERYTHING,
    ]
    # a wait with IF, SW and FN: number 1 into word 3
    assert unit.descriptor(3) == (5 | 0x70 | 1 << 32, STATUS_AT + 4 * 3, 0, 0)


def test_the_tail_shows_descriptors_only_when_all_of_them_are_there() -> None:
    """A driver that dies with descriptors half written leaves none that could be fetched."""
    unit = MiniatureUnit()
    seen = []
    stored = unit.driver.queue._registers.store  # the one store that shows anything

    def store(register: Register, value: int) -> None:
        seen.append((register, value, [unit.descriptor(n)[0] & 0xF for n in range(5)]))
        stored(register, value)

    unit.driver.queue._registers.store = store  # type: ignore[method-assign]
    detach(unit)
    assert seen == [(IQT, 4 * 32, [7, 2, 3, 5, 0])]


def test_a_submitter_sleeps_until_its_wait_stored_its_status() -> None:
    unit = MiniatureUnit()
    first, second = detach(unit), detach(unit)
    unit.execute(3)
    unit.completion()  # the event says nothing: the word does
    assert not first.done
    unit.execute(1)
    unit.completion()
    assert first.done
    assert not second.done
    unit.execute()
    unit.completion()
    assert second.done


def test_one_kick_for_what_is_submitted_and_the_event_is_taken_note_of() -> None:
    unit = MiniatureUnit()
    detach(unit)
    assert unit.kicks == unit.counts.kicks == 1
    unit.execute()
    unit.show(ICS, 1)
    unit.completion()
    assert unit.take_clears(ICS) == 1
    assert unit.kicks == 1


def test_the_ring_wraps_at_its_end() -> None:
    unit = MiniatureUnit()
    for n in range(100):
        wait = detach(unit, did=n)
        assert unit.tail == (n + 1) * 4 % 128
        assert len(unit.execute()) == 4
        unit.completion()
        assert wait.done


def test_what_straddles_the_end_of_the_ring_is_fetched_in_order() -> None:
    unit = MiniatureUnit()
    for n in range(126 // 2):
        unit.start(unit.driver.submit([qi.everything(n), qi.wait()]))
        unit.execute()
        unit.completion()
    assert unit.tail == 126
    wait = detach(unit)
    assert [found[0] & 0xF for found in unit.execute()] == [7, 2, 3, 5]
    unit.completion()
    assert wait.done
    assert unit.tail == 2


def test_a_full_ring_keeps_one_entry_free_and_the_rest_waits_in_order() -> None:
    unit = MiniatureUnit()
    waits = [detach(unit, did=n) for n in range(40)]
    assert unit.tail == 31 * 4  # 124 of 127, and 4 more do not fit
    assert [found[0] & 0xF for found in unit.execute()] == [7, 2, 3, 5] * 31
    unit.completion()
    assert [wait.done for wait in waits] == [True] * 31 + [False] * 9
    assert {found[0] >> 16 & 0xFFFF for found in unit.execute() if found[0] & 0xF == 7} == set(range(31, 40))
    unit.completion()
    assert all(wait.done for wait in waits)


def test_an_entry_whose_wait_is_not_done_is_not_used_again() -> None:
    unit = MiniatureUnit()
    stuck = detach(unit)
    unit.execute(waits=False)  # fetched, but its status is not stored
    wait = unit.descriptor(3)
    unit.completion()
    others = [detach(unit) for _ in range(40)]
    unit.execute()
    unit.completion()
    assert not stuck.done
    assert unit.descriptor(3) == wait
    unit.store_status(wait)
    unit.completion()
    assert stuck.done
    unit.execute()
    unit.completion()
    assert all(other.done for other in others)


def test_a_response_wants_no_wait_and_its_entry_is_free_behind_the_head() -> None:
    unit = MiniatureUnit()
    for n in range(1000):
        assert unit.driver.respond(RID, n % 512, ResponseCode.SUCCESS)
        unit.execute()
        unit.completion()
    assert unit.counts.descriptors["page_group_response"] == 1000


def test_responses_that_fill_the_ring_go_on_when_there_is_room_with_a_wait_among_them_that_says_so() -> None:
    unit = MiniatureUnit()
    for n in range(500):
        unit.driver.respond(RID, n, ResponseCode.SUCCESS)
    answered = []
    while unit.head != unit.tail:
        fetched = unit.execute()
        assert any(found[0] & 0xF == 5 and found[0] & 0x10 for found in fetched) or len(fetched) < 32
        answered += [found[1] >> 3 & 0x1FF for found in fetched if found[0] & 0xF == 9]
        unit.completion()
    assert answered == list(range(500))


# -- what the unit says is its word --------------------------------------------------------------------


@pytest.mark.parametrize("offset", [4096, 16, 1, 5 * 32, 1 << 63, 127 * 32])
def test_a_head_beyond_what_was_queued_ends_the_link(offset: int) -> None:
    unit = MiniatureUnit()
    detach(unit)
    unit.show(IQH, offset, 8)
    with pytest.raises(PeerError, match="invalidation queue"):
        unit.completion()


def test_a_head_that_goes_back_ends_the_link() -> None:
    unit = MiniatureUnit()
    detach(unit)
    unit.execute()
    unit.completion()
    detach(unit)
    unit.show(IQH, 32, 8)
    with pytest.raises(PeerError):
        unit.completion()


def test_head_equal_to_tail_is_an_empty_ring_and_never_a_full_one() -> None:
    unit = MiniatureUnit()
    unit.completion()
    wait = detach(unit)
    unit.completion()  # the head has not moved
    assert not wait.done


def test_the_number_of_another_wait_completes_nothing() -> None:
    unit = MiniatureUnit()
    waits = [detach(unit) for _ in range(2)]
    first = unit.descriptor(3)
    unit.store_status((7 << 32, first[1], 0, 0))
    unit.completion()
    assert not any(wait.done for wait in waits)


# -- a descriptor that the unit refuses ----------------------------------------------------------------


@pytest.mark.parametrize("reason", [BAD_TYPE, RESERVED_FIELD])
def test_a_refused_descriptor_becomes_a_wait_that_does_nothing_and_its_submitter_is_told(reason: int) -> None:
    unit = MiniatureUnit()
    bad, good = detach(unit), detach(unit)
    unit.execute(2)
    stop(unit, IQE, reason)
    assert unit.descriptor(2) == NOTHING
    assert unit.take_clears(FSTS) == IQE
    assert unit.kicks == 3
    unit.execute()
    unit.completion()
    assert errno_of(bad.result) == errno.EINVAL
    assert good.result() is None


def test_a_refused_wait_still_ends_what_was_submitted() -> None:
    """PD, where the unit drains no page requests."""
    unit = MiniatureUnit()
    bad = unit.start(unit.driver.submit(qi.drain(7, RID, ECAP)))
    unit.execute(3)
    assert unit.descriptor(3)[0] & 0xFF == 5 | 0xF0
    stop(unit, IQE, RESERVED_FIELD)
    assert unit.descriptor(3)[0] & 0xFF == 5 | 0x70
    unit.execute()
    unit.completion()
    assert errno_of(bad.result) == errno.EINVAL


def test_a_refused_response_is_left_out_and_the_queue_goes_on() -> None:
    unit = MiniatureUnit()
    unit.driver.respond(RID, 1, ResponseCode.SUCCESS)
    wait = detach(unit)
    stop(unit, IQE, BAD_TYPE)
    unit.execute()
    unit.completion()
    assert wait.result() is None


@pytest.mark.parametrize(("fetched", "reason"), [(0, 1), (0, 2), (0, 9), (4, BAD_TYPE)])
def test_a_queue_that_stopped_for_no_descriptor_of_ours_ends_the_link(fetched: int, reason: int) -> None:
    unit = MiniatureUnit()
    detach(unit)
    unit.execute(fetched)
    with pytest.raises(PeerError, match=f"for reason {reason}"):
        stop(unit, IQE, reason)


# -- a device that does not complete -------------------------------------------------------------------


def test_what_a_device_did_not_complete_in_time_is_submitted_once_more() -> None:
    unit = MiniatureUnit()
    wait = detach(unit)
    unit.execute(waits=False)
    stop(unit, ITE, RID << 32)
    assert unit.take_clears(FSTS) == ITE
    assert not wait.done
    assert [found[0] & 0xF for found in unit.execute()] == [7, 2, 3, 5]
    unit.completion()
    assert wait.result() is None


def test_a_second_time_out_is_told() -> None:
    unit = MiniatureUnit()
    wait, other = detach(unit), detach(unit)
    unit.execute(4, waits=False)
    stop(unit, ITE, RID << 32)
    unit.take_clears(FSTS)
    unit.execute(4)
    unit.execute(4, waits=False)
    stop(unit, ITE, RID << 32)
    assert errno_of(wait.result) == errno.ETIMEDOUT
    unit.completion()
    assert other.result() is None


def test_after_a_second_time_out_the_context_entry_goes_p_first_and_the_function_loses_the_bus() -> None:
    """[VT-d 6.5.3.3]: context cache of the function, PASID cache, IOTLB, a wait; then the rest; then EIO."""
    unit = MiniatureUnit()
    unit.driver.tables.add_function(RID, ats=True, pasid=True, pri=True)
    context = unit.context_words(RID)
    assert context[0] & 1
    wait = detach(unit)
    for _ in range(2):
        unit.execute(waits=False)
        stop(unit, ITE, RID << 32)
        unit.take_clears(FSTS)
    assert unit.context_words(RID) == (context[0] & ~1, *context[1:])
    assert [raw[0] & ~(0xFFFF_FFFF << 32 if raw[0] & 0xF == 5 else 0) for raw in unit.execute()] == [
        1 | 3 << 4 | RID << 32,
        7 | 3 << 4,
        2 | 1 << 4 | 1 << 6 | 1 << 7,
        5 | 1 << 4 | 1 << 5 | 1 << 6,
    ]
    assert (unit.context_words(RID)[1:], unit.ended, wait.done) == (context[1:], [], False)
    unit.completion()
    assert (unit.context_words(RID), unit.ended, wait.done) == ((0, 0, 0, 0), [RID], False)
    assert [raw[0] & 0xF for raw in unit.execute()] == [7, 2, 5], "what it does not answer is left out"
    unit.completion()
    assert wait.result() is None
    assert errno_of(lambda: unit.driver.put_pasid_entry(RID, RID_PASID, PasidEntry())) == errno.EIO


def being_taken_off() -> tuple[MiniatureUnit, Wait[None]]:
    """Up to the bus mastering, which is not answered yet; and who asked for the invalidation."""
    unit = MiniatureUnit()
    unit.driver.tables.add_function(RID, ats=True, pasid=True, pri=True)
    unit.bus = Wait()
    wait = detach(unit)
    for _ in range(2):
        unit.execute(waits=False)
        stop(unit, ITE, RID << 32)
        unit.take_clears(FSTS)
    unit.execute()
    unit.completion()
    return unit, wait


def test_who_comes_while_a_function_is_taken_off_the_bus_waits_until_it_is() -> None:
    """Its device TLB keeps what he wants dropped: told now, he would give away a frame it still reaches."""
    unit, first = being_taken_off()
    second = detach(unit)
    unit.execute()
    unit.completion()
    assert (first.done, second.done, unit.ended) == (False, False, [])
    unit.bus.set(None)
    unit.flows.run_ready()
    unit.execute()
    unit.completion()
    assert (first.result(), second.result(), unit.ended) == (None, None, [RID])


def test_a_function_that_cannot_be_taken_off_the_bus_is_an_error_to_all_who_wait_for_it() -> None:
    unit, first = being_taken_off()
    second = detach(unit)
    unit.bus.fail(UapiError(errno.EIO, "the link answers that it cannot"))
    unit.flows.run_ready()
    third = detach(unit)
    unit.execute()
    unit.completion()
    assert [errno_of(wait.result) for wait in (first, second, third)] == [errno.EIO] * 3
    unit.driver.gone()  # and with it what it translated
    assert errno_of(detach(unit).result) == errno.ENODEV


def test_a_link_that_breaks_while_a_function_is_taken_off_the_bus_is_no_end_of_its_dma() -> None:
    """The unit hears of it later (I13): ENODEV, which is an ack, is for when it has."""
    unit, first = being_taken_off()
    second = detach(unit)
    unit.driver.lost()
    unit.bus.fail(UapiError(errno.ENODEV, "the link is gone"))
    unit.flows.run_ready()
    assert (first.done, second.done) == (False, False)
    unit.driver.gone()
    unit.flows.run_ready()
    assert [errno_of(wait.result) for wait in (first, second)] == [errno.ENODEV] * 2


def test_a_live_link_that_knows_no_such_function_has_not_taken_it_off_the_bus() -> None:
    unit, first = being_taken_off()
    unit.bus.fail(UapiError(errno.ENODEV, "no such function behind this unit"))
    unit.flows.run_ready()
    unit.execute()
    unit.completion()
    assert errno_of(first.result) == errno.EIO


def test_a_unit_that_goes_on_about_a_function_off_the_bus_is_believed_once() -> None:
    unit = MiniatureUnit()
    unit.driver.tables.add_function(RID, ats=True, pasid=True, pri=True)
    wait = detach(unit)
    for n in range(4):
        unit.execute(waits=False)
        stop(unit, ITE, RID << 32)
        unit.take_clears(FSTS)
        if n == 1:
            unit.execute()
            unit.completion()
    assert errno_of(wait.result) == errno.ETIMEDOUT


def test_a_time_out_in_the_middle_does_not_pass_for_done() -> None:
    """Its wait is not fetched yet, and will complete: but the device TLB was not invalidated."""
    unit = MiniatureUnit()
    wait = detach(unit)
    unit.execute(3)
    stop(unit, ITE, RID << 32)
    unit.take_clears(FSTS)
    unit.execute()
    unit.completion()
    assert not wait.done
    unit.execute()
    unit.completion()
    assert wait.result() is None


def test_a_completion_nobody_asked_for_is_cleared() -> None:
    unit = MiniatureUnit()
    wait = detach(unit)
    stop(unit, ICE, 0)
    assert unit.take_clears(FSTS) == ICE
    unit.execute()
    unit.completion()
    assert wait.result() is None


# -- a unit that goes ----------------------------------------------------------------------------------


def test_a_unit_that_dies_before_its_wait_leaves_nobody_waiting() -> None:
    unit = MiniatureUnit()
    waits = [detach(unit) for _ in range(40)]
    unit.driver.gone()
    unit.flows.run_ready()
    assert {errno_of(wait.result) for wait in waits} == {errno.ENODEV}
    assert errno_of(detach(unit).result) == errno.ENODEV
    assert not unit.driver.respond(RID, 0, ResponseCode.SUCCESS)


def test_an_invalidation_of_all_functions_a_link_may_have_fits_into_an_empty_ring() -> None:
    unit = MiniatureUnit()
    rids = [RID + n for n in range(MAX_FUNCTIONS)]
    wait = unit.start(unit.driver.submit(qi.invalidate(CAP, 7, rids, Iova(0), WHOLE_SIZE)))
    assert unit.tail == MAX_FUNCTIONS + 2 < 128
    unit.execute(unit.tail)
    unit.completion()
    assert wait.done


@pytest.mark.parametrize("room", [0, 1])
def test_a_submission_is_at_most_what_an_empty_ring_has_room_for(room: int) -> None:
    """One entry stays free: 127 descriptors are taken, 128 are a mistake of ours."""
    unit = MiniatureUnit()
    wait = unit.start(unit.driver.submit([qi.wait()] * (128 - room)))
    if room:
        assert unit.tail == 127
    else:
        with pytest.raises(AssertionError, match="more than the ring"):
            wait.result()


@pytest.mark.parametrize("more", [0, 1])
def test_a_link_has_no_more_functions_than_one_invalidation_can_name(more: int) -> None:
    usual = dict.fromkeys(("pasid", "ats", "pri", "pasid_required"), True) | {"fault_capability": "full"}
    functions = [
        {"rid": n, "name": f"dsa{n}", "unit": 0, "group": n} | usual for n in range(MAX_FUNCTIONS + more)
    ]
    body = {"units": [(0, 0)], "functions": functions}
    if more:
        with pytest.raises(ValidationError, match="at most 64"):
            CapsReply.model_validate(body)
    else:
        assert len(CapsReply.model_validate(body).functions) == MAX_FUNCTIONS
