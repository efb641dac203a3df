"""iommufdd's front door: device nodes to open, and counters."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

from iommufdd.config import IommufddSettings
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.hwpt_kvm import HwptKvm
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.ioas_check import check_ioas
from iommufdd.service.iommufd import IOMMUFD
from iommufdd.service.objects import IommufddApp, VfioFile
from iommufdd.service.vfio import VFIO
from protocol.daemon import tell_options
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.door import Door
from protocol.rpc.loop import Loop
from protocol.rpc.service import Answer, Method, Result, Service
from protocol.uapi import iommufd as uapi
from protocol.uapi import names
from protocol.uapi.message import MAX_TOLD, StartedWith, as_told


class Iommufdd:
    """The daemon: what it holds, behind its socket."""

    def __init__(self, loop: Loop, settings: IommufddSettings) -> None:
        self.app = IommufddApp(loop, settings)
        self.door = Door(loop, FRONT_DOOR, self.app)
        self.private_doors: Mapping[Path, Door[Any]] = {}

    async def start(self) -> None:
        await self.app.start()

    def close(self) -> None:
        self.door.close()
        self.app.close()


def _open(app: IommufddApp, message: uapi.OpenIommuNode, fds: Fds) -> Result:
    if message.path == names.IOMMU_PATH:
        mm = app.loop.kernel.cookie_of(fds.peek(0)) if len(fds) else 0
        fd, _, _ = app.files.open(IOMMUFD, app.open_iommufd(mm), app.iommufd_closed)
        return Answer({}, [fd])
    return _open_device(app, message)


async def _open_device(app: IommufddApp, message: uapi.OpenIommuNode) -> Answer:
    number = message.path.removeprefix(names.VFIO_PATH)
    if not (message.path.startswith(names.VFIO_PATH) and number.isdecimal() and len(number) < 4):
        raise UapiError(
            errno.ENOENT, f"open {message.path!r}: only {names.IOMMU_PATH} and {names.VFIO_PATH}N"
        )
    node = await app.platform.open(int(number), message.path)
    fd, _, _ = app.files.open(VFIO, VfioFile(app, app.silicon, node), app.vfio_closed)
    return Answer({}, [fd])


def _stats(app: IommufddApp, message: uapi.IommufddStats, fds: Fds) -> Body:
    beyond = (hwpt for did, hwpt in sorted(app.platform.hwpts.items()) if did > message.after)
    return {
        **{field.name: getattr(app.unit_counts, field.name) for field in fields(app.unit_counts)},
        "partial_held": sum(iopf.partial.held for iopf in app.platform.iopfs.values()),
        "faults_recorded": app.faults_recorded,
        "devices_bound": len(app.platform.devices),
        **asdict(app.counts),
        "hwpt_count": len(app.platform.hwpts),
        "hwpts": [_hwpt_stats(hwpt) for hwpt in islice(beyond, MAX_TOLD)],
    }


async def _check(app: IommufddApp, message: uapi.IommufddCheck, fds: Fds) -> Body:
    found = app.violations()
    for ioas in app.spaces:
        found += await check_ioas(ioas)
    return {"violations": as_told(found)}


def _hwpt_stats(hwpt: Hwpt) -> Body:
    stats: Body = {"did": hwpt.domain.did, "functions": len(hwpt.attached)}
    if isinstance(hwpt, HwptKvm):
        stats["invalidations"] = hwpt.invalidations
        stats["acked_epoch"] = hwpt.acked_epoch
    elif isinstance(hwpt, HwptPaging):
        stats["iotlb_syncs"] = hwpt.iotlb_syncs
        stats["acked"] = hwpt.acked
        stats["leaves"] = hwpt.table.leaves[1:]
        for level, tables in enumerate(hwpt.table.tables[1:], 1):
            stats[f"table_pages.iommufd.{level}"] = tables
    return {**stats, "faults": {code.name: count for code, count in hwpt.faults.items()}}


FRONT_DOOR: Service[IommufddApp] = Service(
    "iommufdd",
    {
        "OPEN": Method(uapi.OpenIommuNode, _open, 1, lambda message: int(message.path == names.IOMMU_PATH)),
        "STATS": Method(uapi.IommufddStats, _stats),
        "CHECK": Method(uapi.IommufddCheck, _check),
        "STARTED_WITH": Method(StartedWith, tell_options),
    },
)
