"""The bodies of messages: from bytes to what was asked, and answers to bytes
[vfio-user Protocol Specification].

Lengths, counts, offsets and flags are checked here against the message alone; whether a region or an
interrupt of that number exists is the session's to ask.  UapiError: EINVAL, with what stood in the way; the
client gets the number, the log the sentence.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from errno import EINVAL
from typing import Final, NamedTuple

from protocol.errors import UapiError
from protocol.units import Iova
from vfio_user.core.limits import MAX_WRITES

_DMA_MAP: Final = struct.Struct("<IIQQQ")
_DMA_UNMAP: Final = struct.Struct("<IIQQ")
_DEVICE_INFO: Final = struct.Struct("<IIII")
_REGION_INFO: Final = struct.Struct("<IIIIQQ")
_IRQ_INFO: Final = struct.Struct("<IIII")
_IRQ_SET: Final = struct.Struct("<IIIII")
_ACCESS: Final = struct.Struct("<QII")
_COUNT: Final = struct.Struct("<Q")
_CAP_HEADER: Final = struct.Struct("<HHI")
_SPARSE: Final = struct.Struct("<II")
_AREA: Final = struct.Struct("<QQ")
WRITE_DATA_BYTES: Final = 8  # of data in each write of a REGION_WRITE_MULTI, used or not

CAP_SPARSE_MMAP: Final = 1  # VFIO_REGION_INFO_CAP_SPARSE_MMAP
SPARSE_VERSION: Final = 1


class DmaFlags(IntFlag):
    READ = 1
    WRITE = 2


class UnmapFlags(IntFlag):
    """Not in the specification; QEMU takes it from the ioctl [QEMU hw/vfio-user/container.c]."""

    ALL = 2


class DeviceFlags(IntFlag):
    RESET = 1
    PCI = 2


class RegionFlags(IntFlag):
    READ = 1
    WRITE = 2
    MMAP = 4
    CAPS = 8


class IrqFlags(IntFlag):
    EVENTFD = 1


class IrqSetFlags(IntFlag):
    DATA_NONE = 1
    DATA_BOOL = 2
    DATA_EVENTFD = 4
    ACTION_MASK = 8
    ACTION_UNMASK = 16
    ACTION_TRIGGER = 32


IRQ_SET_DATA: Final = IrqSetFlags.DATA_NONE | IrqSetFlags.DATA_BOOL | IrqSetFlags.DATA_EVENTFD
IRQ_SET_ACTION: Final = IrqSetFlags.ACTION_MASK | IrqSetFlags.ACTION_UNMASK | IrqSetFlags.ACTION_TRIGGER


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise UapiError(EINVAL, why)


def _whole(layout: struct.Struct, body: bytes, what: str) -> tuple[int, ...]:
    _require(len(body) == layout.size, f"{what}: {len(body)} bytes, not {layout.size}")
    return layout.unpack(body)


class DmaMap(NamedTuple):
    """`offset` in the file whose fd came along, bytes."""

    flags: DmaFlags
    offset: int
    start: Iova
    size: int

    @classmethod
    def from_body(cls, body: bytes) -> DmaMap:
        argsz, flags, offset, start, size = _whole(_DMA_MAP, body, "DMA_MAP")
        _require(argsz >= _DMA_MAP.size, f"DMA_MAP: argsz {argsz}, at least {_DMA_MAP.size}")
        _require(flags in (1, 2, 3), f"DMA_MAP: flags {flags:#x}")
        return cls(DmaFlags(flags), offset, Iova(start), size)


class DmaUnmap(NamedTuple):
    everything: bool
    start: Iova
    size: int

    @classmethod
    def from_body(cls, body: bytes) -> DmaUnmap:
        argsz, flags, start, size = _whole(_DMA_UNMAP, body, "DMA_UNMAP")
        _require(argsz >= _DMA_UNMAP.size, f"DMA_UNMAP: argsz {argsz}, at least {_DMA_UNMAP.size}")
        _require(flags in (0, UnmapFlags.ALL), f"DMA_UNMAP: flags {flags:#x}")
        _require(not flags or start == size == 0, f"DMA_UNMAP: all, and {start:#x}+{size:#x}")
        return cls(bool(flags), Iova(start), size)


def check_device_info(body: bytes) -> None:
    argsz, *others = _whole(_DEVICE_INFO, body, "GET_INFO")
    _require(argsz >= _DEVICE_INFO.size, f"GET_INFO: argsz {argsz}, at least {_DEVICE_INFO.size}")
    _require(not any(others), f"GET_INFO: fields that must be zero: {others}")


def device_info(flags: DeviceFlags, regions: int, irqs: int) -> bytes:
    return _DEVICE_INFO.pack(_DEVICE_INFO.size, flags, regions, irqs)


class RegionQuery(NamedTuple):
    """`argsz`: how many bytes of answer there is room for."""

    argsz: int
    region: int

    @classmethod
    def from_body(cls, body: bytes) -> RegionQuery:
        argsz, flags, index, *others = _whole(_REGION_INFO, body, "GET_REGION_INFO")
        _require(argsz >= _REGION_INFO.size, f"GET_REGION_INFO: argsz {argsz}, at least {_REGION_INFO.size}")
        _require(not flags and not any(others), f"GET_REGION_INFO: must be zero: {flags}, {others}")
        return cls(argsz, index)


def region_info(
    query: RegionQuery, flags: RegionFlags, size: int, offset: int, areas: Sequence[tuple[int, int]]
) -> tuple[bytes, bool]:
    """The answer, and whether all of it had room: `argsz` in it says how much that takes.  `areas`: the
    offsets and sizes that may be mapped, in bytes of the region; none: all of it, if MMAP is set.
    """
    chain = b""
    if areas:
        flags |= RegionFlags.CAPS
        chain = _CAP_HEADER.pack(CAP_SPARSE_MMAP, SPARSE_VERSION, 0) + _SPARSE.pack(len(areas), 0)
        chain += b"".join(_AREA.pack(*area) for area in areas)
    needed = _REGION_INFO.size + len(chain)
    fits = needed <= query.argsz
    cap_offset = _REGION_INFO.size if chain and fits else 0
    fixed = _REGION_INFO.pack(needed, flags, query.region, cap_offset, size, offset)
    return (fixed + chain if fits else fixed), fits


def irq_query(body: bytes) -> int:
    """The index that is asked about."""
    argsz, flags, index, count = _whole(_IRQ_INFO, body, "GET_IRQ_INFO")
    _require(argsz >= _IRQ_INFO.size, f"GET_IRQ_INFO: argsz {argsz}, at least {_IRQ_INFO.size}")
    _require(not flags and not count, f"GET_IRQ_INFO: must be zero: {flags}, {count}")
    return index


def irq_info(flags: IrqFlags, index: int, count: int) -> bytes:
    return _IRQ_INFO.pack(_IRQ_INFO.size, flags, index, count)


@dataclass(frozen=True, slots=True)
class IrqSet:
    """`chosen`: with DATA_BOOL, for each of `count` whether it is meant."""

    data: IrqSetFlags
    action: IrqSetFlags
    index: int
    start: int
    count: int
    chosen: tuple[bool, ...]

    @property
    def disables_all(self) -> bool:
        none = self.data is IrqSetFlags.DATA_NONE and self.action is IrqSetFlags.ACTION_TRIGGER
        return none and self.start == self.count == 0

    @classmethod
    def from_body(cls, body: bytes) -> IrqSet:
        _require(len(body) >= _IRQ_SET.size, f"SET_IRQS: {len(body)} bytes, at least {_IRQ_SET.size}")
        argsz, flags, index, start, count = _IRQ_SET.unpack_from(body)
        given = body[_IRQ_SET.size :]
        _require(argsz == len(body), f"SET_IRQS: argsz {argsz}, {len(body)} bytes came")
        data, action = IrqSetFlags(flags) & IRQ_SET_DATA, IrqSetFlags(flags) & IRQ_SET_ACTION
        known = int(IRQ_SET_DATA | IRQ_SET_ACTION)  # an int: the complement of a flag knows no other bits
        single = data.bit_count() == action.bit_count() == 1 and not flags & ~known
        _require(single, f"SET_IRQS: flags {flags:#x}")
        is_bool = data is IrqSetFlags.DATA_BOOL
        _require(len(given) == (count if is_bool else 0), f"SET_IRQS: {len(given)} bytes of data")
        return cls(data, action, index, start, count, tuple(map(bool, given)) if is_bool else ())


class RegionAccess(NamedTuple):
    """Of `length` bytes; `data` is empty for a read."""

    offset: int
    region: int
    length: int
    data: bytes = b""

    @classmethod
    def read_from(cls, body: bytes) -> RegionAccess:
        offset, region, length = _whole(_ACCESS, body, "REGION_READ")
        return cls(offset, region, length)

    @classmethod
    def write_from(cls, body: bytes) -> RegionAccess:
        _require(len(body) >= _ACCESS.size, f"REGION_WRITE: {len(body)} bytes, at least {_ACCESS.size}")
        offset, region, length = _ACCESS.unpack_from(body)
        data = body[_ACCESS.size :]
        _require(len(data) == length, f"REGION_WRITE: count {length}, {len(data)} bytes of data")
        return cls(offset, region, length, data)

    def answer(self, data: bytes = b"") -> bytes:
        return _ACCESS.pack(self.offset, self.region, self.length) + data


def writes_from(body: bytes) -> list[RegionAccess]:
    """Of a REGION_WRITE_MULTI: a count, then so many writes of up to eight bytes."""
    _require(len(body) >= _COUNT.size, f"REGION_WRITE_MULTI: {len(body)} bytes, at least {_COUNT.size}")
    (count,) = _COUNT.unpack_from(body)
    _require(count <= MAX_WRITES, f"REGION_WRITE_MULTI: {count} writes, at most {MAX_WRITES}")
    one = _ACCESS.size + WRITE_DATA_BYTES
    _require(len(body) == _COUNT.size + count * one, f"REGION_WRITE_MULTI: {count}, {len(body)} bytes")
    writes = []
    for at in range(_COUNT.size, len(body), one):
        offset, region, length = _ACCESS.unpack_from(body, at)
        _require(
            length <= WRITE_DATA_BYTES,
            f"REGION_WRITE_MULTI: a write of {length} bytes, at most {WRITE_DATA_BYTES}",
        )
        data = body[at + _ACCESS.size : at + _ACCESS.size + length]
        writes.append(RegionAccess(offset, region, length, data))
    return writes


def writes_answer(count: int) -> bytes:
    return _COUNT.pack(count)
