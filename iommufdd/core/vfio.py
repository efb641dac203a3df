"""A VFIO device node that is open: bound to one iommufd, attached to one of its HWPTs.

Models struct vfio_device_file [VFIO device_cdev.c] and what binding, attaching and unbinding are to iommufd
[iommufd device.c].  In: the group is claimed for the iommufd, the device becomes an object of it.  Out: off
its HWPT, released to the group, and only then out of the iommufd's objects, so that nobody finds one that is
half gone.  A node is of the hardware that was there when it was opened, whatever came in its place.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from iommufdd.core.device import IommufdDevice
from iommufdd.core.fault_policy import FaultPolicy
from iommufdd.core.group import IommufdGroup
from iommufdd.core.hardware import FunctionInfo, Hardware, Unit
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.ioas import Ioas
from iommufdd.core.object import Object, Objects
from iommufdd.core.partial import PartialGroups
from protocol.errors import UapiError
from protocol.units import Iova


class VfioBinding(NamedTuple):
    """`objects`: of the iommufd, which they stand for."""

    objects: Objects
    device: IommufdDevice


class VfioDeviceFile:
    """`partial`: of the page request queue of the unit before it."""

    def __init__(
        self,
        hardware: Hardware,
        info: FunctionInfo,
        unit: Unit,
        group: IommufdGroup,
        policy: FaultPolicy,
        partial: PartialGroups,
    ) -> None:
        self.info = info
        self.unit = unit
        self.binding: VfioBinding | None = None
        self._hardware = hardware
        self._group = group
        self._policy = policy
        self._partial = partial

    @property
    def bound(self) -> IommufdDevice | None:
        return None if self.binding is None else self.binding.device

    def _check_there(self) -> None:
        """ENODEV: the device is gone."""
        if not self._hardware.alive:
            why = f"{self.info.name} went with its remapping unit: close its node and open it again"
            raise UapiError(errno.ENODEV, why)

    def check_unbound(self) -> None:
        """EINVAL: it is bound."""
        if self.binding is not None:
            raise UapiError(errno.EINVAL, f"{self.info.name} is bound already")

    def check_bound(self) -> VfioBinding:
        if self.binding is None:
            raise UapiError(errno.EINVAL, f"{self.info.name} is not bound to an iommufd")
        return self.binding

    # -- iommufd_device_bind, iommufd_device_unbind ----------------------------------------------------

    def bind(self, objects: Objects) -> int:
        """The device's id in the iommufd whose `objects` these are.  EINVAL; ENODEV; EBUSY: another iommufd
        has the group; ENOMEM.
        """
        self.check_unbound()
        self._check_there()
        device = IommufdDevice(self.info, self.unit, self._hardware, self._policy, self._partial)
        self._group.claim(objects)
        try:
            number = objects.add(device)
        except UapiError:
            self._group.release(device)
            raise
        self.binding = VfioBinding(objects, device)
        return number

    async def unbind(self) -> None:
        """Returns once it is done, by us or by whoever began before."""
        binding = self.binding
        if binding is None:
            return
        # await: binding, asked: another may have unbound it; asked again: behind it
        # (tests/unit/iommufdd/test_vfio.py::test_two_who_unbind_take_the_device_out_once)
        await self._group.unbind(binding.device)
        if self.binding is binding:
            self.binding = None
            binding.objects.remove(binding.device.id)

    # -- iommufd_device_attach, iommufd_device_detach --------------------------------------------------

    # awaits: hwpt: its units or its KVM may go; asked again: `check`
    # (tests/unit/iommufdd/test_group.py::test_an_attach_that_waited_asks_whether_its_hwpt_is_walkable)
    async def attach(self, pt_id: int, *, pinned: bool) -> int:
        """Onto an HWPT of the same iommufd, or from one to another; its id.  ENOENT: no such object; EINVAL:
        no HWPT; EOPNOTSUPP: an IOAS; ENODEV; errors as of `IommufdGroup.attach`.
        """
        objects, device = self.check_bound()
        self._check_there()
        found = objects.get(pt_id, Object)
        if isinstance(found, Ioas):
            raise UapiError(
                errno.EOPNOTSUPP,
                f"IOAS {found.id}: no HWPT is chosen for you, allocate one with IOMMU_HWPT_ALLOC",
            )
        if not isinstance(found, Hwpt):
            raise UapiError(errno.EINVAL, f"object {found.id} is a {type(found).__name__}, no HWPT")
        with found.used() as hwpt:  # nobody destroys it while we wait for our turn
            await self._group.attach(device, hwpt, pinned=pinned)
            return hwpt.id

    async def detach(self) -> None:
        """EINVAL: it is not bound."""
        await self._group.detach(self.check_bound().device)

    async def leave(self, hwpt: Hwpt) -> None:
        """Off that HWPT, if it is on it."""
        if self.bound is not None and self.bound.hwpt is hwpt:
            await self._group.detach(self.bound, hwpt)

    # -- pinning ---------------------------------------------------------------------------------------

    async def pin(self, iova: Iova, size: int) -> None:
        """EINVAL, ENODEV; errors as of `IommufdDevice.pin`."""
        device = self.check_bound().device
        self._check_there()
        await device.pin(iova, size)

    async def unpin(self, iova: Iova, size: int) -> None:
        """EINVAL: it is not bound, or no such range was pinned."""
        await self.check_bound().device.unpin(iova, size)
