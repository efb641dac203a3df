"""device_sim's connections: the driver's link, guests' portals, and the doors.

The link is held by one driver at a time.  When it hangs up, in whatever way, the silicon stops: nothing is
translated any more, caches are empty, memory is unmapped and its leases end, portals are cut.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import structlog

from device_sim.config import DeviceSettings, Settings, UnitSettings
from device_sim.core.dmar import RemappingUnit
from device_sim.core.dsa import registers
from device_sim.core.dsa.device import Dsa
from device_sim.core.function import Function
from device_sim.core.msi import InterruptMessage
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


@dataclass(slots=True, eq=False)
class Device:
    """A DSA behind the unit, and the guest that has its BARs mapped."""

    app: DeviceSim
    name: str
    settings: DeviceSettings
    function: Function
    dsa: Dsa
    portal: Channel | None = None

    def interrupt(self, handle: int) -> None:
        if self.portal is not None:
            self.portal.notify("MSIX", {"handle": handle})

    def deliver(self, message: InterruptMessage) -> None:
        """A message that the device wrote itself: to whoever serves the guest's interrupts."""
        if self.portal is not None:
            self.portal.notify("MSI", {"addr": message.addr, "data": message.data})


class DeviceSim:
    def __init__(self, loop: Loop, settings: Settings) -> None:
        self.loop = loop
        self.settings = settings
        self.memory = MappedMemory()
        self.units = [self._unit(unit) for unit in settings.units]
        self.files = Files(loop)
        self.devices = {device.rid: self._device(n, device) for n, device in enumerate(settings.devices)}
        self.link: Channel | None = None
        self._event_due = False
        self.door = Door(loop, FRONT_DOOR, self)
        self.private_doors: Mapping[Path, Door[Any]] = (
            {} if settings.driver_socket is None else {settings.driver_socket: Door(loop, DRIVER_DOOR, self)}
        )

    def _unit(self, settings: UnitSettings) -> RemappingUnit:
        return RemappingUnit(
            settings.cap,
            settings.ecap,
            settings.haw,
            self.memory.physical,
            self._on_event,
            self.flush,
            lambda message: self.devices[message.rid].deliver(message),
        )

    def _device(self, number: int, settings: DeviceSettings) -> Device:
        rid, unit = settings.rid, self.units[settings.unit]
        function = Function(rid, unit, self.memory.physical, perf_counter_ns, settings.traits)
        dsa = Dsa(function, self.loop.flows.spawn, lambda handle: self.devices[rid].interrupt(handle))
        return Device(self, f"dsa{number}", settings, function, dsa)

    async def start(self) -> None:
        """The silicon needs nobody."""

    def close(self) -> None:
        for door in (self.door, *self.private_doors.values()):
            door.close()
        self.files.close()

    def _on_event(self) -> None:
        """A unit has page requests or faults to report: one interrupt a turn, for all of them."""
        if not self._event_due:
            self._event_due = True
            self.loop.mark_dirty(self)

    def flush(self) -> None:
        """Raise the interrupts that are due."""
        self._event_due = False
        if self.link is None:
            return
        for number, unit in enumerate(self.units):
            if unit.prq.has_new:
                entries = unit.prq.take_new()
                body = {"unit": number, "entries": entries, "overflow": unit.prq.overflow}
                self.link.notify("PAGE_REQUESTS", body)
            records = b"".join(unit.take_faults())
            if records:
                self.link.notify("FAULTS", {"unit": number, "records": records})

    def unplug(self) -> None:
        """The link is gone."""
        self.link = None
        log.info("driver gone: translation is off")
        for device in self.devices.values():
            device.dsa.abandon()
            device.function.stop()
            if device.portal is not None:
                device.portal.close()
        for unit in self.units:
            unit.reset()
        self.memory.clear()


# -- front door ----------------------------------------------------------------------------------------


def _no_link(app: DeviceSim, message: uapi.Link, fds: Fds) -> Body:
    raise UapiError(errno.EPERM, "the remapping units are their driver's: it comes by --driver-socket")


def _link(app: DeviceSim, message: uapi.Link, fds: Fds) -> Answer:
    if app.link is not None:
        raise UapiError(errno.EBUSY, "a driver has the remapping unit already")
    fd, _, app.link = app.files.open(LINK, app, DeviceSim.unplug)
    return Answer({}, [fd])


def _stats(app: DeviceSim, message: uapi.DeviceStats, fds: Fds) -> Body:
    return {
        "unit": unit_stats(app.units),
        "devices": {device.name: _device_stats(app, device) for device in app.devices.values()},
    }


def _device_stats(app: DeviceSim, device: Device) -> Body:
    entry = app.units[device.settings.unit].pasid_entry(device.settings.rid)
    return {**device_stats(device.dsa), "pasid_entry": entry}


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
            "unit": device.settings.unit,
            "group": device.settings.group,
            "pasid": device.settings.traits.pasid,
            "ats": device.settings.traits.ats,
            "pri": device.settings.traits.pri,
            "pasid_required": device.settings.pasid_required,
            "fault_capability": device.settings.fault_capability,
        }
        for rid, device in app.devices.items()
    ]
    return {"units": [(unit.cap.value, unit.ecap.value) for unit in app.units], "functions": functions}


def _memory_add(app: DeviceSim, message: uapi.LinkMemoryAdd, fds: Fds) -> Body:
    return {"memory": app.memory.add(message.windows, fds)}


def _memory_remove(app: DeviceSim, message: uapi.LinkMemoryRemove, fds: Fds) -> Body:
    app.memory.remove(message.memory)
    return {}


def _pasid_entry(app: DeviceSim, message: uapi.LinkPasidEntry, fds: Fds) -> Body:
    unit = app.units[_find(app, message.rid).settings.unit]
    try:
        unit.write_pasid_entry(message.rid, Pasid(message.pasid), message.entry)
    except FormatError as error:
        raise UapiError(errno.EINVAL, str(error)) from None
    return {}


def _function(app: DeviceSim, message: uapi.LinkFunction, fds: Fds) -> Body:
    _find(app, message.rid).function.configure(
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
    if message.unit >= len(app.units):
        raise UapiError(errno.EINVAL, f"there is no remapping unit {message.unit}")
    unit = app.units[message.unit]
    if not unit.prq.consume(message.prq_consumed):
        raise UapiError(errno.EINVAL, f"page request queue: {message.prq_consumed} entries are not there")
    if message.prq_clear:
        unit.prq.clear_overflow()
    try:
        return unit.execute(message.descriptors)
    except FormatError as error:
        raise UapiError(errno.EINVAL, f"invalidation queue: {error}") from None


async def _portal(app: DeviceSim, message: uapi.LinkPortal, fds: Fds) -> Answer:
    """Whoever maps the BARs finds the device as it was made: a function-level reset comes first."""
    device, link = _find(app, message.rid), app.link
    if device.portal is None:
        await device.dsa.reset()
    if device.portal is not None:
        raise UapiError(errno.EBUSY, f"the BARs of {device.name} are mapped already")
    if app.link is not link:
        raise UapiError(errno.ENODEV, f"the driver that wanted the BARs of {device.name} is gone")
    fd, _, device.portal = app.files.open(PORTAL, device, _portal_closed)
    return Answer({}, [fd])


def _find(app: DeviceSim, rid: int) -> Device:
    device = app.devices.get(rid)
    if device is None:
        raise UapiError(errno.ENODEV, f"no function {rid:#x} behind this unit")
    return device


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


def _portal_closed(device: Device) -> None:
    """The guest is gone: its queues take nothing more, and nobody is told how what runs ends."""
    device.portal = None
    device.dsa.abandon()


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
