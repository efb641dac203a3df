"""/dev/iommu: objects of one iommufd, but for the making of HWPTs [iommufd main.c]."""

from __future__ import annotations

import errno

from iommufdd.core.device import IommufdDevice
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.service.hwpt import hwpt_alloc
from iommufdd.service.ioas import IOAS
from iommufdd.service.objects import IommuFile
from iommufdd.service.option import option
from iommufdd.service.sizes import sized
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Method, Service
from protocol.uapi import iommufd as uapi
from protocol.uapi import names

VTD_HW_INFO = 1
NO_CLEAR = 1  # IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR
MAX_ENTRY_LEN = 4096
MAX_INV_ENTRIES = 1 << 19


async def _destroy(held: IommuFile, message: uapi.IommuDestroy, fds: Fds) -> Body:
    await held.ctx.destroy(message.id)
    return {}


def _get_hw_info(held: IommuFile, message: uapi.IommuGetHwInfo, fds: Fds) -> Body:
    if message.flags or message.reserved:
        raise UapiError(errno.EOPNOTSUPP, f"flags {message.flags:#x}, __reserved {message.reserved:#x}")
    device = held.ctx.objects.get(message.dev_id, IommufdDevice)
    if message.data_len and not message.data_uptr:
        raise UapiError(errno.EFAULT, f"no memory for {message.data_len} bytes at data_uptr")
    if message.data_len > uapi.MAX_USER_BYTES:
        raise UapiError(errno.EFAULT, f"{message.data_len} bytes at data_uptr: at most {uapi.MAX_USER_BYTES}")
    cap, ecap = device.unit.cap.value, device.unit.ecap.value
    info = b"".join(word.to_bytes(8, "little") for word in (0, cap, ecap))
    return {
        "out_data_type": VTD_HW_INFO,
        "data_len": len(info),
        "out_capabilities": 0,
        "data": info[: message.data_len].ljust(message.data_len, b"\0"),
    }


def _set_dirty_tracking(held: IommuFile, message: uapi.IommuHwptSetDirtyTracking, fds: Fds) -> Body:
    if message.reserved or message.flags & ~1:
        raise UapiError(errno.EOPNOTSUPP, f"flags {message.flags:#x}, __reserved {message.reserved:#x}")
    held.ctx.objects.get(message.hwpt_id, HwptPaging)
    raise UapiError(errno.EOPNOTSUPP, "the unit keeps no dirty bits (ECAP.SSADS)")


def _get_dirty_bitmap(held: IommuFile, message: uapi.IommuHwptGetDirtyBitmap, fds: Fds) -> Body:
    if message.reserved or message.flags & ~NO_CLEAR:
        raise UapiError(errno.EOPNOTSUPP, f"flags {message.flags:#x}, __reserved {message.reserved:#x}")
    held.ctx.objects.get(message.hwpt_id, HwptPaging)
    raise UapiError(errno.EOPNOTSUPP, "the unit keeps no dirty bits (ECAP.SSADS)")


def _invalidate(held: IommuFile, message: uapi.IommuHwptInvalidate, fds: Fds) -> Body:
    if message.reserved:
        raise UapiError(errno.EOPNOTSUPP, f"__reserved {message.reserved:#x}")
    length, count = message.entry_len, message.entry_num
    if count and (message.data_uptr is None or not 0 < length <= MAX_ENTRY_LEN or count > MAX_INV_ENTRIES):
        raise UapiError(errno.EINVAL, f"{count} entries of {length} bytes, or no memory for them")
    raise UapiError(errno.ENOENT, f"object {message.hwpt_id}: no such nested HWPT, there are none")


IOMMUFD: Service[IommuFile] = Service(
    "iommufd",
    {
        "IOMMU_DESTROY": Method(uapi.IommuDestroy, sized(_destroy)),
        "IOMMU_OPTION": Method(uapi.IommuOption, sized(option)),
        "IOMMU_HWPT_ALLOC": Method(
            uapi.IommuHwptAlloc,
            sized(hwpt_alloc),
            1,
            lambda asked: int(asked.data_type == names.IOMMU_HWPT_DATA_KVM),
        ),
        "IOMMU_GET_HW_INFO": Method(uapi.IommuGetHwInfo, sized(_get_hw_info)),
        "IOMMU_HWPT_SET_DIRTY_TRACKING": Method(uapi.IommuHwptSetDirtyTracking, sized(_set_dirty_tracking)),
        "IOMMU_HWPT_GET_DIRTY_BITMAP": Method(uapi.IommuHwptGetDirtyBitmap, sized(_get_dirty_bitmap)),
        "IOMMU_HWPT_INVALIDATE": Method(uapi.IommuHwptInvalidate, sized(_invalidate)),
        **IOAS,
    },
)
