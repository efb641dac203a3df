"""migration: pre-copy of a guest whose CPU and device write all the time (RFC-97).

The migrator knows what KVM tells it and nothing else: it sends every page, then round by round those that
were dirtied meanwhile, stops guest and device, and sends the rest.  The unit sets no dirty bits, so KVM logs
a device's stores by write protection: each page it writes in a round costs it one IO page fault.  Played
twice: with KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG, and with a dirty ring, beside which a device's stores
go to the bitmap because no vCPU makes them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from random import Random

import trio

from protocol.units import align_up
from qemu_shim.api import MIB, PAGE_SIZE, Context, Guest, GuestCpu, Migrator, Param, RamSlot, Scenario

SLOT_GPA = 0x1_8000_0000
RING_BYTES = 1 << 16


@dataclass(slots=True)
class _Running:
    """What runs while it is migrated."""

    guest: Guest
    slot: RamSlot
    running: bool = True
    stores: dict[str, int] = field(default_factory=lambda: {"cpu": 0, "device": 0})

    async def device_writes(self, chance: Random) -> None:
        """First of all to the last page, which is the device's alone: however few there are, one faults."""
        await self._device_writes(self._pages - 1, chance)
        while self.running:
            await self._device_writes(chance.randrange(self._pages - 1), chance)

    async def _device_writes(self, page: int, chance: Random) -> None:
        await self.guest.fill(self._at(page), pattern=chance.getrandbits(64))
        self.stores["device"] += 1

    async def cpu_writes(self, cpu: GuestCpu, chance: Random) -> None:
        while self.running:
            at = self._at(chance.randrange(self._pages - 1)) + 8 * chance.randrange(PAGE_SIZE // 8)
            await cpu.access([(at, struct.pack("<Q", chance.getrandbits(64)))])
            self.stores["cpu"] += 1

    @property
    def _pages(self) -> int:
        return self.slot.size // PAGE_SIZE

    def _at(self, page: int) -> int:
        return self.slot.gpa + page * PAGE_SIZE


async def play(ctx: Context) -> None:
    page_size = 2 * MIB if ctx.params["huge"] else PAGE_SIZE
    for kind, ring in (("bitmap", 0), ("ring", RING_BYTES)):
        guest = await ctx.boot(page_size=page_size, dirty_ring_bytes=ring, vcpus=2, records_present=True)
        size = align_up(ctx.params["pages"] * PAGE_SIZE, page_size)
        figures = await _migrate(ctx, kind, guest, await guest.add_slot(size, SLOT_GPA, page_size))
        await ctx.shut_down(guest)
        ctx.figures |= {f"{kind}_{name}": count for name, count in figures.items()}
        ctx.row(
            f"{kind}: rounds / pages sent / of them at last", "{rounds} / {sent} / {last}".format(**figures)
        )
        ctx.row(f"{kind}: stores of the CPU / the device", "{cpu} / {device}".format(**figures))
        ctx.row(f"{kind}: IO page faults by write protection", figures["protection_faults"])


async def _migrate(ctx: Context, kind: str, guest: Guest, slot: RamSlot) -> dict[str, int]:
    running = _Running(guest, slot)
    for at in range(0, slot.size, PAGE_SIZE):  # so that what faults from here on is protection alone
        await guest.fill(slot.gpa + at, pattern=at)
    async with ctx.counted() as cost:
        migrator = await guest.log_dirty(slot)
        last = await _precopy(migrator, running, guest.cpus[1], ctx.params["rounds"])
    wrong = await migrator.differences()
    ctx.expect(not wrong, f"{kind}: {len(wrong)} of {migrator.pages} pages differ: {wrong[:8]}")
    faults = cost.pages_mapped_io
    rounds = ctx.params["rounds"] + 2  # each may protect again what a store is in the middle of
    few = 0 < faults <= running.stores["device"] + rounds
    ctx.expect(few, f"{kind}: {faults} IO page faults by write protection")
    counts = {
        "rounds": rounds,
        "sent": migrator.sent,
        "last": last,
        "pages": migrator.pages,
    }
    return counts | running.stores | {"protection_faults": faults}


async def _precopy(migrator: Migrator, guest: _Running, cpu: GuestCpu, rounds: int) -> int:
    """All, what was dirtied, and when the guest has stopped the rest: how many pages that is."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.cpu_writes, cpu, Random("cpu"))
        nursery.start_soon(guest.device_writes, Random("device"))
        await migrator.send(range(migrator.pages))
        for _ in range(rounds):
            await migrator.send(await migrator.dirty())
        guest.running = False
    rest = await migrator.dirty()
    await migrator.send(rest)
    return len(rest)


SCENARIO = Scenario(
    name="migration",
    summary="live migration under stores of CPU and device, by bitmap and by ring: the copy is equal",
    tags=("Live migration write-protects", "RFC-97"),
    play=play,
    params={
        "pages": Param(256, 64, 65536, "pages migrated"),
        "rounds": Param(6, 1, 100, "rounds between the first and the last"),
        "huge": Param(0, 0, 1, "1: on host pages of 2 MiB, which logging takes apart"),
    },
    designs=("shared",),
)
