"""Root, context and PASID directory entries: the tables that lead from a function to its PASID entries.

Models scalable mode [VT-d 9.1], [VT-d 9.4], [VT-d 9.5]: RTADDR leads to the root table, which has an entry a
bus; half of that to the context table of the functions below 0x80, the other half to that of those above;
a context entry to the PASID directory, whose entries lead to PASID tables (`pasid_entry.py`).  Positions are
absolute bits.  Must hold:
  - an entry is read and written in words of 8 bytes, word 0 with its P last: `words`, `from_words`;
  - P alone is believed before anything else is: in an entry without it anything may stand;
  - with P, reserved bits are zero: the unit answers SRT.3, SCT.3 or SPD.3 where they are not.
Of a root entry the two halves are present each on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from protocol.hw.fields import (
    NO_HPA,
    NO_PASID,
    FormatError,
    Layout,
    at,
    covered,
    flag,
    page_at,
)
from protocol.units import Hpa, Pasid, bits

WORD_BYTES: Final = 8
DIRECTORY_SHIFT: Final = 6  # of a PASID: the bits that index a PASID table
DIRECTORY_BITS_MIN: Final = 7  # of a PASID: a directory has 2^(PDTS + 7) entries
CONTEXT_ENTRIES: Final = 128  # of one context table: half of a bus


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry as its fields; `P` are the bits that say that any of it means something."""

    LAYOUT: ClassVar[Layout]
    SIZE: ClassVar[int]  # bytes
    P: ClassVar[int] = 1

    def words(self) -> list[int]:
        """As they lie in memory, word 0 first."""
        word = self.LAYOUT.pack(self)
        return [word >> 64 * n & bits(63, 0) for n in range(self.SIZE // WORD_BYTES)]

    @classmethod
    def from_words(cls, words: Sequence[int]) -> Self:
        """FormatError if it is present and a reserved bit is set."""
        assert len(words) * WORD_BYTES == cls.SIZE, f"{cls.__name__} of {len(words)} words"
        word = sum(value << 64 * n for n, value in enumerate(words))
        reserved = word & ~covered(cls.LAYOUT)
        if word & cls.P and reserved:
            raise FormatError(f"{cls.__name__}: reserved bits {reserved:#x} are set")
        return cls(**cls.LAYOUT.unpack(word))


@dataclass(frozen=True, slots=True, kw_only=True)
class RootEntry(Entry):
    """Of one bus."""

    lower_present: bool = False
    lower: Hpa = NO_HPA  # context table of device and function 0 to 0x7f
    upper_present: bool = False
    upper: Hpa = NO_HPA

    SIZE: ClassVar[int] = 16
    P: ClassVar[int] = 1 | 1 << 64
    LAYOUT: ClassVar = Layout(
        {
            "lower_present": flag(0),
            "lower": page_at(63, 12, Hpa),
            "upper_present": flag(64),
            "upper": page_at(127, 76, Hpa),
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextEntry(Entry):
    """Of one function."""

    present: bool = False
    fpd: bool = False  # qualified faults are not recorded
    dte: bool = False  # translation requests and translated requests are allowed
    paside: bool = False  # so are requests with PASID
    pre: bool = False  # so are page requests
    pdts: int = 0  # see directory_entries
    pasid_dir: Hpa = NO_HPA
    rid_pasid: Pasid = NO_PASID  # of requests without PASID
    rid_priv: bool = False

    SIZE: ClassVar[int] = 32
    LAYOUT: ClassVar = Layout(
        {
            "present": flag(0),
            "fpd": flag(1),
            "dte": flag(2),
            "paside": flag(3),
            "pre": flag(4),
            "pdts": at(11, 9),
            "pasid_dir": page_at(63, 12, Hpa),
            "rid_pasid": at(83, 64, Pasid),
            "rid_priv": flag(84),
        }
    )

    @property
    def directory_entries(self) -> int:
        return 1 << DIRECTORY_BITS_MIN + self.pdts


@dataclass(frozen=True, slots=True, kw_only=True)
class PasidDirEntry(Entry):
    """Of 64 PASIDs."""

    present: bool = False
    fpd: bool = False
    pasid_table: Hpa = NO_HPA

    SIZE: ClassVar[int] = 8
    LAYOUT: ClassVar = Layout({"present": flag(0), "fpd": flag(1), "pasid_table": page_at(63, 12, Hpa)})


for _entry in (RootEntry, ContextEntry, PasidDirEntry):
    assert covered(_entry.LAYOUT) < 1 << 8 * _entry.SIZE, _entry.__name__


def root_index(rid: int) -> int:
    """The bus of a requester id."""
    return rid >> 8


def context_index(rid: int) -> tuple[bool, int]:
    """In the upper context table of its bus?  And where there."""
    return bool(rid & 0x80), rid & CONTEXT_ENTRIES - 1


def pasid_index(pasid: int) -> tuple[int, int]:
    """Where in the PASID directory, and where in the table that is named there."""
    return pasid >> DIRECTORY_SHIFT, pasid & (1 << DIRECTORY_SHIFT) - 1
