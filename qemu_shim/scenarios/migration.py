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

from protocol.hw.dsa import Status
from protocol.uapi import names
from protocol.units import GIB, MIB, PAGE_SIZE, align_up
from qemu_shim.dirty_ring import DirtyRing
from qemu_shim.machine import GuestCpu, Host, MachineConfig, RamSlot
from qemu_shim.measure import Report
from qemu_shim.scenarios.scenario import Param, Params, Scenario
from qemu_shim.scenarios.stage import Stage, staged

SLOT, SLOT_GPA = 7, 0x1_8000_0000
RING_BYTES = 1 << 16
MANUAL_PROTECT = 1


@dataclass(slots=True)
class _Migration:
    stage: Stage
    slot: RamSlot
    bitmap: int  # where KVM_GET_DIRTY_LOG puts its bits
    pages: int
    ring: DirtyRing | None
    copy: bytearray
    running: bool = True
    stores: dict[str, int] = field(default_factory=lambda: {"cpu": 0, "device": 0})

    async def dirty(self) -> set[int]:
        """The pages KVM reports, logged anew from here on."""
        vm, process = self.stage.guest.vm, self.stage.guest.process
        found = set()
        if self.ring is not None:
            found |= {page for slot, page in self.ring.harvest() if slot == SLOT}
            await vm.reset_dirty_rings()
        await vm.get_dirty_log(SLOT, self.bitmap)
        bits = await process.read(self.bitmap, self.pages // 8)
        await vm.clear_dirty_log(SLOT, 0, self.pages, self.bitmap)
        return found | {page for page in range(self.pages) if bits[page // 8] >> page % 8 & 1}

    async def send(self, pages: set[int]) -> None:
        """As the source's process sees them now."""
        for page in pages:
            at = page * PAGE_SIZE
            self.copy[at : at + PAGE_SIZE] = await self.stage.guest.process.read(
                self.slot.hva + at, PAGE_SIZE
            )

    async def device_writes(self, chance: Random) -> None:
        while self.running:
            page = chance.randrange(self.pages)
            status = await self.stage.fill(self.slot.gpa + page * PAGE_SIZE, chance.getrandbits(64))
            self.stage.report.expect_equal(status, Status.SUCCESS, f"DMA write to page {page}")
            self.stores["device"] += 1

    async def cpu_writes(self, cpu: GuestCpu, chance: Random) -> None:
        while self.running:
            page, word = chance.randrange(self.pages), chance.randrange(PAGE_SIZE // 8)
            at = self.slot.gpa + page * PAGE_SIZE + 8 * word
            await cpu.access([(at, struct.pack("<Q", chance.getrandbits(64)))])
            self.stores["cpu"] += 1


async def play(host: Host, params: Params, report: Report) -> None:
    for kind, ring_bytes in (("bitmap", 0), ("ring", RING_BYTES)):
        part = Report(report.scenario)
        page_size = 2 * MIB if params["huge"] else PAGE_SIZE
        config = MachineConfig(ram_bytes=GIB, page_size=page_size, dirty_ring_bytes=ring_bytes)
        async with staged(host, part, config) as stage:
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


async def _migrate(stage: Stage, params: Params) -> dict[str, int]:
    guest, report, pages = stage.guest, stage.report, params["pages"]
    slot = await guest.add_slot(SLOT, SLOT_GPA, align_up(pages * PAGE_SIZE, guest.config.page_size))
    pages = slot.size // PAGE_SIZE
    vcpu = await guest.vm.create_vcpu(1)
    await vcpu.set_cpuid(guest.config.maxphyaddr)
    ring = await vcpu.dirty_ring() if guest.config.dirty_ring_bytes else None
    cpu, bitmap = GuestCpu(vcpu), await guest.process.mmap(align_up(pages // 8, PAGE_SIZE))
    migration = _Migration(stage, slot, bitmap, pages, ring, bytearray(slot.size))
    try:
        for page in range(pages):  # so that what faults from here on is protection alone
            report.expect_equal(
                await stage.fill(slot.gpa + page * PAGE_SIZE, page), Status.SUCCESS, "DMA write"
            )
        async with stage.counted() as cost:
            figures = await _precopy(migration, cpu, params["rounds"])
        source = await _all_of(migration)
        wrong = [
            at // PAGE_SIZE
            for at in range(0, slot.size, PAGE_SIZE)
            if _page(source, at) != _page(migration.copy, at)
        ]
        report.expect(not wrong, f"{len(wrong)} of {pages} pages differ: {wrong[:8]}")
        faults = int(cost["io_pf_fixed"])
        report.expect(
            0 < faults <= migration.stores["device"], f"{faults} IO page faults by write protection"
        )
        return figures | migration.stores | {"pages": pages, "protection_faults": faults}
    finally:
        if ring is not None:
            ring.close()
        vcpu.close()


async def _precopy(migration: _Migration, cpu: GuestCpu, rounds: int) -> dict[str, int]:
    vm, slot = migration.stage.guest.vm, migration.slot
    await vm.enable_cap(names.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL_PROTECT)
    await vm.set_user_memory_region(SLOT, slot.gpa, slot.size, slot.hva, names.KVM_MEM_LOG_DIRTY_PAGES)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(migration.cpu_writes, cpu, Random("cpu"))
        nursery.start_soon(migration.device_writes, Random("device"))
        await migration.send(set(range(migration.pages)))
        sent = migration.pages
        for _ in range(rounds):
            found = await migration.dirty()
            await migration.send(found)
            sent += len(found)
        migration.running = False
    last = await migration.dirty()
    await migration.send(last)
    return {"rounds": rounds + 2, "sent": sent + len(last), "last": len(last)}


async def _all_of(migration: _Migration) -> bytes:
    process, slot = migration.stage.guest.process, migration.slot
    return b"".join([await process.read(slot.hva + at, PAGE_SIZE) for at in range(0, slot.size, PAGE_SIZE)])


def _page(memory: bytes | bytearray, at: int) -> bytes | bytearray:
    return memory[at : at + PAGE_SIZE]


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
)
