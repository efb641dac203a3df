"""One change of all leaves in a range, said as data, so that compiled code can make it.

Models nothing of the kernel's by itself: zap, write-protect and age are the same loop there with another line
in its middle [KVM tdp_mmu.c].  What that line does to an entry are two masks.  Whoever makes the change
(kvmd/core/tables/ranges.py run by run, protocol/pt/kernels.py at once) goes by them (docs/decisions/0029).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from protocol.pt.format import TableFormat
from protocol.units import Gfn, Hpa, Level

ALL_BITS = (1 << 64) - 1


class LeafEdit(NamedTuple):
    """Each present leaf loses the bits of `clear`; those it had of `save` are kept at bits.SAVED_SHIFT."""

    clear: int
    save: int = 0


class SomePages(NamedTuple):
    """Frames from `base` on whose bit is set, the lowest bit of the first byte first."""

    base: Gfn
    bits: bytes

    @classmethod
    def of(cls, frames: Iterable[int]) -> SomePages:
        """Those; at least one."""
        listed = sorted(frames)
        base = listed[0]
        bits = bytearray((listed[-1] - base >> 3) + 1)
        for frame in listed:
            bits[frame - base >> 3] |= 1 << (frame - base & 7)
        return cls(Gfn(base), bytes(bits))

    def __contains__(self, frame: object) -> bool:
        assert isinstance(frame, int)
        page = frame - self.base
        return 0 <= page < 8 * len(self.bits) and self.bits[page >> 3] >> (page & 7) & 1 == 1

    def all_in(self, start: int, end: int) -> bool:
        """Every frame from `start` to `end`, as far as whole bytes say: False may be wrong at the edges."""
        first, last = start - self.base, end - self.base
        if first < 0 or last > 8 * len(self.bits):
            return False
        part = self.bits[first >> 3 : last + 7 >> 3]
        return part.count(0xFF) == len(part)

    def within(self, start: int, end: int) -> Iterator[int]:
        """Those of them from `start` to `end`."""
        first, last = max(start - self.base, 0), min(end - self.base, 8 * len(self.bits))
        for at in range(first >> 3, last + 7 >> 3):
            if byte := self.bits[at]:
                for page in range(max(first, 8 * at), min(last, 8 * at + 8)):
                    if byte >> (page & 7) & 1:
                        yield self.base + page


class RangeChange(NamedTuple):
    """What became of a range: the first frame that was not looked at, how many leaves changed, which bits
    some of them lost, and how many are gone."""

    reached: int
    changed: int
    lost: int
    gone: int


class RangeKernels(Protocol):
    """Compiled code over the tables of one window."""

    def edit_leaves(
        self,
        fmt: TableFormat,
        root: Hpa,
        levels: Level,
        start: int,
        end: int,
        edit: LeafEdit,
        wanted: SomePages | None,
        limit: int,
    ) -> RangeChange:
        """Leaves of level 1 in frames `start` to `end`, if they are `wanted`, `limit` changes at most.  Ends
        before a huge leaf, and before a table that lies in no memory."""
