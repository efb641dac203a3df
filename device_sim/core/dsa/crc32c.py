"""CRC-32C, fast without a table entry a byte: many words are reduced at once.

Models the CRC engine of [DSA 8.1], polynomial 0x1EDC6F41, in its reflected form: a register whose bit 0 is
the coefficient of the highest power.  A register is linear in what it has read, and so is moving it over
zero bytes.  Hence a message of n words is as good as one of h < n words: the first n - h words, each moved
over h words, are added (XOR) to the last n - h of the others.  That is done for all words together, a byte
plane at a time: moving is `bytes.translate`, adding is XOR of large integers.  Both run at the speed of C.

Must hold: update(update(r, a), b) == update(r, a + b), and update() of one byte is the definition.
"""

from __future__ import annotations

from functools import cache
from typing import Final

POLYNOMIAL: Final = 0x82F6_3B78  # 0x1EDC6F41, its bits reversed
INVERT: Final = 0xFFFF_FFFF
CRC_SIZE: Final = 4
FEW_BYTES: Final = 1024  # below, one byte after the other is faster
FEW_WORDS: Final = 32

Planes = list[bytes]  # byte 0 of every word, byte 1 of every word, ...


def _of_byte(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
    return value


_BYTES: Final = tuple(_of_byte(value) for value in range(256))
REVERSED_BYTES: Final = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def reflect32(value: int) -> int:
    return int(f"{value:032b}"[::-1], 2)


def update(register: int, data: bytes) -> int:
    """The register after `data`."""
    if len(data) < FEW_BYTES:
        return _bytewise(register, data)
    words = len(data) // CRC_SIZE
    head = (int.from_bytes(data[:CRC_SIZE], "little") ^ register).to_bytes(CRC_SIZE, "little")
    planes = [bytes([head[n]]) + data[CRC_SIZE + n : words * CRC_SIZE : CRC_SIZE] for n in range(CRC_SIZE)]
    while words > FEW_WORDS:
        log2 = (words - 1).bit_length() - 1
        planes = _fold(planes, words - (1 << log2), _move_tables(log2))
        words = 1 << log2
    rest = bytearray(words * CRC_SIZE)
    for n, plane in enumerate(planes):
        rest[n::CRC_SIZE] = plane
    return _bytewise(0, bytes(rest) + data[len(data) // CRC_SIZE * CRC_SIZE :])


def _bytewise(register: int, data: bytes) -> int:
    table = _BYTES
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ register >> 8
    return register


def _fold(planes: Planes, top: int, tables: tuple[tuple[bytes, ...], ...]) -> Planes:
    """Add the first `top` words, moved by `tables`, to the last `top` of the others."""
    moved = [plane[:top] for plane in planes]
    folded = []
    for out, plane in enumerate(planes):
        total = int.from_bytes(plane[top:], "big")
        for source, table in zip(moved, tables, strict=True):
            total ^= int.from_bytes(source.translate(table[out]), "big")
        folded.append(total.to_bytes(len(plane) - top, "big"))
    return folded


@cache
def _move_matrix(log2: int) -> tuple[int, ...]:
    """Where each bit of a register goes when it is moved over 2**log2 words of zeroes."""
    if log2 == 0:
        return tuple(_bytewise(1 << n, bytes(CRC_SIZE)) for n in range(8 * CRC_SIZE))
    half = _move_matrix(log2 - 1)
    return tuple(_times(half, column) for column in half)


def _times(matrix: tuple[int, ...], register: int) -> int:
    moved = 0
    for column in matrix:
        if register & 1:
            moved ^= column
        register >>= 1
    return moved


@cache
def _move_tables(log2: int) -> tuple[tuple[bytes, ...], ...]:
    """The same by bytes, for each that is and each it goes to: what `bytes.translate` takes."""
    matrix = _move_matrix(log2)
    tables = []
    for source in range(CRC_SIZE):
        moved = [_times(matrix, value << 8 * source) for value in range(256)]
        tables.append(tuple(bytes(word >> 8 * out & 0xFF for word in moved) for out in range(CRC_SIZE)))
    return tuple(tables)
