"""A function that is switched off, or whose pages come and go, while DMA is under way or cached."""

from __future__ import annotations

from typing import Any

import pytest

from device_sim.core.function import DmaRange
from protocol.hw.prq import PageRequest
from protocol.units import Iova
from tests.kit.silicon import DID, Silicon, iotlb_domain
from tests.unit.device_sim.test_function import ABSENT, ERROR, PAGE, access, fault_of


@pytest.fixture
def silicon() -> Silicon:
    attached = Silicon()
    attached.attach()
    return attached


OFF = [{"bus_master": False}, {"ats": False}, {"ats": False, "bus_master": False}]
HUGE = 512  # first page of a 2 MiB leaf


@pytest.fixture
def warm(silicon: Silicon) -> Silicon:
    """Pages 7 and 512..1023 are in the device TLB for reading and writing, as a small and a huge leaf."""
    silicon.map(7, 1)
    silicon.map(HUGE, 512, level=2)
    for page in (7, HUGE):
        for write in (False, True):
            access(silicon, DmaRange(Iova(page * PAGE), PAGE, write)).result()
    return silicon


@pytest.mark.parametrize("off", OFF, ids=str)
def test_with_bus_mastering_or_ats_off_nothing_goes_through_what_is_cached(
    warm: Silicon, off: dict[str, bool]
) -> None:
    function, before = warm.function, bytes(warm.frames)
    assert function.write(Iova(7 * PAGE), bytes(8))
    function.configure(**off)
    for page, other in ((7, HUGE), (HUGE, 7), (HUGE + 511, 7)):
        at = page * PAGE
        assert function.read(Iova(at), 8) is None
        assert not function.write(Iova(at), b"too late")
        assert function.copy(Iova(at), Iova(other * PAGE), 8) == 0
        for write in (False, True):
            assert function.accessible(DmaRange(Iova(at), 8, write)) == 0
            assert fault_of(access(warm, DmaRange(Iova(at), 8, write))) == (at, write, ABSENT)
    assert list(function.devtlb.entries()) == []
    assert (bytes(warm.frames), warm.requests(), warm.faults()) == (before, [], [])


@pytest.mark.parametrize("off", OFF, ids=str)
def test_what_was_cached_before_does_not_come_back_with_bus_mastering(
    warm: Silicon, off: dict[str, bool]
) -> None:
    """The page was taken away meanwhile, and nobody invalidates a function that does no DMA."""
    warm.function.configure(**off)
    warm.tables.unmap(7)
    warm.execute(iotlb_domain(DID))
    warm.function.configure(**dict.fromkeys(off, True))
    assert warm.function.read(Iova(7 * PAGE), 8) is None
    assert not access(warm, DmaRange(Iova(7 * PAGE), 8, True)).done
    assert [asked.page for asked in warm.serve(1)] == [7]


@pytest.mark.parametrize("set_again", [{"bus_master": True}, {"ats": True}, {"pri_allocation": 0}], ids=str)
def test_what_stays_on_keeps_what_is_cached(warm: Silicon, set_again: dict[str, Any]) -> None:
    walks = warm.unit.walks
    warm.function.configure(**set_again)
    for page in (7, HUGE, HUGE + 511):
        assert warm.function.write(Iova(page * PAGE), b"cached")
    assert warm.unit.walks == walks


def test_bus_mastering_off_while_an_access_waits_for_its_page_stops_it(warm: Silicon) -> None:
    done = access(warm, DmaRange(Iova(8 * PAGE), PAGE, True))
    warm.function.configure(bus_master=False)
    warm.map(8, 2)
    assert [asked.page for asked in warm.serve()] == [8]
    assert fault_of(done) == (8 * PAGE, True, ABSENT)
    assert list(warm.function.devtlb.entries()) == []


# -- what changes while an access waits for an overflow to be cleared ----------------------------------


@pytest.fixture
def overflowed(silicon: Silicon) -> Silicon:
    """The queue takes nothing, and page 7 is asked for."""
    silicon.driver.add_function(1)
    for prgi in range(2048):
        silicon.unit.prq.submit(PageRequest(rid=1, prgi=prgi % 512, addr=Iova(0), last=False))
    assert silicon.unit.prq.overflow
    silicon.requests()
    return silicon


def test_a_page_that_comes_meanwhile_is_found(overflowed: Silicon) -> None:
    done = access(overflowed, DmaRange(Iova(7 * PAGE), 8, True))
    overflowed.map(7, 1)
    overflowed.driver.clear_overflow()
    overflowed.flows.run_ready()
    assert [asked.page for asked in overflowed.serve()] == [7]
    done.result()
    assert overflowed.function.write(Iova(7 * PAGE), b"here")
    assert overflowed.bytes_of(1, 4) == b"here"


def test_page_requests_gone_meanwhile_end_it(overflowed: Silicon) -> None:
    done = access(overflowed, DmaRange(Iova(7 * PAGE), 8, True))
    overflowed.function.pri.disable()
    overflowed.driver.clear_overflow()
    overflowed.flows.run_ready()
    assert fault_of(done) == (7 * PAGE, True, ERROR)
    assert overflowed.requests() == []
