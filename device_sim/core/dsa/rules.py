"""What a descriptor must be before it runs: flags, fields and limits of every opcode, as one table.

Models the checks of [DSA 5.4, 5.5] in the order: opcode, reserved fields, flags, privilege, interrupt handle,
alignment of the completion record, and then what the operation asks for.  A field no row names is reserved
for that opcode; so are the interrupt handle without RCI and the record's address without CRAV.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from device_sim.core.dsa import delta
from device_sim.core.dsa.result import JobResult
from device_sim.core.dsa.wq import Job
from protocol.hw import dsa
from protocol.hw.dsa import CrcFlag, Descriptor, DrainFlag, Flag, Opcode, Status
from protocol.hw.dsa_regs import WqCfg
from protocol.hw.fields import Field, store
from protocol.units import PAGE_OFFSET_MASK, bits

MSIX_ENTRIES: Final = 2048
MIN_BATCH: Final = 2
CRC_BYTES: Final = 4

Check = Callable[[Descriptor, WqCfg], Status | None]

_COMMON: Final = Flag.CRAV | Flag.RCR | Flag.RCI | Flag.CRSTS | Flag.CR_TCS
_A1, _A2, _A3 = Flag.ADDR1_TCS, Flag.ADDR2_TCS, Flag.ADDR3_TCS
_READS: Final = _COMMON | Flag.BOF
_WRITES: Final = _READS | Flag.CC | Flag.STORD
_RECORD: Final = Flag.CRAV | Flag.RCR  # what an operation is for, where its result is in the record alone
_CRC_FLAGS: Final = CrcFlag.READ_SEED | CrcFlag.BYPASS_INVERT | CrcFlag.BYPASS_REFLECT
_DRAIN_FLAGS: Final = (
    DrainFlag.READBACK1 | DrainFlag.READBACK2 | DrainFlag.SUPPRESS_TC_A | DrainFlag.SUPPRESS_TC_B
)
_OPERANDS: Final = bits(8 * dsa.WORK_DESCRIPTOR_SIZE - 1, 128)  # of a descriptor, behind the record's address
_SRC, _DST, _SIZE = (dsa.LAYOUT[name] for name in ("src", "dst", "size"))
_INT_HANDLE: Final = dsa.LAYOUT["int_handle"].mask
_RECORD_ADDR: Final = dsa.LAYOUT["completion_addr"].mask
_OP_SPECIFIC_SHIFT: Final = 8 * (dsa.WORK_DESCRIPTOR_SIZE - dsa.OP_SPECIFIC_SIZE)


@dataclass(frozen=True, slots=True)
class Rule:
    flags: int
    reserved: int
    checks: tuple[Check, ...]
    required: int = 0  # flags


def _rule(
    flags: int,
    fields: tuple[Field, ...],
    *checks: Check,
    specific: tuple[Field, ...] = (),
    required: int = 0,
) -> Rule:
    used = _INT_HANDLE
    for field in fields:
        used |= field.mask
    for field in specific:
        used |= field.mask << _OP_SPECIFIC_SHIFT
    return Rule(int(flags), dsa.RESERVED | _OPERANDS & ~used, checks, int(required))


# -- checks --------------------------------------------------------------------------------------------


def _transfer_size(d: Descriptor, limits: WqCfg) -> Status | None:
    return None if 0 < d.size <= 1 << limits.max_xfer_shift else Status.TRANSFER_SIZE


def _batch_count(d: Descriptor, limits: WqCfg) -> Status | None:
    return None if MIN_BATCH <= d.size <= 1 << limits.max_batch_shift else Status.DESC_COUNT


def _list_alignment(d: Descriptor, limits: WqCfg) -> Status | None:
    return Status.DESC_LIST_ALIGN if d.src % dsa.WORK_DESCRIPTOR_SIZE else None


def _overlap(a: int, a_size: int, b: int, b_size: int) -> bool:
    return a < b + b_size and b < a + a_size


def _copy_apart(d: Descriptor, limits: WqCfg) -> Status | None:
    return Status.OVERLAP if _overlap(d.src, d.size, d.dst, d.size) else None


def _dualcast_offsets(d: Descriptor, limits: WqCfg) -> Status | None:
    return Status.DUALCAST_ALIGN if (d.dst ^ d.op(dsa.DEST2)) & PAGE_OFFSET_MASK else None


def _dualcast_apart(d: Descriptor, limits: WqCfg) -> Status | None:
    second = d.op(dsa.DEST2)
    pairs = ((d.src, d.dst), (d.src, second), (d.dst, second))
    return Status.OVERLAP if any(_overlap(a, d.size, b, d.size) for a, b in pairs) else None


def _source_size(d: Descriptor, limits: WqCfg) -> Status | None:
    return Status.TRANSFER_SIZE if d.size > delta.MAX_SOURCE else None


def _whole_words(d: Descriptor, limits: WqCfg) -> Status | None:
    return Status.ADDR_ALIGN if (d.src | d.dst | d.size) % delta.WORD else None


def _seed_aligned(d: Descriptor, limits: WqCfg) -> Status | None:
    reads = d.flags & CrcFlag.READ_SEED
    return Status.ADDR_ALIGN if reads and d.op(dsa.CRC_SEED_ADDR) % CRC_BYTES else None


def _largest_delta(d: Descriptor, limits: WqCfg) -> Status | None:
    size = d.op(dsa.MAX_DELTA_SIZE)
    return Status.DELTA_SIZE if size < delta.MIN_MAX_SIZE or size % delta.ENTRY.size else None


def _delta_size(d: Descriptor, limits: WqCfg) -> Status | None:
    size = d.op(dsa.DELTA_REC_SIZE)
    largest = delta.MAX_SOURCE // delta.WORD * delta.ENTRY.size
    return None if 0 < size <= largest and size % delta.ENTRY.size == 0 else Status.DELTA_SIZE


def _delta_made_aligned(d: Descriptor, limits: WqCfg) -> Status | None:
    return Status.ADDR_ALIGN if d.op(dsa.DELTA_ADDR) % delta.WORD else None


def _delta_made_apart(d: Descriptor, limits: WqCfg) -> Status | None:
    at, size = d.op(dsa.DELTA_ADDR), d.op(dsa.MAX_DELTA_SIZE)
    overlaps = any(_overlap(at, size, source, d.size) for source in (d.src, d.dst))
    return Status.OVERLAP if overlaps else None


def _delta_applied_apart(d: Descriptor, limits: WqCfg) -> Status | None:
    overlaps = _overlap(d.src, d.op(dsa.DELTA_REC_SIZE), d.dst, d.size)
    return Status.OVERLAP if overlaps else None


_COMPARED = (dsa.EXPECTED_RESULT,)
_CRC_OPERANDS = (dsa.CRC_SEED, dsa.CRC_SEED_ADDR)
_DELTA_MADE = (dsa.DELTA_ADDR, dsa.MAX_DELTA_SIZE, dsa.EXPECTED_RESULT_MASK)
_BOTH = (_SRC, _DST, _SIZE)

RULES: Final[dict[int, Rule]] = {
    Opcode.NOOP: _rule(_COMMON, ()),
    Opcode.BATCH: _rule(_COMMON | _A1, (_SRC, _SIZE), _batch_count, _list_alignment),
    Opcode.DRAIN: _rule(_COMMON | _A1 | _A2 | _DRAIN_FLAGS, (_SRC, _DST)),
    Opcode.MEMMOVE: _rule(_WRITES | _A1 | _A2, _BOTH, _transfer_size),
    Opcode.MEMFILL: _rule(_WRITES | _A2, _BOTH, _transfer_size),
    Opcode.COMPARE: _rule(
        _READS | Flag.CR | _A1 | _A2, _BOTH, _transfer_size, specific=_COMPARED, required=_RECORD
    ),
    Opcode.COMPVAL: _rule(
        _READS | Flag.CR | _A1, _BOTH, _transfer_size, specific=_COMPARED, required=_RECORD
    ),
    Opcode.CR_DELTA: _rule(
        _WRITES | Flag.CR | _A1 | _A2 | _A3,
        _BOTH,
        *(_transfer_size, _source_size, _whole_words, _largest_delta, _delta_made_aligned, _delta_made_apart),
        specific=_DELTA_MADE,
        required=_RECORD,
    ),
    Opcode.AP_DELTA: _rule(
        _WRITES | _A1 | _A2,
        _BOTH,
        *(_transfer_size, _source_size, _whole_words, _delta_size, _delta_applied_apart),
        specific=(dsa.DELTA_REC_SIZE,),
    ),
    Opcode.DUALCAST: _rule(
        _WRITES | _A1 | _A2 | _A3,
        _BOTH,
        *(_transfer_size, _dualcast_offsets, _dualcast_apart),
        specific=(dsa.DEST2,),
    ),
    Opcode.CRCGEN: _rule(
        _READS | _A1 | _A3 | _CRC_FLAGS,
        (_SRC, _SIZE),
        *(_transfer_size, _seed_aligned),
        specific=_CRC_OPERANDS,
        required=_RECORD,
    ),
    Opcode.COPY_CRC: _rule(
        _WRITES | _A1 | _A2 | _A3 | _CRC_FLAGS,
        _BOTH,
        *(_transfer_size, _seed_aligned, _copy_apart),
        specific=_CRC_OPERANDS,
        required=_RECORD,
    ),
    Opcode.CFLUSH: _rule(_WRITES | _A2, (_DST, _SIZE), _transfer_size),
}
NOT_IN_A_BATCH: Final = (Opcode.BATCH, Opcode.DRAIN)

_FENCE, _CRAV, _RCR, _RCI, _BOF, _CR_TCS = (
    int(flag) for flag in (Flag.FENCE, Flag.CRAV, Flag.RCR, Flag.RCI, Flag.BOF, Flag.CR_TCS)
)
_READ_BACKS: Final = ((int(DrainFlag.READBACK1), int(_A1)), (int(DrainFlag.READBACK2), int(_A2)))


def refusal(job: Job) -> JobResult | None:
    """What is wrong with it, or None."""
    d = job.descriptor
    rule = RULES.get(d.opcode)
    if rule is None or (job.batch is not None and d.opcode in NOT_IN_A_BATCH):
        return JobResult(Status.BAD_OPCODE)
    if int.from_bytes(job.raw, "little") & (rule.reserved | _reserved_without(job.flags)):
        return JobResult(Status.NOZERO_RESERVED)
    invalid = _invalid_flags(job, rule)
    if invalid:
        return JobResult(Status.INVALID_FLAGS, specific=store(invalid, dsa.CR_SPECIFIC_SIZE))
    limits = job.queue.config
    if d.priv and job.batch is None and not limits.dedicated and not limits.priv:
        return JobResult(Status.PRIVILEGE)
    if not valid_handle(job):
        return JobResult(Status.INT_HANDLE)
    if job.flags & _CRAV and d.completion_addr % dsa.COMPLETION_SIZE:
        return JobResult(Status.CR_ALIGN)
    for check in rule.checks:
        status = check(d, limits)
        if status is not None:
            return JobResult(status)
    return None


def _invalid_flags(job: Job, rule: Rule) -> int:
    flags = job.flags
    allowed = rule.flags
    if job.batch is not None:
        allowed |= _FENCE
    if not job.queue.config.block_on_fault:
        allowed &= ~_BOF
    if not flags & _CRAV:
        allowed &= ~(_RCR | _CR_TCS)
    if job.descriptor.opcode == Opcode.DRAIN:
        for valid, tcs in _READ_BACKS:
            if not flags & valid:
                allowed &= ~tcs
        missing = 0 if flags & (_RCR | _RCI) else _RCR | _RCI
    else:
        missing = rule.required & ~flags
    return flags & ~allowed | missing


def _reserved_without(flags: int) -> int:
    return (0 if flags & _RCI else _INT_HANDLE) | (0 if flags & _CRAV else _RECORD_ADDR)


def valid_handle(job: Job) -> bool:
    """An interrupt that is asked for has an entry in the MSI-X table; the first one is the device's own."""
    return not job.flags & _RCI or 0 < job.descriptor.int_handle < MSIX_ENTRIES
