"""Lives of the silicon's users: one driver, one guest a device, and what is left when either goes."""

from __future__ import annotations

import errno

import pytest

from device_sim.core.dsa import registers
from device_sim.core.msi import START, InterruptMessage
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.root_complex import Device, RootComplex
from device_sim.core.traits import DeviceTraits, Traits, UnitTraits, capabilities
from device_sim.core.unit_registers import Events, RegisterPages
from protocol.errors import UapiError
from protocol.flow import Flows, Wait, done
from protocol.hostmem import WindowKind
from protocol.units import Hpa
from tests.kit.accelerator import BOF, CMD, ENABLE_DEVICE, ENABLE_WQ, FILL, GRPCFG, WQCFG, work
from tests.kit.raw_driver import RawDriver
from tests.kit.refusals import errno_of
from tests.kit.silicon import TABLES, page_request, pasid_entry, response, window

ONE, OTHER, ELSEWHERE = 0x6A08, 0x6A10, 0x6A18
NOTHING_CAME = done(None)


class PortalGuest:
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


class TwoUnits:
    """Two units, of two devices and of one."""

    def __init__(self) -> None:
        self.flows = Flows()
        cap, ecap = capabilities()
        devices = [
            DeviceTraits(rid, unit, n, Traits(), pasid_required=True, fault_capability="full")
            for n, (rid, unit) in enumerate(((ONE, 0), (OTHER, 0), (ELSEWHERE, 1)))
        ]
        units = [UnitTraits(cap, ecap, 46)] * 2
        memory = self.memory = PhysicalMemory()
        self.drivers: list[RawDriver] = []
        memory.add(window(WindowKind.TABLES, TABLES, bytearray(4096)), lambda: None)
        self.silicon = RootComplex(units, devices, memory, self.flows.spawn, lambda: 0)

    def plug(self) -> None:
        self.silicon.check_free()
        self.silicon.plug(object())
        self.drivers = [RawDriver(unit, self.memory, number=n) for n, unit in enumerate(self.silicon.units)]

    def unplug(self) -> None:
        """As the shell does: the memory goes after it."""
        self.silicon.unplug()
        for driver in self.drivers:
            for kind, base, backing in (
                (WindowKind.TABLES, driver.structures_at, driver.structures),
                (WindowKind.QUEUES, driver.queues_at, driver.queues),
            ):
                found = self.memory.find(kind, Hpa(base), len(backing))
                assert found is not None
                self.memory.drop(found)

    def map_bars(self, rid: int, caught_up: Wait[None] = NOTHING_CAME) -> Wait[Device]:
        """As the shell does: whoever gets the device gives it its guest at once."""
        done = self.flows.start(self.silicon.map_bars(rid, lambda: caught_up))
        done.on_done(lambda done: self._mapped(done))
        self.flows.run_ready()
        return done

    def _mapped(self, done: Wait[Device]) -> None:
        try:
            device = done.result()
        except UapiError:
            return
        device.guest = PortalGuest(device)

    def attach(self, rid: int) -> Device:
        device = self.silicon.device(rid)
        self.drivers[device.traits.unit].write_pasid_entry(rid, pasid_entry(TABLES))
        device.function.configure(ats=True, bus_master=True, pri_allocation=32)
        return device

    def wait_for_a_page(self, rid: int) -> Device:
        """A descriptor of the device's waits for a page nobody has: it cannot be reset before that ends."""
        device = self.attach(rid)
        for offset, value, size in (
            (WQCFG, 16, 4),
            (WQCFG + 8, 3, 4),
            (WQCFG + 12, 21 | 1 << 5, 4),
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
def world() -> TwoUnits:
    return TwoUnits()


def test_the_units_are_one_drivers(world: TwoUnits) -> None:
    world.plug()
    with pytest.raises(UapiError) as caught:
        world.silicon.check_free()
    assert caught.value.errno == errno.EBUSY
    world.unplug()
    world.plug()


def test_a_units_registers_are_mapped_once_by_each_driver(world: TwoUnits) -> None:
    world.plug()
    for again in (False, True):
        world.silicon.check_connectable(1)
        world.silicon.connect(1, RegisterPages.private(), Events())
        with pytest.raises(UapiError) as caught:
            world.silicon.check_connectable(1)
        assert caught.value.errno == errno.EBUSY
        world.silicon.check_connectable(0)
        with pytest.raises(UapiError) as caught:
            world.silicon.check_connectable(2)
        assert caught.value.errno == errno.EINVAL
        if not again:
            world.unplug()


def test_each_units_requests_lie_in_its_own_queue(world: TwoUnits) -> None:
    world.plug()
    for rid in (ONE, ELSEWHERE):
        world.wait_for_a_page(rid)
    for driver, rid in zip(world.drivers, (ONE, ELSEWHERE), strict=True):
        assert [page_request(raw).rid for raw in driver.take_requests()] == [rid]
        assert driver.request_events == 1


def test_bars_are_mapped_once_and_again_after_the_guest_is_gone(world: TwoUnits) -> None:
    world.plug()
    device = world.map_bars(ONE).result()
    assert errno_of(world.map_bars(ONE).result) == errno.EBUSY
    device.unmap_bars()
    assert world.map_bars(ONE).result() is device
    assert world.map_bars(OTHER).result() is not device
    assert errno_of(world.map_bars(0x1234).result) == errno.ENODEV


def test_a_guest_that_hung_up_before_is_heard_of_first(world: TwoUnits) -> None:
    """Who closed the BARs and maps them again is not told that somebody has them."""
    world.plug()
    device, caught_up = world.map_bars(ONE).result(), Wait[None]()
    again = world.map_bars(ONE, caught_up)
    device.unmap_bars()
    caught_up.set(None)
    world.flows.run_ready()
    assert again.result() is device


def test_a_driver_gone_meanwhile_maps_nothing(world: TwoUnits) -> None:
    world.plug()
    device, caught_up = world.map_bars(ONE).result(), Wait[None]()
    again = world.map_bars(ONE, caught_up)
    world.unplug()
    device.unmap_bars()
    world.plug()
    caught_up.set(None)
    world.flows.run_ready()
    assert errno_of(again.result) == errno.ENODEV
    assert device.guest is None


def test_bars_two_map_during_a_reset_go_to_the_first(world: TwoUnits) -> None:
    world.plug()
    device = world.wait_for_a_page(ONE)
    first, second = world.map_bars(ONE), world.map_bars(ONE)
    assert (first.done, second.done) == (False, False)
    world.drivers[0].execute(response(ONE, 0, 1))
    world.flows.run_ready()
    assert first.result() is device
    assert errno_of(second.result) == errno.EBUSY


@pytest.mark.parametrize("again", [False, True])
def test_a_driver_gone_during_a_reset_maps_nothing(world: TwoUnits, again: bool) -> None:
    world.plug()
    device = world.wait_for_a_page(ONE)
    done = world.map_bars(ONE)
    world.unplug()
    if again:
        world.plug()
    world.flows.run_ready()
    assert errno_of(done.result) == errno.ENODEV
    assert device.guest is None


def test_without_a_driver_no_device_has_a_guest_and_nothing_is_translated(world: TwoUnits) -> None:
    world.plug()
    device = world.wait_for_a_page(ONE)
    other = world.map_bars(OTHER).result()
    guest = other.guest
    assert isinstance(guest, PortalGuest)
    world.unplug()
    world.flows.run_ready()
    assert guest.heard == ["cut"]
    assert (device.guest, other.guest) == (None, None)
    assert device.unit.pasid_entry(ONE) == b""
    function = device.function
    assert (function.ats_enabled, function.dma_enabled, function.pri.enabled) == (False, False, False)
    assert device.function.pri.outstanding == 0
    world.plug()
    assert world.drivers[0].take_requests() == [], "the next driver is told nothing of the last one's"


def test_interrupts_go_to_the_guest_of_the_time_or_to_nobody(world: TwoUnits) -> None:
    world.plug()
    device = world.map_bars(ONE).result()
    message = InterruptMessage(ONE, START, 7)
    guest = device.guest
    assert isinstance(guest, PortalGuest)
    device.unit.interrupt(message)
    device.unmap_bars()
    device.unit.interrupt(message)
    assert guest.heard == [message]
