"""A live migration as the judge of dirty logging: what it copied must be what the guest's memory is at last.

The migrator knows nothing of bits and entries beyond what user space is told: it copies everything once
logging is on, then again and again the pages KVM reports, and compares when guest and device have stopped.
Meanwhile two vCPUs and a device store at will; the device keeps every translation until it acks the
invalidation of it, and acks late.  A store that was reported to nobody is a byte that differs.

The simulator's stories see the bugs planted here, too, by I25; they have neither CPUs without PML nor bits
that begin set or are cleared one by one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from random import Random

from kvmd.core.capability import KvmCap, enable_cap
from kvmd.core.cpu.vcpu import Vcpu
from kvmd.core.host import CpuFeatures
from kvmd.core.invariants import check_vm
from kvmd.core.mm.reclaim import migrate
from kvmd.core.slots.dirty_log import ClearDirtyLog
from protocol.flow import Wait
from protocol.hostmem import HIGH_RAM_START, LOW_RAM_START
from protocol.kvm_run import ExitReason
from protocol.units import Gfn, Gpa, Hva
from tests.kit.kvmd import World
from tests.oracle.table import Machine, RawTables, second_stage_walk

PAGES = 1024  # two host pages of 2 MiB
GFN = 0x400
HVA = 0x2000_0000_0000
BITMAP = 0x3000_0000_0000
RING_BYTES = 16384
UNIT = Machine(address_width=46, max_leaf_level=3, snoop_control=True)


@dataclass
class ToldSpan:
    start: int
    end: int
    acked: Wait[None]
    clock: int


class LateDevice:
    """Stores through whatever translation it holds; drops it when it acks."""

    def __init__(self, world: World, root: int) -> None:
        self._world = world
        self._root = root
        self._raw = RawTables(LOW_RAM_START, world.bare.tables)
        self._held: dict[int, tuple[int, bool, int]] = {}  # gfn -> hpa, writable, when it was walked
        self._clock = 0
        self.pending: list[ToldSpan] = []

    def invalidate(self, start: int, size: int, epoch: int) -> Wait[None]:
        self._clock += 1
        self.pending.append(ToldSpan(start >> 12, start + size >> 12, Wait(), self._clock))
        return self.pending[-1].acked

    def ack(self, index: int) -> None:
        told = self.pending.pop(index)
        self._held = {
            gfn: held
            for gfn, held in self._held.items()
            if held[2] >= told.clock or not told.start <= gfn < told.end
        }
        told.acked.set(None)

    def store(self, gfn: int, byte: int) -> bool:
        """False: it needs a page request first."""
        if gfn not in self._held or not self._held[gfn][1]:
            found = second_stage_walk(self._raw, UNIT, self._root, 4, gfn << 12)
            assert found.kind != "reserved"
            if found.kind == "absent" or not found.rights & 2:
                return False
            self._held[gfn] = found.hpa, True, self._clock
        at = self._held[gfn][0] - HIGH_RAM_START
        self._world.bare.frames[at] = byte
        self._world.vm.dirty_log.stores.stored(0, Gfn(gfn))
        return True


class Migration:
    """One VM being migrated.  `manual` is MANUAL_DIRTY_LOG_PROTECT2's argument, `huge` the host's pages."""

    def __init__(
        self, seed: int, *, manual: int = 0, ring: bool = False, pml: bool = True, huge: bool, device: bool
    ) -> None:
        self.random = Random(seed)
        self.manual, self.ring = manual, ring
        self.world = world = World(CpuFeatures(pml=pml))
        self.vm = world.vm
        if manual:
            enable_cap(self.vm, KvmCap.MANUAL_DIRTY_LOG_PROTECT2, 0, [manual])
        if ring:
            enable_cap(self.vm, KvmCap.DIRTY_LOG_RING, 0, [RING_BYTES])
            enable_cap(self.vm, KvmCap.DIRTY_LOG_RING_WITH_BITMAP, 0, [0])
        world.map(PAGES // 512 if huge else PAGES, 2 if huge else 1, hva=HVA)
        world.map(1, hva=BITMAP)
        self.vcpus: list[Vcpu] = [world.create_vcpu(i) for i in range(2)]
        self.rings = [memoryview(bytearray(RING_BYTES)) for _ in self.vcpus] if ring else []
        self.harvested = [0 for _ in self.vcpus]
        for vcpu, memory in zip(self.vcpus, self.rings, strict=False):
            self.vm.dirty_log.add_ring(vcpu.arch.id, memory)
        self.device: LateDevice | None = None
        self.log(False)
        for page in (0, 5, 600):
            self.cpu(0, page, 1)
        if device:
            self.lend()
        self.wanted = True
        self.running: list[Wait[None]] = []
        self.copy: dict[int, bytes] = {}
        self.restart()

    def log(self, on: bool) -> None:
        self.world.start(
            self.vm.slots_change.set_memory_region(self.world.region(0, GFN, PAGES, HVA, int(on)))
        )

    def restart(self) -> None:
        """Logging off, then on, and everything copied once."""
        self.finish()
        self.log(False)
        self.finish()
        self.log(True)
        self.finish()
        self.copy = {page: self.source(page) for page in range(PAGES)}

    def lend(self) -> None:
        """The TDP is exported, possibly in the middle of it all."""
        if self.device is None:
            exported = self.world.export()
            self.device = LateDevice(self.world, exported.meta.root_hpa)
            exported.register_importer("unit", self.device)

    # -- who stores ------------------------------------------------------------------------------------

    def cpu(self, index: int, page: int, byte: int | None = None) -> None:
        vcpu = self.vcpus[index]
        if vcpu.running:
            return
        gpa = Gpa(GFN + page << 12)
        access = ("r", gpa, 1) if byte is None else ("w", gpa, bytes([byte]))

        async def run() -> None:
            result = await vcpu.run([access])
            assert result.exit.reason in (ExitReason.IO, ExitReason.DIRTY_RING_FULL)
            assert result.exit.errno == 0

        self.world.start(run())

    def dma(self, page: int, byte: int) -> None:
        if self.device is not None and not self.device.store(GFN + page, byte):
            self.world.start(self.world.device_fault(GFN + page))
            self.device.store(GFN + page, byte)

    # -- the migrator ----------------------------------------------------------------------------------

    def source(self, page: int) -> bytes:
        return self.world.run(self.world.mm.read(Hva(HVA + (page << 12)), 1))

    def sync(self) -> None:
        """One round; its copying happens when KVM has answered, whenever that is."""
        if all(wait.done for wait in self.running):
            self.running = [self.world.start(self._sync())]

    async def _sync(self) -> None:
        log, mm = self.vm.dirty_log, self.world.mm
        pages = await self._collect_rings() if self.ring else set[int]()
        await log.get(0, Hva(BITMAP))
        bits = await mm.read(Hva(BITMAP), PAGES // 8)
        if self.manual:
            first = 64 * self.random.randrange(PAGES // 64)  # a part of it, as QEMU does
            some = bits[first // 8 :]
            await mm.write(Hva(BITMAP), some)
            await log.clear(ClearDirtyLog(0, PAGES - first, first, Hva(BITMAP)))
            bits = bytes(first // 8) + some
        pages |= {page for page in range(PAGES) if bits[page >> 3] >> (page & 7) & 1}
        for page in pages:
            self.copy[page] = self.source(page)

    async def _collect_rings(self) -> set[int]:
        pages = set()
        for i, memory in enumerate(self.rings):
            while True:
                at = self.harvested[i] % (RING_BYTES // 16) * 16
                flags, slot, page = struct.unpack_from("<IIQ", memory, at)
                if not flags & 1:
                    break
                assert slot == 0
                pages.add(page)
                memory[at : at + 4] = struct.pack("<I", 2)
                self.harvested[i] += 1
        await self.vm.dirty_log.reset_rings()
        return pages

    # -- the rest --------------------------------------------------------------------------------------

    def move_page(self, page: int) -> None:
        """The host migrates the frame, with whatever is in it."""
        hva = HVA + ((page & ~511) << 12)
        self.world.start(migrate(self.world.mm, Hva(hva), 512 << 12))

    def ack(self, which: int) -> None:
        if self.device is not None and self.device.pending:
            self.device.ack(which % len(self.device.pending))
            self.world.flows.run_ready()

    def finish(self) -> None:
        """Every ack, so that every flow ends."""
        while self.device is not None and self.device.pending:
            self.ack(0)

    def differences(self) -> list[int]:
        """Everybody has stopped: one last round, and the pages that differ."""
        self.finish()
        self.world.start(self._sync_all())
        self.finish()
        return [page for page in range(PAGES) if self.copy[page] != self.source(page)]

    def violations(self) -> list[str]:
        return check_vm(self.vm)

    async def _sync_all(self) -> None:
        pages = await self._collect_rings() if self.ring else set[int]()
        await self.vm.dirty_log.get(0, Hva(BITMAP))
        bits = await self.world.mm.read(Hva(BITMAP), PAGES // 8)
        for page in pages | {page for page in range(PAGES) if bits[page >> 3] >> (page & 7) & 1}:
            self.copy[page] = self.source(page)
