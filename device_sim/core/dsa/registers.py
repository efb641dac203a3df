"""BAR 0: what a read of the device's registers gives, and what a write to them does.

Models the register map of [DSA 9], the tables of groups and queues behind it included.  A read may have any
place and size; a write that is not exactly a register software may write, or a dword or qword of a table, is
ignored, as are writes to what the device's state locks: groups and the sizes of queues while it is enabled, a
queue's registers while that queue is.
"""

from __future__ import annotations

from typing import Final

from device_sim.core.dsa.device import CMDCAP, ENGINES, GENCAP, GROUPS, OPCAP, WORK_QUEUES, WQCAP, Dsa
from protocol.hw.dsa_regs import (
    GRPCFG_BYTES,
    GRPCFG_TABLE,
    GRPCFG_WQS_BYTES,
    OPCAP_BYTES,
    TABLE_UNIT,
    VERSION_1,
    WQCFG_BYTES,
    WQCFG_TABLE,
    Cause,
    CommandWord,
    DsaReg,
    SoftwareError,
    State,
)
from protocol.hw.fields import FormatError, store

GRPCFG_AT: Final = 0x400
WQCFG_AT: Final = 0x500
BAR_BYTES: Final = 0x1000
_GRPCFG_END: Final = GRPCFG_AT + GROUPS * GRPCFG_BYTES
_WQCFG_END: Final = WQCFG_AT + WORK_QUEUES * WQCFG_BYTES
_CAPABILITIES: Final[dict[int, bytes]] = {
    DsaReg.VERSION: store(VERSION_1, 4),
    DsaReg.GENCAP: GENCAP.to_bytes(),
    DsaReg.WQCAP: WQCAP.to_bytes(),
    DsaReg.GRPCAP: store(GROUPS, 8),
    DsaReg.ENGCAP: store(ENGINES, 8),
    DsaReg.OPCAP: store(OPCAP, OPCAP_BYTES),
    DsaReg.OFFSETS: store(
        GRPCFG_TABLE.put(GRPCFG_AT // TABLE_UNIT) | WQCFG_TABLE.put(WQCFG_AT // TABLE_UNIT), 16
    ),
    DsaReg.CMDCAP: store(CMDCAP, 4),
}


def read(dsa: Dsa, offset: int, size: int) -> bytes:
    """What lies there; zeroes where nothing does."""
    bar, end = bytearray(BAR_BYTES), offset + size
    placed: dict[int, bytes] = {
        **_CAPABILITIES,
        DsaReg.GENCTRL: store(dsa.genctrl, 4),
        DsaReg.GENSTS: store(dsa.state, 4),
        DsaReg.INTCAUSE: store(dsa.intcause, 4),
        DsaReg.CMDSTS: dsa.command_status.to_bytes(),
        DsaReg.SWERR: dsa.software_error.to_bytes(),
    }
    if offset < _GRPCFG_END and end > GRPCFG_AT:
        for n, (queues, engines) in enumerate(zip(dsa.group_queues, dsa.group_engines, strict=True)):
            placed[GRPCFG_AT + n * GRPCFG_BYTES] = store(queues, GRPCFG_WQS_BYTES) + store(engines, 8)
    if offset < _WQCFG_END and end > WQCFG_AT:
        for queue in dsa.queues:
            placed[WQCFG_AT + queue.index * WQCFG_BYTES] = queue.registers.to_bytes()
    for at, raw in placed.items():
        bar[at : at + len(raw)] = raw
    return bytes(bar[offset:end]).ljust(size, b"\0")


def write(dsa: Dsa, offset: int, data: bytes) -> None:
    """Four or eight bytes, aligned."""
    if len(data) not in (4, 8) or offset % len(data):
        return
    value = int.from_bytes(data, "little")
    if GRPCFG_AT <= offset < _GRPCFG_END:
        _write_group(dsa, offset - GRPCFG_AT, data)
    elif WQCFG_AT <= offset < _WQCFG_END:
        _write_queue(dsa, offset - WQCFG_AT, data)
    elif offset == DsaReg.SWERR and value & 1:
        dsa.software_error = SoftwareError()  # valid and overflow, written as ones
    elif len(data) == 4:
        _write_dword(dsa, offset, value)


def _write_dword(dsa: Dsa, offset: int, value: int) -> None:
    if offset == DsaReg.GENCTRL:
        dsa.genctrl = value & 1
    elif offset == DsaReg.INTCAUSE:
        dsa.intcause &= ~Cause(value & (Cause.SWERR | Cause.CMD))
    elif offset == DsaReg.CMD:
        dsa.write_command(CommandWord.from_bytes(store(value, 4)))


def _write_group(dsa: Dsa, at: int, data: bytes) -> None:
    if dsa.state is not State.DISABLED:
        return
    group, offset = divmod(at, GRPCFG_BYTES)
    raw = bytearray(store(dsa.group_queues[group], GRPCFG_WQS_BYTES) + store(dsa.group_engines[group], 8))
    if offset < len(raw):
        raw[offset : offset + len(data)] = data
        dsa.group_queues[group] = int.from_bytes(raw[:GRPCFG_WQS_BYTES], "little")
        dsa.group_engines[group] = int.from_bytes(raw[GRPCFG_WQS_BYTES:], "little")


def _write_queue(dsa: Dsa, at: int, data: bytes) -> None:
    index, offset = divmod(at, WQCFG_BYTES)
    queue = dsa.queues[index]
    raw = bytearray(queue.registers.to_bytes())
    raw[offset : offset + len(data)] = data
    try:
        queue.write_registers(bytes(raw), size_too=dsa.state is State.DISABLED)
    except FormatError:
        return  # a state that is none: read-only anyway
