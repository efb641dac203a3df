"""A unit's pages and eventfds over real files, with a driver that hands over what it should not."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import struct
from collections.abc import Iterator

import pytest

from device_sim.core.physmem import PhysicalMemory
from device_sim.core.root_complex import RootComplex
from device_sim.core.traits import UnitTraits, capabilities
from device_sim.unit_port import ConnectedUnit
from protocol.errors import UapiError
from protocol.flow import Flows
from protocol.hostmem import WindowKind
from protocol.kernel.linux import LINUX
from protocol.rpc.loop import Loop
from tests.kit.raw_driver import GCMD, GSTS, IECTL, IQA, IQH, IQT, QIE
from tests.kit.silicon import window

PAGE, RING = 4096, 0x10_0000


class PortOverFiles:
    def __init__(self, descriptors_at_once: int | None = None) -> None:
        self.crashes: list[BaseException] = []
        self.loop = Loop(LINUX, Flows(self.crashes.append))
        self.broken = 0
        cap, ecap = capabilities()
        memory = PhysicalMemory()
        ring = bytearray(struct.pack("<4Q", 5, 0, 0, 0) * (PAGE // 32))  # waits that tell nobody
        memory.add(window(WindowKind.TABLES, RING, ring), lambda: None)
        self.silicon = RootComplex(
            [UnitTraits(cap, ecap, 46, descriptors_at_once)], [], memory, self.loop.flows.spawn, lambda: 0
        )
        self.store_fd, self._mapping = LINUX.memfd("store page", PAGE, peer_writes=False)

    def port(self, fd: int | None = None) -> ConnectedUnit:
        return ConnectedUnit(self.loop, self.silicon, 0, self.store_fd if fd is None else fd, self._on_broken)

    def _on_broken(self) -> None:
        self.broken += 1

    def store(self, offset: int, value: int) -> None:
        self._mapping.view[offset : offset + 4] = value.to_bytes(4, "little")

    def close(self) -> None:
        self._mapping.close()
        os.close(self.store_fd)
        self.loop.close()
        assert self.crashes == []


@pytest.fixture
def rig() -> Iterator[PortOverFiles]:
    made = PortOverFiles()
    yield made
    made.close()


def fds_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_kick_is_looked_at_and_an_event_goes_out_once_a_turn(rig: PortOverFiles) -> None:
    port = rig.port()
    registers, kick, fault, request, completion = port.copies()
    shown = mmap.mmap(registers, 2 * PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
    rig.store(IECTL, 0)
    rig.store(IQA, 1 << 11)
    rig.store(GCMD, QIE)
    os.eventfd_write(kick, 1)
    os.eventfd_write(kick, 1)
    assert rig.loop.turn(1)
    assert int.from_bytes(shown[GSTS : GSTS + 4], "little") == QIE
    assert os.eventfd_read(completion) == 1
    assert [select.select([fd], [], [], 0)[0] for fd in (fault, request, completion)] == [[], [], []]
    shown.close()
    port.close()
    for fd in (registers, kick, fault, request, completion):
        os.close(fd)
    assert rig.broken == 0


def test_a_unit_that_takes_one_descriptor_at_a_time_goes_on_in_turns_of_its_own() -> None:
    rig = PortOverFiles(descriptors_at_once=1)
    port = rig.port()
    registers, kick, *others = port.copies()
    shown = mmap.mmap(registers, 2 * PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
    rig.store(IQA, RING | 1 << 11)
    rig.store(IQT, 3 * 32)
    rig.store(GCMD, QIE)
    os.eventfd_write(kick, 1)
    heads = []
    while rig.loop.turn(0):
        heads.append(int.from_bytes(shown[IQH : IQH + 4], "little"))
    assert heads == [32, 64, 96]
    shown.close()
    port.close()
    for fd in (registers, kick, *others):
        os.close(fd)
    rig.close()


def test_nobody_but_the_unit_stores_into_its_pages(rig: PortOverFiles) -> None:
    port = rig.port()
    registers, *others = port.copies()
    with pytest.raises(OSError, match="ermi"):
        mmap.mmap(registers, 2 * PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError, match="ermi"):
        os.pwrite(registers, b"x", 0)
    for size in (0, PAGE, 4 * PAGE):
        with pytest.raises(OSError, match="ermi"):
            os.ftruncate(registers, size)
    port.close()
    for fd in (registers, *others):
        os.close(fd)


def test_a_store_page_that_could_vanish_is_refused_and_nothing_is_kept(rig: PortOverFiles) -> None:
    before = fds_open()
    unsealed = os.memfd_create("store page", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, PAGE)
    short = os.memfd_create("store page", os.MFD_ALLOW_SEALING)
    os.ftruncate(short, PAGE - 1)
    fcntl.fcntl(short, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    pipe = os.pipe()
    for fd in (unsealed, short, pipe[0]):
        with pytest.raises(UapiError) as caught:
            rig.port(fd)
        assert caught.value.errno == errno.EINVAL
    for fd in (unsealed, short, *pipe):
        os.close(fd)
    assert fds_open() == before
    rig.silicon.check_connectable(0)


def test_a_port_that_is_closed_keeps_no_file_and_the_unit_stores_elsewhere(rig: PortOverFiles) -> None:
    before = fds_open()
    port = rig.port()
    given = port.copies()
    rig.silicon.unplug()
    port.close()
    for fd in given:
        os.close(fd)
    assert fds_open() == before
    rig.silicon.units[0].kick()


def test_a_driver_that_fills_an_event_loses_its_link(rig: PortOverFiles) -> None:
    port = rig.port()
    given = port.copies()
    os.set_blocking(given[4], False)
    os.eventfd_write(given[4], (1 << 64) - 2)
    rig.store(IECTL, 0)
    rig.store(GCMD, QIE)
    os.eventfd_write(given[1], 1)
    rig.loop.turn(1)
    assert rig.broken == 1
    port.close()
    for fd in given:
        os.close(fd)


def test_a_kick_that_was_made_blocking_and_drained_by_its_other_end_stops_nobody(rig: PortOverFiles) -> None:
    port = rig.port()
    given = port.copies()
    os.eventfd_write(given[1], 1)
    os.set_blocking(given[1], True)
    os.eventfd_read(given[1])
    port._kicked(select.EPOLLIN)
    assert rig.broken == 0
    port.close()
    for fd in given:
        os.close(fd)
