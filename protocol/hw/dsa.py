"""Data Streaming Accelerator: the work descriptor and the completion record.

Models the 64-byte descriptor [DSA 8.1] a driver submits through a portal, and the 32-byte record
[DSA 8.2] the device writes back, its status as [DSA table 5-6].  Positions are byte offsets.  Must hold:
  - the status byte is written last, after the other 31 bytes: software polls it, having zeroed it;
  - with a page fault in the status, `fault_addr` names the page and bit 7 of the status byte says
    whether the access was a write; `bytes_completed` says where to resume;
  - what a descriptor says wrong is answered in its completion record, so from_bytes() refuses only a
    wrong length: the engine asks reserved_violation() (status 0x12) and knows its opcodes (0x10).
The model leaves `fault_info` zero (docs/decisions/0008-departures.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from protocol.hw.fields import (
    NO_IOVA,
    NO_PASID,
    Field,
    Layout,
    at,
    byte_at,
    covered,
    flag,
    load,
    require_zero,
    store,
)
from protocol.units import Iova, Pasid, bit, bits

WORK_DESCRIPTOR_SIZE: Final = 64
PATTERN_BYTES: Final = 8  # what a fill repeats and a comparison with a pattern looks for
EQUAL, DIFFERENT = 0, 1  # results of comparisons, and of the creation of a delta record
COMPLETION_SIZE: Final = 32
OP_SPECIFIC_SIZE: Final = 24
CR_SPECIFIC_SIZE: Final = 16
FAULT_CAPABILITIES: Final = ("full", "partial", "none")  # on which paths a device survives an absent page


class Opcode(IntEnum):
    NOOP = 0x00
    BATCH = 0x01
    DRAIN = 0x02
    MEMMOVE = 0x03
    MEMFILL = 0x04
    COMPARE = 0x05
    COMPVAL = 0x06
    CR_DELTA = 0x07
    AP_DELTA = 0x08
    DUALCAST = 0x09
    TRANSL_FETCH = 0x0A
    CRCGEN = 0x10
    COPY_CRC = 0x11
    DIF_CHECK = 0x12
    DIF_INS = 0x13
    DIF_STRP = 0x14
    DIF_UPDT = 0x15
    DIX_GEN = 0x17
    CFLUSH = 0x20


class Flag(IntFlag):
    """Bits 15:0 of the flags; 23:16 depend on the opcode."""

    FENCE = bit(0)  # in a batch: wait for the earlier ones, stop if one failed
    BOF = bit(1)  # block on fault
    CRAV = bit(2)  # completion record address valid
    RCR = bit(3)  # request completion record
    RCI = bit(4)  # request completion interrupt
    CRSTS = bit(5)
    CR = bit(7)  # check result
    CC = bit(8)  # cache control
    ADDR1_TCS = bit(9)
    ADDR2_TCS = bit(10)
    ADDR3_TCS = bit(11)
    CR_TCS = bit(12)
    STORD = bit(13)
    DRDBK = bit(14)
    DSTS = bit(15)


NO_FLAGS: Final = Flag(0)
NEVER_BLOCK: Final = (Opcode.NOOP, Opcode.BATCH, Opcode.DRAIN)  # BOF in one of these is an invalid flag


class CrcFlag(IntFlag):
    READ_SEED = bit(16)
    BYPASS_INVERT = bit(17)
    BYPASS_REFLECT = bit(18)


class DrainFlag(IntFlag):
    READBACK1 = bit(16)
    READBACK2 = bit(17)
    SUPPRESS_TC_A = bit(18)
    SUPPRESS_TC_B = bit(19)


class Status(IntEnum):
    NONE = 0x00  # not written yet
    SUCCESS = 0x01
    SUCCESS_PREDICATE = 0x02  # the comparison gave another result than expected
    PAGE_FAULT_NOBOF = 0x03  # software touches the page and resubmits
    PAGE_FAULT_IR = 0x04  # the page request was answered Invalid Request, or in vain
    BATCH_FAIL = 0x05
    BATCH_PAGE_FAULT = 0x06  # on the list of descriptors
    DELTA_OFFSET_ORDER = 0x07
    DELTA_OFFSET_RANGE = 0x08
    DIF_ERROR = 0x09
    BAD_OPCODE = 0x10
    INVALID_FLAGS = 0x11
    NOZERO_RESERVED = 0x12
    TRANSFER_SIZE = 0x13
    DESC_COUNT = 0x14
    DELTA_SIZE = 0x15
    OVERLAP = 0x16
    DUALCAST_ALIGN = 0x17
    DESC_LIST_ALIGN = 0x18
    INT_HANDLE = 0x19
    CR_TRANSLATION_FAULT = 0x1A
    CR_ALIGN = 0x1B
    ADDR_ALIGN = 0x1C
    PRIVILEGE = 0x1D
    TRAFFIC_CLASS = 0x1E
    READBACK_FAULT = 0x1F
    HW_ERROR = 0x20
    HW_ERROR_READBACK = 0x21
    TRANSLATION_FAIL = 0x22  # UR or CA for a translation request, Response Failure for a page request
    DRAIN_EVENT_LOG = 0x26
    BATCH_EVENT_LOG = 0x27


PAGE_REFUSED: Final = (Status.PAGE_FAULT_IR, Status.TRANSLATION_FAIL)  # to ask for the page again is no use


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    opcode: int  # an Opcode, or what the engine refuses as one
    flags: Flag = NO_FLAGS
    pasid: Pasid = NO_PASID
    priv: bool = False
    completion_addr: Iova = NO_IOVA
    src: int = 0  # or pattern, descriptor list, delta record
    dst: int = 0  # or second source, pattern to compare with
    size: int = 0  # bytes; descriptors of a batch
    int_handle: int = 0
    op_specific: bytes = bytes(OP_SPECIFIC_SIZE)

    def op(self, field: Field) -> int:
        """One of the operands below, EXPECTED_RESULT and so on."""
        return field.get(int.from_bytes(self.op_specific, "little"))

    def to_bytes(self) -> bytes:
        assert len(self.op_specific) == OP_SPECIFIC_SIZE, f"{len(self.op_specific)} operation-specific bytes"
        return store(LAYOUT.pack(self), WORK_DESCRIPTOR_SIZE - OP_SPECIFIC_SIZE) + self.op_specific

    @classmethod
    def from_bytes(cls, raw: bytes) -> Descriptor:
        """FormatError for a wrong length only; see the head of this file."""
        word = load(raw, WORK_DESCRIPTOR_SIZE, "DSA descriptor")
        return cls(**LAYOUT.unpack(word), op_specific=raw[-OP_SPECIFIC_SIZE:])


LAYOUT: Final = Layout(
    {
        "pasid": at(19, 0, Pasid),
        "priv": flag(31),
        "flags": at(55, 32, Flag),
        "opcode": at(63, 56),
        "completion_addr": byte_at(8, 8, Iova),
        "src": byte_at(16, 8),
        "dst": byte_at(24, 8),
        "size": byte_at(32, 4),
        "int_handle": byte_at(36, 2),
    }
)
RESERVED: Final = bits(319, 0) & ~covered(LAYOUT)

assert bits(30, 20) | bits(319, 304) == RESERVED

# Operands in the 24 operation-specific bytes; offset 0 here is byte 40 of the descriptor.
EXPECTED_RESULT: Final = byte_at(0, 1)  # COMPARE, COMPVAL
DELTA_ADDR: Final = byte_at(0, 8, Iova)  # CR_DELTA
MAX_DELTA_SIZE: Final = byte_at(8, 4)
EXPECTED_RESULT_MASK: Final = byte_at(16, 1)
DELTA_REC_SIZE: Final = byte_at(0, 4)  # AP_DELTA
DEST2: Final = byte_at(0, 8, Iova)  # DUALCAST
CRC_SEED: Final = byte_at(0, 4)  # CRCGEN, COPY_CRC
CRC_SEED_ADDR: Final = byte_at(8, 8, Iova)


def op_bytes(*operands: tuple[Field, int]) -> bytes:
    """The operation-specific bytes that hold these operands: op_bytes((DEST2, iova))."""
    word = 0
    for field, value in operands:
        word |= field.put(value)
    return store(word, OP_SPECIFIC_SIZE)


def reserved_violation(raw: bytes) -> bool:
    """Is a bit set that no opcode uses?  The engine answers NOZERO_RESERVED."""
    return load(raw, WORK_DESCRIPTOR_SIZE, "DSA descriptor") & RESERVED != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRecord:
    status: Status
    write_fault: bool = False
    result: int = 0
    fault_info: int = 0
    bytes_completed: int = 0  # or descriptors completed
    fault_addr: Iova = NO_IOVA
    op_specific: bytes = bytes(CR_SPECIFIC_SIZE)

    def op(self, field: Field) -> int:
        """INVALID_FLAGS, DELTA_SIZE or CRC_VALUE."""
        return field.get(int.from_bytes(self.op_specific, "little"))

    def to_bytes(self) -> bytes:
        assert len(self.op_specific) == CR_SPECIFIC_SIZE, f"{len(self.op_specific)} operation-specific bytes"
        return store(CR_LAYOUT.pack(self), COMPLETION_SIZE - CR_SPECIFIC_SIZE) + self.op_specific

    @classmethod
    def from_bytes(cls, raw: bytes) -> CompletionRecord:
        """FormatError for a wrong length, a reserved bit, or a status without meaning."""
        word = load(raw, COMPLETION_SIZE, "completion record")
        require_zero(word, CR_RESERVED, "completion record")
        return cls(**CR_LAYOUT.unpack(word), op_specific=raw[-CR_SPECIFIC_SIZE:])


CR_LAYOUT: Final = Layout(
    {
        "status": at(6, 0, Status),
        "write_fault": flag(7),
        "result": byte_at(1, 1),
        "fault_info": byte_at(2, 1),
        "bytes_completed": byte_at(4, 4),
        "fault_addr": byte_at(8, 8, Iova),
    }
)
CR_RESERVED: Final = bits(127, 0) & ~covered(CR_LAYOUT)

assert bits(31, 24) == CR_RESERVED

# What an operation tells in the 16 bytes of the record that are its own.
INVALID_FLAGS: Final = byte_at(0, 3)  # status INVALID_FLAGS
DELTA_SIZE: Final = byte_at(0, 4)  # CR_DELTA
CRC_VALUE: Final = byte_at(0, 8)  # CRCGEN, COPY_CRC: the CRC of what was read
