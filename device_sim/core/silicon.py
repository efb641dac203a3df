"""The silicon: remapping units, the devices behind them, and who holds which of it.

Models what is there before any driver: units and devices stay, while a driver comes and goes with its link,
and a guest with the BARs that are mapped for it.  In the order of a life:
  plug       one driver takes the units;
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
from protocol.errors import UapiError
from protocol.flow import Flow


class Driver(Protocol):
    """Who holds the units: what they tell it, and the link it has them by."""

    def page_requests(self, unit: int, entries: bytes, *, overflow: bool) -> None: ...
    def faults(self, unit: int, records: bytes) -> None: ...


class Guest(Protocol):
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
        self.guest: Guest | None = None

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


class Silicon:
    """`spawn` starts a flow, `clock` gives nanoseconds; `due` is called when the driver is to be interrupted
    at the end of this turn, by `raise_interrupts`.
    """

    def __init__(
        self,
        units: Sequence[UnitTraits],
        devices: Sequence[DeviceTraits],
        memory: PhysicalMemory,
        spawn: Callable[[Flow[None]], None],
        clock: Callable[[], int],
        due: Callable[[], None],
    ) -> None:
        self._due = due
        self._event_due = False
        self.driver: Driver | None = None
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
            self._on_event,
            self.raise_interrupts,
            lambda message: self.devices[message.rid].deliver(message),
        )

    # -- interrupts ------------------------------------------------------------------------------------

    def _on_event(self) -> None:
        """A unit has page requests or faults to report: one interrupt a turn, for all of them."""
        if not self._event_due:
            self._event_due = True
            self._due()

    def raise_interrupts(self) -> None:
        """Tell the driver of all that waits to be read."""
        self._event_due = False
        if self.driver is None:
            return
        for number, unit in enumerate(self.units):
            if unit.prq.has_new:
                self.driver.page_requests(number, unit.prq.take_new(), overflow=unit.prq.overflow)
            records = b"".join(unit.take_faults())
            if records:
                self.driver.faults(number, records)

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

    def plug(self, driver: Driver) -> None:
        assert self.driver is None, "two drivers for one set of units"
        self.driver = driver

    async def map_bars(self, rid: int) -> Device:
        """The device, as it was made: whoever maps the BARs finds it after a function-level reset.

        The caller gives it its guest in the same turn.  ENODEV: no such function, or the driver that asked
        is gone; EBUSY: another guest has it.
        """
        device, driver = self.device(rid), self.driver
        if device.guest is None:
            # await: device: another may map it meanwhile; asked again: its guest, below
            # (tests/unit/device_sim/test_silicon.py::test_bars_that_two_map_during_a_reset_go_to_the_first)
            # | driver: may be gone; asked again: below
            # (tests/unit/device_sim/test_silicon.py::test_a_driver_gone_during_a_reset_maps_nothing)
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
