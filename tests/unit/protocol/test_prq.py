"""Page request descriptor against words worked by hand from its table [VT-d 7.4]."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.hw.fields import FormatError
from protocol.hw.prq import PRGI_MAX, PageRequest
from protocol.units import Iova, Pasid


def raw(*qwords: int) -> bytes:
    return struct.pack("<4Q", *qwords, *(0,) * (4 - len(qwords)))


FULL = PageRequest(
    rid=0x3A08,
    prgi=0x1A5,
    addr=Iova(0x7000_1234_5000),
    last=True,
    read=True,
    write=True,
    exec=True,
    priv=True,
    pasid_present=True,
    pasid=Pasid(0x12345),
)
PLAIN = PageRequest(rid=0x3A08, prgi=0, addr=Iova(0x5000), last=False, write=True)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (FULL, raw(0x0031_2345_3A08_0101, 0x7000_1234_5D2F)),
        (PLAIN, raw(0x3A08_0001, 0x5002)),
        (PLAIN._replace(write=False, read=True), raw(0x3A08_0001, 0x5001)),
        (PLAIN._replace(last=True), raw(0x3A08_0001, 0x5006)),
        (PLAIN._replace(prgi=PRGI_MAX), raw(0x3A08_0001, 0x5FFA)),
        (PLAIN._replace(exec=True), raw(0x0010_0000_3A08_0001, 0x5002)),
        (PLAIN._replace(priv=True), raw(0x0020_0000_3A08_0001, 0x5002)),
    ],
)
def test_request_has_the_bits_of_the_table(request_: PageRequest, expected: bytes) -> None:
    assert request_.to_bytes() == expected
    assert PageRequest.from_bytes(expected) == request_


def test_stop_marker_asks_for_nothing_and_closes_its_group() -> None:
    marker = FULL._replace(read=False, write=False)
    assert marker.is_stop_marker
    assert marker._replace(pasid_present=False).is_stop_marker
    assert marker._replace(exec=True).is_stop_marker
    assert not marker._replace(last=False).is_stop_marker
    assert not marker._replace(read=True).is_stop_marker
    assert not marker._replace(write=True).is_stop_marker


@pytest.mark.parametrize("n", [9, 10, 15, 54, 63, 128, 191, 192, 255])
def test_reserved_bit_is_a_format_error(n: int) -> None:
    word = int.from_bytes(FULL.to_bytes(), "little") | 1 << n
    with pytest.raises(FormatError):
        PageRequest.from_bytes(word.to_bytes(32, "little"))


@pytest.mark.parametrize("type_", [0, 2, 0x11, 0xFF])
def test_another_type_is_a_format_error(type_: int) -> None:
    with pytest.raises(FormatError):
        PageRequest.from_bytes(raw(0x3A08_0000 | type_, 0x5002))


@given(st.binary(max_size=40))
def test_foreign_bytes_give_a_request_or_a_format_error(junk: bytes) -> None:
    try:
        request_ = PageRequest.from_bytes(junk)
    except FormatError:
        return
    assert request_.to_bytes() == junk


@given(
    st.builds(
        PageRequest,
        rid=st.integers(0, 0xFFFF),
        prgi=st.integers(0, PRGI_MAX),
        addr=st.integers(0, (1 << 52) - 1).map(lambda page: Iova(page << 12)),
        last=st.booleans(),
        read=st.booleans(),
        write=st.booleans(),
        exec=st.booleans(),
        priv=st.booleans(),
        pasid_present=st.booleans(),
        pasid=st.integers(0, (1 << 20) - 1).map(Pasid),
    )
)
def test_request_survives_the_round_trip(request_: PageRequest) -> None:
    assert PageRequest.from_bytes(request_.to_bytes()) == request_


@pytest.mark.parametrize(
    "request_",
    [
        PLAIN._replace(prgi=PRGI_MAX + 1),
        PLAIN._replace(rid=0x1_0000),
        PLAIN._replace(pasid=Pasid(1 << 20)),
        PLAIN._replace(addr=Iova(0x5001)),
        PLAIN._replace(addr=Iova(1 << 64)),
    ],
)
def test_request_of_ours_past_a_limit_is_an_assertion(request_: PageRequest) -> None:
    with pytest.raises(AssertionError, match=r"does not fit|is not aligned"):
        request_.to_bytes()
