"""Delta records: which 8-byte words of one buffer differ from another's, and what they become.

Models the record of [DSA 8.1]: ten bytes a word that differs, its index as 16 bits and then the new word,
indices strictly increasing.  Pure bytes in and out; the operations that move them are in `operations.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from protocol.hw.dsa import Status

WORD: Final = 8
ENTRY: Final = struct.Struct("<HQ")
MIN_MAX_SIZE: Final = 80
MAX_SOURCE: Final = 0x8_0000  # what 16 bits can index
BLOCK: Final = 4096  # equal blocks are passed over whole


class DeltaError(Exception):
    """An entry cannot be applied; `status` says why."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


def differences(first: bytes, second: bytes, base: int) -> bytes:
    """The entries that turn `first` into `second`, which lie `base` bytes into the buffers."""
    entries = []
    for block in range(0, len(first), BLOCK):
        old, new = first[block : block + BLOCK], second[block : block + BLOCK]
        if old == new:
            continue
        words = len(old) // WORD
        for n, (a, b) in enumerate(
            zip(struct.unpack(f"<{words}Q", old), struct.unpack(f"<{words}Q", new), strict=True)
        ):
            if a != b:
                entries.append(ENTRY.pack((base + block) // WORD + n, b))
    return b"".join(entries)


def entries(record: bytes, last: int, size: int) -> Iterator[tuple[int, bytes]]:
    """(offset, new word) of each entry, for a buffer of `size` bytes; `last` is the index before, or -1."""
    for at in range(0, len(record), ENTRY.size):
        index, _ = ENTRY.unpack_from(record, at)
        if index <= last:
            raise DeltaError(Status.DELTA_OFFSET_ORDER)
        if index * WORD >= size:
            raise DeltaError(Status.DELTA_OFFSET_RANGE)
        last = index
        yield index * WORD, record[at + 2 : at + ENTRY.size]
