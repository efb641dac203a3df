"""Queued invalidation: the 256-bit descriptors the driver hands to the remapping unit.

Models the descriptors of [VT-d 6.5.2] and the page-group response [VT-d 7], in the 256-bit queue
that scalable mode requires.  Each class has its fields by absolute bit position; what no field covers
is reserved and must be zero.  The order IOTLB before device TLB, and the wait that follows, is the
driver's business.  Must hold:
  - decode(encode(d)) == d, and encode(decode(raw)) == raw;
  - a descriptor the unit cannot execute is a DescriptorError with the IQEI the unit reports, whereupon
    the queue stops at that descriptor;
  - the block psi_cover() names is the smallest power of two of pages, so aligned, that covers the range.

The unit, which knows its capabilities, must itself refuse AM > MAMV, and `pd` without ECAP.PDS.
Departure: a granularity without meaning, and a device-TLB size beyond 2^64, count as a reserved field.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final

from protocol.hw.fields import (
    NO_IOVA,
    NO_PASID,
    Field,
    FormatError,
    Layout,
    at,
    covered,
    flag,
    load,
    page_at,
    store,
)
from protocol.units import PAGE_SHIFT, Iova, IovaPfn, Pasid, bits

DESCRIPTOR_SIZE: Final = 32
ALL_PAGES: Final = 1 << (64 - PAGE_SHIFT)


class IQEI(IntEnum):
    """Invalidation queue error information: why the queue stopped."""

    NONE = 0
    INVALID_TAIL = 1
    FETCH_ERROR = 2
    BAD_TYPE = 3
    RESERVED_FIELD = 4
    BAD_WIDTH = 5
    TAIL_MISALIGNED = 6
    BAD_TTM = 7


class DescriptorError(FormatError):
    """The unit cannot execute this descriptor; `iqei` is what it reports."""

    def __init__(self, iqei: IQEI, why: str) -> None:
        super().__init__(f"[{iqei.name}] {why}")
        self.iqei = iqei


class ContextGranularity(IntEnum):
    GLOBAL = 1
    DOMAIN = 2
    DEVICE = 3


class IotlbGranularity(IntEnum):
    GLOBAL = 1
    DOMAIN = 2
    PAGE = 3


class PasidIotlbGranularity(IntEnum):
    PASID = 2
    PAGE = 3


class PasidCacheGranularity(IntEnum):
    DOMAIN = 0
    PASID = 1
    GLOBAL = 3


class ResponseCode(IntEnum):
    """The PCIe codes of a page-group response [PCIe 10.4].

    The kernel's own FAILURE is 2 and goes into the descriptor unchanged; a device takes 2 to 0xE as 0xF.
    """

    SUCCESS = 0
    INVALID = 1
    FAILURE = 0xF

    @classmethod
    def from_wire(cls, code: int) -> ResponseCode:
        return cls(code) if code in (cls.SUCCESS, cls.INVALID) else cls.FAILURE


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextInv:
    TYPE: ClassVar = 1
    LAYOUT: ClassVar = Layout(
        {
            "granularity": at(5, 4, ContextGranularity),
            "did": at(31, 16),
            "sid": at(47, 32),
            "fm": at(49, 48),
        }
    )
    granularity: ContextGranularity
    did: int = 0
    sid: int = 0
    fm: int = 0  # how much of the function number is ignored: nothing, bit 2, bits 2:1, all


@dataclass(frozen=True, slots=True, kw_only=True)
class IotlbInv:
    """Tagged by domain id: the one for second-stage translations."""

    TYPE: ClassVar = 2
    LAYOUT: ClassVar = Layout(
        {
            "granularity": at(5, 4, IotlbGranularity),
            "dw": flag(6),
            "dr": flag(7),
            "did": at(31, 16),
            "am": at(69, 64),
            "ih": flag(70),
            "addr": page_at(127, 76, Iova),
        }
    )
    granularity: IotlbGranularity
    did: int = 0
    am: int = 0
    ih: bool = False  # leaves only: paging-structure caches may keep what they hold
    addr: Iova = NO_IOVA
    dw: bool = False
    dr: bool = False

    @property
    def pages(self) -> tuple[IovaPfn, int]:
        """(start_page, npages) of a PAGE invalidation; address bits below the mask are ignored."""
        return _block(self.addr, self.am)


@dataclass(frozen=True, slots=True, kw_only=True)
class DevTlbInv:
    TYPE: ClassVar = 3
    LAYOUT: ClassVar = Layout(
        {
            "pfsid": Field(((15, 12), (63, 52))),
            "mip": at(20, 16),
            "sid": at(47, 32),
            "size": flag(64),
            "addr": page_at(127, 76, Iova),
        }
    )
    sid: int
    pfsid: int = 0
    mip: int = 0  # how many invalidations the device can queue
    size: bool = False
    addr: Iova = NO_IOVA

    @property
    def pages(self) -> tuple[IovaPfn, int]:
        return devtlb_pages(self.addr, self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class IecInv:
    """Interrupt entry cache."""

    TYPE: ClassVar = 4
    LAYOUT: ClassVar = Layout({"index_selective": flag(4), "im": at(31, 27), "iidx": at(47, 32)})
    index_selective: bool
    im: int = 0
    iidx: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitDescriptor:
    """Completes when everything queued before it has, including the devices' own completions."""

    TYPE: ClassVar = 5
    LAYOUT: ClassVar = Layout(
        {
            "if_": flag(4),
            "sw": flag(5),
            "fn": flag(6),
            "pd": flag(7),
            "status_data": at(63, 32),
            "status_addr": at(127, 66, shift=2),
        }
    )
    if_: bool = False  # raise the invalidation event
    sw: bool = False  # write status_data, 32 bits, to status_addr
    fn: bool = False  # nothing queued later starts before
    pd: bool = False  # page requests and responses are drained too
    status_data: int = 0
    status_addr: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PasidIotlbInv:
    """Tagged by PASID as well: for first-stage and pass-through translations."""

    TYPE: ClassVar = 6
    LAYOUT: ClassVar = Layout(
        {
            "granularity": at(5, 4, PasidIotlbGranularity),
            "did": at(31, 16),
            "pasid": at(51, 32, Pasid),
            "am": at(69, 64),
            "ih": flag(70),
            "addr": page_at(127, 76, Iova),
        }
    )
    granularity: PasidIotlbGranularity
    did: int
    pasid: Pasid
    am: int = 0
    ih: bool = False
    addr: Iova = NO_IOVA

    @property
    def pages(self) -> tuple[IovaPfn, int]:
        return _block(self.addr, self.am)


@dataclass(frozen=True, slots=True, kw_only=True)
class PasidCacheInv:
    TYPE: ClassVar = 7
    LAYOUT: ClassVar = Layout(
        {
            "granularity": at(5, 4, PasidCacheGranularity),
            "did": at(31, 16),
            "pasid": at(51, 32, Pasid),
        }
    )
    granularity: PasidCacheGranularity
    did: int = 0
    pasid: Pasid = NO_PASID


@dataclass(frozen=True, slots=True, kw_only=True)
class PasidDevTlbInv:
    TYPE: ClassVar = 8
    LAYOUT: ClassVar = Layout(
        {
            "mip": at(8, 4),
            "pfsid": Field(((15, 12), (63, 52))),
            "sid": at(31, 16),
            "pasid": at(51, 32, Pasid),
            "all_pasids": flag(64),
            "size": flag(75),
            "addr": page_at(127, 76, Iova),
        }
    )
    sid: int
    pasid: Pasid
    pfsid: int = 0
    mip: int = 0
    all_pasids: bool = False
    size: bool = False
    addr: Iova = NO_IOVA

    @property
    def pages(self) -> tuple[IovaPfn, int]:
        return devtlb_pages(self.addr, self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageGroupResponse:
    TYPE: ClassVar = 9
    LAYOUT: ClassVar = Layout(
        {
            "pasid_present": flag(4),
            "code": at(15, 12),
            "rid": at(31, 16),
            "pasid": at(51, 32, Pasid),
            "lpig": flag(66),
            "prgi": at(75, 67),
        }
    )
    rid: int
    prgi: int
    code: int  # 4 bits as sent; ResponseCode.from_wire says what the device makes of them
    pasid_present: bool = False
    pasid: Pasid = NO_PASID
    lpig: bool = True


Descriptor = (
    ContextInv
    | IotlbInv
    | DevTlbInv
    | IecInv
    | WaitDescriptor
    | PasidIotlbInv
    | PasidCacheInv
    | PasidDevTlbInv
    | PageGroupResponse
)

_CLASSES: Final[tuple[type[Descriptor], ...]] = (
    ContextInv,
    IotlbInv,
    DevTlbInv,
    IecInv,
    WaitDescriptor,
    PasidIotlbInv,
    PasidCacheInv,
    PasidDevTlbInv,
    PageGroupResponse,
)
_TYPE: Final = Field(((3, 0), (11, 9)))
_TYPE_BITS: Final[dict[type[Descriptor], int]] = {cls: _TYPE.put(cls.TYPE) for cls in _CLASSES}
_CLASS_OF_TYPE_BITS: Final = {bits: cls for cls, bits in _TYPE_BITS.items()}


def reserved_mask(cls: type[Descriptor]) -> int:
    """The bits of the descriptor that must be zero."""
    return bits(255, 0) & ~covered({**cls.LAYOUT, "type": _TYPE})


_SIZED: Final = (DevTlbInv, PasidDevTlbInv)
_RESERVED: Final = {cls: reserved_mask(cls) for cls in _CLASSES}
# With S set the lowest zero bit gives the size; this address has none [PCIe 10.2].
_NO_ZERO_BIT: Final = bits(63, PAGE_SHIFT)
DEVTLB_ALL: Final = Iova(bits(62, PAGE_SHIFT))  # with S set: everything


def encode(desc: Descriptor) -> bytes:
    return store(_TYPE_BITS[type(desc)] | desc.LAYOUT.pack(desc), DESCRIPTOR_SIZE)


def decode(raw: bytes) -> Descriptor:
    """DescriptorError for what the unit would refuse; FormatError for what is no queue entry at all."""
    word = load(raw, DESCRIPTOR_SIZE, "descriptor")
    cls = _CLASS_OF_TYPE_BITS.get(word & _TYPE.mask)
    if cls is None:
        raise DescriptorError(IQEI.BAD_TYPE, f"type {_TYPE.get(word):#x}")
    if word & _RESERVED[cls]:
        raise DescriptorError(IQEI.RESERVED_FIELD, f"{cls.__name__}: bits {word & _RESERVED[cls]:#x} are set")
    try:
        desc = cls(**cls.LAYOUT.unpack(word))
    except FormatError as e:
        raise DescriptorError(IQEI.RESERVED_FIELD, f"{cls.__name__}: {e}") from e
    if isinstance(desc, _SIZED) and desc.size and desc.addr == _NO_ZERO_BIT:
        raise DescriptorError(IQEI.RESERVED_FIELD, f"{cls.__name__}: S set, no zero bit in {desc.addr:#x}")
    return desc


def psi_cover(start_page: int, npages: int) -> tuple[Iova, int]:
    """(addr, am) of the smallest aligned block that covers the pages; may exceed the unit's MAMV."""
    _check_range(start_page, npages)
    # The block must hold first and last page, so AM must cover every bit in which they differ.
    am = (start_page ^ (start_page + npages - 1)).bit_length()
    return Iova(start_page >> am << am << PAGE_SHIFT), am


def devtlb_addr(start_page: int, npages: int) -> tuple[Iova, bool]:
    """(addr, size) of a device-TLB descriptor for one aligned power-of-two block of pages.

    2^m pages are named by ones in the m - 1 low page bits and a zero above them [PCIe 10.2].
    """
    _check_range(start_page, npages)
    assert npages & (npages - 1) == 0, f"{npages:#x} pages are no power of two"
    assert start_page & (npages - 1) == 0, f"page {start_page:#x} is not aligned to {npages:#x} pages"
    if npages == 1:
        return Iova(start_page << PAGE_SHIFT), False
    return Iova((start_page | (npages // 2 - 1)) << PAGE_SHIFT), True


def devtlb_pages(addr: Iova, size: bool) -> tuple[IovaPfn, int]:
    """(start_page, npages) of a device-TLB descriptor: the inverse of devtlb_addr()."""
    page = addr >> PAGE_SHIFT
    if not size:
        return IovaPfn(page), 1
    assert addr != _NO_ZERO_BIT, "decode() refuses a size without a zero bit"
    npages = (~page & (page + 1)) << 1
    return IovaPfn(page & ~(npages - 1)), npages


def _block(addr: Iova, am: int) -> tuple[IovaPfn, int]:
    return IovaPfn(addr >> PAGE_SHIFT >> am << am), 1 << am


def _check_range(start_page: int, npages: int) -> None:
    assert start_page >= 0, f"page {start_page}"
    assert 1 <= npages <= ALL_PAGES - start_page, f"{npages:#x} pages from {start_page:#x}"
