"""A running guest, for a scenario: what its CPUs, its devices and its host do to its memory.

Addresses are guest physical (gpa), sizes are bytes, pages are of 4 KiB.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from protocol.hw.dsa import EQUAL, CompletionRecord, Opcode, Status
from protocol.hw.dsa_regs import Command
from protocol.units import GIB, PAGE_SIZE
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.guest.memory import GuestMemory
from qemu_shim.vmm.designs import RamSlot
from qemu_shim.vmm.inspector import Inspector
from qemu_shim.vmm.machine import BareMachine, GuestCpu, Machine, PassedThrough, attached
from qemu_shim.vmm.migrator import Migrator

PLUGGED_FROM = 8 * GIB  # slots whose place nobody names lie from here on
FIRST_PLUGGED = 16  # the number of the first of them


class DmaFailed(Exception):
    """A work descriptor did not end well: `record` says how.  A scenario that does not expect it has a
    problem.
    """

    def __init__(self, what: str, record: CompletionRecord) -> None:
        super().__init__(f"{what}: {record.status.name} at {record.fault_addr:#x}")
        self.record = record


@dataclass(frozen=True, slots=True)
class QueueWish:
    """What a work queue is to be like: whether its descriptors wait for absent pages, and whether it is
    dedicated (MOVDIR64B) or shared (ENQCMD).
    """

    block_on_fault: bool = True
    dedicated: bool = True


@dataclass(slots=True)
class DmaDevice:
    """A device of the guest, and the first work queue of it, which blocks on faults.  Raises DmaFailed."""

    plugged: PassedThrough
    queue: IdxdWorkQueue
    _memory: GuestMemory

    @property
    def records(self) -> int:
        """The page of the queue's completion records, which only the device touches."""
        return self.queue.record_page

    async def fill(self, gpa: int, size: int = PAGE_SIZE, pattern: int = 0) -> None:
        """The device writes `pattern`, 8 bytes, over and over."""
        _check(await self.queue.fill(gpa, pattern, size), f"fill of gpa {gpa:#x}")

    async def copy(self, dst: int, src: int, size: int = PAGE_SIZE) -> None:
        """The device reads at `src` and writes at `dst`."""
        _check(await self.queue.memmove(dst, src, size), f"copy to gpa {dst:#x}")

    async def holds(self, gpa: int, size: int, pattern: int) -> bool:
        """The device reads, and compares with `pattern`."""
        record = await self.queue.run(Opcode.COMPVAL, src=gpa, dst=pattern, size=size)
        _check(record, f"read of gpa {gpa:#x}")
        return record.result == EQUAL

    async def set_up(self, *groups: Sequence[QueueWish]) -> list[IdxdWorkQueue]:
        """Groups of other queues instead of the one it came with, numbered through; the first is `queue`."""
        await self.queue.device.command(Command.DISABLE_DEVICE)
        wishes = [wish for group in groups for wish in group]
        queues = [
            IdxdWorkQueue(
                self.plugged.portal,
                self._memory,
                block_on_fault=wish.block_on_fault,
                wq=number,
                dedicated=wish.dedicated,
            )
            for number, wish in enumerate(wishes)
        ]
        of_groups = iter(queues)
        await self.queue.device.set_up([[next(of_groups).config for _ in group] for group in groups])
        for queue in queues:
            await queue.enable()
        self.queue = queues[0]
        return queues


def _check(record: CompletionRecord, what: str) -> None:
    if record.status is not Status.SUCCESS:
        raise DmaFailed(what, record)


class Guest:
    """A guest and its devices; `machine` is all that the VMM has of it."""

    devices: list[DmaDevice]

    def __init__(self, machine: BareMachine, *, records_present: bool = False) -> None:
        self.devices = []
        self._machine = machine
        self._records_present = records_present
        self._slots = 0

    @property
    def machine(self) -> Machine:
        """LookupError: it has had no device yet."""
        if not isinstance(self._machine, Machine):
            raise LookupError("the guest has no device yet: ctx.attach(guest) comes first")
        return self._machine

    @property
    def queue(self) -> IdxdWorkQueue:
        """The first device's."""
        return self.devices[0].queue

    @property
    def cpus(self) -> list[GuestCpu]:
        """Each has `access([(gpa, size), (gpa, bytes), ...])`: loads and stores in order; what was loaded."""
        return self._machine.cpus

    # -- the guest's CPU -----------------------------------------------------------------------------------

    def pages(self, count: int, alignment: int = PAGE_SIZE) -> list[int]:
        """Addresses of so many pages in a row that nobody has touched.  OutOfGuestMemory."""
        start = self._machine.memory.allocate(count, alignment)
        return [start + n * PAGE_SIZE for n in range(count)]

    async def touch(self, gpas: Sequence[int]) -> None:
        """The first CPU stores a byte at each."""
        await self._machine.memory.touch(gpas)

    async def read(self, gpa: int, size: int = PAGE_SIZE) -> bytes:
        """The first CPU loads.  LookupError: no RAM is there."""
        return await self._machine.memory.read(gpa, size)

    async def write(self, gpa: int, data: bytes) -> None:
        """The first CPU stores.  LookupError: no RAM is there."""
        await self._machine.memory.write(gpa, data)

    # -- the first device ----------------------------------------------------------------------------------

    async def fill(self, gpa: int, size: int = PAGE_SIZE, pattern: int = 0) -> None:
        """The first device writes `pattern`, 8 bytes, over and over.  DmaFailed."""
        await self.devices[0].fill(gpa, size, pattern)

    async def copy(self, dst: int, src: int, size: int = PAGE_SIZE) -> None:
        """The first device reads at `src` and writes at `dst`.  DmaFailed."""
        await self.devices[0].copy(dst, src, size)

    async def holds(self, gpa: int, size: int, pattern: int) -> bool:
        """The first device reads, and compares with `pattern`.  DmaFailed."""
        return await self.devices[0].holds(gpa, size, pattern)

    async def plug(self, number: int) -> DmaDevice:
        """One more device of the host's, by its number, on the table the first has.  Refused."""
        device = await _with_queue(self.machine, await self.machine.plug(number))
        self.devices.append(device)
        return device

    async def unplug(self, device: DmaDevice) -> None:
        """It is drained, detached and gone."""
        await device.plugged.portal.drain()
        self.devices.remove(device)
        await self.machine.unplug(device.plugged)

    # -- the host: each says to how many pages it did it --------------------------------------------------

    async def swap_out(self, gpa: int, size: int = PAGE_SIZE) -> int:
        """Written to swap; the next touch reads it back."""
        return await self._host("swap_out", gpa, size)

    async def migrate(self, gpa: int, size: int = PAGE_SIZE) -> int:
        """Moved to other frames."""
        return await self._host("migrate", gpa, size)

    async def age(self, gpa: int, size: int = PAGE_SIZE) -> int:
        """Looked at and made old: how many were young."""
        return await self._host("age", gpa, size)

    async def numa_hint(self, gpa: int, size: int = PAGE_SIZE) -> int:
        """Made absent to see who touches it."""
        return await self._host("numa_hint", gpa, size)

    async def collapse(self, gpa: int, size: int) -> int:
        """Put together to huge pages of 2 MiB."""
        return await self._host("collapse", gpa, size)

    async def split(self, gpa: int, size: int) -> int:
        """Huge pages are taken apart."""
        return await self._host("split", gpa, size)

    async def resident_pages(self, gpa: int, size: int = PAGE_SIZE) -> int:
        """How many of them the host has in memory."""
        return await self._machine.process.resident_pages(self._machine.hva_of(gpa), size)

    async def discard(self, gpa: int, size: int = PAGE_SIZE) -> None:
        """What a balloon does with pages the guest gave up: they read as zeroes.  Refused."""
        await self.machine.discard(gpa, size)

    async def _host(self, action: str, gpa: int, size: int) -> int:
        return await self._machine.process.host_action(action, self._machine.hva_of(gpa), size)

    # -- memslots ------------------------------------------------------------------------------------------

    async def add_slot(self, size: int, gpa: int | None = None, page_size: int = PAGE_SIZE) -> RamSlot:
        """More RAM, on host pages of `page_size`; at a place of its own if none is named.  Refused."""
        number = FIRST_PLUGGED + self._slots
        place = PLUGGED_FROM + self._slots * GIB if gpa is None else gpa
        self._slots += 1
        return await self.machine.add_slot(number, place, size, page_size)

    async def remove_slot(self, slot: RamSlot) -> None:
        """It is gone, for CPUs and devices, when this returns."""
        await self.machine.remove_slot(slot)

    async def log_dirty(self, slot: RamSlot) -> Migrator:
        """Log stores from here on; its `dirty()` are the pages, from 0, stored to since it was last asked."""
        return await Migrator.start(self.machine, slot)

    # -- what KVM says of it -------------------------------------------------------------------------------

    async def inspect(self) -> Mapping[str, Any]:
        """Its `slots`, `roots`, `exported` TDPs and `stats`."""
        return await self._inspector.vm(self._machine.vm)

    async def inspect_gpa(self, gpa: int) -> Mapping[str, Any]:
        """`path`: the entries on the way, (level, hpa, entry); `cpu` and `unit`: where each walker ends,
        (outcome, level, entry, rights, ...).
        """
        return await self._inspector.gpa(self._machine.vm, gpa)

    async def tables(self) -> bytes:
        """Every page of KVM's table, one after the other."""
        return await self._inspector.tables(self._machine.vm)

    @property
    def _inspector(self) -> Inspector:
        return Inspector(self._machine.host.kvmd.channel)


@asynccontextmanager
async def with_devices(guest: Guest) -> AsyncIterator[Machine]:
    """Its devices have come, each with a queue, and stay while this is open."""
    async with attached(guest._machine) as machine:
        guest._machine = machine
        guest.devices = [await _with_queue(machine, device) for device in machine.devices]
        if guest._records_present:
            await guest.touch([device.records for device in guest.devices])
        yield machine


async def _with_queue(machine: Machine, plugged: PassedThrough) -> DmaDevice:
    queue = IdxdWorkQueue(plugged.portal, machine.memory, block_on_fault=True)
    await queue.enable()
    return DmaDevice(plugged, queue, machine.memory)
