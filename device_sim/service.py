"""device_sim's connections: the driver's link, guests' portals, and the doors.

The link is held by one driver at a time.  When it hangs up, in whatever way, the silicon stops: nothing is
translated any more, caches are empty, memory is unmapped and its leases end, portals are cut.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import structlog

from device_sim.config import DeviceSimSettings
from device_sim.core.dsa import registers
from device_sim.core.msi import InterruptMessage
from device_sim.core.silicon import Device, Silicon
from device_sim.core.stats import device_stats, unit_stats
from device_sim.memory import MappedMemory
from protocol.daemon import tell_options
from protocol.errors import UapiError
from protocol.hw.fields import FormatError
from protocol.rpc.channel import Body, Channel, Fds
from protocol.rpc.door import Door
from protocol.rpc.files import Files
from protocol.rpc.loop import Loop
from protocol.rpc.service import Answer, Method, Notification, Service
from protocol.uapi import link as uapi
from protocol.uapi.message import StartedWith
from protocol.units import Pasid

log = structlog.get_logger("device_sim")


class LinkedDriver:
    """The driver at the other end of a link."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def page_requests(self, unit: int, entries: bytes, *, overflow: bool) -> None:
        self._channel.notify("PAGE_REQUESTS", {"unit": unit, "entries": entries, "overflow": overflow})

    def faults(self, unit: int, records: bytes) -> None:
        self._channel.notify("FAULTS", {"unit": unit, "records": records})


class PortalGuest:
    """The guest at the other end of a portal."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def interrupt(self, handle: int) -> None:
        self._channel.notify("MSIX", {"handle": handle})

    def message(self, message: InterruptMessage) -> None:
        self._channel.notify("MSI", {"addr": message.addr, "data": message.data})

    def cut(self) -> None:
        self._channel.close()


class DeviceSim:
    def __init__(self, loop: Loop, settings: DeviceSimSettings) -> None:
        self.loop = loop
        self.settings = settings
        self.memory = MappedMemory()
        self.silicon = Silicon(
            settings.units,
            settings.devices,
            self.memory.physical,
            loop.flows.spawn,
            perf_counter_ns,
            lambda: loop.mark_dirty(self),
        )
        self.files = Files(loop)
        self.door = Door(loop, FRONT_DOOR, self)
        self.private_doors: Mapping[Path, Door[Any]] = (
            {} if settings.driver_socket is None else {settings.driver_socket: Door(loop, DRIVER_DOOR, self)}
        )

    async def start(self) -> None:
        """The silicon needs nobody."""

    def close(self) -> None:
        for door in (self.door, *self.private_doors.values()):
            door.close()
        self.files.close()

    def flush(self) -> None:
        """The end of a turn."""
        self.silicon.raise_interrupts()

    def unplug(self) -> None:
        """The link is gone."""
        log.info("driver gone: translation is off")
        self.silicon.unplug()
        self.memory.clear()


# -- front door ----------------------------------------------------------------------------------------


def _no_link(app: DeviceSim, message: uapi.Link, fds: Fds) -> Body:
    raise UapiError(errno.EPERM, "the remapping units are their driver's: it comes by --driver-socket")


def _link(app: DeviceSim, message: uapi.Link, fds: Fds) -> Answer:
    app.silicon.check_free()
    fd, _, channel = app.files.open(LINK, app, DeviceSim.unplug)
    app.silicon.plug(LinkedDriver(channel))
    return Answer({}, [fd])


def _stats(app: DeviceSim, message: uapi.DeviceStats, fds: Fds) -> Body:
    return {
        "unit": unit_stats(app.silicon.units),
        "devices": {device.name: device_stats(device) for device in app.silicon.devices.values()},
    }


FRONT_DOOR: Service[DeviceSim] = Service(
    "device_sim",
    {
        "LINK": Method(uapi.Link, _no_link),
        "STATS": Method(uapi.DeviceStats, _stats),
        "STARTED_WITH": Method(StartedWith, tell_options),
    },
)
DRIVER_DOOR: Service[DeviceSim] = Service("device_sim-link", {"LINK": Method(uapi.Link, _link)})

# -- link ----------------------------------------------------------------------------------------------


def _caps(app: DeviceSim, message: uapi.LinkCaps, fds: Fds) -> Body:
    functions = [
        {
            "rid": rid,
            "name": device.name,
            "unit": device.traits.unit,
            "group": device.traits.group,
            "pasid": device.traits.function.pasid,
            "ats": device.traits.function.ats,
            "pri": device.traits.function.pri,
            "pasid_required": device.traits.pasid_required,
            "fault_capability": device.traits.fault_capability,
        }
        for rid, device in app.silicon.devices.items()
    ]
    units = [(unit.cap.value, unit.ecap.value) for unit in app.silicon.units]
    return {"units": units, "functions": functions}


def _memory_add(app: DeviceSim, message: uapi.LinkMemoryAdd, fds: Fds) -> Body:
    return {"memory": app.memory.add(message.windows, fds)}


def _memory_remove(app: DeviceSim, message: uapi.LinkMemoryRemove, fds: Fds) -> Body:
    app.memory.remove(message.memory)
    return {}


def _pasid_entry(app: DeviceSim, message: uapi.LinkPasidEntry, fds: Fds) -> Body:
    try:
        app.silicon.device(message.rid).unit.write_pasid_entry(
            message.rid, Pasid(message.pasid), message.entry
        )
    except FormatError as error:
        raise UapiError(errno.EINVAL, str(error)) from None
    return {}


def _function(app: DeviceSim, message: uapi.LinkFunction, fds: Fds) -> Body:
    app.silicon.device(message.rid).function.configure(
        pasid=message.pasid,
        ats=message.ats,
        pri_allocation=message.pri_allocation,
        bus_master=message.bus_master,
    )
    return {}


def _qi(app: DeviceSim, message: uapi.LinkQi, fds: Fds) -> Body:
    return {"status": _run_queue(app, message)}


def _qi_posted(app: DeviceSim, message: uapi.LinkQi) -> None:
    try:
        _run_queue(app, message)
    except UapiError as error:
        log.warning("bad descriptors posted", why=str(error))


def _run_queue(app: DeviceSim, message: uapi.LinkQi) -> list[int]:
    unit = app.silicon.unit(message.unit)
    if not unit.prq.consume(message.prq_consumed):
        raise UapiError(errno.EINVAL, f"page request queue: {message.prq_consumed} entries are not there")
    if message.prq_clear:
        unit.prq.clear_overflow()
    try:
        return unit.execute(message.descriptors)
    except FormatError as error:
        raise UapiError(errno.EINVAL, f"invalidation queue: {error}") from None


async def _portal(app: DeviceSim, message: uapi.LinkPortal, fds: Fds) -> Answer:
    device = await app.silicon.map_bars(message.rid)
    fd, _, channel = app.files.open(PORTAL, device, Device.unmap_bars)
    device.guest = PortalGuest(channel)
    return Answer({}, [fd])


LINK: Service[DeviceSim] = Service(
    "link",
    {
        "CAPS": Method(uapi.LinkCaps, _caps),
        "MEMORY_ADD": Method(uapi.LinkMemoryAdd, _memory_add, uapi.MAX_WINDOWS + 1),
        "MEMORY_REMOVE": Method(uapi.LinkMemoryRemove, _memory_remove),
        "PASID_ENTRY": Method(uapi.LinkPasidEntry, _pasid_entry),
        "FUNCTION": Method(uapi.LinkFunction, _function),
        "QI": Method(uapi.LinkQi, _qi),
        "PORTAL": Method(uapi.LinkPortal, _portal),
    },
    notifications={"QI": Notification(uapi.LinkQi, _qi_posted)},
)

# -- portal --------------------------------------------------------------------------------------------


def _mmio_read(device: Device, message: uapi.MmioRead, fds: Fds) -> Body:
    return {"data": registers.read(device.dsa, message.offset, message.size)}


def _mmio_write(device: Device, message: uapi.MmioWrite) -> None:
    registers.write(device.dsa, message.offset, message.data)


def _enqcmd(device: Device, message: uapi.Enqcmd, fds: Fds) -> Body:
    return {"retry": device.dsa.enqcmd(message.wq, message.descriptor, limited=message.limited)}


def _movdir64b(device: Device, message: uapi.Movdir64b) -> None:
    device.dsa.movdir64b(message.wq, message.descriptor)


PORTAL: Service[Device] = Service(
    "portal",
    {
        "MMIO_READ": Method(uapi.MmioRead, _mmio_read),
        "ENQCMD": Method(uapi.Enqcmd, _enqcmd),
    },
    notifications={
        "MMIO_WRITE": Notification(uapi.MmioWrite, _mmio_write),
        "MOVDIR64B": Notification(uapi.Movdir64b, _movdir64b),
    },
)
