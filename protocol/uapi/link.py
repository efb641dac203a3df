"""Between the VT-d driver (iommufdd) and the silicon (device_sim), and between a guest and its device.

The link is for what has no hardware equivalent here: enumeration and config space, handing over windows of
memory, a unit's registers and events; all else between the two is memory (docs/decisions/0018).  A portal
stands for the BARs of one device, mapped into a guest.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from protocol.uapi.message import U8, U16, U32, U64, Checked, Message, Name, Windows

DSA_DESCRIPTOR_BYTES = 64
MAX_MMIO_READ = 256
MAX_MMIO_WRITE = 8
MAX_UNITS_TOLD = 64
MAX_FUNCTIONS = 64  # a descriptor each when a domain is invalidated: all of them fit into a unit's ring

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


class FunctionInfo(Checked):
    """A function as enumeration finds it.  `unit`: the number of the one before it; `group`: those with the
    same number share every translation; `fault_capability`: the paths on which it survives an absent page.
    """

    rid: U16
    name: Name
    unit: U8
    group: U16
    pasid: bool
    ats: bool
    pri: bool
    pasid_required: bool
    fault_capability: Literal["full", "partial", "none"]


class CapsReply(Checked):
    """CAP and ECAP of every unit, and the functions behind them."""

    units: Annotated[
        list[Annotated[tuple[U64, U64], Field(strict=False)]], Field(min_length=1, max_length=MAX_UNITS_TOLD)
    ]
    functions: Annotated[list[FunctionInfo], Field(max_length=MAX_FUNCTIONS)]


class LinkMemoryAdd(Message):
    """Windows of host memory, with an fd each and then the lease; the reply names the set."""

    windows: Windows


class LinkMemoryRemove(Message):
    """The driver is done with a set: it is unmapped and its lease closed before the reply."""

    memory: U32


class LinkFunction(Message):
    """Config space of a function: PASID, then ATS, then PRI with an allocation (0: off); bus mastering.

    None leaves as it is.  EINVAL: no such capability, or the wrong order; EBUSY: page requests are on.
    """

    rid: U16
    pasid: bool | None = None
    ats: bool | None = None
    pri_allocation: U32 | None = None
    bus_master: bool | None = None


class LinkUnit(Message):
    """A unit's pages and events: the request carries the driver's store page, the reply the registers with
    the acknowledge page behind them, the kick, and the fault, page request and completion events.  EBUSY: the
    driver has them; EINVAL: no such unit, or no such page.
    """

    unit: U8


class LinkPortal(Message):
    """Map a function's BARs: the reply carries a portal.  Only the driver hands them out."""

    rid: U16


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
