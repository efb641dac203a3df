"""The page request queue in memory: what is taken, when the head moves, and what the unit may do wrong."""

from __future__ import annotations

import pytest

from iommufdd.core import qi
from protocol.errors import PeerError
from protocol.hw.prq import PageRequest
from protocol.units import Iova
from tests.kit.iommufdd import ECAP, RID
from tests.unit.iommufdd.hardware import PQH, PQT, PRS, RECORDS, MiniatureUnit

PPR, PRO = 1, 2


def entry(n: int) -> bytes:
    return PageRequest(rid=RID, prgi=n % 512, addr=Iova(n << 12), last=True, read=True).to_bytes()


def test_what_is_between_head_and_tail_is_taken_once_and_the_head_moves_behind_it() -> None:
    unit = MiniatureUnit()
    unit.request(entry(1), entry(2))
    unit.driver.on_page_request()
    assert unit.page_requests == [(entry(1) + entry(2), False)]
    assert unit.load(PQH, 8) == 64
    unit.driver.on_page_request()
    assert len(unit.page_requests) == 1


def test_the_ring_wraps_at_its_end() -> None:
    unit = MiniatureUnit()
    taken = b""
    for n in range(0, 5000, 500):
        unit.request(*(entry(n + m) for m in range(500)))
        unit.driver.on_page_request()
        taken += unit.page_requests[-1][0]
        assert unit.load(PQH, 8) == (n + 500) * 32 % RECORDS
    assert taken == b"".join(entry(n) for n in range(5000))


def test_ppr_is_cleared_and_a_fence_passed_before_the_tail_is_read_and_nobody_is_kicked_for_that() -> None:
    """Else an entry written in between is neither seen nor told of again."""
    unit = MiniatureUnit()
    unit.request(entry(1))
    fence = unit.driver.page_requests._registers.fence
    late = [entry(2)]

    def come_in_between() -> None:
        fence()
        if late:
            assert unit.take_clears(PRS) == PPR
            unit.request(late.pop())

    unit.driver.page_requests._registers.fence = come_in_between
    unit.driver.on_page_request()
    assert unit.page_requests == [(entry(1) + entry(2), False)]
    assert unit.kicks == 0
    assert unit.shows(PRS) == PPR  # it was told of all the same, and there is nothing left
    unit.driver.on_page_request()
    assert len(unit.page_requests) == 1


def test_a_clear_that_was_not_taken_yet_is_not_done_twice() -> None:
    unit = MiniatureUnit()
    unit.request(entry(1))
    unit.driver.on_page_request()
    unit.driver.on_page_request()
    assert unit.take_clears(PRS) == PPR


def test_an_overflow_is_told_with_what_was_there_and_cleared_behind_it() -> None:
    unit = MiniatureUnit()
    unit.request(entry(1))
    unit.show(PRS, PPR | PRO)
    unit.driver.on_page_request()
    assert unit.page_requests == [(entry(1), True)]
    assert unit.take_clears(PRS) == PPR | PRO
    assert unit.kicks == 1


def test_an_overflow_of_an_empty_queue_is_cleared_too() -> None:
    unit = MiniatureUnit()
    unit.show(PRS, PRO)
    unit.driver.on_page_request()
    assert unit.page_requests == [(b"", True)]
    assert unit.take_clears(PRS) == PRO


@pytest.mark.parametrize("offset", [RECORDS, 16, 1, 1 << 63])
def test_a_tail_beyond_the_ring_ends_the_link(offset: int) -> None:
    unit = MiniatureUnit()
    unit.show(PQT, offset, 8)
    with pytest.raises(PeerError, match="page request queue"):
        unit.driver.on_page_request()
    assert unit.page_requests == []


def test_a_drain_looks_at_the_queue_before_it_is_done_event_or_not() -> None:
    unit = MiniatureUnit()
    drained = unit.start(unit.driver.submit(qi.drain(7, RID, ECAP)))
    unit.request(entry(1))
    unit.execute()
    unit.completion()
    assert unit.page_requests == [(entry(1), False)]
    assert drained.done
