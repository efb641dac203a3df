"""The root complex: remapping units, the devices behind them, and who holds which of it.

Models what is there before any driver: units and devices stay, while a driver comes and goes with its link,
and a guest with the BARs that are mapped for it.  In the order of a life:
  plug       one driver takes the units;
  connect    it has the registers of one;
  map_bars   a device is reset and its BARs go to one guest;
  unmap_bars the guest is gone: its queues take nothing more, nobody is told how what runs ends;
  unplug     the driver is gone: DMA ends, then guests lose their BARs, then translation ends.

Must hold: after `unplug` nothing is translated, no cache holds anything, and no device has a guest, so that
the memory it all led to may be unmapped; an interrupt goes to whoever holds the device then, or to nobody.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Protocol

from device_sim.core.dmar import RemappingUnit
from device_sim.core.dsa.device import Dsa
from device_sim.core.function import Function
from device_sim.core.msi import InterruptMessage
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.traits import DeviceTraits, UnitTraits
from device_sim.core.unit_registers import Events, RegisterPages
from protocol.errors import UapiError
from protocol.flow import Flow, Wait


class BarOwner(Protocol):
    """Who has a device's BARs mapped: where its interrupts go."""

    def interrupt(self, handle: int) -> None: ...
    def message(self, message: InterruptMessage) -> None: ...
    def cut(self) -> None:
        """The BARs are gone."""


class Device:
    """A DSA behind a unit; `guest` has its BARs."""

    def __init__(
        self,
        name: str,
        traits: DeviceTraits,
        unit: RemappingUnit,
        memory: PhysicalMemory,
        spawn: Callable[[Flow[None]], None],
        clock: Callable[[], int],
    ) -> None:
        self.name = name
        self.traits = traits
        self.unit = unit
        self.function = Function(traits.rid, unit, memory, clock, traits.function)
        self.dsa = Dsa(self.function, spawn, self._interrupt)
        self.guest: BarOwner | None = None

    def _interrupt(self, handle: int) -> None:
        if self.guest is not None:
            self.guest.interrupt(handle)

    def deliver(self, message: InterruptMessage) -> None:
        """A message that the device wrote itself: to whoever serves the guest's interrupts."""
        if self.guest is not None:
            self.guest.message(message)

    def unmap_bars(self) -> None:
        """The guest is gone."""
        self.guest = None
        self.dsa.abandon()


class RootComplex:
    """`spawn` starts a flow, `clock` gives nanoseconds, `fence` is a full fence between two processes."""

    def __init__(
        self,
        units: Sequence[UnitTraits],
        devices: Sequence[DeviceTraits],
        memory: PhysicalMemory,
        spawn: Callable[[Flow[None]], None],
        clock: Callable[[], int],
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self.driver: object | None = None
        self._connected: set[int] = set()
        self._fence = fence
        self.units = [self._unit(traits, memory) for traits in units]
        self.devices = {
            traits.rid: Device(f"dsa{n}", traits, self.units[traits.unit], memory, spawn, clock)
            for n, traits in enumerate(devices)
        }

    def _unit(self, traits: UnitTraits, memory: PhysicalMemory) -> RemappingUnit:
        return RemappingUnit(
            traits.cap,
            traits.ecap,
            traits.haw,
            memory,
            lambda message: self.devices[message.rid].deliver(message),
            self._fence,
            traits.descriptors_at_once,
        )

    # -- lookups ---------------------------------------------------------------------------------------

    def unit(self, number: int) -> RemappingUnit:
        if number >= len(self.units):
            raise UapiError(errno.EINVAL, f"there is no remapping unit {number}")
        return self.units[number]

    def device(self, rid: int) -> Device:
        device = self.devices.get(rid)
        if device is None:
            raise UapiError(errno.ENODEV, f"no function {rid:#x} behind this unit")
        return device

    # -- lives -----------------------------------------------------------------------------------------

    def check_free(self) -> None:
        """EBUSY: another driver has the units."""
        if self.driver is not None:
            raise UapiError(errno.EBUSY, "a driver has the remapping unit already")

    def plug(self, driver: object) -> None:
        assert self.driver is None, "two drivers for one set of units"
        self.driver = driver

    def check_connectable(self, number: int) -> None:
        """EINVAL: there is no such unit; EBUSY: its registers are mapped already."""
        self.unit(number)
        if number in self._connected:
            raise UapiError(errno.EBUSY, f"the registers of unit {number} are mapped already")

    def connect(self, number: int, pages: RegisterPages, events: Events) -> RemappingUnit:
        """The driver has the registers of a unit."""
        unit = self.unit(number)
        assert number not in self._connected, f"unit {number} has one register page"
        self._connected.add(number)
        unit.connect(pages, events)
        return unit

    async def map_bars(self, rid: int, caught_up: Callable[[], Wait[None]]) -> Device:
        """The device, as it was made: whoever maps the BARs finds it after a function-level reset.

        The caller gives it its guest in the same turn.  `caught_up`: set once all is heard that came before.
        ENODEV: no such function, or the driver that asked is gone; EBUSY: another guest has it.
        """
        device, driver = self.device(rid), self.driver
        if device.guest is not None:
            # await: device: its guest, who hung up before this was asked, may be heard of; asked again: below
            # (tests/unit/device_sim/test_root_complex.py::test_a_guest_that_hung_up_before_is_heard_of_first)
            # | driver: may be gone; asked again: below
            # (tests/unit/device_sim/test_root_complex.py::test_a_driver_gone_meanwhile_maps_nothing)
            await caught_up()
        if device.guest is None:
            # await: device: another may map it meanwhile; asked again: its guest, below
            # (tests/unit/device_sim/test_root_complex.py::test_bars_two_map_during_a_reset_go_to_the_first)
            # | driver: may be gone; asked again: below
            # (tests/unit/device_sim/test_root_complex.py::test_a_driver_gone_during_a_reset_maps_nothing)
            await device.dsa.reset()
        if device.guest is not None:
            raise UapiError(errno.EBUSY, f"the BARs of {device.name} are mapped already")
        if self.driver is not driver:
            raise UapiError(errno.ENODEV, f"the driver that wanted the BARs of {device.name} is gone")
        return device

    def unplug(self) -> None:
        """The driver is gone."""
        self.driver = None
        for device in self.devices.values():
            device.dsa.abandon()
            device.function.stop()
            if device.guest is not None:
                device.guest.cut()
        for unit in self.units:
            unit.reset()
        self._connected.clear()
