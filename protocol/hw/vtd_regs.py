"""The register page of a remapping unit: where each register lies, how wide it is, and its fields.

Models [VT-d 11.4] as far as scalable mode with queued invalidation uses it.  Must hold:
  - a register is loaded and stored in one piece of its width, 4 or 8 bytes, aligned;
  - bits in RW1C are cleared by software, by storing 1; every other register is stored as a whole;
  - a queue's head and tail are byte offsets into it, aligned to its entries: `Ring` says what fits.
Fault recording registers lie at CAP.FRO, CAP.NFR of them, 16 bytes each (`faults.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from protocol.hw.fields import Field, at, flag, page_at
from protocol.units import PAGE_SIZE, Hpa, bit

REGISTER_PAGE: Final = PAGE_SIZE


class Reg(IntEnum):
    """Offsets in the register page."""

    __hash__ = int.__hash__  # an enum's own is a Python call, and a register is looked up at every access

    VER = 0x00
    CAP = 0x08
    ECAP = 0x10
    GCMD = 0x18
    GSTS = 0x1C
    RTADDR = 0x20
    FSTS = 0x34
    FECTL = 0x38
    FEDATA = 0x3C
    FEADDR = 0x40
    FEUADDR = 0x44
    PMEN = 0x64
    IQH = 0x80
    IQT = 0x88
    IQA = 0x90
    ICS = 0x9C
    IECTL = 0xA0
    IEDATA = 0xA4
    IEADDR = 0xA8
    IEUADDR = 0xAC
    IQERCD = 0xB0
    IRTA = 0xB8
    PQH = 0xC0
    PQT = 0xC8
    PQA = 0xD0
    PRS = 0xDC
    PECTL = 0xE0
    PEDATA = 0xE4
    PEADDR = 0xE8
    PEUADDR = 0xEC


# The others have 4 bytes.
WIDE: Final = frozenset(
    {
        *(Reg.CAP, Reg.ECAP, Reg.RTADDR, Reg.IRTA),
        *(Reg.IQH, Reg.IQT, Reg.IQA, Reg.IQERCD),
        *(Reg.PQH, Reg.PQT, Reg.PQA),
    }
)


def width(register: Reg) -> int:
    """In bytes."""
    return 8 if register in WIDE else 4


class Gcmd(IntFlag):
    """A command; in GSTS the same bit says that it took effect."""

    CFI = bit(23)
    SIRTP = bit(24)
    IRE = bit(25)
    QIE = bit(26)  # queued invalidation
    WBF = bit(27)
    EAFL = bit(28)
    SFL = bit(29)
    SRTP = bit(30)  # RTADDR is taken
    TE = bit(31)  # translation


class Fsts(IntFlag):
    PFO = bit(0)  # a fault found no free recording register
    PPF = bit(1)  # some recording register has F: not stored, the unit's own sum
    IQE = bit(4)  # the queue stopped at a descriptor: IQERCD says why
    ICE = bit(5)  # a device completed what nobody asked it
    ITE = bit(6)  # a device did not complete in time


FSTS_FRI: Final = at(15, 8)  # the recording register of the first fault


class Ics(IntFlag):
    IWC = bit(0)  # a wait descriptor with IF completed


class Prs(IntFlag):
    PPR = bit(0)  # page requests wait
    PRO = bit(1)  # one found no room


class EventControl(IntFlag):
    """FECTL, IECTL and PECTL."""

    IP = bit(30)  # held back by IM
    IM = bit(31)


# Cleared by storing 1; the others of these registers are the unit's own.
RW1C: Final = {
    Reg.FSTS: int(Fsts.PFO | Fsts.IQE | Fsts.ICE | Fsts.ITE),
    Reg.ICS: int(Ics.IWC),
    Reg.PRS: int(Prs.PPR | Prs.PRO),
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
