"""Fault reasons of the remapping unit in scalable mode, and the fault-recording register.

Models the reason codes [VT-d 7.1.3] and the 128-bit record [VT-d 10.4] with which the unit tells the
driver of a request it could not serve.  Must hold:
  - a record is written only where its F bit is clear; F is cleared by software writing 1 to it;
  - a fault in QUALIFIED is not recorded when the context or PASID entry that decides has FPD set;
  - a fault in RECOVERABLE, met by an ATS translation request, is answered with R = W = 0 and is not
    recorded; the device may turn it into a page request [PCIe 10.4].
Unconfirmed by a public text, and therefore constants of the model: RECOVERABLE, SSS_6, SGN_9, SGN_10.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from protocol.hw.fields import (
    NO_PASID,
    Field,
    Layout,
    at,
    covered,
    flag,
    load,
    page_at,
    require_zero,
    store,
)
from protocol.units import Iova, Pasid, bits

FAULT_RECORD_SIZE: Final = 16


class FaultReason(IntEnum):
    """Names as in the manual with `.` for `_`; the group says which structure was being read."""

    RTA_1 = 0x30  # root table address invalid
    RTA_2 = 0x31  # request with PASID, but translation is not in scalable mode
    RTA_3 = 0x32  # page request, but translation is not in scalable mode
    RTA_4 = 0x33  # translation table mode reserved, or abort
    SRT_1 = 0x38  # root entry: access error
    SRT_2 = 0x39  # root entry: not present
    SRT_3 = 0x3A  # root entry: reserved field
    SCT_1 = 0x40  # context entry: access error
    SCT_2 = 0x41  # context entry: not present
    SCT_3 = 0x42  # context entry: reserved field
    SCT_4 = 0x43  # context entry: invalid
    SCT_5 = 0x44  # ATS or translated request while DTE = 0
    SCT_6 = 0x45  # request with PASID while PASIDE = 0
    SCT_7 = 0x46  # PASID beyond the directory
    SCT_8 = 0x47  # page request while PRE = 0
    SCT_9 = 0x48  # RID_PASID field in error
    SPD_1 = 0x50  # PASID directory entry: access error
    SPD_2 = 0x51  # PASID directory entry: not present
    SPD_3 = 0x52  # PASID directory entry: reserved field
    SPT_1 = 0x58  # PASID entry: access error
    SPT_2 = 0x59  # PASID entry: not present
    SPT_3 = 0x5A  # PASID entry: reserved field
    SPT_4 = 0x5B  # PASID entry: PGTT or AW invalid, or the unit lacks the capability
    SPT_5 = 0x5C  # execute request while ERE = 0
    SPT_6 = 0x5D  # supervisor request while SRE = 0
    SFS_1 = 0x70  # first stage: access error
    SFS_2 = 0x71  # first stage: not present
    SFS_3 = 0x72  # first stage: reserved field
    SFS_4 = 0x73  # first stage: root access error
    SFS_5 = 0x74  # first stage, nested: address beyond width
    SFS_6 = 0x75  # first stage: no read permission
    SFS_7 = 0x76  # first stage: no read permission, second case
    SFS_8 = 0x77  # first stage: no write permission
    SSS_1 = 0x78  # second stage: access error reading an entry
    SSS_2 = 0x79  # second stage: entry with R = W = 0 (not present)
    SSS_3 = 0x7A  # second stage: reserved field in a present entry
    SSS_4 = 0x7B  # second stage: SSPTPTR invalid
    SSS_5 = 0x7C  # second stage: A/D update needed, but the walk does not snoop
    SSS_6 = 0x7D  # second stage: A/D update failed
    SGN_1 = 0x80  # first-stage address not canonical
    SGN_2 = 0x81  # first stage: user/supervisor privilege
    SGN_3 = 0x82  # execute permission
    SGN_4 = 0x83  # address beyond what the hardware translates
    SGN_5 = 0x84  # second-stage input address beyond the width of AW
    SGN_6 = 0x85  # no write permission
    SGN_7 = 0x86  # no read permission
    SGN_8 = 0x87  # output address in the interrupt range
    SGN_9 = 0x88
    SGN_10 = 0x89
    SFS_9 = 0x90  # first stage: A/D update needed, but the walk does not snoop
    SFS_10 = 0x91  # first stage: A/D update failed


RECOVERABLE: Final = frozenset({FaultReason.SSS_2, FaultReason.SGN_6, FaultReason.SGN_7})

# Up to the entry that holds FPD nothing can be hidden: it was not found, or could not be read.
_UNQUALIFIED: Final = frozenset(
    {
        FaultReason.RTA_1,
        FaultReason.RTA_2,
        FaultReason.RTA_3,
        FaultReason.RTA_4,
        FaultReason.SRT_1,
        FaultReason.SRT_2,
        FaultReason.SRT_3,
        FaultReason.SCT_1,
        FaultReason.SPD_1,
        FaultReason.SPT_1,
    }
)
QUALIFIED: Final = frozenset(FaultReason) - _UNQUALIFIED

assert RECOVERABLE <= QUALIFIED


class FaultType(IntEnum):
    """T1 as the high, T2 as the low bit."""

    WRITE = 0
    PAGE_REQUEST = 1
    READ = 2
    ATOMIC = 3


class AddressType(IntEnum):
    """The AT field of the request [PCIe 10.2]."""

    UNTRANSLATED = 0
    TRANSLATION_REQUEST = 1
    TRANSLATED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRecord:
    sid: int
    addr: Iova  # of the page
    reason: int  # a FaultReason, or a code of a mode the model does not have
    type: FaultType
    at: AddressType = AddressType.UNTRANSLATED
    pasid_present: bool = False
    pasid: Pasid = NO_PASID
    exec: bool = False
    priv: bool = False
    f: bool = True  # a fault is recorded here

    def to_bytes(self) -> bytes:
        return store(LAYOUT.pack(self), FAULT_RECORD_SIZE)

    @classmethod
    def from_bytes(cls, raw: bytes) -> FaultRecord:
        """FormatError for a wrong length, a reserved bit, or the reserved address type."""
        word = load(raw, FAULT_RECORD_SIZE, "fault record")
        require_zero(word, RESERVED, "fault record")
        return cls(**LAYOUT.unpack(word))


LAYOUT: Final = Layout(
    {
        "addr": page_at(63, 12, Iova),
        "sid": at(79, 64),
        "type": Field(((92, 92), (126, 126)), FaultType),
        "priv": flag(93),
        "exec": flag(94),
        "pasid_present": flag(95),
        "reason": at(103, 96),
        "pasid": at(123, 104, Pasid),
        "at": at(125, 124, AddressType),
        "f": flag(127),
    }
)

RESERVED: Final = bits(127, 0) & ~covered(LAYOUT)

assert bits(11, 0) | bits(91, 80) == RESERVED
