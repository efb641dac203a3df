"""Bodies against literal layouts: what was sent is read, and every bit without a meaning is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from errno import EINVAL

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.refusals import errno_of
from tests.vfio_user import messages
from tests.vfio_user.messages import Sent
from vfio_user.core import records
from vfio_user.core.records import DmaMap, DmaUnmap, IrqSet, RegionAccess, RegionFlags, RegionQuery

U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)

READERS: dict[str, tuple[Callable[[bytes], object], Sent, tuple[int, ...]]] = {
    "DMA_MAP": (DmaMap.from_body, messages.dma_map(0, 4096), (4,)),
    "DMA_UNMAP": (DmaUnmap.from_body, messages.dma_unmap(0, 4096), (4,)),
    "GET_INFO": (records.check_device_info, messages.get_info(), (4, 8, 12)),
    "GET_REGION_INFO": (RegionQuery.from_body, messages.get_region_info(1), (4, 12, 16, 20, 24, 28)),
    "GET_IRQ_INFO": (records.irq_query, messages.get_irq_info(1), (4, 12)),
    "SET_IRQS": (IrqSet.from_body, messages.set_irqs(messages.NONE, 0, 1), (4,)),
}
KNOWN = {"DMA_MAP": 3, "DMA_UNMAP": 2, "SET_IRQS": 0x3F}
FIXED = [name for name in READERS if name != "SET_IRQS"]


@pytest.mark.parametrize("name", READERS)
def test_what_qemu_sends_is_read(name: str) -> None:
    reader, sent, _ = READERS[name]
    reader(sent.data[16:])


@pytest.mark.parametrize("name", READERS)
def test_every_bit_without_a_meaning_is_refused(name: str) -> None:
    reader, sent, words = READERS[name]
    for word in words:
        for number in range(32):
            if word == 4 and KNOWN.get(name, 0) >> number & 1:
                continue
            body = bytearray(sent.data[16:])
            body[word + number // 8] ^= 1 << number % 8
            assert errno_of(lambda: reader(bytes(body))) == EINVAL, f"{name}: bit {number} of {word}"  # noqa: B023


@pytest.mark.parametrize("name", READERS)
def test_no_other_length_is_read(name: str) -> None:
    reader, sent, _ = READERS[name]
    body = sent.data[16:]
    for wrong in (body + b"\0", *(body[:cut] for cut in range(len(body)))):
        assert errno_of(lambda: reader(wrong)) == EINVAL  # noqa: B023


@pytest.mark.parametrize("name", FIXED)
def test_an_argsz_too_small_for_the_answer_is_refused(name: str) -> None:
    reader, sent, _ = READERS[name]
    size = len(sent.data) - 16
    assert errno_of(lambda: reader(struct.pack("<I", size - 1) + sent.data[20:])) == EINVAL
    reader(struct.pack("<I", size + 1) + sent.data[20:])


@given(st.sampled_from([1, 2, 3]), U64, U64, U64)
def test_a_map_is_read_as_it_was_sent(flags: int, offset: int, start: int, size: int) -> None:
    assert DmaMap.from_body(struct.pack("<IIQQQ", 32, flags, offset, start, size)) == (
        flags,
        offset,
        start,
        size,
    )


@given(U64, U32, st.binary(max_size=64))
def test_a_write_is_read_as_it_was_sent_and_answered_without_its_data(
    offset: int, region: int, data: bytes
) -> None:
    fixed = struct.pack("<QII", offset, region, len(data))
    access = RegionAccess.write_from(fixed + data)
    assert access == (offset, region, len(data), data)
    assert access.answer() == fixed


@given(st.lists(st.tuples(U64, U32, st.binary(max_size=8)), max_size=20))
def test_many_writes_are_read_as_they_were_sent(writes: list[tuple[int, int, bytes]]) -> None:
    sent = messages.write_multi(*((region, offset, data) for offset, region, data in writes))
    found = records.writes_from(sent.data[16:])
    assert found == [(offset, region, len(data), data) for offset, region, data in writes]
    assert records.writes_answer(len(writes)) == sent.data[16:24]


def test_a_write_of_nine_bytes_and_a_201st_write_are_refused() -> None:
    nine = struct.pack("<QQII8s", 1, 0, 0, 9, bytes(8))
    assert errno_of(lambda: records.writes_from(nine)) == EINVAL
    assert len(records.writes_from(messages.write_multi(*[(0, 0, b"x")] * 200).data[16:])) == 200
    many = messages.write_multi(*[(0, 0, b"x")] * 201).data[16:]
    assert errno_of(lambda: records.writes_from(many)) == EINVAL


@given(st.integers(32, 200), st.lists(st.tuples(U64, U64), max_size=4))
def test_a_chain_is_sent_whole_or_not_at_all(argsz: int, areas: list[tuple[int, int]]) -> None:
    answer, whole = records.region_info(RegionQuery(argsz, 2), RegionFlags.MMAP, 0x2000, 0x4000, areas)
    needed, flags, index, cap_offset, size, offset = struct.unpack_from("<IIIIQQ", answer)
    assert (index, size, offset) == (2, 0x2000, 0x4000)
    assert flags == (4 | 8 if areas else 4)
    assert needed == 32 + (16 + 16 * len(areas) if areas else 0)
    assert whole == (needed <= argsz)
    assert len(answer) == (needed if whole else 32)
    if cap_offset:
        assert struct.unpack_from("<HHIII", answer, cap_offset) == (1, 1, 0, len(areas), 0)
        found = list(struct.iter_unpack("<QQ", answer[cap_offset + 16 :]))
        assert found == areas
    else:
        assert not areas or not whole
