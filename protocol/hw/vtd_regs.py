"""The register page of a remapping unit: where each register lies, how wide it is, and its fields.

Models [VT-d 11.4] as far as scalable mode with queued invalidation uses it.  Must hold:
  - a register is loaded and stored in one piece of its width, 4 or 8 bytes, aligned;
  - bits in RW1C are cleared by software, by storing 1; every other register is stored as a whole;
  - a queue's head and tail are byte offsets into it, aligned to its entries: `Ring` says what fits.
Fault recording registers lie at CAP.FRO, CAP.NFR of them, 16 bytes each (`faults.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NewType

from protocol.hw.fields import Field, at, flag, page_at
from protocol.units import PAGE_SIZE, Hpa, bit

REGISTER_PAGE: Final = PAGE_SIZE


Register = NewType("Register", int)  # its offset in the register page


class Reg:
    """The registers.  They and the bits below are no enums: those are looked up and combined in Python, and
    a register is at every access.
    """

    VER: Final = Register(0x00)
    CAP: Final = Register(0x08)
    ECAP: Final = Register(0x10)
    GCMD: Final = Register(0x18)
    GSTS: Final = Register(0x1C)
    RTADDR: Final = Register(0x20)
    FSTS: Final = Register(0x34)
    FECTL: Final = Register(0x38)
    FEDATA: Final = Register(0x3C)
    FEADDR: Final = Register(0x40)
    FEUADDR: Final = Register(0x44)
    PMEN: Final = Register(0x64)
    IQH: Final = Register(0x80)
    IQT: Final = Register(0x88)
    IQA: Final = Register(0x90)
    ICS: Final = Register(0x9C)
    IECTL: Final = Register(0xA0)
    IEDATA: Final = Register(0xA4)
    IEADDR: Final = Register(0xA8)
    IEUADDR: Final = Register(0xAC)
    IQERCD: Final = Register(0xB0)
    IRTA: Final = Register(0xB8)
    PQH: Final = Register(0xC0)
    PQT: Final = Register(0xC8)
    PQA: Final = Register(0xD0)
    PRS: Final = Register(0xDC)
    PECTL: Final = Register(0xE0)
    PEDATA: Final = Register(0xE4)
    PEADDR: Final = Register(0xE8)
    PEUADDR: Final = Register(0xEC)


# The others have 4 bytes.
WIDE: Final = frozenset(
    {
        *(Reg.CAP, Reg.ECAP, Reg.RTADDR, Reg.IRTA),
        *(Reg.IQH, Reg.IQT, Reg.IQA, Reg.IQERCD),
        *(Reg.PQH, Reg.PQT, Reg.PQA),
    }
)


def width(register: Register) -> int:
    """In bytes."""
    return 8 if register in WIDE else 4


class Gcmd:
    """A command; in GSTS the same bit says that it took effect."""

    CFI: Final = bit(23)
    SIRTP: Final = bit(24)
    IRE: Final = bit(25)
    QIE: Final = bit(26)  # queued invalidation
    WBF: Final = bit(27)
    EAFL: Final = bit(28)
    SFL: Final = bit(29)
    SRTP: Final = bit(30)  # RTADDR is taken
    TE: Final = bit(31)  # translation


class Fsts:
    PFO: Final = bit(0)  # a fault found no free recording register
    PPF: Final = bit(1)  # some recording register has F: not stored, the unit's own sum
    IQE: Final = bit(4)  # the queue stopped at a descriptor: IQERCD says why
    ICE: Final = bit(5)  # a device completed what nobody asked it
    ITE: Final = bit(6)  # a device did not complete in time


FSTS_FRI: Final = at(15, 8)  # the recording register of the first fault


class Ics:
    IWC: Final = bit(0)  # a wait descriptor with IF completed


class Prs:
    PPR: Final = bit(0)  # page requests wait
    PRO: Final = bit(1)  # one found no room


class EventControl:
    """FECTL, IECTL and PECTL."""

    IP: Final = bit(30)  # held back by IM
    IM: Final = bit(31)


# Cleared by storing 1; the others of these registers are the unit's own.
RW1C: Final = {
    Reg.FSTS: Fsts.PFO | Fsts.IQE | Fsts.ICE | Fsts.ITE,
    Reg.ICS: Ics.IWC,
    Reg.PRS: Prs.PPR | Prs.PRO,
}
FAULT_RECORD_F: Final = bit(63)  # in the upper 8 bytes of a fault recording register


class TranslationTableMode(IntEnum):
    """RTADDR.TTM; 2 is reserved."""

    LEGACY = 0
    SCALABLE = 1
    ABORT = 3


RTADDR_TTM: Final = at(11, 10)
RTADDR_RTA: Final = page_at(63, 12, Hpa)

IQA_QS: Final = at(2, 0)
IQA_DW: Final = flag(11)  # descriptors of 256 bits
IQA_BASE: Final = page_at(63, 12, Hpa)
IQERCD_IQEI: Final = at(3, 0)  # a qi.IQEI
IQERCD_ITESID: Final = at(47, 32)  # the function that did not complete in time
IQERCD_ICESID: Final = at(63, 48)

PQA_PQS: Final = at(2, 0)
PQA_BASE: Final = page_at(63, 12, Hpa)

IQ_OFFSET: Final = Field(((18, 4),), shift=4)  # IQH, IQT: of 16 bytes, with DW of 32
PQ_OFFSET: Final = Field(((18, 5),), shift=5)  # PQH, PQT


@dataclass(frozen=True, slots=True)
class Ring:
    """A queue in memory: `entries` of `entry_bytes` from `base` on; one is always left free."""

    base: Hpa
    entries: int
    entry_bytes: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.entries * self.entry_bytes

    def index(self, offset: int) -> int | None:
        """The entry that a head or tail names; None: beyond the ring, or within an entry."""
        at_entry, within = divmod(offset, self.entry_bytes)
        return None if within or at_entry >= self.entries else at_entry

    def offset(self, index: int) -> int:
        return index % self.entries * self.entry_bytes

    def distance(self, head: int, tail: int) -> int:
        """Entries from one index on to the other."""
        return (tail - head) % self.entries


def invalidation_ring(iqa: int) -> Ring:
    """What IQA says [VT-d 11.4]: pages of descriptors, 128 to a page with DW, 256 without."""
    wide = IQA_DW.get(iqa)
    return Ring(Hpa(IQA_BASE.get(iqa)), 1 << IQA_QS.get(iqa) + (7 if wide else 8), 32 if wide else 16)


def page_request_ring(pqa: int) -> Ring:
    """What PQA says [VT-d 11.4]: pages of requests, 128 to a page."""
    return Ring(Hpa(PQA_BASE.get(pqa)), 1 << PQA_PQS.get(pqa) + 7, 32)
