"""What iommufdd answers: its front door, /dev/iommu, and VFIO device nodes.

Kernel field names kept.  A pointer to user memory is what that memory holds: None is a null pointer,
fewer bytes than the length says are memory that cannot be read.  An fd number inside such memory is
looked up in `fd_table`, which names the fds that travel with the message as the caller numbers them: a
number that is not there is not open.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from protocol.uapi import names
from protocol.uapi.message import U32, Message


class Open(Message):
    """Open a node; the reply carries its fd.  /dev/iommu takes the mm fd of the opening process along."""

    path: Annotated[str, Field(max_length=256)]


class Stats(Message):
    """Counters of the driver and of every HWPT."""


class IommuHwptAlloc(Message):
    """struct iommu_hwpt_alloc; reply: `out_hwpt_id` [RFC 12/42]."""

    size: U32 = names.HWPT_ALLOC_SIZE
    flags: U32 = 0
    dev_id: U32
    pt_id: U32 = 0
    reserved: U32 = 0
    data_type: U32 = names.IOMMU_HWPT_DATA_KVM
    data_len: U32 = names.HWPT_KVM_INFO_SIZE
    data_uptr: Annotated[bytes, Field(max_length=4096)] | None
    fd_table: Annotated[tuple[int, ...], Field(max_length=1, strict=False)] = ()


class IommuDestroy(Message):
    id: U32


class IommuGetHwInfo(Message):
    """Reply: `out_data_type` 1 (VT-d), `cap_reg`, `ecap_reg`."""

    dev_id: U32


class VfioDeviceBindIommufd(Message):
    """With the iommufd; reply: `out_devid`."""

    flags: U32 = 0


class VfioDeviceAttachIommufdPt(Message):
    flags: U32 = 0
    pt_id: U32


class VfioDeviceDetachIommufdPt(Message):
    flags: U32 = 0


class VfioDeviceMmap(Message):
    """Map a BAR; the reply carries the portal that stands for it."""

    region: Literal[2] = 2
