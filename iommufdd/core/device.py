"""A device bound to an iommufd: attach and detach, in the order that leaves nothing behind.

Models iommufd_device attach and detach with VT-d's part of it [RFC 16/42], [RFC 19/42]: the PASID entry
goes in before ATS and PRI are switched on; at detach page requests stop first, what is in flight is
answered, and only then is the entry cleared and every cache that may remember it flushed (defect B-20).
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Protocol

from iommufdd.core import qi
from iommufdd.core.hwpt_kvm import HwptKvm, Unit
from iommufdd.core.object import Object
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.hw.caps import Ecap
from protocol.hw.pasid_entry import PASID_ENTRY_SIZE
from protocol.trace import TRACE, AttachDeviceToDomain, pci_name
from protocol.units import Pasid

PRI_DEPTH = 2048  # page requests a function may have outstanding, as the driver asks
RID_PASID = Pasid(0)
NOT_PRESENT = bytes(PASID_ENTRY_SIZE)


class Hardware(Unit, Protocol):
    """The unit, and config space of the functions behind it.  Raises UapiError(ENODEV) once it is gone."""

    async def write_pasid_entry(self, rid: int, pasid: Pasid, entry: bytes) -> None: ...
    async def set_function(self, rid: int, *, ats: bool, pri_allocation: int, bus_master: bool) -> None: ...


class Device(Object):
    def __init__(self, rid: int, name: str, hardware: Hardware, ecap: Ecap) -> None:
        super().__init__()
        self.rid = rid
        self.name = name
        self.hwpt: HwptKvm | None = None
        self._changing: Wait[None] | None = None  # an attach or detach is under way
        self._hardware = hardware
        self._ecap = ecap
        self._handling = 0  # groups of page requests being worked on
        self._quiet: Wait[None] | None = None

    async def attach(self, hwpt: HwptKvm) -> None:
        """EINVAL: attached already; EBUSY: being attached or detached; ENODEV."""
        if self.hwpt is not None:
            raise UapiError(errno.EINVAL, f"{self.name} is attached to HWPT {self.hwpt.id}: detach it first")
        self._begin()
        hwpt.users += 1
        hwpt.rids.append(self.rid)  # before the entry: an invalidation from now on reaches this function
        try:
            entry = hwpt.domain.pasid_entry(self._ecap).to_bytes()
            await self._hardware.write_pasid_entry(self.rid, RID_PASID, entry)
            self.hwpt = hwpt
            if TRACE.on:
                TRACE.emit(AttachDeviceToDomain(pci_name(self.rid)))
            await self._hardware.set_function(self.rid, ats=True, pri_allocation=0, bus_master=False)
            await self._hardware.set_function(self.rid, ats=True, pri_allocation=PRI_DEPTH, bus_master=True)
        except UapiError:
            self.hwpt = None
            with suppress(UapiError):  # the unit is gone
                await self._clear(hwpt)
            self._leave(hwpt)
            raise
        finally:
            self._end()

    async def detach(self) -> None:
        """Nothing uses the HWPT any more when this returns.  No error if nothing is attached."""
        while self._changing is not None:
            await self._changing
        hwpt = self.hwpt
        if hwpt is None:
            return
        self._begin()
        try:
            # DMA and page requests stop, those in flight are answered, then the entry goes.
            await self._hardware.set_function(self.rid, ats=True, pri_allocation=0, bus_master=False)
            await self._wait_quiet()
            await self._clear(hwpt)
        except UapiError:
            pass  # the unit is gone: it translates nothing and asks for nothing
        finally:
            self.hwpt = None
            self._leave(hwpt)
            self._end()

    async def _clear(self, hwpt: HwptKvm) -> None:
        """The entry, every cache that may remember it, and ATS."""
        await self._hardware.write_pasid_entry(self.rid, RID_PASID, NOT_PRESENT)
        await self._hardware.submit(qi.detach(hwpt.domain.did, self.rid))
        await self._hardware.set_function(self.rid, ats=False, pri_allocation=0, bus_master=False)

    def _begin(self) -> None:
        if self._changing is not None:
            raise UapiError(errno.EBUSY, f"{self.name} is being attached or detached")
        self._changing = Wait()

    def _end(self) -> None:
        assert self._changing is not None
        changed, self._changing = self._changing, None
        changed.set(None)

    def _leave(self, hwpt: HwptKvm) -> None:
        hwpt.rids.remove(self.rid)
        hwpt.users -= 1

    # -- page requests in flight -----------------------------------------------------------------------

    def begin_group(self) -> None:
        self._handling += 1

    def end_group(self) -> None:
        self._handling -= 1
        if not self._handling and self._quiet is not None:
            quiet, self._quiet = self._quiet, None
            quiet.set(None)

    async def _wait_quiet(self) -> None:
        if self._handling:
            self._quiet = Wait()
            await self._quiet
