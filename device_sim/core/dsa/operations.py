"""What each operation does to memory: a flow an opcode, in one table.

Models the operations of [DSA 8.1] that an engine runs.  An operation moves forward as far as its operands are
reached and keeps `JobResult.completed` true at every wait, so that a fault in the middle leaves a record from
which software can resume.  Only a move onto its own tail goes backwards, and says so (result 1).

Departures: DIF, DIX and translation fetch are no operations of this device, nor is the 16-byte fill pattern.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from device_sim.core.dsa import crc32c, delta
from device_sim.core.dsa.dma import Dma
from device_sim.core.dsa.result import JobResult
from device_sim.core.function import DmaRange
from protocol.flow import Flow
from protocol.hw import dsa
from protocol.hw.dsa import (
    DIFFERENT,
    EQUAL,
    PATTERN_BYTES,
    CrcFlag,
    Descriptor,
    Flag,
    Opcode,
    Status,
)
from protocol.units import PAGE_OFFSET_MASK, Iova

SEED_BYTES: Final = 4
DELTA_TOO_LARGE = 2
BACKWARD = 1  # result of a move that did not end
_CRC = struct.Struct("<Q8x")
_DELTA_SIZE = struct.Struct("<I12x")

Operation = Callable[[Dma, Descriptor, JobResult], Flow[None]]


async def _nothing(dma: Dma, d: Descriptor, out: JobResult) -> None:
    """NOOP."""


# -- move and fill -------------------------------------------------------------------------------------


# awaits: copy, dma, src, dst, size, out: cannot change: the descriptor's own operands and what is done of it
async def _move(dma: Dma, d: Descriptor, out: JobResult) -> None:
    src, dst, size = Iova(d.src), Iova(d.dst), d.size
    if src < dst < src + size:
        await _move_backward(dma, d, out)
        return
    copy = dma.function.copy
    while True:
        done = out.completed
        out.completed += copy(Iova(src + done), Iova(dst + done), size - done)
        if out.completed == size:
            return
        await dma.reach(out.completed, size, (src, False), (dst, True))


# awaits: dma, rest, count, out: cannot change: the descriptor's own operands and what is done of it
async def _move_backward(dma: Dma, d: Descriptor, out: JobResult) -> None:
    """The destination begins inside the source: from the end, a page at a time, unless all of it is there."""
    out.result = BACKWARD
    while out.completed < d.size:
        rest = d.size - out.completed
        count = _reached_together(dma, d, rest)
        if not count:
            last = rest - 1
            count = 1 + min((d.src + last) & PAGE_OFFSET_MASK, (d.dst + last) & PAGE_OFFSET_MASK, last)
            start = rest - count
            await dma.reach_ranges(
                [DmaRange(Iova(d.src + start), count, False), DmaRange(Iova(d.dst + start), count, True)]
            )
        start = rest - count
        dma.store(Iova(d.dst + start), dma.load(Iova(d.src + start), count))
        out.completed += count
    out.result = 0


def _reached_together(dma: Dma, d: Descriptor, rest: int) -> int:
    """`rest`, if that much of both operands is accessible; or 0."""
    source, target = DmaRange(Iova(d.src), rest, False), DmaRange(Iova(d.dst), rest, True)
    reached = dma.function.accessible
    return rest if reached(source) == reached(target) == rest else 0


# awaits: dma, data, out: cannot change: the descriptor's own operands and what is done of it
async def _fill(dma: Dma, d: Descriptor, out: JobResult) -> None:
    data = _repeated(d.src, d.size)
    while out.completed < d.size:
        count = await dma.reach(out.completed, d.size, (Iova(d.dst), True))
        dma.store(Iova(d.dst + out.completed), data[out.completed : out.completed + count])
        out.completed += count


def _repeated(pattern: int, size: int) -> bytes:
    return (pattern.to_bytes(PATTERN_BYTES, "little") * (size // PATTERN_BYTES + 1))[:size]


# awaits: dma, done, second, out: cannot change: the descriptor's own operands and what is done of it
async def _dualcast(dma: Dma, d: Descriptor, out: JobResult) -> None:
    second = Iova(d.op(dsa.DEST2))
    while out.completed < d.size:
        done = out.completed
        count = await dma.reach(done, d.size, (Iova(d.src), False), (Iova(d.dst), True), (second, True))
        data = dma.load(Iova(d.src + done), count)
        dma.store(Iova(d.dst + done), data)
        dma.store(Iova(second + done), data)
        out.completed += count


# awaits: dma, out: cannot change: the descriptor's own operands and what is done of it
async def _flush(dma: Dma, d: Descriptor, out: JobResult) -> None:
    """CFLUSH: memory here has no cache before it; what remains is that every page is reached."""
    while out.completed < d.size:
        done = await dma.reach(out.completed, d.size, (Iova(d.dst), False))
        out.completed += done


# -- comparisons ---------------------------------------------------------------------------------------


# awaits: dma, done, out: cannot change: the descriptor's own operands and what is done of it
async def _compare(dma: Dma, d: Descriptor, out: JobResult) -> None:
    while out.completed < d.size and out.result == EQUAL:
        done = out.completed
        count = await dma.reach(done, d.size, (Iova(d.src), False), (Iova(d.dst), False))
        _compare_piece(out, dma.load(Iova(d.src + done), count), dma.load(Iova(d.dst + done), count))
    _predicate(d, out)


# awaits: dma, done, expected, out: cannot change: the descriptor's own operands and what is done of it
async def _compare_pattern(dma: Dma, d: Descriptor, out: JobResult) -> None:
    expected = _repeated(d.dst, d.size)
    while out.completed < d.size and out.result == EQUAL:
        done = out.completed
        count = await dma.reach(done, d.size, (Iova(d.src), False))
        _compare_piece(out, dma.load(Iova(d.src + done), count), expected[done : done + count])
    if out.result == DIFFERENT:
        out.completed -= out.completed % PATTERN_BYTES
    _predicate(d, out)


def _compare_piece(out: JobResult, first: bytes, second: bytes) -> None:
    if first == second:
        out.completed += len(first)
    else:
        out.completed += first_difference(first, second)
        out.result = DIFFERENT
        out.tell_completed = True


def first_difference(first: bytes, second: bytes) -> int:
    """The index of the first byte of two unequal strings that differs, found by halving."""
    low, high = 0, len(first)
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _predicate(d: Descriptor, out: JobResult) -> None:
    """Check result: the status tells whether the result is the expected one."""
    if Flag.CR in d.flags and out.result != d.op(dsa.EXPECTED_RESULT):
        out.status = Status.SUCCESS_PREDICATE


# -- CRC -----------------------------------------------------------------------------------------------


# awaits: dma, done, operands, raw, as_read, register, out: cannot change: the descriptor's own operands and
# what is done of it
async def _crc(dma: Dma, d: Descriptor, out: JobResult) -> None:
    """CRCGEN, and COPY_CRC, whose destination gets what was read."""
    seed = d.op(dsa.CRC_SEED)
    if d.flags & CrcFlag.READ_SEED:
        seed = int.from_bytes(await dma.read(Iova(d.op(dsa.CRC_SEED_ADDR)), SEED_BYTES), "little")
    raw = bool(d.flags & CrcFlag.BYPASS_INVERT)
    as_read = bool(d.flags & CrcFlag.BYPASS_REFLECT)
    operands = [(Iova(d.src), False)] + ([(Iova(d.dst), True)] if d.opcode == Opcode.COPY_CRC else [])
    register = crc32c.reflect32(seed) if raw else seed ^ crc32c.INVERT
    out.specific = _CRC.pack(seed)
    while out.completed < d.size:
        done = out.completed
        count = await dma.reach(done, d.size, *operands)
        data = dma.load(Iova(d.src + done), count)
        if d.opcode == Opcode.COPY_CRC:
            dma.store(Iova(d.dst + done), data)
        register = crc32c.update(register, data.translate(crc32c.REVERSED_BYTES) if as_read else data)
        out.completed += count
        out.specific = _CRC.pack(crc32c.reflect32(register) if raw else register ^ crc32c.INVERT)


# -- delta records -------------------------------------------------------------------------------------


# awaits: dma, at, largest, made, done, count, first, entries, fits, out: cannot change: the descriptor's own
# operands and what is done of it
async def _create_delta(dma: Dma, d: Descriptor, out: JobResult) -> None:
    at, largest = d.op(dsa.DELTA_ADDR), d.op(dsa.MAX_DELTA_SIZE)
    made = 0
    while out.completed < d.size and out.result != DELTA_TOO_LARGE:
        done = out.completed
        reached = await dma.reach(done, d.size, (Iova(d.src), False), (Iova(d.dst), False))
        count = max(reached - reached % delta.WORD, delta.WORD)  # a word may lie across two pages
        first = await dma.read(Iova(d.src + done), count)
        second = await dma.read(Iova(d.dst + done), count)
        entries = delta.differences(first, second, done)
        fits = min(len(entries), largest - made)
        await dma.write(Iova(at + made), entries[:fits])
        made += fits
        out.specific = _DELTA_SIZE.pack(made)
        if fits < len(entries):
            out.completed = delta.ENTRY.unpack_from(entries, fits)[0] * delta.WORD
            out.result = DELTA_TOO_LARGE
            out.tell_completed = True
        else:
            out.completed += count
            out.result = DIFFERENT if made else EQUAL
    if Flag.CR in d.flags and not d.op(dsa.EXPECTED_RESULT_MASK) >> out.result & 1:
        out.status = Status.SUCCESS_PREDICATE


# awaits: dma, size, last, each offset, offset, out: cannot change: the descriptor's own operands and what is
# done of it
async def _apply_delta(dma: Dma, d: Descriptor, out: JobResult) -> None:
    """`completed` counts bytes of the delta record."""
    size, last = d.op(dsa.DELTA_REC_SIZE), -1
    while out.completed < size:
        reached = await dma.reach(out.completed, size, (Iova(d.src), False))
        count = max(reached - reached % delta.ENTRY.size, delta.ENTRY.size)
        record = await dma.read(Iova(d.src + out.completed), count)
        for offset, word in delta.entries(record, last, d.size):
            await dma.write(Iova(d.dst + offset), word)
            last = offset // delta.WORD
            out.completed += delta.ENTRY.size


OPERATIONS: Final[dict[int, Operation]] = {
    Opcode.NOOP: _nothing,
    Opcode.MEMMOVE: _move,
    Opcode.MEMFILL: _fill,
    Opcode.COMPARE: _compare,
    Opcode.COMPVAL: _compare_pattern,
    Opcode.CR_DELTA: _create_delta,
    Opcode.AP_DELTA: _apply_delta,
    Opcode.DUALCAST: _dualcast,
    Opcode.CRCGEN: _crc,
    Opcode.COPY_CRC: _crc,
    Opcode.CFLUSH: _flush,
}
