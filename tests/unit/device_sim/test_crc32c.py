"""CRC-32C against its definition, a bit at a time from the most significant end."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_sim.core.dsa import crc32c


def crc_by_bits(data: bytes, seed: int = 0) -> int:
    """The polynomial division, bits of each byte taken lowest first, as the reflected CRC is defined."""
    register = int(f"{~seed & 0xFFFF_FFFF:032b}"[::-1], 2)
    for byte in data:
        for n in range(8):
            top = (register >> 31) ^ (byte >> n & 1)
            register = (register << 1) & 0xFFFF_FFFF
            if top:
                register ^= 0x1EDC6F41
    return ~int(f"{register:032b}"[::-1], 2) & 0xFFFF_FFFF


def crc(data: bytes, seed: int = 0) -> int:
    return crc32c.update(seed ^ crc32c.INVERT, data) ^ crc32c.INVERT


def test_the_check_value_of_crc_32c() -> None:
    assert crc(b"123456789") == crc_by_bits(b"123456789") == 0xE306_9283


@pytest.mark.parametrize("data", [bytes(32), b"\xff" * 32, bytes(range(32)), bytes(range(31, -1, -1))])
def test_the_published_vectors_of_iscsi(data: bytes) -> None:
    published = {
        bytes(32): 0x8A91_36AA,
        b"\xff" * 32: 0x62A8_AB43,
        bytes(range(32)): 0x46DD_794E,
        bytes(range(31, -1, -1)): 0x113F_DB5C,
    }
    assert crc(data) == published[data]


LONG = [1023, 1024, 1025, 1027, 2048, 4095, 4096, 4097, 4132, 10_001]


@pytest.mark.parametrize("size", LONG)
def test_a_long_message_is_reduced_to_the_same_register(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert crc(data, size) == crc_by_bits(data, size)


@given(st.binary(max_size=3000), st.integers(0, 3000), st.integers(0, 0xFFFF_FFFF))
def test_a_message_in_two_pieces_is_the_message(data: bytes, cut: int, register: int) -> None:
    piece = crc32c.update(register, data[:cut])
    assert crc32c.update(piece, data[cut:]) == crc32c.update(register, data)


@given(st.binary(min_size=crc32c.FEW_BYTES, max_size=5000), st.integers(0, 0xFFFF_FFFF))
def test_folding_agrees_with_one_byte_after_the_other(data: bytes, register: int) -> None:
    by_bytes = register
    for at in range(0, len(data), 100):
        by_bytes = crc32c.update(by_bytes, data[at : at + 100])
    assert crc32c.update(register, data) == by_bytes
