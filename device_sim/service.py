"""device_sim's connections: the driver's link, guests' portals, and the doors.

The link is held by one driver at a time.  When it hangs up, in whatever way, the silicon stops: nothing is
translated any more, caches are empty, memory is unmapped and its leases end, portals are cut.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from device_sim.config import DeviceSimSettings
from device_sim.core.dsa import registers
from device_sim.core.msi import InterruptMessage
from device_sim.core.root_complex import Device, RootComplex
from device_sim.core.stats import device_stats, unit_stats
from device_sim.memory import MappedMemory
from device_sim.unit_port import ConnectedUnit
from protocol.daemon import tell_options
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Channel, Fds
from protocol.rpc.door import Door
from protocol.rpc.fence import full_fence
from protocol.rpc.files import Files
from protocol.rpc.loop import Loop
from protocol.rpc.service import Answer, Method, Notification, Service
from protocol.uapi import link as uapi
from protocol.uapi.message import MAX_WINDOWS_LENT, StartedWith

log = structlog.get_logger("device_sim")


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
        self.memory = MappedMemory(loop.kernel)
        self.silicon = RootComplex(
            settings.units,
            settings.devices,
            self.memory.physical,
            loop.flows.spawn,
            loop.kernel.monotonic_ns,
            full_fence,
        )
        self.files = Files(loop)
        self.link: Channel | None = None
        self.ports: list[ConnectedUnit] = []
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

    def unplug(self) -> None:
        """The link is gone."""
        log.info("driver gone: translation is off")
        self.link = None
        self.silicon.unplug()
        while self.ports:
            self.ports.pop().close()
        self.memory.clear()

    def hang_up(self) -> None:
        """On a driver that breaks what it shares with us."""
        if self.link is not None:
            self.link.close()


# -- front door ----------------------------------------------------------------------------------------


def _no_link(app: DeviceSim, message: uapi.Link, fds: Fds) -> Body:
    raise UapiError(errno.EPERM, "the remapping units are their driver's: it comes by --driver-socket")


def _link(app: DeviceSim, message: uapi.Link, fds: Fds) -> Answer:
    app.silicon.check_free()
    fd, _, app.link = app.files.open(LINK, app, DeviceSim.unplug)
    app.silicon.plug(app.link)
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


def _function(app: DeviceSim, message: uapi.LinkFunction, fds: Fds) -> Body:
    app.silicon.device(message.rid).function.configure(
        pasid=message.pasid,
        ats=message.ats,
        pri_allocation=message.pri_allocation,
        bus_master=message.bus_master,
    )
    return {}


def _unit(app: DeviceSim, message: uapi.LinkUnit, fds: Fds) -> Answer:
    app.silicon.check_connectable(message.unit)
    if len(fds) != 1:
        raise UapiError(errno.EINVAL, f"a unit's registers want one store page, {len(fds)} fds came")
    app.ports.append(ConnectedUnit(app.loop, app.silicon, message.unit, fds.peek(0), app.hang_up))
    return Answer({}, app.ports[-1].copies())


async def _portal(app: DeviceSim, message: uapi.LinkPortal, fds: Fds) -> Answer:
    device = await app.silicon.map_bars(message.rid, app.loop.next_turn)
    fd, _, channel = app.files.open(PORTAL, device, Device.unmap_bars)
    device.guest = PortalGuest(channel)
    return Answer({}, [fd])


LINK: Service[DeviceSim] = Service(
    "link",
    {
        "CAPS": Method(uapi.LinkCaps, _caps),
        "MEMORY_ADD": Method(uapi.LinkMemoryAdd, _memory_add, MAX_WINDOWS_LENT + 1),
        "MEMORY_REMOVE": Method(uapi.LinkMemoryRemove, _memory_remove),
        "FUNCTION": Method(uapi.LinkFunction, _function),
        "UNIT": Method(uapi.LinkUnit, _unit, 1),
        "PORTAL": Method(uapi.LinkPortal, _portal),
    },
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
