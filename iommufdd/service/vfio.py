"""A VFIO device node: bind to an iommufd, attach to one of its HWPTs, map the BAR [VFIO device_cdev.c]."""

from __future__ import annotations

import errno

from iommufdd.service.objects import IommuFile, VfioFile
from iommufdd.service.sizes import argsz
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Answer, Method, Service
from protocol.uapi import iommufd as uapi
from protocol.units import Iova


def _bind(held: VfioFile, message: uapi.VfioDeviceBindIommufd, fds: Fds) -> Body:
    held.node.check_unbound()
    if not len(fds):
        raise UapiError(errno.EBADF, "no iommufd came with the request")
    try:
        iommufd = held.app.files.find(fds.peek(0), IommuFile)
    except UapiError:
        raise UapiError(errno.EBADFD, "the file descriptor is no iommufd") from None
    return {"out_devid": held.node.bind(iommufd.ctx.objects)}


async def _attach(held: VfioFile, message: uapi.VfioDeviceAttachIommufdPt, fds: Fds) -> Body:
    return {"pt_id": await held.node.attach(message.pt_id, pinned=message.pinned)}


async def _detach(held: VfioFile, message: uapi.VfioDeviceDetachIommufdPt, fds: Fds) -> Body:
    await held.node.detach()
    return {}


async def _pin(held: VfioFile, message: uapi.VfioDevicePin, fds: Fds) -> Body:
    await held.node.pin(Iova(message.iova), message.length)
    return {}


async def _unpin(held: VfioFile, message: uapi.VfioDeviceUnpin, fds: Fds) -> Body:
    await held.node.unpin(Iova(message.iova), message.length)
    return {}


async def _mmap(held: VfioFile, message: uapi.VfioDeviceMmap, fds: Fds) -> Answer:
    held.node.check_bound()
    return Answer({}, [await held.silicon.portal(held.node.info.rid)])


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
