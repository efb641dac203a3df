"""IOMMU_IOAS_*: address spaces, and whose memory they map [iommufd ioas.c].

The checks come in the kernel's order.  `current->mm` is the mm fd that comes with IOMMU_IOAS_MAP.
"""

from __future__ import annotations

import errno
import struct
from typing import Any

from iommufdd.core.area import ULONG_MAX, Span
from iommufdd.core.hmm import CallerMm, UserFd
from iommufdd.core.ioas import Ioas
from iommufdd.core.ioas_on_demand import IoasOnDemand
from iommufdd.core.notes import follow
from iommufdd.kvm_client import FaultNotes
from iommufdd.service.objects import IommuFile
from iommufdd.service.sizes import sized
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Method
from protocol.uapi import iommufd as uapi
from protocol.uapi import names
from protocol.units import PAGE_SIZE, Hva, Iova

_RANGE = struct.Struct("<QQ")  # struct iommu_iova_range: start, last
_MAP_FLAGS = names.IOMMU_IOAS_MAP_FIXED_IOVA | names.IOMMU_IOAS_MAP_WRITEABLE | names.IOMMU_IOAS_MAP_READABLE


def _alloc(held: IommuFile, message: uapi.IommuIoasAlloc, fds: Fds) -> Body:
    if message.flags & ~names.IOMMU_IOAS_ON_DEMAND:
        raise UapiError(errno.EOPNOTSUPP, f"flags {message.flags:#x}: there is ON_DEMAND (1)")
    return {"out_ioas_id": held.ctx.ioas_alloc(on_demand=bool(message.flags))}


async def _map(held: IommuFile, message: uapi.IommuIoasMap, fds: Fds) -> Body:
    if message.reserved:
        raise UapiError(errno.EOPNOTSUPP, f"__reserved {message.reserved:#x}")
    writable = _is_writable(message.flags, message.iova, message.length)
    with held.ctx.objects.get(message.ioas_id, Ioas).used() as ioas:
        iova = _fixed(message.flags, message.iova)
        mapped = await ioas.map(
            _mm_of(held, fds), Hva(message.user_va), message.length, iova, writable=writable
        )
    return {"iova": mapped}


async def _map_file(held: IommuFile, message: uapi.IommuIoasMapFile, fds: Fds) -> Body:
    writable = _is_writable(message.flags, message.iova, message.length)
    with _not_on_demand(held, message.ioas_id).used() as ioas:
        if message.fd not in message.fd_table:
            raise UapiError(errno.EBADF, f"fd {message.fd} is not open")
        file = UserFd(fds.peek(1 + message.fd_table.index(message.fd)))
        iova = _fixed(message.flags, message.iova)
        mapped = await ioas.map(
            _mm_of(held, fds), Hva(message.start), message.length, iova, writable=writable, file=file
        )
    return {"iova": mapped}


async def _change_process(held: IommuFile, message: uapi.IommuIoasChangeProcess, fds: Fds) -> Body:
    if message.reserved:
        raise UapiError(errno.EOPNOTSUPP, f"__reserved {message.reserved:#x}")
    await held.ctx.change_process(_mm_of(held, fds))
    return {}


async def _copy(held: IommuFile, message: uapi.IommuIoasCopy, fds: Fds) -> Body:
    writable = _is_writable(message.flags, message.length, message.src_iova, message.dst_iova)
    with _not_on_demand(held, message.src_ioas_id).used() as src:
        slices = await src.slices(Iova(message.src_iova), message.length)
    try:
        with _not_on_demand(held, message.dst_ioas_id).used() as dst:
            iova = _fixed(message.flags, message.dst_iova)
            mapped = await dst.map_slices(slices, iova, writable=writable)
    finally:
        for piece in slices:
            await piece.pages.put()
    return {"dst_iova": mapped}


def _is_writable(flags: int, *numbers: int) -> bool:
    """Of IOMMU_IOAS_MAP_*.  EOPNOTSUPP; EOVERFLOW: one of `numbers` is all ones; EINVAL."""
    if flags & ~_MAP_FLAGS:
        raise UapiError(errno.EOPNOTSUPP, f"flags {flags:#x}: there are {_MAP_FLAGS:#x}")
    if ULONG_MAX in numbers:
        raise UapiError(errno.EOVERFLOW, f"{', '.join(map(hex, numbers))}: one is beyond all iovas")
    writable = bool(flags & names.IOMMU_IOAS_MAP_WRITEABLE)
    if not flags & names.IOMMU_IOAS_MAP_READABLE:
        if writable:
            raise UapiError(errno.EOPNOTSUPP, f"flags {flags:#x}: every area here is READABLE")
        raise UapiError(errno.EINVAL, f"flags {flags:#x}: neither READABLE nor WRITEABLE")
    return writable


def _fixed(flags: int, iova: int) -> Iova | None:
    return Iova(iova) if flags & names.IOMMU_IOAS_MAP_FIXED_IOVA else None


def _not_on_demand(held: IommuFile, ioas_id: int) -> Ioas:
    ioas = held.ctx.objects.get(ioas_id, Ioas)
    if isinstance(ioas, IoasOnDemand):
        raise UapiError(
            errno.EOPNOTSUPP, f"IOAS {ioas_id} is on demand: it has no pages of its own, use IOMMU_IOAS_MAP"
        )
    return ioas


def _mm_of(held: IommuFile, fds: Fds) -> CallerMm:
    """current->mm."""
    return CallerMm(held.app.loop.kernel.cookie_of(fds.peek(0)), UserFd(fds.peek(0)))


async def _unmap(held: IommuFile, message: uapi.IommuIoasUnmap, fds: Fds) -> Body:
    with held.ctx.objects.get(message.ioas_id, Ioas).used() as ioas:
        everything = message.iova == 0 and message.length == ULONG_MAX
        if not everything and ULONG_MAX in (message.iova, message.length):
            raise UapiError(errno.EOVERFLOW, f"iova {message.iova:#x}+{message.length:#x}")
        return {"length": await ioas.unmap(Iova(message.iova), message.length)}


def _iova_ranges(held: IommuFile, message: uapi.IommuIoasIovaRanges, fds: Fds) -> Body:
    if message.reserved:
        raise UapiError(errno.EOPNOTSUPP, f"__reserved {message.reserved:#x}")
    available = held.ctx.objects.get(message.ioas_id, Ioas).areas.available
    return {
        "num_iovas": len(available),
        "allowed_iovas": available[: message.num_iovas],
        "out_iova_alignment": PAGE_SIZE,
        "truncated": message.num_iovas < len(available),
    }


async def _allow_iovas(held: IommuFile, message: uapi.IommuIoasAllowIovas, fds: Fds) -> Body:
    if message.reserved:
        raise UapiError(errno.EOPNOTSUPP, f"__reserved {message.reserved:#x}")
    with held.ctx.objects.get(message.ioas_id, Ioas).used() as ioas:
        await ioas.allow_iovas(_ranges(message.allowed_iovas or b"", message.num_iovas))
    return {}


def _ranges(memory: bytes, count: int) -> list[Span[Iova]]:
    """struct iommu_iova_range[count], looked at one after the other.  EFAULT, EINVAL."""
    found: list[Span[Iova]] = []
    for n in range(count):
        if len(memory) < (n + 1) * _RANGE.size:
            raise UapiError(errno.EFAULT, f"{count} ranges at allowed_iovas: no memory for number {n}")
        first, last = _RANGE.unpack_from(memory, n * _RANGE.size)
        if first >= last:
            raise UapiError(errno.EINVAL, f"iovas {first:#x}..{last:#x}: the last is not behind the first")
        if any(start <= last and first <= end for start, end in found):
            raise UapiError(errno.EINVAL, f"iovas {first:#x}..{last:#x}: they overlap a range before")
        found.append((Iova(first), Iova(last)))
    return found


async def _follow_kvm(held: IommuFile, message: uapi.IommuIoasFollowKvm, fds: Fds) -> Body:
    if message.reserved:
        raise UapiError(errno.EOPNOTSUPP, f"__reserved {message.reserved:#x}")
    with held.ctx.objects.get(message.ioas_id, Ioas).used() as ioas:
        if not isinstance(ioas, IoasOnDemand):
            raise UapiError(errno.EINVAL, f"IOAS {ioas.id} is not on demand: its pages are there already")
        app, vm_fd = held.app, fds.peek(0)
        await follow(
            ioas,
            lambda on_note, on_gone: FaultNotes(app.loop, app.settings.kvmd, vm_fd, on_note, on_gone),
            app.loop.flows.spawn,
        )
    return {}


IOAS: dict[str, Method[IommuFile, Any]] = {
    "IOMMU_IOAS_ALLOC": Method(uapi.IommuIoasAlloc, sized(_alloc)),
    "IOMMU_IOAS_MAP": Method(uapi.IommuIoasMap, sized(_map), 1),
    "IOMMU_IOAS_MAP_FILE": Method(uapi.IommuIoasMapFile, sized(_map_file), 2),
    "IOMMU_IOAS_CHANGE_PROCESS": Method(uapi.IommuIoasChangeProcess, sized(_change_process), 1),
    "IOMMU_IOAS_COPY": Method(uapi.IommuIoasCopy, sized(_copy)),
    "IOMMU_IOAS_UNMAP": Method(uapi.IommuIoasUnmap, sized(_unmap)),
    "IOMMU_IOAS_IOVA_RANGES": Method(uapi.IommuIoasIovaRanges, sized(_iova_ranges)),
    "IOMMU_IOAS_ALLOW_IOVAS": Method(uapi.IommuIoasAllowIovas, sized(_allow_iovas)),
    "IOMMU_IOAS_FOLLOW_KVM": Method(uapi.IommuIoasFollowKvm, sized(_follow_kvm), 1),
}
