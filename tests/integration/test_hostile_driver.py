"""A driver that shares memory with device_sim's unit and stores in it what it likes: the link ends, or
nothing.

Whatever it does, device_sim ends with status 0 and serves the next driver.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from protocol.kernel.linux import LINUX
from tests.integration.test_hostile import keep, link, serves
from tests.kit.daemons import System, system, until

SEED = 20231202
PAGE = 4096
TABLES, QUEUES = 1 << 42, 1 << 43
GCMD, GSTS, RTADDR, FSTS = 0x18, 0x1C, 0x20, 0x34
IQT, IQA, IQH, PQH, PQA = 0x88, 0x90, 0x80, 0xC0, 0xD0
QIE, SRTP, TE = 1 << 26, 1 << 30, 1 << 31
IQE = 1 << 4
RID = 0x6A08


@pytest.fixture(scope="module")
def bare_unit() -> Iterator[System]:
    """A device_sim without driver: its link is free."""
    with system(None, None, "device_sim") as running:
        yield running


class Driver:
    """One link, its windows handed over, and unit 0's pages and events."""

    def __init__(self, stack: ExitStack, running: System) -> None:
        self.peer = keep(stack, link(stack, running))
        fd, tables = LINUX.memfd("tables", 16 * PAGE, peer_writes=False)
        queues_fd, queues = LINUX.memfd("queues", 32 * PAGE, peer_writes=True)
        stored_fd, stored = LINUX.memfd("stored", PAGE, peer_writes=False)
        for own in (fd, queues_fd, stored_fd):
            stack.callback(os.close, own)
        self.tables, self.queues, self.stored = tables.view, queues.view, stored.view
        windows = [["tables", TABLES, 16 * PAGE], ["queues", QUEUES, 32 * PAGE]]
        assert not isinstance(self.peer.ask("MEMORY_ADD", {"windows": windows}, [fd, queues_fd, fd]), int)
        _, fds = self.peer.ask("UNIT", {"unit": 0}, [stored_fd])
        for got in fds:
            stack.callback(os.close, got)
        self.registers_fd = fds[0]
        self.registers = mmap.mmap(fds[0], 2 * PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
        self.kick_fd, self.fault_fd, self.page_request_fd, self.completion_fd = fds[1:]
        self.store(RTADDR, TABLES | 1 << 10, 8)
        self.store(IQA, TABLES + PAGE | 1 << 11, 8)
        self.store(PQA, QUEUES, 8)
        for command in (QIE, QIE | SRTP, QIE | TE):
            self.store(GCMD, command)
            self.kick()
            self.synchronized()
            assert self.shows(GSTS) & command == command

    def store(self, offset: int, value: int, size: int = 4) -> None:
        self.stored[offset : offset + size] = value.to_bytes(size, "little")

    def shows(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.registers[offset : offset + size], "little")

    def kick(self) -> None:
        """The unit is to look."""
        os.eventfd_write(self.kick_fd, 1)

    def until(self, holds: Callable[[], bool]) -> None:
        until(holds, "the unit looked")

    def submit(self, *descriptors: bytes) -> None:
        """At the tail, whatever is there."""
        tail = int.from_bytes(self.stored[IQT : IQT + 8], "little")
        for raw in descriptors:
            self.tables[PAGE + tail : PAGE + tail + 32] = raw
            tail = (tail + 32) % PAGE
        self.store(IQT, tail, 8)
        self.kick()

    def synchronized(self) -> None:
        """Everything stored before a kick was looked at: in the turn of the first answer, if not before."""
        for _ in range(2):
            assert not isinstance(self.peer.ask("CAPS"), int)


@pytest.fixture
def driver(bare_unit: System) -> Iterator[Driver]:
    before = bare_unit.all_fds()
    with ExitStack() as stack:
        yield Driver(stack, bare_unit)
    assert serves(bare_unit, "device_sim")
    bare_unit.wait_closed(before)


def test_descriptors_of_random_bytes_are_refused_or_run(driver: Driver) -> None:
    chance = random.Random(SEED)
    for _ in range(300):
        raw = bytearray(chance.randbytes(32))
        raw[0] = raw[0] & 0xF0 | chance.randrange(12)
        driver.submit(bytes(raw) if chance.random() < 0.5 else bytes(raw[:2]) + bytes(30))
        driver.synchronized()
        if driver.shows(FSTS) & IQE:
            at = driver.shows(IQH, 8)
            driver.tables[PAGE + at : PAGE + at + 32] = struct.pack("<4Q", 5, 0, 0, 0)
            flipped = int.from_bytes(driver.stored[FSTS : FSTS + 4], "little") ^ IQE
            driver.store(FSTS, flipped)
            driver.kick()
            driver.synchronized()


def test_a_wait_whose_status_is_to_lie_anywhere_else_stores_nothing(driver: Driver) -> None:
    """In a table, beyond every window, across the end of one."""
    tables = bytes(driver.tables)
    for at in (TABLES, QUEUES + 32 * PAGE, QUEUES + 32 * PAGE - 2, 0, (1 << 64) - 4):
        driver.submit(struct.pack("<4Q", 5 | 1 << 5 | 0xDEAD << 32, at & ~3, 0, 0))
        driver.synchronized()
    assert bytes(driver.tables[:PAGE]) == tables[:PAGE]
    assert b"\xad\xde" not in bytes(driver.queues[:PAGE])


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        *((IQT, value) for value in (PAGE, 16, 1 << 63, PAGE - 1)),
        *((PQH, value) for value in (1 << 63, 16, 1 << 18)),
        *((IQA, value) for value in (0, TABLES + 15 * PAGE | 7 | 1 << 11, TABLES + PAGE, QUEUES | 1 << 11)),
        *((PQA, value) for value in (0, QUEUES + 31 * PAGE | 7, TABLES)),
        *((RTADDR, value) for value in (0, TABLES | 2 << 10, 1 << 52 | 1 << 10, QUEUES | 1 << 10)),
    ],
)
def test_an_index_or_an_address_beyond_what_there_is_harms_nobody(
    driver: Driver, offset: int, value: int
) -> None:
    driver.store(offset, value, 8)
    for command in (0, QIE, QIE | SRTP, QIE | TE):
        driver.store(GCMD, command)
        driver.kick()
        driver.synchronized()
    driver.store(IQT, 32, 8)
    driver.kick()
    driver.synchronized()


def test_a_tail_that_changes_all_the_time_harms_nobody(driver: Driver) -> None:
    chance = random.Random(SEED)
    for _ in range(300):
        for _ in range(4):
            offset = chance.choice((IQT, PQH, IQA, PQA, RTADDR, GCMD, FSTS, chance.randrange(0, PAGE - 8)))
            driver.stored[offset : offset + 8] = chance.randbytes(8) if chance.random() < 0.7 else bytes(8)
        driver.tables[:] = chance.randbytes(PAGE) + bytes(15 * PAGE)
        driver.kick()
        driver.synchronized()


def test_an_event_without_room_for_a_signal_ends_the_link(driver: Driver) -> None:
    """Who waited in that write would wait for ever."""
    os.set_blocking(driver.completion_fd, True)
    with suppress(BlockingIOError):
        os.preadv(driver.completion_fd, [bytearray(8)], -1, os.RWF_NOWAIT)
    os.eventfd_write(driver.completion_fd, 2**64 - 2)
    driver.submit(struct.pack("<4Q", 5 | 1 << 4, 0, 0, 0))
    assert driver.peer.hung_up()


def test_a_kick_made_blocking_is_not_waited_in(driver: Driver) -> None:
    os.set_blocking(driver.kick_fd, True)
    driver.kick()
    driver.synchronized()


def test_a_driver_that_dies_with_descriptors_half_written_leaves_nothing_to_run(bare_unit: System) -> None:
    """What lies behind the tail never ran, and the next driver's queue starts empty."""
    with ExitStack() as stack:
        first = Driver(stack, bare_unit)
        first.tables[PAGE : PAGE + 32] = struct.pack("<4Q", 5 | 1 << 5 | 0xBEEF << 32, QUEUES, 0, 0)
        first.kick()
        first.synchronized()
        assert first.shows(IQH, 8) == 0
        first.peer.close()
        second = Driver(stack, bare_unit)
        second.synchronized()
        assert second.shows(IQH, 8) == 0
        assert bytes(first.queues[:4]) == bytes(4)
        second.submit(struct.pack("<4Q", 5 | 1 << 5 | 0xCAFE << 32, QUEUES, 0, 0))
        second.until(lambda: bytes(second.queues[:2]) == b"\xfe\xca")
    assert serves(bare_unit, "device_sim")


# -- UNIT ----------------------------------------------------------------------------------------------


def test_a_store_page_that_could_shrink_or_is_none_is_refused(bare_unit: System) -> None:
    before = bare_unit.all_fds()
    with ExitStack() as stack:
        peer = keep(stack, link(stack, bare_unit))
        fd = os.memfd_create("store page", os.MFD_ALLOW_SEALING)
        stack.callback(os.close, fd)
        os.ftruncate(fd, PAGE)
        assert peer.ask("UNIT", {"unit": 0}, [fd]) == errno.EINVAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        os.ftruncate(fd, PAGE)
        assert peer.ask("UNIT", {"unit": 0}) == errno.EINVAL
        assert peer.ask("UNIT", {"unit": 200}, [fd]) == errno.EINVAL
        small, _ = LINUX.memfd("small", PAGE // 2, peer_writes=False)
        stack.callback(os.close, small)
        assert peer.ask("UNIT", {"unit": 0}, [small]) == errno.EINVAL
        answer = peer.ask("UNIT", {"unit": 0}, [fd])
        assert not isinstance(answer, int)
        for got in answer[1]:
            os.close(got)
        assert peer.ask("UNIT", {"unit": 0}, [fd]) == errno.EBUSY
    assert serves(bare_unit, "device_sim")
    bare_unit.wait_closed(before)


def test_a_driver_cannot_store_into_the_registers(driver: Driver) -> None:
    with pytest.raises(PermissionError):
        mmap.mmap(driver.registers_fd, 2 * PAGE)
    with pytest.raises(PermissionError):
        os.truncate(driver.registers_fd, 0)
