"""One bit a page of a slot: what was written, or may have been, since the bits were last taken.

Models kvm_memory_slot.dirty_bitmap [KVM kvm_main.c]: whole 64-bit words, least significant bit first, as user
space reads them.  Bits beyond the last page are never set, whatever user space asks to have cleared.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

WORD_PAGES = 64
_BLOCK_BYTES = 4096  # looked at as one: most of a bitmap is zeroes
_NONE, _EVERY = bytes(_BLOCK_BYTES), b"\xff" * _BLOCK_BYTES


def bitmap_bytes(npages: int) -> int:
    """How much user space passes and gets for `npages` [KVM kvm_dirty_bitmap_bytes]."""
    return (npages + WORD_PAGES - 1) // WORD_PAGES * 8


class DirtyBitmap:
    """The bits of a slot of `npages`; `full` is what INITIALLY_SET asks for."""

    def __init__(self, npages: int, *, full: bool = False) -> None:
        self._bits = bytearray(bitmap_bytes(npages))
        if full:
            self._bits[: npages // 8] = b"\xff" * (npages // 8)
            if npages % 8:
                self._bits[npages // 8] = (1 << npages % 8) - 1

    def mark(self, page: int, count: int = 1) -> None:
        at, end = page >> 3, page + count + 7 >> 3
        held = int.from_bytes(self._bits[at:end], "little") | (1 << count) - 1 << (page & 7)
        self._bits[at:end] = held.to_bytes(end - at, "little")

    def __contains__(self, page: int) -> bool:
        return is_set(self._bits, page)

    def read(self) -> bytes:
        return bytes(self._bits)

    def take(self) -> bytes:
        """Every bit, and none is left: the kernel's exchange of each word with 0."""
        taken, self._bits = self._bits, bytearray(len(self._bits))
        return bytes(taken)

    def clear(self, first_page: int, wanted: bytes) -> bytes:
        """Clear those of `wanted`, whose bit 0 is `first_page`; the ones that really were set."""
        at = first_page // 8
        held = int.from_bytes(self._bits[at : at + len(wanted)], "little")
        cleared = held & int.from_bytes(wanted, "little")
        self._bits[at : at + len(wanted)] = (held & ~cleared).to_bytes(len(wanted), "little")
        return cleared.to_bytes(len(wanted), "little")


def is_set(bitmap: bytes | bytearray, page: int) -> bool:
    return bitmap[page >> 3] >> (page & 7) & 1 == 1


def runs(bitmap: bytes) -> Iterator[tuple[int, int]]:
    """Half-open page ranges that hold every set bit, no tighter than words are."""
    start = None
    for at in range(0, len(bitmap), _BLOCK_BYTES):
        block = bitmap[at : at + _BLOCK_BYTES]
        for i, word in enumerate(_words(block)):
            page = at * 8 + i * WORD_PAGES
            if word and start is None:
                start = page
            elif not word and start is not None:
                yield start, page
                start = None
    if start is not None:
        yield start, len(bitmap) * 8


def _words(block: bytes) -> tuple[int, ...]:
    """Of a block, or one for all where every page or none is set."""
    if block in (_NONE[: len(block)], _EVERY[: len(block)]):
        return (block[0],)
    return struct.unpack(f"<{len(block) // 8}Q", block)
