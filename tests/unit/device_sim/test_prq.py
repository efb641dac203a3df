"""The page request ring at its limits, and what becomes of requests that find no room."""

from __future__ import annotations

import pytest

from device_sim.core.prq import RING_ENTRIES, PageRequestQueue
from protocol.hw.prq import PageRequest
from protocol.hw.qi import ResponseCode
from protocol.units import Iova, Pasid
from tests.unit.device_sim.silicon import Asked, page_request

RID = 0x6A08


class Ring:
    """A ring of few entries, and what it did."""

    def __init__(self, entries: int = 4) -> None:
        self.responses: list[tuple[int, int, int]] = []
        self.interrupts = 0
        self.queue = PageRequestQueue(self._respond, self._interrupt, entries)

    def _respond(self, rid: int, prgi: int, code: ResponseCode) -> None:
        self.responses.append((rid, prgi, int(code)))

    def _interrupt(self) -> None:
        self.interrupts += 1

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
        raw = self.queue.take_new()
        return [page_request(raw[at : at + 32]) for at in range(0, len(raw), 32)]


def test_requests_are_delivered_once_in_order_with_an_interrupt() -> None:
    ring = Ring()
    ring.submit(1, last=False)
    ring.submit(2)
    assert ring.queue.has_new
    assert ring.interrupts == 2
    assert ring.taken() == [
        Asked(RID, 1, 1, read=True, write=True, last=False),
        Asked(RID, 2, 2, read=True, write=False, last=True),
    ]
    assert (ring.taken(), ring.queue.has_new) == ([], False)


def test_the_ring_of_the_model_has_64_kib() -> None:
    assert RING_ENTRIES * 32 == 64 << 10
    ring = Ring(RING_ENTRIES)
    ring.fill(RING_ENTRIES - 1)
    assert not ring.queue.overflow
    ring.submit(0)
    assert (ring.queue.overflow, ring.queue.requests, ring.queue.dropped) == (True, 2047, 1)


def test_a_ring_is_full_when_one_entry_is_left() -> None:
    ring = Ring(4)
    ring.fill(3)
    assert (ring.queue.overflow, ring.responses) == (False, [])
    ring.submit(3)
    assert (ring.queue.overflow, ring.queue.dropped) == (True, 1)
    assert [asked.prgi for asked in ring.taken()] == [0, 1, 2]


def test_a_dropped_request_is_answered_success_only_if_it_is_the_last_of_its_group() -> None:
    ring = Ring(2)
    ring.submit(1)
    ring.submit(7, last=False)
    assert ring.responses == []
    ring.submit(7)
    assert ring.responses == [(RID, 7, 0)]


def test_a_dropped_stop_marker_is_not_answered() -> None:
    ring = Ring(2)
    ring.submit(1)
    marker = PageRequest(rid=RID, prgi=2, addr=Iova(0), last=True, pasid_present=True, pasid=Pasid(1))
    ring.queue.submit(marker)
    assert ring.queue.overflow
    assert ring.responses == []


def test_after_an_overflow_everything_is_dropped_until_software_clears_it() -> None:
    ring = Ring(3)
    ring.fill(3)
    ring.taken()
    assert ring.queue.consume(2)
    ring.submit(9)
    assert ring.queue.overflow, "room alone does not end it"
    assert ring.taken() == []
    ring.queue.clear_overflow()
    ring.submit(10)
    assert [asked.prgi for asked in ring.taken()] == [10]
    assert (ring.queue.overflow, ring.queue.dropped, ring.queue.requests) == (False, 2, 3)


def test_an_overflow_is_worth_an_interrupt_even_if_no_entry_is_new() -> None:
    ring = Ring(3)
    ring.fill(2)
    ring.taken()
    before = ring.interrupts
    ring.submit(2)
    assert ring.interrupts == before + 1, "else software never learns of it, and nothing is ever queued again"
    assert ring.queue.has_new
    assert ring.taken() == []
    assert not ring.queue.has_new
    ring.submit(3)
    assert (ring.interrupts, ring.queue.has_new) == (before + 1, False), "it is told once"


def test_clearing_an_overflow_without_making_room_overflows_again() -> None:
    ring = Ring(3)
    ring.fill(3)
    ring.queue.clear_overflow()
    ring.submit(5)
    assert ring.queue.overflow
    assert ring.responses[-1] == (RID, 5, 0)


@pytest.mark.parametrize(
    ("claim", "right"), [(-1, False), (0, True), (2, True), (3, False), (1 << 31, False)]
)
def test_the_head_moves_over_delivered_entries_only(claim: int, right: bool) -> None:
    ring = Ring(8)
    ring.fill(2)
    ring.taken()
    ring.submit(2)
    assert ring.queue.consume(claim) is right


def test_the_head_makes_room_for_as_many_as_it_passed() -> None:
    ring = Ring(4)
    for turn in range(10):
        for n in range(3):
            ring.submit(n)
        assert len(ring.taken()) == 3
        assert ring.queue.consume(3), turn
        assert not ring.queue.consume(1)
    assert (ring.queue.requests, ring.queue.dropped) == (30, 0)


def test_a_reset_ring_is_empty_and_takes_requests() -> None:
    ring = Ring(3)
    ring.fill(3)
    ring.queue.reset()
    assert (ring.queue.overflow, ring.queue.has_new, ring.taken()) == (False, False, [])
    assert not ring.queue.consume(1)
    ring.fill(2)
    assert not ring.queue.overflow
