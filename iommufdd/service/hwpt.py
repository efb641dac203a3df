"""IOMMU_HWPT_ALLOC: what the struct says; the order of allocating is the core's (`core/hwpt_alloc.py`)."""

from __future__ import annotations

import errno

from iommufdd.core.device import IommufdDevice
from iommufdd.core.hwpt_alloc import alloc_kvm, alloc_paging, parent_of
from iommufdd.kvm_client import KvmTdp
from iommufdd.service.objects import IommuFile
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.uapi import iommufd as uapi
from protocol.uapi import names

INT_MAX = (1 << 31) - 1


async def hwpt_alloc(held: IommuFile, message: uapi.IommuHwptAlloc, fds: Fds) -> Body:
    if message.reserved:
        raise UapiError(errno.EOPNOTSUPP, "__reserved is not zero")
    if message.data_type == names.IOMMU_HWPT_DATA_NONE and message.data_len:
        raise UapiError(errno.EINVAL, f"data_type NONE with {message.data_len} bytes of data")
    device = held.ctx.objects.get(message.dev_id, IommufdDevice)
    if message.data_type == names.IOMMU_HWPT_DATA_KVM:
        app, mm_cookie = held.app, held.ctx.mm_cookie
        tdp = KvmTdp(app.loop, app.settings.kvmd, mm_cookie, _tdp_fd_of(held, message, fds))
        return {"out_hwpt_id": await alloc_kvm(held.ctx, device, tdp, message.flags)}
    ioas = parent_of(held.ctx, message.pt_id)
    if message.flags or message.data_type != names.IOMMU_HWPT_DATA_NONE:
        raise UapiError(
            errno.EOPNOTSUPP,
            f"flags {message.flags:#x}, data_type {message.data_type}: no nesting, no dirty tracking",
        )
    premap_pages = held.app.settings.premap_pages
    return {"out_hwpt_id": await alloc_paging(held.ctx, device, ioas, held.app.tables, premap_pages)}


def _tdp_fd_of(held: IommuFile, message: uapi.IommuHwptAlloc, fds: Fds) -> int:
    """The TDP FD that struct iommu_hwpt_kvm_info names; it becomes ours."""
    if message.data_len != names.HWPT_KVM_INFO_SIZE or message.data_uptr is None:
        raise UapiError(
            errno.EINVAL, f"data_len {message.data_len}: {names.HWPT_KVM_INFO_SIZE} bytes at data_uptr"
        )
    if len(message.data_uptr) < message.data_len:
        raise UapiError(errno.EFAULT, "data_uptr cannot be read")
    if not held.app.settings.kvm_hwpt:
        raise UapiError(errno.EOPNOTSUPP, "built without KVM HWPTs (IOMMUFD_KVM_HWPT)")
    number = int.from_bytes(message.data_uptr[: message.data_len], "little")
    if number > INT_MAX:
        raise UapiError(errno.EINVAL, f"fd {number:#x} is no fd number")
    if number not in message.fd_table:
        raise UapiError(errno.EBADF, f"fd {number} is not open")
    return fds.take(message.fd_table.index(number))
