"""IOMMU_IOAS_*: address spaces, and whose memory they map [iommufd ioas.c].

The checks come in the kernel's order.  `current->mm` is the mm fd that comes with IOMMU_IOAS_MAP.
"""

from __future__ import annotations

import errno
import struct
from typing import Any

from iommufdd.core.area import ULONG_MAX
from iommufdd.core.hmm import HostMemory
from iommufdd.core.ioas import Ioas
from iommufdd.core.ioas_on_demand import IoasOnDemand
from iommufdd.core.notes import Notes
from iommufdd.hmm_client import HmmMirror
from iommufdd.kvm_client import FaultNotes
from iommufdd.service.objects import IommuFile
from iommufdd.service.sizes import sized
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.files import inode_of
from protocol.rpc.service import Method
from protocol.uapi import iommufd as uapi
from protocol.uapi import names
from protocol.units import PAGE_SIZE

_RANGE = struct.Struct("<QQ")  # struct iommu_iova_range: start, last
_MAP_FLAGS = names.IOMMU_IOAS_MAP_FIXED_IOVA | names.IOMMU_IOAS_MAP_WRITEABLE | names.IOMMU_IOAS_MAP_READABLE


def _alloc(held: IommuFile, message: uapi.IommuIoasAlloc, fds: Fds) -> Body:
    if message.flags & ~names.IOMMU_IOAS_ON_DEMAND:
        raise UapiError(errno.EOPNOTSUPP, f"flags {message.flags:#x}: there is ON_DEMAND (1)")
    kind = IoasOnDemand if message.flags else Ioas
    return {"out_ioas_id": held.objects.add(kind(held.app.counts, held.app.silicon))}


async def _map(held: IommuFile, message: uapi.IommuIoasMap, fds: Fds) -> Body:
    if message.flags & ~_MAP_FLAGS or message.reserved:
        raise UapiError(errno.EOPNOTSUPP, f"flags {message.flags:#x}, __reserved {message.reserved:#x}")
    if ULONG_MAX in (message.iova, message.length):
        raise UapiError(errno.EOVERFLOW, f"iova {message.iova:#x}+{message.length:#x}")
    writable = bool(message.flags & names.IOMMU_IOAS_MAP_WRITEABLE)
    if not message.flags & names.IOMMU_IOAS_MAP_READABLE:
        if writable:
            raise UapiError(errno.EOPNOTSUPP, f"flags {message.flags:#x}: every area here is READABLE")
        raise UapiError(errno.EINVAL, f"flags {message.flags:#x}: neither READABLE nor WRITEABLE")
    iova = message.iova if message.flags & names.IOMMU_IOAS_MAP_FIXED_IOVA else None
    with held.objects.get(message.ioas_id, Ioas).used() as ioas:

        async def connect() -> tuple[HostMemory, int]:
            return await _connect(held, ioas, fds.peek(0))

        mm = inode_of(fds.peek(0))
        mapped = await ioas.map(mm, connect, message.user_va, message.length, iova, writable=writable)
    return {"iova": mapped}


async def _connect(held: IommuFile, ioas: Ioas, mm_fd: int) -> tuple[HostMemory, int]:
    """The process's memory at kvmd, its frames handed to the units there are now."""
    app = held.app
    silicon = ioas.bus = await app.live_silicon()
    host = HmmMirror(ioas.invalidate, lambda: app.loop.flows.spawn(app.lose_host(ioas)))
    try:
        await host.open(app.loop, app.settings.kvmd, mm_fd)
        windows, fds = await host.register(held.account)
        return host, await silicon.add_memory(windows, [fds.take(n) for n in range(len(fds))])
    except UapiError:
        host.release()
        raise


async def _unmap(held: IommuFile, message: uapi.IommuIoasUnmap, fds: Fds) -> Body:
    with held.objects.get(message.ioas_id, Ioas).used() as ioas:
        everything = message.iova == 0 and message.length == ULONG_MAX
        if not everything and ULONG_MAX in (message.iova, message.length):
            raise UapiError(errno.EOVERFLOW, f"iova {message.iova:#x}+{message.length:#x}")
        return {"length": await ioas.unmap(message.iova, message.length)}


def _iova_ranges(held: IommuFile, message: uapi.IommuIoasIovaRanges, fds: Fds) -> Body:
    if message.reserved:
        raise UapiError(errno.EOPNOTSUPP, f"__reserved {message.reserved:#x}")
    available = held.objects.get(message.ioas_id, Ioas).areas.available
    return {
        "num_iovas": len(available),
        "allowed_iovas": available[: message.num_iovas],
        "out_iova_alignment": PAGE_SIZE,
        "truncated": message.num_iovas < len(available),
    }


async def _allow_iovas(held: IommuFile, message: uapi.IommuIoasAllowIovas, fds: Fds) -> Body:
    if message.reserved:
        raise UapiError(errno.EOPNOTSUPP, f"__reserved {message.reserved:#x}")
    with held.objects.get(message.ioas_id, Ioas).used() as ioas:
        await ioas.allow_iovas(_ranges(message.allowed_iovas or b"", message.num_iovas))
    return {}


def _ranges(memory: bytes, count: int) -> list[tuple[int, int]]:
    """struct iommu_iova_range[count], looked at one after the other.  EFAULT, EINVAL."""
    found: list[tuple[int, int]] = []
    for n in range(count):
        if len(memory) < (n + 1) * _RANGE.size:
            raise UapiError(errno.EFAULT, f"{count} ranges at allowed_iovas: no memory for number {n}")
        first, last = _RANGE.unpack_from(memory, n * _RANGE.size)
        if first >= last:
            raise UapiError(errno.EINVAL, f"iovas {first:#x}..{last:#x}: the last is not behind the first")
        if any(start <= last and first <= end for start, end in found):
            raise UapiError(errno.EINVAL, f"iovas {first:#x}..{last:#x}: they overlap a range before")
        found.append((first, last))
    return found


async def _follow_kvm(held: IommuFile, message: uapi.IommuIoasFollowKvm, fds: Fds) -> Body:
    if message.reserved:
        raise UapiError(errno.EOPNOTSUPP, f"__reserved {message.reserved:#x}")
    with held.objects.get(message.ioas_id, Ioas).used() as ioas:
        if not isinstance(ioas, IoasOnDemand):
            raise UapiError(errno.EINVAL, f"IOAS {ioas.id} is not on demand: its pages are there already")
        if ioas in held.app.following:
            raise UapiError(errno.EBUSY, f"IOAS {ioas.id} follows a VM")
        notes = Notes(ioas, held.app.loop.flows.spawn)
        following = held.app.following
        channel = following[ioas] = FaultNotes(notes.told, lambda: following.pop(ioas, None))
        try:
            await channel.open(held.app.loop, held.app.settings.kvmd, fds.peek(0))
            if ioas not in following:
                raise UapiError(errno.EBADF, "the iommufd was closed meanwhile, or the VM is gone")
        except UapiError:
            following.pop(ioas, None)
            channel.hang_up()
            raise
    return {}


IOAS: dict[str, Method[IommuFile, Any]] = {
    "IOMMU_IOAS_ALLOC": Method(uapi.IommuIoasAlloc, sized(_alloc)),
    "IOMMU_IOAS_MAP": Method(uapi.IommuIoasMap, sized(_map), 1),
    "IOMMU_IOAS_UNMAP": Method(uapi.IommuIoasUnmap, sized(_unmap)),
    "IOMMU_IOAS_IOVA_RANGES": Method(uapi.IommuIoasIovaRanges, sized(_iova_ranges)),
    "IOMMU_IOAS_ALLOW_IOVAS": Method(uapi.IommuIoasAllowIovas, sized(_allow_iovas)),
    "IOMMU_IOAS_FOLLOW_KVM": Method(uapi.IommuIoasFollowKvm, sized(_follow_kvm), 1),
}
