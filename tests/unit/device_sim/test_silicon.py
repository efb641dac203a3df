"""Lives of the silicon's users: one driver, one guest a device, and what is left when either goes."""

from __future__ import annotations

import errno

import pytest

from device_sim.core.dsa import registers
from device_sim.core.msi import START, InterruptMessage
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.silicon import Device, Silicon
from device_sim.core.traits import DeviceTraits, Traits, UnitTraits, capabilities
from protocol.errors import UapiError
from protocol.flow import Flows, Wait
from protocol.hostmem import WindowKind
from protocol.units import Pasid
from tests.unit.device_sim.accelerator import BOF, CMD, ENABLE_DEVICE, ENABLE_WQ, FILL, GRPCFG, WQCFG, work
from tests.unit.device_sim.silicon import TABLES, pasid_entry, response, window

ONE, OTHER, ELSEWHERE = 0x6A08, 0x6A10, 0x6A18


class Driver:
    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []

    def page_requests(self, unit: int, entries: bytes, *, overflow: bool) -> None:
        self.told.append(("requests", unit, len(entries) // 32))

    def faults(self, unit: int, records: bytes) -> None:
        self.told.append(("faults", unit, len(records) // 16))


class Guest:
    """A portal of the silicon's under test: when it is cut, its BARs are unmapped, as the shell does."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.heard: list[object] = []

    def interrupt(self, handle: int) -> None:
        self.heard.append(handle)

    def message(self, message: InterruptMessage) -> None:
        self.heard.append(message)

    def cut(self) -> None:
        self.heard.append("cut")
        self.device.unmap_bars()


class World:
    """Two units, of two devices and of one."""

    def __init__(self) -> None:
        self.flows = Flows()
        self.due = 0
        cap, ecap = capabilities()
        devices = [
            DeviceTraits(rid, unit, n, Traits(), pasid_required=True, fault_capability="full")
            for n, (rid, unit) in enumerate(((ONE, 0), (OTHER, 0), (ELSEWHERE, 1)))
        ]
        units = [UnitTraits(cap, ecap, 46)] * 2
        memory = PhysicalMemory()
        memory.add(window(WindowKind.TABLES, TABLES, bytearray(4096)), lambda: None)
        self.silicon = Silicon(units, devices, memory, self.flows.spawn, lambda: 0, self._due)

    def _due(self) -> None:
        self.due += 1

    def plug(self) -> Driver:
        driver = Driver()
        self.silicon.check_free()
        self.silicon.plug(driver)
        return driver

    def map_bars(self, rid: int) -> Wait[Device]:
        """As the shell does: whoever gets the device gives it its guest at once."""
        done = self.flows.start(self.silicon.map_bars(rid))
        done.on_done(lambda done: self._mapped(done))
        self.flows.run_ready()
        return done

    def _mapped(self, done: Wait[Device]) -> None:
        try:
            device = done.result()
        except UapiError:
            return
        device.guest = Guest(device)

    def attach(self, rid: int) -> Device:
        device = self.silicon.device(rid)
        device.unit.write_pasid_entry(rid, Pasid(0), pasid_entry(TABLES))
        device.function.configure(ats=True, bus_master=True, pri_allocation=32)
        return device

    def wait_for_a_page(self, rid: int) -> Device:
        """A descriptor of the device's waits for a page nobody has: it cannot be reset before that ends."""
        device = self.attach(rid)
        for offset, value, size in (
            (WQCFG, 16, 4),
            (WQCFG + 8, 3, 4),
            (WQCFG + 12, 21, 4),
            (GRPCFG, 1, 8),
            (GRPCFG + 32, 1, 8),
            (CMD, ENABLE_DEVICE << 20, 4),
            (CMD, ENABLE_WQ << 20, 4),
        ):
            registers.write(device.dsa, offset, value.to_bytes(size, "little"))
            self.flows.run_ready()
        device.dsa.movdir64b(0, work(FILL, BOF, dst=0x5000, size=8))
        self.flows.run_ready()
        return device


@pytest.fixture
def world() -> World:
    return World()


def errno_of(done: Wait[Device]) -> int:
    with pytest.raises(UapiError) as caught:
        done.result()
    return caught.value.errno


def test_the_units_are_one_drivers(world: World) -> None:
    world.plug()
    with pytest.raises(UapiError) as caught:
        world.silicon.check_free()
    assert caught.value.errno == errno.EBUSY
    world.silicon.unplug()
    world.plug()


def test_events_of_a_turn_are_told_together_and_each_units_on_their_own(world: World) -> None:
    driver = world.plug()
    for rid in (ONE, ELSEWHERE):
        world.wait_for_a_page(rid)
    assert world.due == 1
    assert driver.told == []
    world.silicon.raise_interrupts()
    assert driver.told == [("requests", 0, 1), ("requests", 1, 1)]
    world.silicon.raise_interrupts()
    assert len(driver.told) == 2, "nothing is told twice"


def test_bars_are_mapped_once_and_again_after_the_guest_is_gone(world: World) -> None:
    world.plug()
    device = world.map_bars(ONE).result()
    assert errno_of(world.map_bars(ONE)) == errno.EBUSY
    device.unmap_bars()
    assert world.map_bars(ONE).result() is device
    assert world.map_bars(OTHER).result() is not device
    assert errno_of(world.map_bars(0x1234)) == errno.ENODEV


def test_bars_that_two_map_during_a_reset_go_to_the_first(world: World) -> None:
    world.plug()
    device = world.wait_for_a_page(ONE)
    first, second = world.map_bars(ONE), world.map_bars(ONE)
    assert (first.done, second.done) == (False, False)
    device.unit.execute(response(ONE, 0, 1))
    world.flows.run_ready()
    assert first.result() is device
    assert errno_of(second) == errno.EBUSY


@pytest.mark.parametrize("again", [False, True])
def test_a_driver_gone_during_a_reset_maps_nothing(world: World, again: bool) -> None:
    world.plug()
    device = world.wait_for_a_page(ONE)
    done = world.map_bars(ONE)
    world.silicon.unplug()
    if again:
        world.plug()
    world.flows.run_ready()
    assert errno_of(done) == errno.ENODEV
    assert device.guest is None


def test_without_a_driver_no_device_has_a_guest_and_nothing_is_translated(world: World) -> None:
    world.plug()
    device = world.wait_for_a_page(ONE)
    other = world.map_bars(OTHER).result()
    guest = other.guest
    assert isinstance(guest, Guest)
    world.silicon.unplug()
    world.flows.run_ready()
    assert guest.heard == ["cut"]
    assert (device.guest, other.guest) == (None, None)
    assert device.unit.pasid_entry(ONE) == b""
    function = device.function
    assert (function.ats_enabled, function.dma_enabled, function.pri.enabled) == (False, False, False)
    assert device.function.pri.outstanding == 0
    driver = world.plug()
    world.silicon.raise_interrupts()
    assert driver.told == [], "the next driver is told nothing of the last one's"


def test_interrupts_go_to_the_guest_of_the_time_or_to_nobody(world: World) -> None:
    world.plug()
    device = world.map_bars(ONE).result()
    message = InterruptMessage(ONE, START, 7)
    guest = device.guest
    assert isinstance(guest, Guest)
    device.unit.interrupt(message)
    device.unmap_bars()
    device.unit.interrupt(message)
    assert guest.heard == [message]
