"""Between the VT-d driver (iommufdd) and the silicon (device_sim), and between a guest and its device.

The link stands for what a driver does with registers and rings in memory: it reads capabilities, writes PASID
entries, submits invalidation descriptors, and is interrupted for page requests and faults.  Hardware records
travel as their bytes.  A portal stands for the BARs of one device, mapped into a guest.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from protocol.uapi.message import U8, U16, U32, U64, Message, Name

MAX_RING_BYTES = 1 << 19  # a whole invalidation queue
PASID_ENTRY_BYTES = 64
DSA_DESCRIPTOR_BYTES = 64
MAX_MMIO_READ = 256
MAX_MMIO_WRITE = 8
MAX_WINDOWS = 7  # and the lease: what one message may carry
MAX_UNITS = 64
MAX_FUNCTIONS = 1 << 10
FAULT_CAPABILITIES: Final = ("full", "partial", "none")

# -- doors of device_sim -------------------------------------------------------------------------------


class Link(Message):
    """The driver takes the units; the reply carries the link.  EBUSY: another driver has it; EPERM: not at
    the driver's door.
    """


class DeviceStats(Message):
    """Counters of the unit and of every device."""


# -- driver -> silicon ---------------------------------------------------------------------------------


class LinkCaps(Message):
    """The reply is a CapsReply."""


class FunctionInfo(BaseModel):
    """A function as enumeration finds it.  `unit`: the number of the one before it; `group`: those with the
    same number share every translation; `fault_capability`: the paths on which it survives an absent page.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    rid: U16
    name: Name
    unit: U8
    group: U16
    pasid: bool
    ats: bool
    pri: bool
    pasid_required: bool
    fault_capability: Literal["full", "partial", "none"]


class CapsReply(BaseModel):
    """CAP and ECAP of every unit, and the functions behind them."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    units: Annotated[
        list[Annotated[tuple[U64, U64], Field(strict=False)]], Field(min_length=1, max_length=MAX_UNITS)
    ]
    functions: Annotated[list[FunctionInfo], Field(max_length=MAX_FUNCTIONS)]


class LinkMemoryAdd(Message):
    """Windows of host memory, with an fd each and then the lease; the reply names the set."""

    windows: Annotated[
        list[Annotated[tuple[Name, U64, Annotated[int, Field(gt=0, lt=1 << 52)]], Field(strict=False)]],
        Field(min_length=1, max_length=MAX_WINDOWS),
    ]


class LinkMemoryRemove(Message):
    """The driver is done with a set: it is unmapped and its lease closed before the reply."""

    memory: U32


class LinkPasidEntry(Message):
    """Store a PASID-table entry; cached copies stay until invalidated."""

    rid: U16
    pasid: Annotated[int, Field(ge=0, lt=1 << 20)]
    entry: Annotated[bytes, Field(min_length=PASID_ENTRY_BYTES, max_length=PASID_ENTRY_BYTES)]


class LinkFunction(Message):
    """Config space of a function: PASID, then ATS, then PRI with an allocation (0: off); bus mastering.

    None leaves as it is.  EINVAL: no such capability, or the wrong order; EBUSY: page requests are on.
    """

    rid: U16
    pasid: bool | None = None
    ats: bool | None = None
    pri_allocation: U32 | None = None
    bus_master: bool | None = None


class LinkQi(Message):
    """Invalidation descriptors, executed in order; reply: `status`, the data of each completed wait.

    `prq_consumed` moves the page request queue's head first; `prq_clear` clears its overflow flag.
    """

    unit: U8 = 0
    descriptors: Annotated[bytes, Field(max_length=MAX_RING_BYTES)] = b""
    prq_consumed: U32 = 0
    prq_clear: bool = False


class LinkPortal(Message):
    """Map a function's BARs: the reply carries a portal.  Only the driver hands them out."""

    rid: U16


# -- silicon -> driver (notifications) -----------------------------------------------------------------


class PageRequests(Message):
    """The page request interrupt: new entries, 32 bytes each, and whether the queue overflowed."""

    unit: U8 = 0
    entries: Annotated[bytes, Field(max_length=MAX_RING_BYTES)]
    overflow: bool


class Faults(Message):
    """The fault event: records, 16 bytes each."""

    unit: U8 = 0
    records: Annotated[bytes, Field(max_length=MAX_RING_BYTES)]


# -- guest -> device, through its portal ---------------------------------------------------------------


class MmioRead(Message):
    """A load from BAR 0; reply: `data`.  Ordered behind every write before it."""

    offset: U16
    size: Annotated[int, Field(gt=0, le=MAX_MMIO_READ)]


class MmioWrite(Message):
    """A posted store to BAR 0 (notification)."""

    offset: U16
    data: Annotated[bytes, Field(min_length=1, max_length=MAX_MMIO_WRITE)]


class Movdir64b(Message):
    """A posted write of a descriptor to the portal of a dedicated queue (notification)."""

    wq: U8
    descriptor: Annotated[bytes, Field(min_length=DSA_DESCRIPTOR_BYTES, max_length=DSA_DESCRIPTOR_BYTES)]


class Enqcmd(Movdir64b):
    """A descriptor to a portal of a shared queue, the limited one or the other; reply: `retry`."""

    limited: bool = True
