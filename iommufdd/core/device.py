"""A device bound to an iommufd: how it gets onto an HWPT and off it, and leaves nothing behind.

Models iommufd_device attach, replace and detach with VT-d's part of it [RFC 16/42], [RFC 19/42].  In: the
PASID entry, PASID, ATS, page requests, and DMA last.  Out: DMA and page requests stop, the queue is drained
and what came of it answered, only then is the entry not present any more and every cache that may remember it
flushed (R10, defect B-20), and only then is the rest of it cleared.

Page requests are on exactly while the device is on an HWPT that needs them, however it got there (defect
B-12); those that were on before stay on.
"""

from __future__ import annotations

import errno
from collections.abc import Coroutine
from contextlib import suppress
from enum import Enum, auto
from typing import Any, NamedTuple

from iommufdd.core import qi
from iommufdd.core.fault_policy import FaultPolicy
from iommufdd.core.hardware import ConfigSpace, FunctionInfo, Unit
from iommufdd.core.hwpt import Former, Hwpt
from iommufdd.core.object import Object
from iommufdd.core.partial import PartialGroups
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.hw.pasid_entry import RID_PASID
from protocol.lifecycle import LifeCycle
from protocol.trace import TRACE, AttachDeviceToDomain, pci_name
from protocol.units import Iova

PRI_DEPTH = 2048  # page requests a function may have outstanding, as the driver asks


class DeviceState(Enum):
    BLOCKED = auto()  # bound, and reaches nothing
    ATTACHED = auto()  # on an HWPT; an entry that is half made counts
    DRAINED = auto()  # still on it, but what it asks for from now on came too late
    UNBOUND = auto()


class DeviceEvent(Enum):
    ENTER = auto()
    DRAIN = auto()
    LEAVE = auto()
    UNBIND = auto()


DEVICE_LIFE = LifeCycle(
    "device of an iommufd",
    DeviceState.BLOCKED,
    {
        (DeviceState.BLOCKED, DeviceEvent.ENTER): DeviceState.ATTACHED,
        (DeviceState.ATTACHED, DeviceEvent.DRAIN): DeviceState.DRAINED,
        (DeviceState.DRAINED, DeviceEvent.LEAVE): DeviceState.BLOCKED,
        (DeviceState.BLOCKED, DeviceEvent.UNBIND): DeviceState.UNBOUND,
    },
)


class Attachment(NamedTuple):
    """`pinned`: so that no page the device reaches can be absent."""

    hwpt: Hwpt
    pinned: bool


class IommufdDevice(Object):
    """Whoever calls `enter` and `leave` holds the mutex of the device's group."""

    def __init__(
        self,
        info: FunctionInfo,
        unit: Unit,
        config: ConfigSpace,
        policy: FaultPolicy,
        partial: PartialGroups,
    ) -> None:
        super().__init__()
        self.info = info
        self.rid = info.rid
        self.unit = unit
        self.state = DEVICE_LIFE.born
        self.attachment: Attachment | None = None  # while it is on an HWPT
        self._config = config
        self._policy = policy
        self._partial = partial  # of the unit's page request queue
        self._owns_pri = False
        self._pins: dict[int, tuple[Iova, int] | None] = {}  # by the HWPT's name: (iova, size), or everything
        self._former: Hwpt | None = None  # that the unit refused to forget when it left
        self._handling = 0  # groups of page requests being worked on
        self._quiet: Wait[None] | None = None

    def happens(self, event: DeviceEvent) -> None:
        self.state = DEVICE_LIFE.after(self.state, event)

    @property
    def hwpt(self) -> Hwpt | None:
        return None if self.attachment is None else self.attachment.hwpt

    @property
    def pinned(self) -> bool:
        return self.attachment is not None and self.attachment.pinned

    @property
    def asks_on(self) -> Hwpt | None:
        """The HWPT its page requests are for, if they do not come too late."""
        return self.hwpt if self.state is DeviceState.ATTACHED else None

    def check(self, hwpt: Hwpt, *, pinned: bool) -> None:
        """EINVAL if this device does not go with that HWPT, ENODEV if nobody does; nothing was touched."""
        hwpt.check_walkable()
        missing = hwpt.domain.what_is_missing(self.unit.cap, self.unit.ecap)
        if missing is not None:
            raise UapiError(errno.EINVAL, f"the unit before {self.info.name} cannot walk it: {missing}")
        objection = self._policy.objection(self.info) if hwpt.needs_iopf and not pinned else None
        if objection is not None:
            raise UapiError(errno.EINVAL, f"{objection}: attach it with what it reaches pinned")

    # awaits: hwpt: cannot change: the group's mutex is held, and it has a user; whoever loses it waits to
    # take us off
    async def enter(self, hwpt: Hwpt, *, pinned: bool) -> None:
        """Onto an HWPT.  Raises UapiError, with the device blocked, off it, and every cache clean."""
        if self._former is not None:  # which its unit would go on translating it by
            await self._former.forget_former()
            self._former = None
        hwpt.check_walkable()  # again: a device that is replaced slept since `check`
        self.happens(DeviceEvent.ENTER)
        self.attachment = Attachment(hwpt, pinned)
        hwpt.users += 1
        hwpt.attached[self.rid] = self.unit  # before the entry: an invalidation from now on reaches it
        if not self.info.ats:
            hwpt.without_ats.add(self.rid)
        try:
            if pinned and hwpt.needs_iopf:  # before anything could be reached
                self._pins[await hwpt.pin_all()] = None
            self.unit.put_pasid_entry(self.rid, RID_PASID, hwpt.domain.pasid_entry(self.unit.ecap))
            if TRACE.on:
                TRACE.emit(AttachDeviceToDomain(pci_name(self.rid)))
            if self.info.pasid:
                await self._config.set_function(self.rid, pasid=True)
            if self.info.ats and self.unit.ecap.dt:
                await self._config.set_function(self.rid, ats=True)
            if hwpt.needs_iopf:
                await self._enable_iopf(pinned=pinned)
            self.unit.check_on_bus(self.rid)  # again: an invalidation may have timed out while we slept
            await self._config.set_function(self.rid, bus_master=True)
            self.unit.check_on_bus(self.rid)  # and in this sleep: it is no master any more
        except UapiError:
            await self.leave()
            raise

    async def _enable_iopf(self, *, pinned: bool) -> None:
        """IOMMU_DEV_FEAT_IOPF [RFC 16/42]: must come after ATS."""
        info, ecap = self.info, self.unit.ecap
        if not (info.ats and info.pri and ecap.dt and ecap.prs):
            if pinned:
                return
            has = f"ATS {info.ats}, PRI {info.pri}, ECAP.DT {ecap.dt}, ECAP.PRS {ecap.prs}"
            raise UapiError(errno.ENODEV, f"{info.name} cannot ask for pages: {has}")
        if info.pasid and not info.pasid_required:
            raise UapiError(errno.EINVAL, f"{info.name} has PASID on and needs none in its page responses")
        try:
            await self._config.set_function(self.rid, pri_allocation=PRI_DEPTH)
        except UapiError as error:
            if error.errno != errno.EBUSY:  # somebody else has them on already: then they are not ours
                raise
        else:
            self._owns_pri = True

    # awaits: asked, hwpt, did, ecap, ats: cannot change: the group's mutex is held
    async def leave(self) -> None:
        """Off the HWPT, if it is on one."""
        hwpt = self.hwpt
        if hwpt is None:
            return
        did, ecap, ats = hwpt.domain.did, self.unit.ecap, self.info.ats
        await _try(self._config.set_function(self.rid, bus_master=False))
        if self._owns_pri:
            await _try(self._config.set_function(self.rid, pri_allocation=0))
        await _try(self.unit.submit(qi.drain(did, self.rid, ecap, ats=ats)))
        self.happens(DeviceEvent.DRAIN)
        self._partial.discard([self.rid])
        await self._wait_quiet()
        self.unit.retire_pasid_entry(self.rid, RID_PASID)
        await self._have_forgotten(hwpt)
        self.unit.clear_pasid_entry(self.rid, RID_PASID)
        await _try(self._config.set_function(self.rid, ats=False))
        await _try(self._config.set_function(self.rid, pasid=False))
        self._owns_pri = False
        self.attachment = None
        self.happens(DeviceEvent.LEAVE)
        del hwpt.attached[self.rid]
        hwpt.without_ats.discard(self.rid)
        await self._unpin_all(hwpt)
        hwpt.users -= 1

    async def _have_forgotten(self, hwpt: Hwpt) -> None:
        """No cache has it; or the unit refuses, and is asked again before anything is given up."""
        ats = self.info.ats
        try:
            # await: hwpt: cannot change: the group's mutex is held
            await self.unit.submit(qi.detach(hwpt.domain.did, self.rid, self.unit.ecap, ats=ats))
        except UapiError as error:
            if error.errno != errno.ENODEV:  # else silicon that is gone
                hwpt.unforgotten[self.rid] = Former(self.unit, ats)
                self._former = hwpt

    # -- pinning ---------------------------------------------------------------------------------------

    async def pin(self, iova: Iova, size: int) -> None:
        """The guest registered memory with the device that it does not tolerate faults on, and the variant
        driver trapped that [RFC 00/42].  EINVAL: on no HWPT, or no whole pages; KVM's errnos.
        """
        hwpt = self._attached_to()
        # await: hwpt: the device may leave it; asked again: behind it
        # (tests/unit/iommufdd/test_device.py::test_a_pin_that_outlasts_the_attachment_is_taken_back)
        pin = await hwpt.pin(iova, size)
        if self.hwpt is not hwpt:
            await _try(hwpt.unpin(pin))
            raise UapiError(errno.EINVAL, f"{self.info.name} was detached meanwhile")
        self._pins[pin] = iova, size

    async def unpin(self, iova: Iova, size: int) -> None:
        """What is left of this device's first pin of that range: what went with its memslot, or its area, is
        not taken from who pinned there since.  EINVAL: it has none."""
        hwpt = self._attached_to()
        pin = next((pin for pin, pinned in self._pins.items() if pinned == (iova, size)), None)
        if pin is None:
            raise UapiError(errno.EINVAL, f"unpin of {iova:#x}+{size:#x}: no such range was pinned")
        del self._pins[pin]
        await hwpt.unpin(pin)

    def _attached_to(self) -> Hwpt:
        if self.hwpt is None:
            raise UapiError(errno.EINVAL, f"{self.info.name} is attached to no HWPT")
        return self.hwpt

    # awaits: each pin, hwpt: cannot change: taken out of what we have first, so nobody gives them up twice
    async def _unpin_all(self, hwpt: Hwpt) -> None:
        """The device reaches nothing any more."""
        pins, self._pins = self._pins, {}
        for pin in reversed(pins):
            await _try(hwpt.unpin(pin))

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


async def _try(step: Coroutine[Any, None, None]) -> None:
    """The next step is taken all the same: silicon that is gone translates nothing and asks for nothing."""
    with suppress(UapiError):
        await step
