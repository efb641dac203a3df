"""An IOMMU group: devices whose requests cannot be told apart, so that one HWPT serves all of them.

Models struct iommufd_group [iommufd device.c]: one owner, one HWPT, one mutex under which devices are
attached, replaced and detached.  A second device of the group joins the HWPT the first brought; another
one is EINVAL; replacing it for one device replaces it for all.

Departure: a function's own entry is written when its device is attached, not with the first of its group;
what nobody bound does no DMA here.
"""

from __future__ import annotations

import errno
from contextlib import suppress

from iommufdd.core.device import DeviceEvent, DeviceState, IommufdDevice
from iommufdd.core.hwpt import Hwpt
from protocol.errors import UapiError
from protocol.flow import RwLock


class IommufdGroup:
    def __init__(self, number: int) -> None:
        self.number = number
        self.attached: list[IommufdDevice] = []
        self._owner: object = None  # the iommufd all its bound devices belong to
        self._bound = 0
        self._mutex = RwLock()

    @property
    def hwpt(self) -> Hwpt | None:
        return self.attached[0].hwpt if self.attached else None

    def claim(self, owner: object) -> None:
        """One device more is bound.  EBUSY: another of the group belongs to another iommufd."""
        if self._bound and self._owner is not owner:
            raise UapiError(errno.EBUSY, f"group {self.number} belongs to another iommufd")
        self._owner = owner
        self._bound += 1

    def release(self, device: IommufdDevice) -> None:
        """Blocked, and nobody's from now on."""
        device.happens(DeviceEvent.UNBIND)
        self._bound -= 1

    # awaits: device: it may be unbound; asked again: `_attach`
    # (tests/unit/iommufdd/test_group.py::test_an_attach_that_waited_while_its_device_was_unbound_is_einval) |
    # hwpt: its units or its KVM may go; asked again: `check`
    # (tests/unit/iommufdd/test_group.py::test_an_attach_that_waited_asks_whether_its_hwpt_is_walkable)
    async def attach(self, device: IommufdDevice, hwpt: Hwpt, *, pinned: bool) -> None:
        """Attach, or replace what is attached.

        EINVAL: the device does not fit, its group is on another HWPT, or on this one and not pinned as asked;
        ENODEV: what the HWPT needs of it is not there, or the silicon is gone.
        """
        await self._mutex.acquire(write=True)
        try:
            if device in self.attached:
                await self._replace(hwpt, pinned=pinned)
            else:
                await self._attach(device, hwpt, pinned=pinned)
        finally:
            self._mutex.release()

    # awaits: device: it may be off already; asked again: with the mutex
    # (tests/unit/iommufdd/test_group.py::test_two_detaches_at_once_detach_once_and_both_return) | hwpt: the
    # device may be on another; asked again: with the mutex
    # (tests/unit/iommufdd/test_vfio.py::test_who_left_an_hwpt_while_its_kvm_was_lost_stays_where_it_went)
    async def detach(self, device: IommufdDevice, hwpt: Hwpt | None = None) -> None:
        """Nothing of the device uses `hwpt` any more when this returns, or any.  No error if nothing is
        attached."""
        await self._mutex.acquire(write=True)
        try:
            if hwpt is None or device.hwpt is hwpt:
                await self._detach(device)
        finally:
            self._mutex.release()

    # awaits: device: another may have unbound it; asked again: its state, with the mutex
    # (tests/unit/iommufdd/test_group.py::test_two_unbinds_at_once_unbind_once_and_both_return)
    async def unbind(self, device: IommufdDevice) -> None:
        """Detached and released when this returns: whoever waits to attach it comes too late."""
        await self._mutex.acquire(write=True)
        try:
            await self._detach(device)
            if device.state is not DeviceState.UNBOUND:
                self.release(device)
        finally:
            self._mutex.release()

    # awaits: device: cannot change: the group's mutex is held
    async def _detach(self, device: IommufdDevice) -> None:
        if device in self.attached:
            await device.leave()
            self.attached.remove(device)

    # awaits: asked, device: cannot change: the group's mutex is held
    async def _attach(self, device: IommufdDevice, hwpt: Hwpt, *, pinned: bool) -> None:
        if device.state is DeviceState.UNBOUND:
            raise UapiError(errno.EINVAL, f"{device.info.name} was unbound meanwhile")
        held = self.hwpt
        if held is not None and held is not hwpt:
            raise UapiError(errno.EINVAL, f"group {self.number} is attached to HWPT {held.id}: one for all")
        device.check(hwpt, pinned=pinned)
        await device.enter(hwpt, pinned=pinned)
        self.attached.append(device)

    # awaits: hwpt: its units or its KVM may go; asked again: `enter`
    # (tests/unit/iommufdd/test_group.py::test_a_replacement_asks_again_once_the_device_has_left) | each
    # device, device, old, was_pinned: cannot change: the group's mutex is held, and `old` is kept
    async def _replace(self, hwpt: Hwpt, *, pinned: bool) -> None:
        """Every device of the group, or none."""
        old = self.hwpt
        if old is hwpt and pinned and hwpt.needs_iopf and not all(device.pinned for device in self.attached):
            raise UapiError(
                errno.EINVAL, f"group {self.number} is on HWPT {hwpt.id}, not pinned: detach it first"
            )
        if old is None or old is hwpt:
            return
        for device in self.attached:
            device.check(hwpt, pinned=pinned)
        was_pinned = {device: device.pinned for device in self.attached}
        old.users += 1  # nobody destroys what we may have to go back to
        try:
            for device in list(self.attached):
                await device.leave()
                try:
                    await device.enter(hwpt, pinned=pinned)
                except UapiError:
                    await self._back_to(old, was_pinned)
                    raise
        finally:
            old.users -= 1

    # awaits: each device, device, old, was_pinned: cannot change: the group's mutex is held, and `old` is
    # kept
    async def _back_to(self, old: Hwpt, was_pinned: dict[IommufdDevice, bool]) -> None:
        """A replacement failed half way; a device that cannot go back is blocked, and detached."""
        for device in list(self.attached):
            if device.hwpt is old:
                continue
            await device.leave()
            with suppress(UapiError):
                await device.enter(old, pinned=was_pinned[device])
            if device.hwpt is None:
                self.attached.remove(device)
