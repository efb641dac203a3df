"""migration: pre-copy of a guest whose CPU and device write all the time (RFC-97).

The migrator knows what KVM tells it and nothing else: it sends every page, then round by round those that
were dirtied meanwhile, stops guest and device, and sends the rest.  The unit sets no dirty bits, so KVM logs
a device's stores by write protection: each page it writes in a round costs it one IO page fault.  Played
twice: with KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG, and with a dirty ring, beside which a device's stores
go to the bitmap because no vCPU makes them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

import trio

from protocol.hw.dsa import Status
from protocol.units import GIB, MIB, PAGE_SIZE, align_up
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.measure import Report
from qemu_shim.scenarios.scenario import Param, Scenario
from qemu_shim.scenarios.series.stage import Stage, staged
from qemu_shim.vmm.designs import SHARED, RamSlot
from qemu_shim.vmm.machine import GuestCpu, MachineConfig
from qemu_shim.vmm.migrator import Migrator

SLOT, SLOT_GPA = 7, 0x1_8000_0000
RING_BYTES = 1 << 16


@dataclass(slots=True)
class _Guest:
    """What runs while it is migrated."""

    stage: Stage
    slot: RamSlot
    running: bool = True
    stores: dict[str, int] = field(default_factory=lambda: {"cpu": 0, "device": 0})

    async def device_writes(self, chance: Random) -> None:
        while self.running:
            status = await self.stage.fill(self._page(chance), chance.getrandbits(64))
            self.stage.report.expect_equal(status, Status.SUCCESS, "DMA write")
            self.stores["device"] += 1

    async def cpu_writes(self, cpu: GuestCpu, chance: Random) -> None:
        while self.running:
            at = self._page(chance) + 8 * chance.randrange(PAGE_SIZE // 8)
            await cpu.access([(at, struct.pack("<Q", chance.getrandbits(64)))])
            self.stores["cpu"] += 1

    def _page(self, chance: Random) -> int:
        return self.slot.gpa + chance.randrange(self.slot.size // PAGE_SIZE) * PAGE_SIZE


async def play(ctx: Context) -> None:
    params, report = ctx.params, ctx.report
    for kind, ring_bytes in (("bitmap", 0), ("ring", RING_BYTES)):
        part = Report(report.scenario)
        page_size = 2 * MIB if params["huge"] else PAGE_SIZE
        config = MachineConfig(ram_bytes=GIB, page_size=page_size, dirty_ring_bytes=ring_bytes, vcpus=2)
        async with staged(ctx, config, part) as stage:
            figures = await _migrate(stage, params)
        report.problems += [f"{kind}: {problem}" for problem in part.problems]
        report.figures |= part.figures | {f"{kind}_{name}": count for name, count in figures.items()}
        report.rows += [
            (
                f"{kind}: rounds / pages sent / of them at last",
                "{rounds} / {sent} / {last}".format(**figures),
            ),
            (f"{kind}: stores of the CPU / the device", "{cpu} / {device}".format(**figures)),
            (f"{kind}: IO page faults by write protection", "{protection_faults}".format(**figures)),
        ]


async def _migrate(stage: Stage, params: Mapping[str, int]) -> dict[str, int]:
    guest, report = stage.guest, stage.report
    size = align_up(params["pages"] * PAGE_SIZE, guest.config.page_size)
    slot = await guest.add_slot(SLOT, SLOT_GPA, size)
    ring = await guest.vcpus[1].dirty_ring() if guest.config.dirty_ring_bytes else None
    running = _Guest(stage, slot)
    try:
        for at in range(0, size, PAGE_SIZE):  # so that what faults from here on is protection alone
            report.expect_equal(await stage.fill(slot.gpa + at, at), Status.SUCCESS, "DMA write")
        async with stage.counted() as cost:
            migrator = await Migrator.start(guest, slot, ring)
            last = await _precopy(migrator, running, guest.cpus[1], params["rounds"])
        wrong = await migrator.differences()
        report.expect(not wrong, f"{len(wrong)} of {migrator.pages} pages differ: {wrong[:8]}")
    finally:
        if ring is not None:
            ring.close()
    faults = cost.pages_mapped_io
    report.expect(0 < faults <= running.stores["device"], f"{faults} IO page faults by write protection")
    counts = {"rounds": params["rounds"] + 2, "sent": migrator.sent, "last": last, "pages": migrator.pages}
    return counts | running.stores | {"protection_faults": faults}


async def _precopy(migrator: Migrator, guest: _Guest, cpu: GuestCpu, rounds: int) -> int:
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
    designs=(SHARED.name,),
)
