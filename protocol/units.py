"""Addresses, frames, levels and spans: one type each, and every conversion between them.

Models: nothing; names the quantities the kernel names.  A gpa is never passed where an hpa is
expected because mypy tells them apart; at run time all of them are plain ints.  Levels are KVM's
everywhere: 1 = 4 KiB, 2 = 2 MiB, 3 = 1 GiB, up to the root (4 or 5).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NewType, TypeVar

assert (sys.byteorder, sys.maxsize) == ("little", 2**63 - 1), "the model needs a 64-bit little-endian host"

Gpa = NewType("Gpa", int)
Gfn = NewType("Gfn", int)
Hva = NewType("Hva", int)
Hpa = NewType("Hpa", int)
Pfn = NewType("Pfn", int)
Iova = NewType("Iova", int)
IovaPfn = NewType("IovaPfn", int)  # the number of its page, the kernel's IOVA_PFN
Pasid = NewType("Pasid", int)
Level = NewType("Level", int)

N = TypeVar("N", bound=int)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_OFFSET_MASK = PAGE_SIZE - 1
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

LEVEL_4K = Level(1)
LEVEL_2M = Level(2)
LEVEL_1G = Level(3)

# The whole address space, as KVM says it to importers: start 0, size all ones [RFC 08/42].
WHOLE_SIZE = (1 << 64) - 1


def bit(n: int) -> int:
    """The mask with only bit `n` set."""
    return 1 << n


def bits(high: int, low: int) -> int:
    """The mask of bits high..low, both inclusive, as the manuals write `high:low`."""
    return (1 << (high + 1)) - (1 << low)


def gfn_of(gpa: Gpa) -> Gfn:
    return Gfn(gpa >> PAGE_SHIFT)


def gpa_of(gfn: Gfn) -> Gpa:
    return Gpa(gfn << PAGE_SHIFT)


def pfn_of(hpa: Hpa) -> Pfn:
    return Pfn(hpa >> PAGE_SHIFT)


def iova_pfn_of(iova: Iova) -> IovaPfn:
    return IovaPfn(iova >> PAGE_SHIFT)


def gpa_of_iova(iova: Iova) -> Gpa:
    """A KVM HWPT translates guest-physical addresses: its iova is the gpa [RFC 12/42]."""
    return Gpa(iova)


def iova_of_gpa(gpa: Gpa) -> Iova:
    return Iova(gpa)


def pages_of_level(level: Level) -> int:
    """How many 4 KiB pages one entry of `level` maps."""
    return 1 << (9 * (level - 1))


def size_of_level(level: Level) -> int:
    """Bytes one entry of `level` maps."""
    return PAGE_SIZE << (9 * (level - 1))


def align_down(value: N, alignment: int) -> N:
    """An aligned address is of the kind it was."""
    return value & ~(alignment - 1)  # type: ignore[return-value]


def align_up(value: N, alignment: int) -> N:
    return (value + alignment - 1) & ~(alignment - 1)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, order=True)
class GfnSpan:
    """Guest frames start..end, half-open."""

    start: Gfn
    end: Gfn

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.end, f"span {self.start:#x}..{self.end:#x}"

    @classmethod
    def of_pages(cls, start: Gfn, npages: int) -> GfnSpan:
        return cls(start, Gfn(start + npages))

    @property
    def npages(self) -> int:
        return self.end - self.start

    def __contains__(self, gfn: int) -> bool:
        return self.start <= gfn < self.end

    def overlaps(self, other: GfnSpan) -> bool:
        return self.start < other.end and other.start < self.end

    def __str__(self) -> str:
        return f"gfn {self.start:#x}..{self.end:#x}"
