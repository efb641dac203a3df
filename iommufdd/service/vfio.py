"""A VFIO device node: bind to an iommufd, attach to one of its HWPTs, map the BAR [VFIO device_cdev.c]."""

from __future__ import annotations

import errno

from iommufdd.core.device import IommufdDevice
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.ioas import Ioas
from iommufdd.core.object import Object
from iommufdd.service.objects import IommuFile, VfioFile
from iommufdd.service.sizes import argsz
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Answer, Method, Service
from protocol.uapi import iommufd as uapi
from protocol.units import Iova


def _bind(held: VfioFile, message: uapi.VfioDeviceBindIommufd, fds: Fds) -> Body:
    app = held.app
    if held.bound is not None:
        raise UapiError(errno.EINVAL, f"{held.info.name} is bound already")
    if not len(fds):
        raise UapiError(errno.EBADF, "no iommufd came with the request")
    try:
        iommufd = app.files.find(fds.peek(0), IommuFile)
    except UapiError:
        raise UapiError(errno.EBADFD, "the file descriptor is no iommufd") from None
    held.check()
    partial = app.iopfs[held.unit].partial
    device = IommufdDevice(held.info, held.unit, held.silicon, app.settings.fault_policy, partial)
    group = held.group
    group.claim(iommufd)
    try:
        device_id = iommufd.objects.add(device)
    except UapiError:
        group.release(device)
        raise
    held.bound = iommufd, device
    return {"out_devid": device_id}


async def _attach(held: VfioFile, message: uapi.VfioDeviceAttachIommufdPt, fds: Fds) -> Body:
    iommufd, device = _bound(held)
    held.check()
    found = iommufd.objects.get(message.pt_id, Object)
    if isinstance(found, Ioas):
        raise UapiError(
            errno.EOPNOTSUPP,
            f"IOAS {found.id}: no HWPT is chosen for you, allocate one with IOMMU_HWPT_ALLOC",
        )
    if not isinstance(found, Hwpt):
        raise UapiError(errno.EINVAL, f"object {found.id} is a {type(found).__name__}, no HWPT")
    found.users += 1  # nobody destroys it while we wait for our turn
    try:
        await held.group.attach(device, found, pinned=message.pinned)
    finally:
        found.users -= 1
    return {"pt_id": found.id}


async def _detach(held: VfioFile, message: uapi.VfioDeviceDetachIommufdPt, fds: Fds) -> Body:
    _, device = _bound(held)
    await held.group.detach(device)
    return {}


async def _pin(held: VfioFile, message: uapi.VfioDevicePin, fds: Fds) -> Body:
    _, device = _bound(held)
    held.check()
    await device.pin(Iova(message.iova), message.length)
    return {}


async def _unpin(held: VfioFile, message: uapi.VfioDeviceUnpin, fds: Fds) -> Body:
    await _bound(held)[1].unpin(Iova(message.iova), message.length)
    return {}


async def _mmap(held: VfioFile, message: uapi.VfioDeviceMmap, fds: Fds) -> Answer:
    _bound(held)
    return Answer({}, [await held.silicon.portal(held.info.rid)])


def _bound(held: VfioFile) -> tuple[IommuFile, IommufdDevice]:
    if held.bound is None:
        raise UapiError(errno.EINVAL, f"{held.info.name} is not bound to an iommufd")
    return held.bound


VFIO: Service[VfioFile] = Service(
    "vfio-device",
    {
        "VFIO_DEVICE_BIND_IOMMUFD": Method(uapi.VfioDeviceBindIommufd, argsz(_bind), 1),
        "VFIO_DEVICE_ATTACH_IOMMUFD_PT": Method(uapi.VfioDeviceAttachIommufdPt, argsz(_attach)),
        "VFIO_DEVICE_DETACH_IOMMUFD_PT": Method(uapi.VfioDeviceDetachIommufdPt, argsz(_detach)),
        "VFIO_DEVICE_PIN": Method(uapi.VfioDevicePin, argsz(_pin)),
        "VFIO_DEVICE_UNPIN": Method(uapi.VfioDeviceUnpin, argsz(_unpin)),
        "VFIO_DEVICE_MMAP": Method(uapi.VfioDeviceMmap, _mmap),
    },
)
