"""Invalidation descriptors, byte for byte: executed in order, the first bad one stops the queue."""

from __future__ import annotations

import pytest

from device_sim.core.dmar import RemappingUnit
from device_sim.core.pri import PageAccess
from protocol.hw.caps import make_ecap
from protocol.hw.qi import IQEI, ResponseCode
from protocol.units import IovaPfn
from tests.kit.raw_driver import Stopped
from tests.kit.silicon import (
    DID,
    FRAMES,
    RID,
    R,
    Silicon,
    descriptor,
    devtlb_all,
    devtlb_page,
    iotlb_domain,
    iotlb_global,
    iotlb_pages,
    pasid_cache,
    response,
    wait,
)


class LoggingEndpoint:
    """Writes down what reaches it, and what the IOTLB held at that moment."""

    def __init__(self, unit: RemappingUnit) -> None:
        self.log: list[tuple[object, ...]] = []
        self._unit = unit

    def invalidate_translations(self, start: IovaPfn, npages: int) -> bool:
        self.log.append(("invalidate", start, npages, len(self._unit.iotlb.entries(DID))))
        return True

    def page_response(self, prgi: int, code: ResponseCode) -> None:
        self.log.append(("response", prgi, int(code)))


@pytest.fixture
def silicon() -> Silicon:
    """Pages 0..3 and 600 are mapped and in the IOTLB."""
    attached = Silicon()
    attached.attach()
    for page in (0, 1, 2, 3, 600):
        attached.map(page, page % 512)
        attached.translate(page)
    return attached


def cached(silicon: Silicon, did: int = DID) -> list[int]:
    return sorted(page for page, _ in silicon.unit.iotlb.entries(did))


def stopped(silicon: Silicon, ring: bytes) -> IQEI:
    with pytest.raises(Stopped) as caught:
        silicon.execute(ring)
    return caught.value.iqei


@pytest.mark.parametrize(
    ("raw", "left"),
    [
        (iotlb_pages(DID, 2), [0, 1, 3, 600]),
        (iotlb_pages(DID, 2, am=1), [0, 1, 600]),
        (iotlb_pages(DID, 3, am=1), [0, 1, 600]),
        (iotlb_pages(DID, 0, am=9), [600]),
        (iotlb_pages(DID, 512, am=9), [0, 1, 2, 3]),
        (iotlb_pages(DID + 1, 2), [0, 1, 2, 3, 600]),
        (iotlb_domain(DID), []),
        (iotlb_domain(DID + 1), [0, 1, 2, 3, 600]),
        (iotlb_global(), []),
        (devtlb_all(RID), [0, 1, 2, 3, 600]),
        (wait(1), [0, 1, 2, 3, 600]),
    ],
)
def test_an_iotlb_descriptor_drops_what_it_names(silicon: Silicon, raw: bytes, left: list[int]) -> None:
    silicon.execute(raw)
    assert cached(silicon) == left


def test_descriptors_take_effect_in_the_order_they_come(silicon: Silicon) -> None:
    endpoint = LoggingEndpoint(silicon.unit)
    silicon.unit.add_endpoint(0x6A10, endpoint)
    ring = [
        devtlb_page(0x6A10, 7),
        wait(11),
        iotlb_pages(DID, 0),
        devtlb_all(0x6A10),
        response(0x6A10, 300, 1),
        iotlb_domain(DID),
        devtlb_page(0x6A10, 9),
        wait(0xFFFF_FFFF),
    ]
    assert silicon.execute(b"".join(ring)) == [11, 0xFFFF_FFFF]
    assert endpoint.log == [
        ("invalidate", 7, 1, 5),
        ("invalidate", 0, 1 << 52, 4),
        ("response", 300, 1),
        ("invalidate", 9, 1, 0),
    ]
    unit = silicon.unit
    assert (unit.iotlb_invalidations, unit.devtlb_invalidations) == (2, 3), "waits and responses are none"
    assert (unit.invalidation_descriptors, unit.invalidation_waits) == (5, 2), (
        "one before each wait, and more"
    )
    silicon.execute(response(0x6A10, 300, 1) + wait(1))
    assert unit.invalidation_waits == 2


@pytest.mark.parametrize(
    ("qw1", "start", "npages"),
    [
        (0x5000, 5, 1),
        (0x4000 | 1, 4, 2),
        (0x5000 | 1, 4, 4),
        (0x7000 | 1, 0, 16),
        (0xFF000 | 1, 0, 512),
        (0x2FF000 | 1, 512, 512),
        (0x7FFF_FFFF_FFFF_F000 | 1, 0, 1 << 52),
    ],
)
def test_the_size_of_a_device_tlb_invalidation_lies_in_its_address(
    silicon: Silicon, qw1: int, start: int, npages: int
) -> None:
    endpoint = LoggingEndpoint(silicon.unit)
    silicon.unit.add_endpoint(RID, endpoint)
    silicon.execute(descriptor(3 | RID << 32, qw1))
    assert endpoint.log == [("invalidate", start, npages, 5)]


@pytest.mark.parametrize(("code", "heard"), [(0, 0), (1, 1), (2, 0xF), (7, 0xF), (0xE, 0xF), (0xF, 0xF)])
def test_every_response_code_but_success_and_invalid_is_failure(
    silicon: Silicon, code: int, heard: int
) -> None:
    endpoint = LoggingEndpoint(silicon.unit)
    silicon.unit.add_endpoint(RID, endpoint)
    silicon.execute(response(RID, 5, code))
    assert endpoint.log == [("response", 5, heard)]


def test_descriptors_for_a_function_that_is_not_there_do_nothing(silicon: Silicon) -> None:
    assert silicon.execute(devtlb_all(0x1234) + response(0x1234, 1, 0) + wait(3)) == [3]


@pytest.mark.parametrize(
    ("raw", "iqei"),
    [
        (descriptor(0), IQEI.BAD_TYPE),
        (descriptor(10), IQEI.BAD_TYPE),
        (descriptor(2 | 1 << 9), IQEI.BAD_TYPE),
        (descriptor(2 | 2 << 4 | 1 << 40), IQEI.RESERVED_FIELD),
        (descriptor(2 | 2 << 4, 1 << 7), IQEI.RESERVED_FIELD),
        (descriptor(2), IQEI.RESERVED_FIELD),
        (descriptor(2 | 2 << 4)[:16] + b"\x01" + bytes(15), IQEI.RESERVED_FIELD),
        (descriptor(4), IQEI.BAD_TYPE),
        (descriptor(6 | 2 << 4), IQEI.BAD_TYPE),
        (descriptor(8), IQEI.BAD_TYPE),
        (iotlb_pages(DID, 0, am=19), IQEI.RESERVED_FIELD),
    ],
)
def test_a_bad_descriptor_stops_the_queue_with_those_before_it_done(
    silicon: Silicon, raw: bytes, iqei: IQEI
) -> None:
    assert stopped(silicon, iotlb_pages(DID, 1) + raw + iotlb_domain(DID)) is iqei
    assert cached(silicon) == [0, 2, 3, 600]


def test_the_largest_am_is_the_units_mamv(silicon: Silicon) -> None:
    assert silicon.execute(iotlb_pages(DID, 0, am=18) + wait(1)) == [1]
    assert cached(silicon) == []
    assert stopped(silicon, iotlb_pages(DID, 0, am=19)) is IQEI.RESERVED_FIELD


@pytest.mark.parametrize("size", [1, 31, 33, 48])
def test_half_a_descriptor_is_refused_before_any_is_executed(silicon: Silicon, size: int) -> None:
    assert stopped(silicon, (iotlb_domain(DID) + wait(1))[:size]) is IQEI.TAIL_MISALIGNED
    assert len(cached(silicon)) == 5


def test_draining_page_requests_needs_the_capability(silicon: Silicon) -> None:
    drain = descriptor(5 | 1 << 5 | 1 << 7 | 9 << 32)
    assert silicon.execute(drain) == [9]
    without = Silicon(ecap=make_ecap(smts=1, ssts=1, sc=1, smpwc=1))
    assert stopped(without, drain) is IQEI.RESERVED_FIELD


def test_an_empty_ring_is_no_error(silicon: Silicon) -> None:
    assert silicon.execute(b"") == []


def test_a_device_tlb_descriptor_reaches_the_function_it_names_only(silicon: Silicon) -> None:
    one, two = LoggingEndpoint(silicon.unit), LoggingEndpoint(silicon.unit)
    silicon.unit.add_endpoint(0x6A10, one)
    silicon.unit.add_endpoint(0x6A18, two)
    silicon.execute(devtlb_page(0x6A18, 5))
    assert (len(one.log), len(two.log)) == (0, 1)


def test_a_reset_unit_translates_nothing_and_remembers_nothing(silicon: Silicon) -> None:
    silicon.start(silicon.function.pri.request([PageAccess(IovaPfn(9), False)]))
    with pytest.raises(Exception, match="SGN_5"):
        silicon.translate(1 << 36)
    silicon.unit.reset()
    assert cached(silicon) == []
    left = bytes(silicon.driver.shown)
    with pytest.raises(Exception, match="SPT_2"):
        silicon.translate(0)
    assert bytes(silicon.driver.shown) == left, "the pages of who is gone are not stored to"
    silicon.driver.come_back()
    assert (silicon.requests(), silicon.faults()) == ([], [])
    silicon.attach()
    assert silicon.translate(600)[0] == FRAMES + (88 << 12)


def test_a_pasid_cache_invalidation_leaves_the_iotlb_alone(silicon: Silicon) -> None:
    silicon.execute(pasid_cache(DID))
    assert len(cached(silicon)) == 5
    assert silicon.translate(0, R)[0] == FRAMES
