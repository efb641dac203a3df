"""What is left of a descriptor that ended in a page fault, as a descriptor.

Models how software goes on after status 3 [DSA 8.2]: it touches the page and submits the rest.  Addresses
move by the bytes completed, patterns by their phase, a CRC takes the one told as its seed.  A move that went
backwards keeps its addresses.  Delta records are begun again: to make or to apply one twice is to do it once,
and a record's rest does not begin where a record may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from protocol.hw import dsa
from protocol.hw.dsa import (
    PATTERN_BYTES,
    WORK_DESCRIPTOR_SIZE,
    CompletionRecord,
    CrcFlag,
    Descriptor,
    Flag,
    Opcode,
)
from protocol.hw.fields import Field

# Which of source and destination are addresses that move on.
MOVING: Final[Mapping[int, tuple[bool, bool]]] = {
    **dict.fromkeys((Opcode.MEMMOVE, Opcode.COMPARE, Opcode.DUALCAST, Opcode.COPY_CRC), (True, True)),
    **dict.fromkeys((Opcode.COMPVAL, Opcode.CRCGEN), (True, False)),
    **dict.fromkeys((Opcode.MEMFILL, Opcode.CFLUSH), (False, True)),
}


def rest_of(d: Descriptor, record: CompletionRecord) -> Descriptor:
    """The descriptor that does what `d` has not done."""
    done = record.bytes_completed
    if d.opcode == Opcode.BATCH:
        return replace(d, src=d.src + done * WORK_DESCRIPTOR_SIZE, size=d.size - done)
    if d.opcode not in MOVING:
        return d
    if d.opcode == Opcode.MEMMOVE and record.result:
        return replace(d, size=d.size - done)
    src, dst = MOVING[d.opcode]
    rest = replace(d, src=d.src + src * done, dst=d.dst + dst * done, size=d.size - done)
    if d.opcode == Opcode.MEMFILL:
        rest = replace(rest, src=rotated(d.src, done))
    elif d.opcode == Opcode.COMPVAL:
        rest = replace(rest, dst=rotated(d.dst, done))
    elif d.opcode == Opcode.DUALCAST:
        rest = _with_operand(rest, dsa.DEST2, d.op(dsa.DEST2) + done)
    elif done and d.opcode in (Opcode.CRCGEN, Opcode.COPY_CRC):
        rest = _with_operand(rest, dsa.CRC_SEED, record.op(dsa.CRC_VALUE))
        rest = replace(rest, flags=rest.flags & ~Flag(CrcFlag.READ_SEED))
    return rest


def rotated(pattern: int, done: int) -> int:
    """The pattern as it goes on after `done` bytes."""
    raw = pattern.to_bytes(PATTERN_BYTES, "little")
    phase = done % PATTERN_BYTES
    return int.from_bytes(raw[phase:] + raw[:phase], "little")


def _with_operand(d: Descriptor, field: Field, value: int) -> Descriptor:
    word = int.from_bytes(d.op_specific, "little") & ~field.mask | field.put(value)
    return replace(d, op_specific=word.to_bytes(len(d.op_specific), "little"))
