"""dsa-ops: every operation of the device, on several devices and queues at once, each result checked.

Every device has three queues in two groups: a dedicated one and a shared one that block on faults, and a
dedicated one that does not, whose faults the driver resumes.  Targets are pages nobody has touched, so that
each operation meets faults of its queue's kind.  What memory and records must hold is computed here, by the
shortest code that can.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from random import Random

import trio

from protocol.hw import dsa
from protocol.hw.dsa import CompletionRecord, Descriptor, Flag, Opcode, Status
from qemu_shim.api import (
    DESIGNS,
    PAGE_SIZE,
    Context,
    Guest,
    IdxdWorkQueue,
    Param,
    QueueWish,
    Scenario,
)

PAGES = 3
SIZE = PAGES * PAGE_SIZE - 24  # of each operand, beginning 8 bytes into its first page
OFFSET = 8
PATTERN = 0x0123_4567_89AB_CDEF
DELTA_ENTRY = 10


def crc_by_bits(data: bytes) -> int:
    register = 0xFFFF_FFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F6_3B78 if register & 1 else 0)
    return register ^ 0xFFFF_FFFF


def delta_by_words(old: bytes, new: bytes) -> bytes:
    return b"".join(
        struct.pack("<H", at // 8) + new[at : at + 8]
        for at in range(0, len(old), 8)
        if old[at : at + 8] != new[at : at + 8]
    )


@dataclass(slots=True)
class _Operations:
    """All operations on one queue."""

    name: str
    ctx: Context
    guest: Guest
    queue: IdxdWorkQueue
    chance: Random
    done: int = 0

    async def run(self) -> None:
        for operation in (
            *(self._move, self._move_onto_itself, self._fill, self._compare, self._compare_pattern),
            *(self._dualcast, self._crc, self._delta, self._batch, self._nothing),
        ):
            await operation()
            self.done += 1

    def _empty(self) -> int:
        return self.guest.pages(PAGES)[0] + OFFSET

    async def _filled(self, data: bytes) -> int:
        gpa = self._empty()
        await self.guest.write(gpa, data)
        return gpa

    async def _complete(self, opcode: Opcode, **fields: int | bytes | Flag) -> CompletionRecord:
        descriptor = Descriptor(opcode=opcode, **fields)  # type: ignore[arg-type]
        record = (await self.queue.complete(descriptor)).record
        self._expect(record.status is Status.SUCCESS, f"{opcode.name}: {record.status.name}")
        return record

    def _expect(self, holds: bool, what: str) -> None:
        self.ctx.expect(holds, f"{self.name}: {what}")

    async def _holds(self, gpa: int, data: bytes, what: str) -> None:
        self._expect(await self.guest.read(gpa, len(data)) == data, f"{what}: wrong data")

    # -- operations ------------------------------------------------------------------------------------

    async def _move(self) -> None:
        data = self.chance.randbytes(SIZE)
        src, dst = await self._filled(data), self._empty()
        await self._complete(Opcode.MEMMOVE, src=src, dst=dst, size=SIZE)
        await self._holds(dst, data, "MEMMOVE")

    async def _move_onto_itself(self) -> None:
        data = self.chance.randbytes(SIZE)
        for distance in (-72, 72):
            gpa = await self._filled(data)
            src, dst = (gpa, gpa + distance) if distance > 0 else (gpa - distance, gpa)
            await self._complete(Opcode.MEMMOVE, src=src, dst=dst, size=SIZE - 72)
            moved = bytearray(data)
            moved[dst - gpa : dst - gpa + SIZE - 72] = data[src - gpa : src - gpa + SIZE - 72]
            await self._holds(gpa, bytes(moved), f"MEMMOVE by {distance}")

    async def _fill(self) -> None:
        dst = self._empty()
        await self._complete(Opcode.MEMFILL, src=PATTERN, dst=dst, size=SIZE)
        await self._holds(dst, PATTERN.to_bytes(8, "little") * (SIZE // 8), "MEMFILL")

    async def _compare(self) -> None:
        data = self.chance.randbytes(SIZE)
        at = self.chance.randrange(SIZE)
        other = bytearray(data)
        other[at] ^= 1
        src, same, differs = [await self._filled(bytes(buffer)) for buffer in (data, data, other)]
        equal = await self._complete(Opcode.COMPARE, src=src, dst=same, size=SIZE)
        self._expect(equal.result == 0, "COMPARE of equal buffers")
        unequal = await self._complete(Opcode.COMPARE, src=src, dst=differs, size=SIZE)
        self._expect((unequal.result, unequal.bytes_completed) == (1, at), f"COMPARE at {at}: {unequal}")

    async def _compare_pattern(self) -> None:
        words = PATTERN.to_bytes(8, "little") * (SIZE // 8)
        at = self.chance.randrange(SIZE)
        src = await self._filled(words[:at] + b"\0\0" + words[at + 2 :])
        record = await self._complete(Opcode.COMPVAL, src=src, dst=PATTERN, size=SIZE)
        self._expect((record.result, record.bytes_completed) == (1, at & ~7), f"COMPVAL at {at}: {record}")

    async def _dualcast(self) -> None:
        data = self.chance.randbytes(SIZE)
        src, first, second = await self._filled(data), self._empty(), self._empty()
        operand = dsa.op_bytes((dsa.DEST2, second))
        await self._complete(Opcode.DUALCAST, src=src, dst=first, size=SIZE, op_specific=operand)
        await self._holds(first, data, "DUALCAST")
        await self._holds(second, data, "DUALCAST, second")

    async def _crc(self) -> None:
        data = self.chance.randbytes(SIZE)
        src, dst = await self._filled(data), self._empty()
        for opcode in (Opcode.CRCGEN, Opcode.COPY_CRC):
            record = await self._complete(opcode, src=src, dst=dst * (opcode == Opcode.COPY_CRC), size=SIZE)
            self._expect(record.op(dsa.CRC_VALUE) == crc_by_bits(data), f"{opcode.name}: {record}")
        await self._holds(dst, data, "COPY_CRC")

    async def _delta(self) -> None:
        old = self.chance.randbytes(SIZE)
        new = bytearray(old)
        for _ in range(50):
            new[self.chance.randrange(SIZE)] ^= 0x80
        expected = delta_by_words(old, bytes(new))
        src, dst, delta = await self._filled(old), await self._filled(bytes(new)), self._empty()
        largest = DELTA_ENTRY * 100
        operands = dsa.op_bytes((dsa.DELTA_ADDR, delta), (dsa.MAX_DELTA_SIZE, largest))
        record = await self._complete(Opcode.CR_DELTA, src=src, dst=dst, size=SIZE, op_specific=operands)
        told = record.result, record.op(dsa.DELTA_SIZE)
        self._expect(told == (1, len(expected)), f"CR_DELTA: {record}")
        await self._holds(delta, expected, "CR_DELTA")
        operand = dsa.op_bytes((dsa.DELTA_REC_SIZE, len(expected)))
        await self._complete(Opcode.AP_DELTA, src=delta, dst=src, size=SIZE, op_specific=operand)
        await self._holds(src, bytes(new), "AP_DELTA")

    async def _batch(self) -> None:
        """A fill and, behind a fence, a copy of it; in pages that are present, for faults end a batch."""
        first, second = await self._filled(bytes(SIZE)), await self._filled(bytes(SIZE))
        record, children = await self.queue.batch(
            [
                Descriptor(opcode=Opcode.MEMFILL, src=PATTERN, dst=first, size=SIZE),
                Descriptor(opcode=Opcode.MEMMOVE, flags=Flag.FENCE, src=first, dst=second, size=SIZE),
            ]
        )
        statuses = [each.status for each in (record, *children)]
        self._expect(statuses == [Status.SUCCESS] * 3, f"BATCH: {statuses}")
        await self._holds(second, PATTERN.to_bytes(8, "little") * (SIZE // 8), "BATCH")

    async def _nothing(self) -> None:
        await self._complete(Opcode.NOOP)
        await self._complete(Opcode.CFLUSH, dst=self._empty(), size=SIZE)
        await self._complete(Opcode.DRAIN)


QUEUES = {
    "dedicated": QueueWish(),
    "shared": QueueWish(dedicated=False),
    "not blocking": QueueWish(block_on_fault=False),
}


async def play(ctx: Context) -> None:
    available = len((await ctx.host.device_sim.stats())["devices"])
    devices = min(ctx.params["devices"], available)
    guest = await ctx.boot(devices=devices)
    dedicated, shared, not_blocking = QUEUES.values()
    running = [
        _Operations(f"dsa{n} {name}", ctx, guest, queue, Random(f"{n} {name}"))
        for n, device in enumerate(guest.devices)
        for name, queue in zip(QUEUES, await device.set_up([dedicated, shared], [not_blocking]), strict=True)
    ]
    async with ctx.counted() as cost:
        for _ in range(ctx.params["rounds"]):
            async with trio.open_nursery() as nursery:
                for operations in running:
                    nursery.start_soon(operations.run)
    done = sum(operations.done for operations in running)
    resumed = sum(operations.queue.faults for operations in running)
    for operations in running:
        ctx.say(f"{operations.name}: {operations.done} operations")
    ctx.row("devices / queues", f"{devices} / {len(running)}")
    ctx.row("operations verified", done)
    ctx.row("descriptors resumed after a fault", resumed)
    ctx.figures |= {"operations": done, "resumed": resumed, "devices": devices}
    faults, requests = not ctx.design.pins, cost.io_faults
    ctx.expect(faults == (resumed > 0), f"RFC-109: {resumed} descriptors ended in a page fault")
    ctx.expect(faults == (requests > 0), f"RFC-108: {requests} page requests")


SCENARIO = Scenario(
    name="dsa-ops",
    summary="every operation of the device against the same worked out here, on several devices and queues",
    tags=("RFC-108", "RFC-109"),
    play=play,
    params={
        "devices": Param(2, 1, 16, "devices of the machine, of those there are"),
        "rounds": Param(1, 1, 1000, "times each queue runs every operation"),
    },
    options={"device_sim": ("--devices", "2")},
    designs=tuple(design.name for design in DESIGNS.values() if design.touch_serves),
)
