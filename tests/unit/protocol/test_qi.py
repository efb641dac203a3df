"""Invalidation descriptors against words worked by hand from their tables [VT-d 6.5.2]."""

from __future__ import annotations

import struct

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from protocol.hw import qi
from protocol.hw.fields import FormatError
from protocol.hw.qi import IQEI, Descriptor, DescriptorError, ResponseCode, decode, encode
from protocol.units import Iova, Pasid

PAGES_IN_ALL = 1 << 52


def raw(*qwords: int) -> bytes:
    return struct.pack("<4Q", *qwords, *(0,) * (4 - len(qwords)))


TABLE: list[tuple[Descriptor, bytes]] = [
    (
        qi.ContextInv(granularity=qi.ContextGranularity.DEVICE, did=2, sid=0x3A08, fm=3),
        raw(0x0003_3A08_0002_0031),
    ),
    (qi.ContextInv(granularity=qi.ContextGranularity.GLOBAL), raw(0x11)),
    (qi.IotlbInv(granularity=qi.IotlbGranularity.GLOBAL), raw(0x12)),
    (qi.IotlbInv(granularity=qi.IotlbGranularity.DOMAIN, did=5, dw=True, dr=True), raw(0x0005_00E2)),
    (
        qi.IotlbInv(
            granularity=qi.IotlbGranularity.PAGE,
            did=0x1234,
            am=9,
            ih=True,
            addr=Iova(0x7F12_3440_0000),
            dw=True,
            dr=True,
        ),
        raw(0x1234_00F2, 0x7F12_3440_0049),
    ),
    (
        qi.DevTlbInv(sid=0x3A08, pfsid=0xABC5, mip=0x11, size=True, addr=Iova(0x10000)),
        raw(0xABC0_3A08_0011_5003, 0x1_0001),
    ),
    (qi.DevTlbInv(sid=8, addr=Iova(0x5000)), raw(0x0000_0008_0000_0003, 0x5000)),
    (
        qi.DevTlbInv(sid=8, size=True, addr=qi.DEVTLB_ALL),
        raw(0x0000_0008_0000_0003, 0x7FFF_FFFF_FFFF_F001),
    ),
    (qi.IecInv(index_selective=False), raw(0x4)),
    (qi.IecInv(index_selective=True, im=3, iidx=0x22), raw(0x0000_0022_1800_0014)),
    (qi.WaitDescriptor(sw=True, status_data=2, status_addr=0x1004), raw(0x0000_0002_0000_0025, 0x1004)),
    (qi.WaitDescriptor(if_=True), raw(0x15)),
    (qi.WaitDescriptor(fn=True), raw(0x45)),
    (qi.WaitDescriptor(pd=True), raw(0x85)),
    (
        qi.PasidIotlbInv(granularity=qi.PasidIotlbGranularity.PASID, did=1, pasid=Pasid(5)),
        raw(0x0000_0005_0001_0026),
    ),
    (
        qi.PasidIotlbInv(
            granularity=qi.PasidIotlbGranularity.PAGE, did=1, pasid=Pasid(5), am=2, addr=Iova(0x4000)
        ),
        raw(0x0000_0005_0001_0036, 0x4002),
    ),
    (
        qi.PasidCacheInv(granularity=qi.PasidCacheGranularity.PASID, did=0x42, pasid=Pasid(0xFEDCB)),
        raw(0x000F_EDCB_0042_0017),
    ),
    (qi.PasidCacheInv(granularity=qi.PasidCacheGranularity.DOMAIN, did=0x42), raw(0x0042_0007)),
    (qi.PasidCacheInv(granularity=qi.PasidCacheGranularity.GLOBAL), raw(0x37)),
    (
        qi.PasidDevTlbInv(
            sid=0x3A08,
            pasid=Pasid(7),
            pfsid=0x1234,
            mip=0x1F,
            all_pasids=True,
            size=True,
            addr=Iova(0x2000),
        ),
        raw(0x1230_0007_3A08_41F8, 0x2801),
    ),
    (
        qi.PageGroupResponse(
            rid=0x3A08, prgi=0x1FF, code=ResponseCode.FAILURE, pasid_present=True, pasid=Pasid(1)
        ),
        raw(0x0000_0001_3A08_F019, 0xFFC),
    ),
    (
        qi.PageGroupResponse(rid=0x3A08, prgi=1, code=ResponseCode.SUCCESS, lpig=False),
        raw(0x3A08_0009, 0x8),
    ),
    (qi.PageGroupResponse(rid=0, prgi=0, code=2, lpig=True), raw(0x2009, 0x4)),
]


@pytest.mark.parametrize(("desc", "expected"), TABLE, ids=lambda v: type(v).__name__)
def test_descriptor_has_the_bits_of_the_table(desc: Descriptor, expected: bytes) -> None:
    assert encode(desc).hex() == expected.hex()
    assert decode(expected) == desc


# QEMU's masks of qw0 and qw1, type bits 11:9 aside.  It leaves qw1 of a context descriptor and qw0 of a
# device-TLB descriptor unchecked, where we take the table, and it has no PD (wait, bit 7).
@pytest.mark.parametrize(
    ("cls", "qw0", "qw1"),
    [
        (qi.ContextInv, 0xFFFC_0000_0000_FFC0, 0xFFFF_FFFF_FFFF_FFFF),
        (qi.IotlbInv, 0xFFFF_FFFF_0000_FF00, 0xF80),
        (qi.PasidIotlbInv, 0xFFF0_0000_0000_FFC0, 0xF80),
        (qi.PasidCacheInv, 0xFFF0_0000_0000_FFC0, 0xFFFF_FFFF_FFFF_FFFF),
        (qi.DevTlbInv, 0x000F_0000_FFE0_0FF0, 0xFFE),
        (qi.WaitDescriptor, 0xFFFF_FF00, 3),
        (qi.PageGroupResponse, 0xFFF0_0000_0000_01E0, 0xFFFF_FFFF_FFFF_F003),
    ],
)
def test_reserved_mask_is_the_one_others_check(cls: type[Descriptor], qw0: int, qw1: int) -> None:
    upper = ((1 << 128) - 1) << 128
    assert qi.reserved_mask(cls) | 0xE00 == upper | qw1 << 64 | qw0 | 0xE00


@pytest.mark.parametrize("desc", [desc for desc, _ in TABLE], ids=lambda v: type(v).__name__)
def test_each_reserved_bit_stops_the_queue(desc: Descriptor) -> None:
    mask = qi.reserved_mask(type(desc))
    good = int.from_bytes(encode(desc), "little")
    for n in (n for n in range(256) if mask >> n & 1):
        with pytest.raises(DescriptorError) as caught:
            decode((good | 1 << n).to_bytes(32, "little"))
        assert caught.value.iqei is IQEI.RESERVED_FIELD, f"bit {n}"


@pytest.mark.parametrize("qw0", [0x0, 0xA, 0xB, 0xF, 0x202, 0x802])
def test_unknown_type_stops_the_queue(qw0: int) -> None:
    with pytest.raises(DescriptorError) as caught:
        decode(raw(qw0))
    assert caught.value.iqei is IQEI.BAD_TYPE


@pytest.mark.parametrize("qw0", [0x01, 0x02, 0x06, 0x16, 0x27])
def test_granularity_without_meaning_is_a_reserved_field(qw0: int) -> None:
    with pytest.raises(DescriptorError) as caught:
        decode(raw(qw0))
    assert caught.value.iqei is IQEI.RESERVED_FIELD


@pytest.mark.parametrize(("qw0", "qw1"), [(0x3, 0xFFFF_FFFF_FFFF_F001), (0x8, 0xFFFF_FFFF_FFFF_F800)])
def test_device_tlb_size_beyond_the_address_space_is_a_reserved_field(qw0: int, qw1: int) -> None:
    with pytest.raises(DescriptorError) as caught:
        decode(raw(qw0, qw1))
    assert caught.value.iqei is IQEI.RESERVED_FIELD


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_wrong_length_is_a_format_error(size: int) -> None:
    with pytest.raises(FormatError):
        decode(bytes(size))


@given(st.sampled_from([desc for desc, _ in TABLE]), st.integers(0, (1 << 256) - 1))
def test_whatever_decodes_encodes_to_the_same_bytes(like: Descriptor, noise: int) -> None:
    type_bits = 0xE0F
    word = (noise & ~qi.reserved_mask(type(like)) & ~type_bits) | like.TYPE
    junk = word.to_bytes(32, "little")
    try:
        desc = decode(junk)
    except DescriptorError:
        return  # a granularity or a size without meaning: tested above
    assert type(desc) is type(like)
    assert encode(desc) == junk


@given(st.binary(max_size=40))
def test_foreign_bytes_give_a_descriptor_or_a_format_error(junk: bytes) -> None:
    try:
        desc = decode(junk)
    except FormatError:
        return
    assert encode(desc) == junk


@pytest.mark.parametrize(
    "desc",
    [
        qi.IotlbInv(granularity=qi.IotlbGranularity.DOMAIN, did=0x1_0000),
        qi.IotlbInv(granularity=qi.IotlbGranularity.PAGE, am=64),
        qi.IotlbInv(granularity=qi.IotlbGranularity.PAGE, addr=Iova(0x800)),
        qi.IotlbInv(granularity=qi.IotlbGranularity.PAGE, addr=Iova(1 << 64)),
        qi.DevTlbInv(sid=0x1_0000),
        qi.DevTlbInv(sid=0, mip=32),
        qi.DevTlbInv(sid=0, pfsid=0x1_0000),
        qi.WaitDescriptor(status_addr=0x1002),
        qi.WaitDescriptor(status_data=1 << 32),
        qi.PasidCacheInv(granularity=qi.PasidCacheGranularity.PASID, pasid=Pasid(1 << 20)),
        qi.PageGroupResponse(rid=0, prgi=512, code=0),
        qi.PageGroupResponse(rid=0, prgi=0, code=16),
        qi.PageGroupResponse(rid=0, prgi=-1, code=0),
    ],
    ids=repr,
)
def test_descriptor_of_ours_past_a_limit_is_an_assertion(desc: Descriptor) -> None:
    with pytest.raises(AssertionError, match=r"does not fit|is not aligned"):
        encode(desc)


@pytest.mark.parametrize(
    ("start", "npages", "addr", "am"),
    [
        (0x1000, 1, 0x100_0000, 0),
        (0x1000, 2, 0x100_0000, 1),
        (0x1001, 2, 0x100_0000, 2),  # crosses the middle of a block of four
        (0x1003, 2, 0x100_0000, 3),
        (0x1000, 3, 0x100_0000, 2),
        (0x200, 512, 0x20_0000, 9),
        (0x201, 512, 0x0, 11),  # page 0x400 belongs to it
        (0x1FF, 2, 0x0, 10),
        (0, PAGES_IN_ALL, 0, 52),
        ((1 << 51) - 1, 2, 0, 52),
        (PAGES_IN_ALL - 1, 1, 0xFFFF_FFFF_FFFF_F000, 0),
    ],
)
def test_psi_block_at_boundaries(start: int, npages: int, addr: int, am: int) -> None:
    assert qi.psi_cover(start, npages) == (addr, am)


@given(st.integers(0, PAGES_IN_ALL - 1), st.integers(1, PAGES_IN_ALL))
def test_psi_block_is_the_smallest_that_covers(start: int, npages: int) -> None:
    assume(start + npages <= PAGES_IN_ALL)
    smallest = next(
        am for am in range(53) if (start // 2**am) * 2**am + 2**am >= start + npages
    )  # grow until one block covers
    addr, am = qi.psi_cover(start, npages)
    assert am == smallest
    desc = qi.IotlbInv(granularity=qi.IotlbGranularity.PAGE, am=am, addr=addr)
    assert desc.pages == ((start // 2**am) * 2**am, 2**am)


def test_page_invalidation_ignores_address_bits_below_the_mask() -> None:
    desc = qi.IotlbInv(granularity=qi.IotlbGranularity.PAGE, am=2, addr=Iova(0x7000))
    assert desc.pages == (4, 4)


@pytest.mark.parametrize(
    ("start", "npages", "addr", "size"),
    [
        (0x5, 1, 0x5000, False),
        (0x4, 2, 0x4000, True),
        (0x4, 4, 0x5000, True),
        (0x8, 8, 0xB000, True),
        (0x200, 512, 0x2F_F000, True),
        (0, 1 << 51, 0x3FFF_FFFF_FFFF_F000, True),
        (1 << 51, 1 << 51, 0xBFFF_FFFF_FFFF_F000, True),
        (0, PAGES_IN_ALL, 0x7FFF_FFFF_FFFF_F000, True),
    ],
)
def test_device_tlb_size_encoding_at_boundaries(start: int, npages: int, addr: int, size: bool) -> None:
    assert qi.devtlb_addr(start, npages) == (addr, size)
    assert qi.devtlb_pages(Iova(addr), size) == (start, npages)


@given(st.integers(12, 63).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, 2 ** (63 - n) - 1))))
def test_device_tlb_size_is_the_lowest_zero_bit(case: tuple[int, int]) -> None:
    n, high = case
    addr = (high << (n + 1)) | ((1 << n) - (1 << 12))  # ones from 12 to n - 1, then a zero
    start, npages = qi.devtlb_pages(Iova(addr), True)
    assert npages << 12 == 1 << (n + 1)
    assert start << 12 == high << (n + 1)
    assert qi.devtlb_addr(start, npages) == (addr, True)
    assert qi.DevTlbInv(sid=0, size=True, addr=Iova(addr)).pages == (start, npages)
    assert qi.PasidDevTlbInv(sid=0, pasid=Pasid(1), size=True, addr=Iova(addr)).pages == (start, npages)


@pytest.mark.parametrize(
    ("start", "npages"), [(0, 0), (0, 3), (1, 2), (-1, 1), (PAGES_IN_ALL, 1), (0, 2 * PAGES_IN_ALL)]
)
def test_block_that_is_none_is_an_assertion(start: int, npages: int) -> None:
    with pytest.raises(AssertionError, match=r"pages from|power of two|is not aligned|page -1"):
        qi.devtlb_addr(start, npages)


@pytest.mark.parametrize(("start", "npages"), [(0, 0), (-1, 1), (1, PAGES_IN_ALL), (0, PAGES_IN_ALL + 1)])
def test_range_outside_the_address_space_is_an_assertion(start: int, npages: int) -> None:
    with pytest.raises(AssertionError, match=r"pages from|page -1"):
        qi.psi_cover(start, npages)


def test_device_takes_every_unknown_response_for_a_failure() -> None:
    read = [ResponseCode.from_wire(code) for code in range(16)]
    assert read == [ResponseCode.SUCCESS, ResponseCode.INVALID] + [ResponseCode.FAILURE] * 14
