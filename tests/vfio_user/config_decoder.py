"""Config space as software reads it: BARs sized by writing ones, capabilities found along their chains.

Offsets and ids are the manual's numbers [PCIe 7.5.1, 7.6], none of the server's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

Read = Callable[[int, int], int]  # offset, size -> value
Write = Callable[[int, int, int], None]  # offset, size, value


class FoundBar(NamedTuple):
    size: int
    is_64_bit: bool
    prefetchable: bool


def bars(read: Read, write: Write) -> dict[int, FoundBar]:
    """As a kernel sizes them: memory decoding off, ones written, what it was put back."""
    found: dict[int, FoundBar] = {}
    command = read(4, 2)
    write(4, 2, command & ~2)
    number = 0
    while number < 6:
        at = 0x10 + 4 * number
        low = read(at, 4)
        wide = low & 0b110 == 0b100
        before = (low, read(at + 4, 4) if wide else 0)
        write(at, 4, 0xFFFFFFFF)
        if wide:
            write(at + 4, 4, 0xFFFFFFFF)
        mask = read(at, 4) & ~0xF | (read(at + 4, 4) << 32 if wide else 0xFFFFFFFF << 32)
        write(at, 4, before[0])
        if wide:
            write(at + 4, 4, before[1])
        if mask & 0xFFFFFFFF or (wide and mask):
            found[number] = FoundBar((1 << 64) - mask, wide, bool(low & 8))
        number += 2 if wide else 1
    write(4, 2, command)
    return found


def capabilities(read: Read) -> dict[int, int]:
    """Of each id the offset; a chain that does not end is an AssertionError."""
    if not read(6, 2) & 0x10:
        return {}
    found: dict[int, int] = {}
    at = read(0x34, 1) & ~3
    while at:
        assert at not in found.values(), "the chain goes in a circle"
        assert at >= 0x40
        found[read(at, 1)] = at
        at = read(at + 1, 1) & ~3
    return found


def extended_capabilities(read: Read) -> dict[int, int]:
    found: dict[int, int] = {}
    at = 0x100
    while at and read(at, 4):
        assert at not in found.values(), "the chain goes in a circle"
        assert 0x100 <= at < 0x1000
        assert at % 4 == 0
        word = read(at, 4)
        assert word >> 16 & 0xF == 1
        found[word & 0xFFFF] = at
        at = word >> 20
    return found


def dump(text: str, size: int) -> bytes:
    """Of lines `OFFSET: BYTE BYTE ...` in hex; what stands on none is zero."""
    raw = bytearray(size)
    for line in text.strip().splitlines():
        at, _, rest = line.partition(":")
        data = bytes.fromhex(rest)
        struct.pack_into(f"{len(data)}s", raw, int(at, 16), data)
    return bytes(raw)
