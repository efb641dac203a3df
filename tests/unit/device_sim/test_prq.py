"""The page request ring at its limits, and what becomes of requests that find no room."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from device_sim.core.dmar import RemappingUnit
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.traits import capabilities
from protocol.flow import Flows
from protocol.hw.prq import PageRequest
from protocol.hw.qi import ResponseCode
from protocol.units import Iova, IovaPfn, Pasid
from tests.kit.raw_driver import (
    IM,
    IP,
    PECTL,
    PPR,
    PQA,
    PQH,
    PQT,
    PRO,
    PRS,
    QUEUES,
    RawDriver,
)
from tests.kit.silicon import Asked, page_request

RID = 0x6A08
ROOM = 127  # of the smallest ring: 128 entries, one is left


class AnsweredEndpoint:
    def __init__(self) -> None:
        self.responses: list[tuple[int, int]] = []

    def invalidate_translations(self, start: IovaPfn, npages: int) -> bool:
        return True

    def page_response(self, prgi: int, code: ResponseCode) -> None:
        self.responses.append((prgi, int(code)))


class Ring:
    """A unit's queue, its driver, and the function that asks."""

    def __init__(self, *, pqs: int = 0) -> None:
        cap, ecap = capabilities()
        memory = PhysicalMemory()
        self.endpoint = AnsweredEndpoint()
        self.on_fence: Callable[[], None] = lambda: None
        self.unit = RemappingUnit(cap, ecap, 46, memory, fence=lambda: self.on_fence())
        self.unit.add_endpoint(RID, self.endpoint)
        self.driver = RawDriver(self.unit, memory, pqs=pqs)
        self.driver.add_function(RID)
        self.queue = self.unit.prq

    def submit(self, prgi: int, *, last: bool = True) -> None:
        self.queue.submit(
            PageRequest(
                rid=RID, prgi=prgi % 512, addr=Iova(prgi << 12), last=last, read=True, write=prgi % 2 == 1
            )
        )

    def fill(self, count: int) -> None:
        for prgi in range(count):
            self.submit(prgi)

    def taken(self) -> list[Asked]:
        return [page_request(raw) for raw in self.driver.take_requests()]

    @property
    def shows(self) -> int:
        return self.driver.load(PRS)


def test_requests_lie_in_memory_in_order_and_one_event_tells_of_them() -> None:
    ring = Ring()
    ring.submit(1, last=False)
    ring.submit(2)
    assert (ring.driver.load(PQT), ring.shows, ring.driver.request_events) == (64, PPR, 1)
    assert ring.taken() == [
        Asked(RID, 1, 1, read=True, write=True, last=False),
        Asked(RID, 2, 2, read=True, write=False, last=True),
    ]
    assert ring.taken() == []


def test_after_ppr_is_cleared_the_next_request_raises_the_event_again_without_a_kick() -> None:
    ring = Ring()
    ring.submit(1)
    ring.driver.clear(PRS, PPR)
    ring.submit(2)
    assert ring.driver.request_events == 2


def test_who_cleared_ppr_and_read_the_tail_too_early_is_told_at_the_next_kick() -> None:
    ring = Ring()
    ring.submit(1)
    ring.driver.clear(PRS, PPR)  # and does not take what is there
    ring.unit.kick()
    assert (ring.shows, ring.driver.request_events) == (PPR, 2)
    ring.taken()
    ring.unit.kick()
    assert (ring.shows, ring.driver.request_events) == (0, 2), "an empty queue has nothing to tell"


def test_who_waits_for_room_is_told_of_a_clear_that_is_taken_with_the_next_event() -> None:
    """The driver takes what is there while the unit is about to raise PPR, and so takes clears (R9)."""
    ring, flows = Ring(), Flows()
    ring.fill(ROOM + 1)
    assert ring.shows == PPR | PRO
    waits = flows.start(ring.queue.wait_accepting())
    ring.driver.clear(PRS, PPR)
    ring.on_fence = lambda: ring.driver.clear(PRS, PRO)
    ring.unit.kick()  # which finds requests that were not taken
    ring.on_fence = lambda: None
    flows.run_ready()
    assert (ring.shows, waits.done) == (PPR, True)


def test_a_masked_event_goes_out_when_it_is_unmasked() -> None:
    ring = Ring()
    ring.driver.store(PECTL, IM)
    ring.unit.kick()
    ring.submit(1)
    assert (ring.driver.request_events, ring.driver.load(PECTL)) == (0, IM | IP)
    ring.driver.store(PECTL, 0)
    ring.unit.kick()
    assert (ring.driver.request_events, ring.driver.load(PECTL)) == (1, 0)


def test_a_masked_event_whose_cause_was_cleared_goes_out_never() -> None:
    ring = Ring()
    ring.driver.store(PECTL, IM)
    ring.unit.kick()
    ring.submit(1)
    ring.taken()
    ring.driver.store(PECTL, 0)
    ring.unit.kick()
    # The driver took the requests before it let events in: IP was there at the kick, so one event more.
    assert ring.driver.request_events <= 1
    assert ring.shows == 0


def test_a_ring_of_pqs_4_has_64_kib() -> None:
    ring = Ring(pqs=4)
    ring.fill(2047)
    assert not ring.queue.overflow
    ring.submit(0)
    assert (ring.queue.overflow, ring.queue.requests, ring.queue.dropped) == (True, 2047, 1)


def test_a_ring_is_full_when_one_entry_is_left() -> None:
    ring = Ring()
    ring.fill(ROOM)
    assert (ring.queue.overflow, ring.endpoint.responses) == (False, [])
    ring.submit(300)
    assert (ring.queue.overflow, ring.queue.dropped) == (True, 1)
    assert [asked.prgi for asked in ring.taken()] == list(range(ROOM))


def test_a_dropped_request_is_answered_success_only_if_it_is_the_last_of_its_group() -> None:
    ring = Ring()
    ring.fill(ROOM)
    ring.submit(7, last=False)
    assert ring.endpoint.responses == []
    ring.submit(7)
    assert ring.endpoint.responses == [(7, 0)]


def test_a_dropped_stop_marker_is_not_answered() -> None:
    ring = Ring()
    ring.fill(ROOM)
    marker = PageRequest(rid=RID, prgi=2, addr=Iova(0), last=True, pasid_present=True, pasid=Pasid(1))
    ring.queue.submit(marker)
    assert ring.queue.overflow
    assert ring.endpoint.responses == []


def test_after_an_overflow_everything_is_dropped_until_software_clears_it() -> None:
    ring = Ring()
    ring.fill(ROOM + 1)
    ring.taken()
    ring.unit.kick()
    ring.submit(9)
    assert ring.queue.overflow, "room alone does not end it"
    assert ring.taken() == []
    ring.driver.clear_overflow()
    ring.submit(10)
    assert [asked.prgi for asked in ring.taken()] == [10]
    assert (ring.queue.overflow, ring.queue.dropped, ring.queue.requests) == (False, 2, ROOM + 1)


def test_an_overflow_is_worth_an_event_even_if_no_entry_is_new() -> None:
    ring = Ring()
    ring.fill(ROOM)
    ring.driver.clear(PRS, PPR)
    before = ring.driver.request_events
    ring.submit(2)
    assert ring.shows == PRO
    assert ring.driver.request_events == before + 1, "else software never learns of it"
    ring.submit(3)
    assert ring.driver.request_events == before + 1, "it is told once"


def test_clearing_an_overflow_without_making_room_overflows_again() -> None:
    ring = Ring()
    ring.fill(ROOM + 1)
    ring.driver.clear_overflow()
    ring.submit(5)
    assert ring.queue.overflow
    assert ring.endpoint.responses[-1] == (5, 0)


def test_the_ring_wraps_at_its_end_and_is_empty_where_head_is_tail() -> None:
    ring = Ring()
    for turn in range(10):
        for n in range(50):
            ring.submit(n)
        assert [asked.prgi for asked in ring.taken()] == list(range(50)), turn
        assert ring.driver.load(PQT) == 50 * (turn + 1) * 32 % 4096
    assert (ring.queue.requests, ring.queue.dropped) == (500, 0)


# -- a driver that is not to be trusted ----------------------------------------------------------------


@pytest.mark.parametrize("head", [4096, 4097, 1, 31, 33, 1 << 18, (1 << 64) - 1, 1 << 63])
def test_a_head_that_names_no_entry_leaves_no_room(head: int) -> None:
    ring = Ring()
    before = bytes(ring.driver.queues)
    ring.driver.store(PQH, head)
    ring.unit.kick()
    ring.submit(1)
    assert ring.queue.overflow
    assert bytes(ring.driver.queues) == before


@pytest.mark.parametrize(
    "base", [0, 0x4000_0000, QUEUES - 4096, QUEUES + (1 << 20), 1 << 51, (1 << 64) - 4096]
)
def test_a_ring_outside_the_queues_is_stored_to_nowhere(base: int) -> None:
    ring = Ring()
    before = bytes(ring.driver.queues), bytes(ring.driver.structures)
    ring.driver.store(PQA, base)
    ring.unit.kick()
    ring.submit(1)
    assert ring.queue.overflow
    assert (bytes(ring.driver.queues), bytes(ring.driver.structures)) == before


def test_a_ring_whose_end_lies_outside_the_queues_is_filled_as_far_as_they_go() -> None:
    ring = Ring()
    ring.driver.store(PQA, QUEUES | 7)
    ring.unit.kick()
    ring.fill(300)
    assert ring.queue.requests == len(ring.driver.queues) // 32
    assert ring.queue.overflow


def test_another_ring_starts_at_its_start() -> None:
    ring = Ring()
    ring.fill(3)
    ring.driver.store(PQA, QUEUES + 4096)
    ring.driver.store(PQH, 0)
    ring.unit.kick()
    assert ring.driver.load(PQT) == 0
    ring.submit(9)
    assert page_request(bytes(ring.driver.queues[4096 : 4096 + 32])).prgi == 9


def test_a_reset_queue_takes_nothing_and_keeps_nobody_waiting() -> None:
    ring = Ring()
    ring.fill(ROOM + 1)
    ring.unit.reset()
    assert not ring.queue.overflow
    ring.submit(1)
    assert ring.endpoint.responses[-1] == (1, 0xF), "nothing says that it may ask: the unit answers itself"
