"""Dirty bitmaps, as bytes and as runs of pages: bit n of little-endian 64-bit words is page n."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

FILL = 0xA5  # what a buffer holds before the kernel writes to it
WORD_BYTES = 8

Run = Sequence[int]  # first page, count


def size_of(npages: int) -> int:
    """Bytes of the bitmap of so many pages: whole words."""
    return (npages + 63) // 64 * WORD_BYTES


def from_runs(runs: Iterable[Run], npages: int) -> bytes:
    bits = 0
    for first, count in runs:
        bits |= ((1 << count) - 1) << first
    return bits.to_bytes(size_of(max(npages, bits.bit_length())), "little")


def to_runs(bitmap: bytes) -> list[list[int]]:
    bits = int.from_bytes(bitmap, "little")
    runs: list[list[int]] = []
    page = 0
    while bits:
        gap = (bits & -bits).bit_length() - 1
        bits >>= gap
        count = (~bits & (bits + 1)).bit_length() - 1
        runs.append([page + gap, count])
        bits >>= count
        page += gap + count
    return runs


def written(buffer: bytes) -> int:
    """How many bytes from the start are no longer FILL, in whole words."""
    untouched = bytes([FILL]) * WORD_BYTES
    end = len(buffer) // WORD_BYTES * WORD_BYTES
    while end and buffer[end - WORD_BYTES : end] == untouched:
        end -= WORD_BYTES
    return end
