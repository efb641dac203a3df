"""kvmd's core under any schedule a test can think of, against plain dicts.

Two importers cache translations and table pointers as badly as they may: whatever they once walked they go
on using until they ack the invalidation that covers it, and acks come late and in any order.  What the
guest should see is kept in dicts and updated in the same atomic step as the operation ends, by flows that
wrap the core's.  Lookups of pages fall asleep, and wake at whatever other step.

At every step: no cached translation and no entry of the table names a frame that was given up (I6), no
cached table page was reused (I7), each entry maps the page the host has there now unless it is being
changed (I5, I11), and every byte read is the byte the dicts hold.

The simulator's stories do not replace it: a lookup sleeps here behind what it found, where the daemons have
no step that another may come before, and R1-sequence-stands is seen only so.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from random import Random
from typing import Any

from kvmd.core.capability import KvmCap, enable_cap
from kvmd.core.cpu.vcpu import Vcpu
from kvmd.core.export.tdp_fd import TdpFaultType
from kvmd.core.faults.page_fault import RESOLVED, FaultResult
from kvmd.core.invariants import check_vm
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.page import MappedPage, PageKind, Pte
from protocol.errors import UapiError
from protocol.flow import Flows, Wait
from protocol.frame_tags import is_free
from protocol.hostmem import HIGH_RAM_START, LOW_RAM_START
from protocol.kvm_run import ExitReason
from protocol.units import Gfn, Hpa, Hva, Level
from tests.kit.kvmd import MM_CHANGES, RW, World
from tests.kit.refusals import may_refuse
from tests.oracle.table import Machine, RawTables, leaves, second_stage_walk
from tests.properties.sleepy import SleepyMm

PAGE = 4096
GFNS = 0x800  # what the guest touches lies below
SMALL, SMALL_PAGES = 0x4000_0000, 8
LARGE, LARGE_PAGES = 0x8000_0000, 1024  # two pages of 2 MiB
BITMAP = Hva(0x3000_0000_0000)
UNIT = Machine(address_width=46, max_leaf_level=3, snoop_control=True)


class AnyOrder(Flows):
    """Ready flows run in an order the seed picks."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random

    def _pick(self) -> Any:
        self._ready.rotate(self._random.randrange(len(self._ready)))
        return self._ready.popleft()


@dataclass
class Cached:
    """One translation an importer holds; `tag` is the frame's owner word when it was walked."""

    hpa: int
    rights: int
    tag: int
    filled: int


@dataclass
class Pending:
    start: int
    size: int
    told: int
    acked: Wait[None]


class CachingImporter:
    def __init__(self, rig: RandomVm) -> None:
        self.rig = rig
        self.iotlb: dict[int, Cached] = {}
        self.tables: dict[tuple[int, int], tuple[int, int]] = {}  # (table, generation) -> (first gfn, filled)
        self.pending: list[Pending] = []

    def invalidate(self, start: int, size: int, epoch: int) -> Wait[None]:
        self.pending.append(Pending(start >> 12, size >> 12, self.rig.clock, Wait()))
        return self.pending[-1].acked

    def ack(self, index: int) -> None:
        """Drop what is older than the invalidation, and say so."""
        done = self.pending.pop(index)
        gone = range(done.start, done.start + done.size)
        self.iotlb = {
            gfn: held for gfn, held in self.iotlb.items() if held.filled > done.told or gfn not in gone
        }
        self.tables = {
            key: (gfn, filled)
            for key, (gfn, filled) in self.tables.items()
            if filled > done.told or not (gfn < gone.stop and gone.start < gfn + 512)
        }
        done.acked.set(None)

    def walk(self, gfn: int) -> Cached | None:
        """From the cache, else through the table, remembering the way there."""
        held = self.iotlb.get(gfn)
        if held is not None:
            return held
        rig = self.rig
        found = second_stage_walk(rig.raw, UNIT, rig.root, 4, gfn << 12)
        assert found.kind != "reserved", f"I2: gfn {gfn:#x} level {found.level}: {found.entry:#x}"
        table = rig.root
        for level in (4, 3, 2, 1):
            self.tables.setdefault((table, rig.generation[table]), (gfn & ~511, rig.clock))
            entry = rig.raw.entry(table, gfn >> 9 * (level - 1) & 511)
            if level == max(found.level, 1) or not entry & 3:
                break
            table = entry & 0xF_FFFF_FFFF_F000
        if found.kind == "absent":
            return None
        tag = rig.world.bare.tags.read(found.hpa >> 12)
        held = self.iotlb[gfn] = Cached(found.hpa, found.rights, tag, rig.clock)
        return held


class RandomVm:
    """The core, what drives it, and what the guest should see.  `own`: the exported root is the IOMMU's."""

    def __init__(self, seed: int, *, own: bool = False) -> None:
        self.random = Random(seed)
        self.world = World(seq_start=self.random.choice((0, 2**32 - 3, 2**64 - 3)))
        self.world.flows = self.flows = AnyOrder(self.random)
        self.mm: Mm = self.world.mm
        self.vm = self.world.vm
        self.lookups = SleepyMm(self.mm, self.random, self.while_asleep)
        self.vm.mm = self.vm.frames.mm = self.lookups  # type: ignore[assignment]
        self.world.map(1, hva=BITMAP)
        self.clock = 0
        self.generation: Counter[int] = Counter()
        self._watch_pool()
        self.vcpus: list[Vcpu] = [self.world.create_vcpu(i) for i in range(2)]
        if own:
            enable_cap(self.vm, KvmCap.TDP_FD_OWN_ROOT, 0, [0])
        self.exported = self.world.export()
        self.root = int(self.exported.meta.root_hpa)
        self.raw = RawTables(LOW_RAM_START, self.world.bare.tables)
        self.importers: list[CachingImporter] = []
        self.running: list[str] = []  # operations that have not ended
        self.busy = [False, False]
        self.nap = ""
        # What the guest should see.
        self.mapped: dict[int, int] = {}  # hva page -> level of its mapping
        self.bytes: dict[int, bytearray] = {}  # hva page -> contents, absent: zeroes
        self.slots: dict[int, tuple[int, int, int, bool]] = {}  # id -> gfn, pages, hva page, readonly
        self.compared = 0  # reads that the dicts were asked about
        self.overlapped = 0  # steps with more than one invalidation out
        self.slot_changes = 0
        self.slots_changing = 0

    def _watch_pool(self) -> None:
        allocate = self.world.host.pool.allocate

        def watched() -> Hpa:
            table = allocate()
            self.generation[table] += 1
            return table

        self.world.host.pool.allocate = watched  # type: ignore[method-assign]

    # -- operations ------------------------------------------------------------------------------------

    def begin(self, name: str, flow: Coroutine[Any, None, None]) -> None:
        """Start a flow; what it raises surfaces here or at a later step."""

        async def named() -> None:
            self.running.append(name)
            await flow
            self.running.remove(name)

        self.flows.spawn(named())
        self.settle()

    def settle(self) -> None:
        self.clock += 1
        self.flows.run_ready()

    def mmap(self, large: bool) -> None:
        base, pages, level = (LARGE, LARGE_PAGES, 2) if large else (SMALL, SMALL_PAGES, 1)
        first = base >> 12

        async def run() -> None:
            try:
                await self.mm.mmap(Hva(base), pages << 12, RW, Level(level))
            except UapiError:
                assert any(first + i in self.mapped for i in range(pages))
                return
            assert not any(first + i in self.mapped for i in range(pages))
            self.mapped.update(dict.fromkeys(range(first, first + pages), level))

        self.begin(f"mmap {base:#x}", run())

    def change(self, what: str, first: int, pages: int) -> None:
        """munmap, madvise_dontneed or migrate of hva pages."""

        async def run() -> None:
            try:
                await MM_CHANGES[what](self.mm, Hva(first << 12), pages << 12)
            except UapiError as error:
                if error.errno != errno.ENOMEM:  # of a hole: the rest was done
                    return
            for page in range(first, first + pages):
                if what != "migrate":
                    self.bytes.pop(page, None)
                if what == "munmap":
                    self.mapped.pop(page, None)

        self.begin(f"{what} {first:#x}+{pages}", run())

    def set_slot(
        self, slot: int, gfn: int, pages: int, page: int, readonly: bool, *, log: bool = False
    ) -> None:
        async def run() -> None:
            region = self.world.region(slot, gfn, pages, page << 12, 2 * readonly + log)
            self.slots_changing += 1
            self.slot_changes += 1
            try:
                await self.vm.slots_change.set_memory_region(region)
            except UapiError:
                return
            finally:
                self.slots_changing -= 1
                self.slot_changes += 1
            if pages == 0:
                del self.slots[slot]
            else:
                self.slots[slot] = gfn, pages, page, readonly

        self.begin(f"slot {slot} {gfn:#x}+{pages}", run())

    def log(self, slot: int, on: bool) -> None:
        """The same slot, its logging switched."""
        if slot in self.slots:
            self.set_slot(slot, *self.slots[slot], log=on)

    def get_dirty_log(self, slot: int) -> None:
        async def run() -> None:
            with may_refuse(errno.ENOENT):  # it does not log
                await self.vm.dirty_log.get(slot, BITMAP)

        self.begin(f"get {slot}", run())

    def guest(self, index: int, gfn: int, data: bytes | None, cpl: int = 3) -> None:
        """One access of a vCPU, within a page."""
        if self.busy[index]:
            return

        async def run() -> None:
            self.busy[index] = True
            changes = self.quiet_slots()
            access = ("w", gfn << 12, data) if data else ("r", gfn << 12, 8)
            result = await self.vcpus[index].run([access], cpl)
            self.busy[index] = False
            if changes is None or changes != self.quiet_slots():
                if result.done:
                    self._reached_under_change(gfn, data, result.reads)
                return
            page, readonly = self.lookup(gfn)
            emulated_elsewhere = cpl == 0 and page not in self.mapped
            if page is None or (readonly and data) or emulated_elsewhere:
                assert result.exit.reason is ExitReason.MMIO, f"gfn {gfn:#x} should leave: {result}"
            elif page not in self.mapped:
                assert result.exit.errno, f"gfn {gfn:#x} has no host page: {result}"
            else:
                assert result.done, f"gfn {gfn:#x}: {result}"
                if data:
                    self.store(page, data)
                else:
                    assert result.reads == [self.load(page)], f"gfn {gfn:#x} reads {result.reads}"

        self.begin(f"vcpu {index} gfn {gfn:#x}", run())

    def _reached_under_change(self, gfn: int, data: bytes | None, reads: list[bytes]) -> None:
        """Slots changed meanwhile; what was reached is what the core has at the gfn now."""
        slot = self.vm.slots.find(Gfn(gfn))
        assert slot is not None, f"gfn {gfn:#x} was reached and has no slot"
        page = slot.hva_of(Gfn(gfn)) >> 12
        assert page in self.mapped, f"gfn {gfn:#x} was reached where nothing is mapped"
        if data:
            assert not slot.readonly, f"gfn {gfn:#x} is read-only and was stored to"
            self.store(page, data)
        else:
            assert reads == [self.load(page)], f"gfn {gfn:#x} reads {reads} while its slot changes"

    def io_fault(self, gfn: int, write: bool) -> None:
        async def run() -> None:
            kind = TdpFaultType(read=not write, write=write, exec=False)
            changes = self.quiet_slots()
            result = await self.exported.fault(self.vm.fault_path, 77, Gfn(gfn), kind)
            if changes is None or changes != self.quiet_slots():
                return
            page, readonly = self.lookup(gfn)
            if page is None:
                assert result is FaultResult.NO_SLOT
            elif readonly and write:
                assert result is FaultResult.READONLY
            else:
                assert (result in RESOLVED) == (page in self.mapped), f"gfn {gfn:#x}: {result}"

        self.begin(f"fault gfn {gfn:#x}", run())

    def dma(self, index: int, gfn: int, data: bytes | None) -> None:
        """Through the importer's cache, however old; what it may not reach it leaves alone."""
        if not self.importers:
            return
        importer = self.importers[index % len(self.importers)]
        held = importer.walk(gfn)
        if held is None or not held.rights & (2 if data else 1):
            return
        self.check_cached(gfn, held)
        at = held.hpa - HIGH_RAM_START
        if data is None:
            page, _ = self.lookup(gfn)
            if not self.slots_changing and page in self.mapped and not importer.pending:
                assert bytes(self.world.bare.frames[at : at + 8]) == self.load(page)
            return
        owner = self.owner_of(held.hpa >> 12)
        self.world.bare.frames[at : at + len(data)] = data
        self.vm.dirty_log.stores.stored(0, Gfn(gfn))
        self.store(owner, data)

    def owner_of(self, pfn: int) -> int:
        """The hva page a frame backs now: what a stale but unacked translation still writes to."""
        for entry in self.mm.table.entries():
            assert isinstance(entry, Pte)
            if entry.pfn <= pfn < entry.pfn + (1 << 9 * (entry.level - 1)):
                assert entry.page.kind is not PageKind.ZERO, "I11: DMA wrote to the zero page"
                return int(entry.hva >> 12) + pfn - entry.pfn
        raise AssertionError(f"I6: DMA to pfn {pfn:#x}, which nothing backs")

    def pfn_of(self, hva: Hva) -> int | None:
        """The frame the host has at `hva` now."""
        entry = self.mm.table.find(hva)
        return entry.pfn + ((hva - entry.hva) >> 12) if isinstance(entry, Pte) else None

    def process(self, page: int, data: bytes | None) -> None:
        """The process's own access."""
        hva = Hva(page << 12)

        async def run() -> None:
            try:
                if data:
                    await self.mm.write(hva, data)
                else:
                    seen = await self.mm.read(hva, 8)
            except UapiError:
                assert page not in self.mapped
                return
            assert page in self.mapped
            if data:
                self.store(page, data)
            else:
                assert seen == self.load(page), f"the process reads {seen!r} at {hva:#x}"

        self.begin(f"process {hva:#x}", run())

    def join(self) -> None:
        if len(self.importers) < 2:
            self.importers.append(CachingImporter(self))
            self.exported.register_importer(f"unit{len(self.importers)}", self.importers[-1])

    def ack(self, index: int, which: int) -> None:
        if self.importers:
            importer = self.importers[index % len(self.importers)]
            if importer.pending:
                importer.ack(which % len(importer.pending))
                self.settle()

    def ack_all(self) -> None:
        while any(importer.pending for importer in self.importers):
            for i in range(len(self.importers)):
                self.ack(i, self.random.randrange(8))

    def wake(self, which: int) -> None:
        self.lookups.wake(which)
        self.settle()

    def finish(self) -> None:
        """Everybody wakes, everything is acked: every operation ends."""
        self.lookups.drowsy = 0
        while self.lookups.sleepers or any(importer.pending for importer in self.importers):
            self.wake(self.random.randrange(8))
            self.ack_all()
        assert self.running == []

    def while_asleep(self, page: MappedPage) -> None:
        """Called inside a fault, between the lookup and the mapping."""
        nap, self.nap = self.nap, ""
        if nap:
            pages = 1 << 9 * (page.level - 1)
            first = page.hva >> 12

            async def run() -> None:
                with may_refuse(errno.ENOMEM):  # unmapped meanwhile
                    await MM_CHANGES[nap](self.mm, page.hva, pages << 12)
                if nap == "madvise_dontneed":
                    for gone in range(first, first + pages):
                        self.bytes.pop(gone, None)

            self.flows.spawn(run())

    # -- what the guest should see ---------------------------------------------------------------------

    def quiet_slots(self) -> int | None:
        """The same number at two times: no change of the slots was under way at either, or in between."""
        return None if self.slots_changing else self.slot_changes

    def lookup(self, gfn: int) -> tuple[int | None, bool]:
        for start, pages, page, readonly in self.slots.values():
            if start <= gfn < start + pages:
                return page + gfn - start, readonly
        return None, False

    def load(self, page: int | None) -> bytes:
        assert page is not None
        self.compared += 1
        return bytes(self.bytes.get(page, bytearray(8))[:8])

    def store(self, page: int, data: bytes) -> None:
        self.bytes.setdefault(page, bytearray(8))[: len(data)] = data

    # -- what must hold --------------------------------------------------------------------------------

    def check_cached(self, gfn: int, held: Cached) -> None:
        tag = self.world.bare.tags.read(held.hpa >> 12)
        assert tag == held.tag, f"I6: gfn {gfn:#x}: hpa {held.hpa:#x} was given up while an importer uses it"

    def check(self) -> None:
        self.overlapped += any(len(importer.pending) > 1 for importer in self.importers)
        free = set(self.world.host.pool._free)
        for importer in self.importers:
            for gfn, held in importer.iotlb.items():
                self.check_cached(gfn, held)
            for table, generation in importer.tables:
                reused = table in free or self.generation[table] != generation
                assert not reused, f"I7: table {table:#x} reused while an importer caches it"
        self.check_entries()
        found = check_vm(self.vm)
        assert not found, found
        if not any(importer.pending for importer in self.importers):
            assert self.lookups.sleepers or not self.running, f"nothing is out, they wait: {self.running}"
            assert self.vm.flusher.acked == self.vm.flusher.epoch

    def check_entries(self) -> None:
        """I5: no entry names a free frame, nor another than the host has there, unless it changes now."""
        for gfn, level, entry in leaves(self.raw, self.root, 4):
            pfn = entry >> 12 & 0xFF_FFFF_FFFF
            assert not is_free(self.world.bare.tags.read(pfn)), f"I5: gfn {gfn:#x} maps free pfn {pfn:#x}"
            slot = self.vm.slots.find(Gfn(gfn))
            assert slot is not None, f"I11: gfn {gfn:#x} is mapped, there is no slot"
            assert self.pfn_of(slot.hva_of(Gfn(gfn))) == pfn, f"I5: gfn {gfn:#x} maps a stale pfn"
            assert level <= 2
