"""Data Streaming Accelerator: the registers of BAR 0 that a driver reads and writes.

Models [DSA 9] as the kernel's driver uses it [idxd registers.h]: capabilities, configuration of queues and
groups, the command register and its status, and the software error register, where a descriptor ends up
that cannot be answered in a completion record.  Must hold:
  - reserved bits of a register are written as zero and ignored when read, as registers have it;
  - a record here is the whole register: from_bytes(to_bytes()) gives it back.
The names of the command errors are the kernel's, their meanings those of [DSA table 5-8].
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import ClassVar, Final, Self

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
    store,
)
from protocol.units import Iova, Pasid, bit


class DsaReg(IntEnum):
    """Offsets in BAR 0; OFFSETS says where the tables lie."""

    VERSION = 0x00
    GENCAP = 0x10
    WQCAP = 0x20
    GRPCAP = 0x30
    ENGCAP = 0x38
    OPCAP = 0x40
    OFFSETS = 0x60
    GENCFG = 0x80
    GENCTRL = 0x88
    GENSTS = 0x90
    INTCAUSE = 0x98
    CMD = 0xA0
    CMDSTS = 0xA8
    CMDCAP = 0xB0
    SWERR = 0xC0


VERSION_1: Final = 0x100
OPCAP_BYTES: Final = 32
TABLE_UNIT: Final = 0x100  # OFFSETS counts in these
GRPCFG_TABLE: Final = Field(((15, 0),))  # in OFFSETS
WQCFG_TABLE: Final = Field(((31, 16),))
GRPCFG_BYTES: Final = 64
GRPCFG_WQS_BYTES: Final = 32  # a bit a queue, then one qword with a bit an engine
WQCFG_BYTES: Final = 32
MISC_VECTOR: Final = 0  # the MSI-X entry of the device itself; descriptors name the others


class State(IntEnum):
    """GENSTS 1:0."""

    DISABLED = 0
    ENABLED = 1
    DRAIN = 2
    HALT = 3


class WqState(IntEnum):
    DISABLED = 0
    ENABLED = 1
    BUSY = 2  # takes nothing more, what it took still runs


class Cause(IntFlag):
    """INTCAUSE; software clears a bit by writing it."""

    SWERR = bit(0)
    CMD = bit(1)


GENCTRL_SWERR_INT: Final = bit(0)


class Command(IntEnum):
    ENABLE_DEVICE = 1
    DISABLE_DEVICE = 2
    DRAIN_ALL = 3
    ABORT_ALL = 4
    RESET_DEVICE = 5
    ENABLE_WQ = 6  # operand: the queue; those below take sixteen queues as bits, and which sixteen
    DISABLE_WQ = 7
    DRAIN_WQ = 8
    ABORT_WQ = 9
    RESET_WQ = 10
    DRAIN_PASID = 11
    ABORT_PASID = 12
    REQUEST_INT_HANDLE = 13
    RELEASE_INT_HANDLE = 14


class CommandError(IntEnum):
    """CMDSTS 7:0."""

    SUCCESS = 0x00
    INVAL_CMD = 0x01
    INVAL_WQIDX = 0x02
    HW_ERR = 0x03
    DEV_ENABLED = 0x10
    CONFIG = 0x11
    BUSMASTER_EN = 0x12
    PASID_INVAL = 0x13
    WQ_SIZE_ERANGE = 0x14  # all queues together are larger than WQCAP says
    GRP_CONFIG = 0x15  # a group has queues and no engine, or engines and no queue
    GRP_CONFIG2 = 0x16  # a queue is in two groups, with a size in none, without one in some, or there is none
    GRP_CONFIG3 = 0x17  # an engine is in two groups, or there is none of that number
    GRP_CONFIG4 = 0x18  # read buffers
    DEV_NOTEN = 0x20
    WQ_ENABLED = 0x21
    WQ_SIZE = 0x22  # none, or a shared queue's threshold is not within it
    WQ_PRIOR = 0x23
    WQ_MODE = 0x24
    BOF_EN = 0x25
    PASID_EN = 0x26
    MAX_BATCH_SIZE = 0x27  # 0, or larger than GENCAP says
    MAX_XFER_SIZE = 0x28
    DIS_DEV_EN = 0x31  # the device to disable is not enabled
    DEV_NOT_EN = 0x32  # nor is the device, or the queue, of a queue's command
    INVAL_INT_IDX = 0x41
    NO_HANDLE = 0x42


class OtherError(IntEnum):
    """SWERR codes of what no descriptor in a queue is to blame for [DSA table 5-7]; else a Status tells."""

    COMMAND_ACTIVE = 0x52  # a command was written while another was active
    QUEUE_FULL = 0x53  # a posted write to a dedicated queue found no room


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """A register as its fields."""

    LAYOUT: ClassVar[Layout]
    SIZE: ClassVar[int]

    def to_bytes(self) -> bytes:
        return store(self.LAYOUT.pack(self), self.SIZE)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """FormatError for a wrong length, or a number without meaning."""
        return cls(**cls.LAYOUT.unpack(load(raw, cls.SIZE, cls.__name__)))


@dataclass(frozen=True, slots=True, kw_only=True)
class GenCap(Register):
    block_on_fault: bool = False
    overlap_copy: bool = False
    cache_control_mem: bool = False
    cache_control_cache: bool = False
    cmd_cap: bool = False
    dest_readback: bool = False
    drain_readback: bool = False
    evl_support: int = 0
    batch_continuation: bool = False
    max_xfer_shift: int = 0
    max_batch_shift: int = 0
    max_ims_mult: int = 0
    config_en: bool = False

    SIZE: ClassVar[int] = 8
    LAYOUT: ClassVar = Layout(
        {
            "block_on_fault": flag(0),
            "overlap_copy": flag(1),
            "cache_control_mem": flag(2),
            "cache_control_cache": flag(3),
            "cmd_cap": flag(4),
            "dest_readback": flag(8),
            "drain_readback": flag(9),
            "evl_support": at(14, 13),
            "batch_continuation": flag(15),
            "max_xfer_shift": at(20, 16),
            "max_batch_shift": at(24, 21),
            "max_ims_mult": at(30, 25),
            "config_en": flag(31),
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WqCap(Register):
    total_wq_size: int
    num_wqs: int
    wqcfg_size: int = 0  # log2 of the bytes of a WQCFG, less 5
    shared_mode: bool = False
    dedicated_mode: bool = False
    wq_ats_support: bool = False
    priority: bool = False
    occupancy: bool = False
    op_config: bool = False
    wq_prs_support: bool = False

    SIZE: ClassVar[int] = 8
    LAYOUT: ClassVar = Layout(
        {
            "total_wq_size": at(15, 0),
            "num_wqs": at(23, 16),
            "wqcfg_size": at(27, 24),
            "shared_mode": flag(48),
            "dedicated_mode": flag(49),
            "wq_ats_support": flag(50),
            "priority": flag(51),
            "occupancy": flag(52),
            "op_config": flag(54),
            "wq_prs_support": flag(55),
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WqCfg(Register):
    """Eight dwords; the last field and the state are the device's to write."""

    size: int = 0
    threshold: int = 0
    dedicated: bool = False
    block_on_fault: bool = False
    ats_disable: bool = False
    prs_disable: bool = False
    priority: int = 0
    pasid: Pasid = NO_PASID
    pasid_enable: bool = False
    priv: bool = False
    max_xfer_shift: int = 0
    max_batch_shift: int = 0
    occupancy: int = 0
    state: WqState = WqState.DISABLED

    SIZE: ClassVar[int] = WQCFG_BYTES
    LAYOUT: ClassVar = Layout(
        {
            "size": at(15, 0),
            "threshold": at(47, 32),
            "dedicated": flag(64),
            "block_on_fault": flag(65),
            "ats_disable": flag(66),
            "prs_disable": flag(67),
            "priority": at(71, 68),
            "pasid": at(91, 72, Pasid),
            "pasid_enable": flag(92),
            "priv": flag(93),
            "max_xfer_shift": at(100, 96),
            "max_batch_shift": at(104, 101),
            "occupancy": at(207, 192),
            "state": at(223, 222, WqState),
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandWord(Register):
    command: int  # a Command, or what the device refuses as one
    operand: int = 0
    interrupt: bool = False

    SIZE: ClassVar[int] = 4
    LAYOUT: ClassVar = Layout({"operand": at(19, 0), "command": at(24, 20), "interrupt": flag(31)})


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandStatus(Register):
    error: CommandError = CommandError.SUCCESS
    result: int = 0
    active: bool = False

    SIZE: ClassVar[int] = 4
    LAYOUT: ClassVar = Layout({"error": at(7, 0, CommandError), "result": at(23, 8), "active": flag(31)})


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftwareError(Register):
    """SWERR: the first error stays until software clears `valid`; those lost meanwhile set `overflow`."""

    valid: bool = False
    overflow: bool = False
    desc_valid: bool = False
    wq_idx_valid: bool = False
    batch: bool = False
    fault_rw: bool = False
    priv: bool = False
    error: int = 0  # a Status or an OtherError
    wq_idx: int = 0
    operation: int = 0
    pasid: Pasid = NO_PASID
    batch_idx: int = 0
    invalid_flags: int = 0
    fault_addr: Iova = NO_IOVA

    SIZE: ClassVar[int] = 32
    LAYOUT: ClassVar = Layout(
        {
            "valid": flag(0),
            "overflow": flag(1),
            "desc_valid": flag(2),
            "wq_idx_valid": flag(3),
            "batch": flag(4),
            "fault_rw": flag(5),
            "priv": flag(6),
            "error": at(15, 8),
            "wq_idx": at(23, 16),
            "operation": at(39, 32),
            "pasid": at(59, 40, Pasid),
            "batch_idx": byte_at(8, 2),
            "invalid_flags": byte_at(12, 4),
            "fault_addr": byte_at(16, 8, Iova),
        }
    )


for _register in (GenCap, WqCap, WqCfg, CommandWord, CommandStatus, SoftwareError):
    assert covered(_register.LAYOUT) < 1 << 8 * _register.SIZE, _register.__name__
