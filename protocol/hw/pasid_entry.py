"""Scalable-mode PASID-table entry: 64 bytes that say which table translates a (device, PASID).

Models the entry of [VT-d 9.6] as the driver writes it for a second-stage domain: clear all words,
then DID, SSPTPTR, AW, PGTT = 2, FPD, PWSNP, PGSNP, and P last [RFC 19/42].  Positions are absolute
bits of the 512-bit entry.  Must hold:
  - the driver of a KVM domain leaves SSADE clear: the unit neither reads nor sets accessed and dirty
    bits of a table that belongs to KVM [RFC 19/42];
  - reserved bits are zero in an entry with P = 1; the unit answers SPT.3 where they are not.

Departure: a second-stage entry must also keep zero what only first-stage translation or the memory-type
controls use (the model has neither first stage nor ECAP.MTS).  Hardware would ignore part of them.
A PGTT or AW without meaning is not a format error: the unit answers SPT.4, which needs the entry read.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from protocol.hw.fields import (
    NO_HPA,
    FormatError,
    Layout,
    at,
    covered,
    flag,
    load,
    page_at,
    store,
)
from protocol.units import Hpa, Level, Pasid, bit, bits

PASID_ENTRY_SIZE: Final = 64

# DID 0 is reserved in caching mode and 1 is shared by first-stage and pass-through entries.
FIRST_SS_DID: Final = 2
RID_PASID = Pasid(0)  # of requests without a PASID, as Linux has it in every context entry


class Pgtt(IntEnum):
    """PASID granular translation type; every other value is invalid."""

    FIRST_STAGE = 1
    SECOND_STAGE = 2
    NESTED = 3
    PASS_THROUGH = 4


AW_LEVELS: Final = {1: Level(3), 2: Level(4), 3: Level(5)}
AW_OF_LEVEL: Final = {level: aw for aw, level in AW_LEVELS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PasidEntry:
    present: bool = False
    fpd: bool = False  # qualified faults are not recorded
    aw: int = 0  # AW_LEVELS; also the agaw of the kernel
    ssee: bool = False
    pgtt: int = 0  # a Pgtt, or a number the unit refuses with SPT.4
    ssade: bool = False
    ss_ptr: Hpa = NO_HPA
    did: int = 0
    pwsnp: bool = False  # page walks snoop; needs ECAP.SMPWC
    pgsnp: bool = False  # translated accesses snoop whatever they ask for; needs ECAP.SC
    sre: bool = False
    ere: bool = False

    @property
    def level(self) -> Level | None:
        """Level of the root, or None for a width that does not exist."""
        return AW_LEVELS.get(self.aw)

    def to_bytes(self) -> bytes:
        return store(LAYOUT.pack(self), PASID_ENTRY_SIZE)

    @classmethod
    def from_bytes(cls, raw: bytes) -> PasidEntry:
        """FormatError for a wrong length, or P = 1 with reserved bits set; with P = 0 anything goes."""
        word = load(raw, PASID_ENTRY_SIZE, "PASID entry")
        entry = cls(**LAYOUT.unpack(word))
        if entry.present and reserved_violation(raw):
            raise FormatError(f"PASID entry: reserved bits {word & _must_be_zero(word):#x} are set")
        return entry


LAYOUT: Final = Layout(
    {
        "present": flag(0),
        "fpd": flag(1),
        "aw": at(4, 2),
        "ssee": flag(5),
        "pgtt": at(8, 6),
        "ssade": flag(9),
        "ss_ptr": page_at(63, 12, Hpa),
        "did": at(79, 64),
        "pwsnp": flag(87),
        "pgsnp": flag(88),
        "sre": flag(128),
        "ere": flag(129),
    }
)

# In the table, but of no use to a second-stage entry of this model: CD, EMTE, EMT, PWT, PCD and PAT;
# FSPM, WPE, NXE, SMEP, EAFE and FSPTPTR.
FOREIGN_TO_SECOND_STAGE: Final = bits(127, 89) | bits(135, 130) | bits(191, 140)
RESERVED: Final = bits(11, 10) | bits(86, 80) | bits(139, 136) | bits(511, 192)

assert covered(LAYOUT) & (RESERVED | FOREIGN_TO_SECOND_STAGE) == 0
assert covered(LAYOUT) | RESERVED | FOREIGN_TO_SECOND_STAGE == bits(511, 0)


def is_present(raw: bytes) -> bool:
    """P alone, to be asked before anything else about an entry is believed."""
    return bool(load(raw, PASID_ENTRY_SIZE, "PASID entry") & bit(0))


def reserved_violation(raw: bytes) -> bool:
    """Would the unit answer SPT.3?  Meaningful for an entry with P = 1."""
    word = load(raw, PASID_ENTRY_SIZE, "PASID entry")
    return word & _must_be_zero(word) != 0


def _must_be_zero(word: int) -> int:
    if LAYOUT["pgtt"].get(word) == Pgtt.SECOND_STAGE:
        return RESERVED | FOREIGN_TO_SECOND_STAGE
    return RESERVED
