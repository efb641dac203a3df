"""What iommufdd answers: its front door, /dev/iommu, and VFIO device nodes.

Kernel field names kept.  A pointer to user memory is what that memory holds: None is a null pointer,
fewer bytes than the length says are memory that cannot be read.  An fd number inside such memory is
looked up in `fd_table`, which names the fds that travel with the message as the caller numbers them: a
number that is not there is not open.  There are at most MAX_USER_BYTES of user memory at a pointer.

Every iommufd struct begins with its `size` as the caller has it, and `tail` is what lies beyond the
struct we know: it must be zero [iommufd main.c].
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from protocol.uapi import names
from protocol.uapi.message import U16, U32, U64, Message

MAX_USER_BYTES = 4096
UserBytes = Annotated[bytes, Field(max_length=MAX_USER_BYTES)]


class OpenIommuNode(Message):
    """Open a node; the reply carries its fd.  /dev/iommu takes the mm fd of the opening process along."""

    path: Annotated[str, Field(max_length=256)]


class IommufddStats(Message):
    """Counters of the driver, and of the first MAX_TOLD HWPTs whose domain ids are above `after`; there are
    `hwpt_count`.
    """

    after: U32 = 0


class IommufddCheck(Message):
    """Check the invariants of what iommufdd holds; reply: `violations`, a sentence each."""


class IommuStruct(Message):
    """SIZE: of the struct; MIN_SIZE: of what the oldest caller passes."""

    SIZE: ClassVar[int]
    MIN_SIZE: ClassVar[int]

    size: U32
    tail: UserBytes = b""


class IommuDestroy(IommuStruct):
    SIZE = MIN_SIZE = 8

    size: U32 = SIZE
    id: U32


class IommuIoasAlloc(IommuStruct):
    """struct iommu_ioas_alloc; reply: `out_ioas_id`.  `flags`: IOMMU_IOAS_ON_DEMAND is the model's."""

    SIZE = MIN_SIZE = 12

    size: U32 = SIZE
    flags: U32 = 0


class IommuIoasMap(IommuStruct):
    """struct iommu_ioas_map, with the caller's mm fd; reply: `iova`.  `flags`: IOMMU_IOAS_MAP_*."""

    SIZE = MIN_SIZE = 40

    size: U32 = SIZE
    flags: U32
    ioas_id: U32
    reserved: U32 = 0
    user_va: U64
    length: U64
    iova: U64 = 0


class IommuIoasMapFile(IommuStruct):
    """struct iommu_ioas_map_file, with the caller's mm fd, and then the fds that `fd_table` names; reply:
    `iova`.  `flags`: IOMMU_IOAS_MAP_*.
    """

    SIZE = MIN_SIZE = 40

    size: U32 = SIZE
    flags: U32
    ioas_id: U32
    fd: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
    start: U64
    length: U64
    iova: U64 = 0
    fd_table: Annotated[tuple[int, ...], Field(max_length=1, strict=False)] = ()


class IommuIoasChangeProcess(IommuStruct):
    """struct iommu_ioas_change_process, with the mm fd of who is to pay for what the IOASes have pinned."""

    SIZE = MIN_SIZE = 8

    size: U32 = SIZE
    reserved: U32 = 0


class IommuIoasCopy(IommuStruct):
    """struct iommu_ioas_copy; reply: `dst_iova`.  `flags`: IOMMU_IOAS_MAP_*, of the copy."""

    SIZE = MIN_SIZE = 40

    size: U32 = SIZE
    flags: U32
    dst_ioas_id: U32
    src_ioas_id: U32
    length: U64
    dst_iova: U64 = 0
    src_iova: U64


class IommuIoasUnmap(IommuStruct):
    """struct iommu_ioas_unmap; reply: `length`, the bytes unmapped.  iova 0 with all ones is everything."""

    SIZE = MIN_SIZE = 24

    size: U32 = SIZE
    ioas_id: U32
    iova: U64
    length: U64


class IommuIoasIovaRanges(IommuStruct):
    """struct iommu_ioas_iova_ranges; `num_iovas`: room for as many.  Reply: `num_iovas`, `allowed_iovas`
    [[start, last]...] as far as there is room, `out_iova_alignment`; EMSGSIZE becomes `truncated`.
    """

    SIZE = MIN_SIZE = 32

    size: U32 = SIZE
    ioas_id: U32
    num_iovas: U32 = 16
    reserved: U32 = 0


class IommuIoasAllowIovas(IommuStruct):
    """struct iommu_ioas_allow_iovas; `allowed_iovas`: `num_iovas` times u64 start, u64 last."""

    SIZE = MIN_SIZE = 24

    size: U32 = SIZE
    ioas_id: U32
    num_iovas: U32 = 0
    reserved: U32 = 0
    allowed_iovas: UserBytes | None = None


class IommuIoasFollowKvm(IommuStruct):
    """The model's: with a VM fd; map into an IOAS on demand what KVM says its vCPUs faulted in.  EINVAL: the
    IOAS is not on demand, or no VM fd; EBUSY: it follows one.
    """

    SIZE = MIN_SIZE = 12

    size: U32 = SIZE
    ioas_id: U32
    reserved: U32 = 0


class IommuOption(IommuStruct):
    """struct iommu_option; reply: `val64`, as it is now (OP_GET), or as it was given (OP_SET)."""

    SIZE = MIN_SIZE = 24

    size: U32 = SIZE
    option_id: U32
    option_op: U16 = 0
    reserved: U16 = 0
    object_id: U32 = 0
    val64: U64 = 0


class IommuHwptAlloc(IommuStruct):
    """struct iommu_hwpt_alloc; reply: `out_hwpt_id` [RFC 12/42]."""

    SIZE = names.HWPT_ALLOC_SIZE
    MIN_SIZE = names.HWPT_ALLOC_MIN_SIZE

    size: U32 = SIZE
    flags: U32 = 0
    dev_id: U32
    pt_id: U32 = 0
    reserved: U32 = 0
    data_type: U32 = names.IOMMU_HWPT_DATA_KVM
    data_len: U32 = names.HWPT_KVM_INFO_SIZE
    data_uptr: UserBytes | None
    fd_table: Annotated[tuple[int, ...], Field(max_length=1, strict=False)] = ()


class IommuGetHwInfo(IommuStruct):
    """struct iommu_hw_info; `data_uptr`: whether user memory for `data_len` bytes is there.

    Reply: `out_data_type` 1 (VT-d), `data_len` as the kernel has it, `out_capabilities`, and `data`, the
    bytes stored: struct iommu_hw_info_vtd, cut to `data_len` or followed by as many zeroes.
    """

    SIZE = 40
    MIN_SIZE = 32

    size: U32 = SIZE
    flags: U32 = 0
    dev_id: U32
    data_len: U32 = 24
    data_uptr: bool = True
    reserved: U32 = 0


class IommuHwptSetDirtyTracking(IommuStruct):
    """struct iommu_hwpt_set_dirty_tracking: no HWPT here tracks."""

    SIZE = MIN_SIZE = 16

    size: U32 = SIZE
    flags: U32 = 0
    hwpt_id: U32
    reserved: U32 = 0


class IommuHwptGetDirtyBitmap(IommuStruct):
    """struct iommu_hwpt_get_dirty_bitmap: no HWPT here tracks."""

    SIZE = MIN_SIZE = 48

    size: U32 = SIZE
    hwpt_id: U32
    flags: U32 = 0
    reserved: U32 = 0
    iova: U64 = 0
    length: U64 = 4096
    page_size: U64 = 4096


class IommuHwptInvalidate(IommuStruct):
    """struct iommu_hwpt_invalidate: only a nested HWPT takes it, and there is none."""

    SIZE = MIN_SIZE = 32

    size: U32 = SIZE
    hwpt_id: U32
    data_uptr: UserBytes | None = None
    data_type: U32 = 0
    entry_len: U32 = 24
    entry_num: U32 = 0
    reserved: U32 = 0


class VfioStruct(Message):
    """VFIO's structs begin with `argsz`; what lies beyond the struct we know is not looked at."""

    MIN_SIZE: ClassVar[int]

    argsz: U32
    flags: U32 = 0


class VfioDeviceBindIommufd(VfioStruct):
    """With the iommufd; reply: `out_devid`."""

    MIN_SIZE = 16

    argsz: U32 = MIN_SIZE


class VfioDeviceAttachIommufdPt(VfioStruct):
    """Attach, or replace what is attached; reply: `pt_id`.

    `pinned` is the model's: everything the device reaches is pinned as long as it is attached, so that one
    that does not survive an absent page may be attached.  If something cannot be pinned it is not attached.
    """

    MIN_SIZE = 12

    argsz: U32 = MIN_SIZE
    pt_id: U32
    pinned: bool = False


class VfioDeviceDetachIommufdPt(VfioStruct):
    MIN_SIZE = 8

    argsz: U32 = MIN_SIZE


class VfioDevicePin(VfioStruct):
    """The model's: what a variant driver asks for when it traps the guest's registration of memory on which
    the device tolerates no fault, completion records for one [RFC 00/42].  Ends with the attachment.
    """

    MIN_SIZE = 24

    argsz: U32 = MIN_SIZE
    iova: U64
    length: U64


class VfioDeviceUnpin(VfioDevicePin):
    """A range as it was pinned."""


class VfioDeviceMmap(Message):
    """Map a BAR; the reply carries the portal that stands for it."""

    region: Literal[2] = 2
