"""Which descriptors a range becomes: literal words, their order, and that they cover it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iommufdd.core import qi
from protocol.hw.caps import Cap, Ecap
from protocol.hw.qi import ResponseCode
from protocol.units import WHOLE_SIZE, Iova, Pasid

PSI = 1 << 39
MAMV = 18
CAP = Cap(PSI | MAMV << 48)
DID = 0x123
DRAIN = 3 << 6
DSI = (2 | 2 << 4 | DRAIN | DID << 16, 0, 0, 0)
WAIT = (5 | 1 << 5 | 1 << 6 | 2 << 32, 0, 0, 0)
RIDS = (0x6A08, 0x6A10)
EVERYTHING = tuple((3 | rid << 32, 0x7FFF_FFFF_FFFF_F001, 0, 0) for rid in RIDS)

Words = tuple[int, ...]


def words(start: int, size: int, *, cap: Cap = CAP, rids: tuple[int, ...] = RIDS) -> list[Words]:
    raw = b"".join(qi.raw(qi.invalidate(cap, DID, rids, Iova(start), size)))
    assert len(raw) % 32 == 0
    return [struct.unpack_from("<4Q", raw, at) for at in range(0, len(raw), 32)]


def psi(addr: int, am: int) -> Words:
    return (2 | 3 << 4 | DRAIN | DID << 16, addr | am, 0, 0)


def devtlb(addr: int) -> list[Words]:
    return [(3 | rid << 32, addr, 0, 0) for rid in RIDS]


@pytest.mark.parametrize("start", [0, 0x1000])
def test_everything_is_the_domain_then_every_function_then_a_wait(start: int) -> None:
    assert words(start, WHOLE_SIZE) == [DSI, *EVERYTHING, WAIT]


def test_without_functions_the_iotlb_is_flushed_and_waited_for_all_the_same() -> None:
    assert words(0, WHOLE_SIZE, rids=()) == [DSI, WAIT]
    assert words(0x5000, 0x1000, rids=()) == [psi(0x5000, 0), WAIT]


@pytest.mark.rfc("RFC-91", "RFC-92", "RFC-93")
@pytest.mark.defect("B-21", "B-29")
@pytest.mark.parametrize(
    ("start", "size", "addr", "am", "device"),
    [
        (0x5000, 0x1000, 0x5000, 0, 0x5000),
        (0x4000, 0x2000, 0x4000, 1, 0x4001),
        (0x5000, 0x2000, 0x4000, 2, 0x5001),
        (0x7000, 0x2000, 0x0, 4, 0x7001),
        (0x20_0000, 0x20_0000, 0x20_0000, 9, 0x2F_F001),
        (0x5000, 1, 0x5000, 0, 0x5000),
        (0x5FFF, 2, 0x4000, 2, 0x5001),
        (0x5123, 0x1000, 0x4000, 2, 0x5001),
        (0x5800, 0x800, 0x5000, 0, 0x5000),
        (0x5000, 0, 0x5000, 0, 0x5000),
        (0x4000_0000, 0x4000_0000, 0x4000_0000, 18, 0x5FFF_F001),
        ((1 << 57) - 0x1000, 0x1000, (1 << 57) - 0x1000, 0, (1 << 57) - 0x1000),
    ],
)
def test_a_range_is_the_smallest_aligned_block_around_whole_pages(
    start: int, size: int, addr: int, am: int, device: int
) -> None:
    """B-21: the hint would be bit 6 of the address word; B-29: no misaligned range is lost."""
    assert words(start, size) == [psi(addr, am), *devtlb(device), WAIT]


@pytest.mark.rfc("RFC-91")
@pytest.mark.defect("B-30")
@pytest.mark.parametrize(
    ("start", "size"),
    [
        (0, (1 << 30) + 0x1000),
        (0x4000_0000 - 0x1000, 0x2000),  # two pages, but no block of 2^18 pages holds both
        ((1 << 47) - 0x1000, 0x2000),
        (0, 1 << 44),  # 2^32 pages: B-30 counted them in 32 bits, as none
        (0, 1 << 52),
        (0x1000, (1 << 64) - 0x1000),
        ((1 << 64) - 0x1000, 0x2000),
    ],
)
def test_a_range_no_descriptor_can_name_becomes_the_whole_domain(start: int, size: int) -> None:
    assert words(start, size) == [DSI, *EVERYTHING, WAIT]


@pytest.mark.parametrize("mamv", [0, 1, 9])
def test_the_largest_mask_is_the_units(mamv: int) -> None:
    cap = Cap(PSI | mamv << 48)
    assert words(0, 0x1000 << mamv, cap=cap)[0] == psi(0, mamv)
    assert words(0, 0x1000 << mamv + 1, cap=cap)[0] == DSI


def test_a_unit_without_page_selective_invalidation_flushes_the_domain() -> None:
    assert words(0x5000, 0x1000, cap=Cap(MAMV << 48)) == [DSI, *EVERYTHING, WAIT]


@pytest.mark.rfc("RFC-100")
def test_a_detach_flushes_pasid_cache_then_iotlb_then_that_device() -> None:
    raw = b"".join(qi.raw(qi.detach(DID, RIDS[1], Ecap(1 << 2))))
    assert [struct.unpack_from("<4Q", raw, at) for at in range(0, len(raw), 32)] == [
        (7 | 1 << 4 | DID << 16, 0, 0, 0),
        DSI,
        EVERYTHING[1],
        WAIT,
    ]


@pytest.mark.parametrize("pds", [True, False])
def test_a_drain_fences_flushes_and_waits_for_page_requests_if_the_unit_can(pds: bool) -> None:
    raw = b"".join(qi.raw(qi.drain(DID, RIDS[0], Ecap(1 << 2 | pds << 42))))
    assert [struct.unpack_from("<4Q", raw, at) for at in range(0, len(raw), 32)] == [
        (5 | 1 << 6, 0, 0, 0),
        DSI,
        EVERYTHING[0],
        (WAIT[0] | pds << 7, 0, 0, 0),
    ]


@pytest.mark.rfc("RFC-81")
@pytest.mark.defect("B-37")
@pytest.mark.parametrize(("code", "bits"), [("SUCCESS", 0), ("INVALID", 1), ("FAILURE", 0xF)])
def test_a_page_group_response_names_function_group_and_code(code: str, bits: int) -> None:
    """B-37: the kernel's FAILURE went onto the wire as 2."""
    raw = b"".join(qi.raw([qi.page_group_response(0x6A08, 511, ResponseCode[code])]))
    assert struct.unpack("<4Q", raw) == (9 | bits << 12 | 0x6A08 << 16, 511 << 3 | 1 << 2, 0, 0)


# -- any range -----------------------------------------------------------------------------------------


def block_of_device(qw1: int) -> tuple[int, int]:
    """(start, end) of a device-TLB descriptor: n is the lowest zero bit at or above 12."""
    if not qw1 & 1:
        return qw1 & ~0xFFF, (qw1 & ~0xFFF) + 0x1000
    n = next(n for n in range(12, 64) if not qw1 >> n & 1)
    start = qw1 >> n + 1 << n + 1
    return start, start + (1 << n + 1)


NUMBERS = st.integers(0, 1 << 22) | st.integers(0, (1 << 64) - 1) | st.integers(0, 57).map(lambda n: 1 << n)


@pytest.mark.rfc("RFC-93")
@settings(max_examples=400, deadline=None)
@given(start=NUMBERS, size=NUMBERS, mamv=st.integers(0, 40), rids=st.integers(0, 3), psi=st.booleans())
def test_every_range_is_covered_in_the_iotlb_first_then_in_every_device_then_waited_for(
    start: int, size: int, mamv: int, rids: int, psi: bool
) -> None:
    functions = tuple(range(100, 100 + rids))
    found = words(start, size, cap=Cap(mamv << 48 | (PSI if psi else 0)), rids=functions)
    assert [qw0 & 0xF for qw0, *_ in found] == [2, *[3] * rids, 5]
    assert [qw0 >> 32 & 0xFFFF for qw0, *_ in found[1:-1]] == list(functions)
    assert found[-1] == WAIT
    iotlb = found[0]
    assert iotlb[0] >> 16 & 0xFFFF == DID
    end = min(start + max(size, 1), 1 << 64)
    if iotlb[0] >> 4 & 3 == 3:
        am = iotlb[1] & 0x3F
        block = 0x1000 << am
        assert psi
        assert am <= mamv
        assert iotlb[1] >> 6 & 0x3F == 0, "no hint: tables may be gone as well"
        base = iotlb[1] & ~0xFFF
        assert base % block == 0
        assert base <= start
        assert end <= base + block
        covered = (base, base + block)
        assert [block_of_device(qw1) for _, qw1, *_ in found[1:-1]] == [covered] * rids
    else:
        assert iotlb[0] >> 4 & 3 == 2
        assert {qw1 for _, qw1, *_ in found[1:-1]} <= {0x7FFF_FFFF_FFFF_F001}


def test_a_page_group_response_says_the_pasid_it_is_given() -> None:
    """PASID Present in bit 4, PASID in 51:32."""
    (raw,) = qi.raw([qi.page_group_response(0x6A08, 3, ResponseCode.INVALID, Pasid(0x54321))])
    assert struct.unpack("<4Q", raw) == (
        9 | 1 << 4 | 1 << 12 | 0x6A08 << 16 | 0x54321 << 32,
        3 << 3 | 1 << 2,
        0,
        0,
    )
