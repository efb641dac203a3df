"""Loads and stores of table entries: the only file that touches table memory.

Models the one property everything else leans on: an entry changes by a single aligned 8-byte store, and
a reader sees the old value or the new one (invariant I4).  Item access on a `memoryview` cast to "Q" is one
mov on x86-64, which orders stores and loads; packing into a buffer would write a transient zero.
The walker's loop loads from `words` itself; only this file stores.
The range forms are for pages no walker can reach: not linked yet, or cut off and flushed.  A page counts as
linked from the store of an entry that leads to it until it is cleared; no frame lies among tables.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache

from protocol.pt import bits
from protocol.pt.geometry import ENTRIES, ENTRY_BYTES
from protocol.units import PAGE_SIZE, Hpa


class TableOutside(Exception):
    """An entry was asked for at an address where no table memory is: a walker's access error (SSS.1)."""


class TableReader:
    """Entries of a window of table pages that starts at `base`; `view` may be a read-only mapping."""

    __slots__ = ("base", "words")

    def __init__(self, base: Hpa, view: memoryview) -> None:
        assert base % PAGE_SIZE == len(view) % PAGE_SIZE == 0, f"window {base:#x}+{len(view):#x}"
        self.base = base
        self.words = view.cast("Q")

    def load64(self, hpa: int) -> int:
        """The entry at `hpa`.  Raises TableOutside."""
        offset = hpa - self.base
        if offset < 0:
            raise TableOutside(f"no table memory at hpa {hpa:#x}")
        try:
            return self.words[offset >> 3]
        except IndexError:
            raise TableOutside(f"no table memory at hpa {hpa:#x}") from None

    def load_table(self, table: Hpa) -> list[int]:
        """All 512 entries; not a snapshot, each one is loaded on its own."""
        return self.load_run(table, ENTRIES)

    def load_run(self, hpa: int, count: int) -> list[int]:
        """`count` entries side by side, likewise."""
        first = self._index(hpa, count)
        return self.words[first : first + count].tolist()

    def count(self, table: Hpa, mask: int, value: int) -> int:
        """How many of a page's entries have `value` under `mask`, which is of bits of one byte."""
        which, is_one = _byte_of(mask, value)
        return bytes(self.pages(table, 1))[which::ENTRY_BYTES].translate(is_one).count(1)

    def pages(self, table: Hpa, count: int) -> memoryview:
        """`count` pages from `table` on, as they lie in memory."""
        first = self._index(table, count * ENTRIES)
        return self.words[first : first + count * ENTRIES]

    def _index(self, hpa: int, entries: int) -> int:
        offset = hpa - self.base
        if offset < 0 or offset + entries * ENTRY_BYTES > len(self.words) * ENTRY_BYTES:
            raise TableOutside(f"no table memory at hpa {hpa:#x}")
        return offset >> 3

    def release(self) -> None:
        self.words.release()


class TableWriter(TableReader):
    """The same, for the one process that may store: whose tables they are."""

    __slots__ = ("_linked",)

    def __init__(self, base: Hpa, view: memoryview) -> None:
        super().__init__(base, view)
        self._linked: set[int] = set()

    def store64(self, hpa: int, entry: int) -> None:
        """One aligned 8-byte store."""
        assert hpa % ENTRY_BYTES == 0, f"unaligned entry {hpa:#x}"
        offset = hpa - self.base
        if offset < 0:
            raise TableOutside(f"no table memory at hpa {hpa:#x}")
        try:
            self.words[offset >> 3] = entry
        except IndexError:
            raise TableOutside(f"no table memory at hpa {hpa:#x}") from None
        table = entry & bits.ADDRESS_MASK
        if entry & bits.RWX and 0 <= table - self.base < self.words.nbytes:
            self._linked.add(table)

    def cmpxchg64(self, hpa: int, expected: int, entry: int) -> bool:
        """Store `entry` if the one there is still `expected`: what a CPU does when it sets A or D."""
        if self.load64(hpa) != expected:
            return False
        self.store64(hpa, entry)
        return True

    def fill_unlinked(self, table: Hpa, entries: Sequence[int]) -> None:
        """Write a whole page that no walker can reach."""
        assert len(entries) == ENTRIES, f"{len(entries)} entries fill a table page"
        assert table not in self._linked, f"I4: table {table:#x} is linked: a walker would see it half filled"
        first = self._index(table, ENTRIES)
        self.words[first : first + ENTRIES] = memoryview(array("Q", entries))

    def clear_unlinked(self, table: Hpa) -> None:
        first = self._index(table, ENTRIES)
        self.words[first : first + ENTRIES] = _ZERO_TABLE
        self._linked.discard(table)


@cache
def _byte_of(mask: int, value: int) -> tuple[int, bytes]:
    """Which byte of an entry says so, and for each that it may be whether it does."""
    which = (mask.bit_length() - 1) // 8
    within, wanted = mask >> 8 * which, value >> 8 * which
    assert within << 8 * which == mask, f"{mask:#x} is more than a byte"
    return which, bytes(byte & within == wanted for byte in range(256))


_ZERO_TABLE = memoryview(array("Q", bytes(PAGE_SIZE)))
