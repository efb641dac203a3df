"""iommufdd's mirror under any schedule: a host that is a dict, a real remapping unit, messages that dawdle.

Every message, from iommufdd to the host, back, and to the unit, takes until the seed lets it arrive.  The
device has a TLB of its own, the unit an IOTLB and a cache of table pointers, and all of them keep what they
have until a descriptor takes it.

At every step: no leaf, no cached translation and no address a device is given leads to a frame that is
neither the process's nor pinned (I6), and each leaf maps what the host has there now unless that is being
changed or pinned (I5, I11; messages say R1).

The simulator's stories do not replace it: answers overtake notices here, and R1-lookups-are-not-told is seen
only so.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Coroutine, Sequence
from random import Random
from typing import Any

from device_sim.core.dmar import RemappingUnit
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.traits import capabilities
from iommufdd.core.counts import Counts
from iommufdd.core.domain import Domain
from iommufdd.core.hmm import CallerMm, HmmPage, Invalidate, UserFd
from iommufdd.core.hwpt_mirror import HwptMirror
from iommufdd.core.io_pagetable import IoPageTable
from iommufdd.core.ioas_check import check_ioas
from iommufdd.core.ioas_on_demand import IoasOnDemand
from iommufdd.core.mirror_pins import MirrorPin
from iommufdd.core.notes import Notes
from iommufdd.core.source import Source, Sources
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.hostmem import LOW_RAM_START, Window, WindowKind
from protocol.hw.pasid_entry import RID_PASID, PasidEntry
from protocol.hw.qi import Descriptor, ResponseCode
from protocol.pt import bits
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.units import LEVEL_1G, PAGE_SIZE, Gfn, Hva, Iova, IovaPfn, Level, Pasid, size_of_level
from tests.kit.host_memory import FakeHost
from tests.kit.iommufdd import RID
from tests.kit.linked_unit import LinkedUnit
from tests.kit.refusals import may_refuse
from tests.properties.machine import AnyOrder
from tests.unit.iommufdd.spaces import request

HVA, M2 = 0x7000_0000_0000, 2 << 20
RAM = 3 * M2
TABLE_BYTES = 32 * PAGE_SIZE
MM = 7


class CachingEndpoint:
    """A function's device TLB: page -> frame."""

    def __init__(self) -> None:
        self.tlb: dict[IovaPfn, int] = {}

    def invalidate_translations(self, start: IovaPfn, npages: int) -> bool:
        self.tlb = {page: hpa for page, hpa in self.tlb.items() if not start <= page < start + npages}
        return True

    def page_response(self, prgi: int, code: ResponseCode) -> None: ...


class MirrorMachine:
    """The unit port, the memory bus, and the world around them."""

    alive = True

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.flows = AnyOrder(self.random)
        self.dawdling: list[Wait[None]] = []
        self.running: list[Wait[Any]] = []
        self.codes: Counter[ResponseCode] = Counter()
        self.pinned: list[int] = []  # names of requests
        self.cap, self.ecap = capabilities()
        self.endpoint = CachingEndpoint()
        self.host = FakeHost()
        self.counts = Counts()
        self.ioas = IoasOnDemand(self.counts, Sources(self._connect))
        self.host.told, self.host.hop = self.ioas.invalidate, self.dawdle
        self.notes = Notes(self.ioas, self.flows.spawn)
        view = memoryview(bytearray(TABLE_BYTES))
        writer = TableWriter(LOW_RAM_START, view)
        memory = PhysicalMemory()
        memory.add(Window(WindowKind.TABLES, LOW_RAM_START, TABLE_BYTES, view), lambda: None)
        table = IoPageTable(writer, TablePool(writer, TABLE_BYTES), Level(4), LEVEL_1G)
        domain = Domain(table.root, Level(4), 2, LEVEL_1G)
        self.unit = RemappingUnit(self.cap, self.ecap, 46, memory)
        self.unit.add_endpoint(RID, self.endpoint)
        self.link = LinkedUnit(self.flows, self.unit, memory)
        self.link.driver.tables.add_function(RID, ats=True, pasid=True, pri=True)
        self.hwpt = HwptMirror(domain, self, self.ioas, self.ioas.watched, table)
        self.link.driver.put_pasid_entry(RID, RID_PASID, domain.pasid_entry(self.ecap))
        self.hwpt.attached[RID] = self
        self.start(self.ioas.add_hwpt(self.hwpt))
        self.start(self._map(0, RAM, HVA))
        self.let_all_arrive()

    # -- ports -----------------------------------------------------------------------------------------

    async def dawdle(self) -> None:
        arrived: Wait[None] = Wait()
        self.dawdling.append(arrived)
        await arrived

    async def submit(self, descriptors: Sequence[Descriptor]) -> None:
        await self.dawdle()
        done = self.flows.start(self.link.driver.submit(descriptors))
        self.link.deliver()
        await done
        await self.dawdle()

    def check_on_bus(self, rid: int) -> None: ...

    def put_pasid_entry(self, rid: int, pasid: Pasid, entry: PasidEntry) -> None: ...

    def retire_pasid_entry(self, rid: int, pasid: Pasid) -> None: ...

    def clear_pasid_entry(self, rid: int, pasid: Pasid) -> None: ...

    def respond(self, rid: int, prgi: int, code: ResponseCode, pasid: Pasid | None = None) -> bool:
        return True

    async def remove_memory(self, memory: int) -> None: ...

    async def _connect(self, mm: CallerMm, on_invalidate: Invalidate) -> Source:
        return Source(self.host, self, 1)

    # -- what may happen ---------------------------------------------------------------------------------

    def start(self, flow: Coroutine[Any, None, Any]) -> None:
        self.running.append(self.flows.start(flow))
        self.flows.run_ready()

    def arrive(self) -> None:
        """One message, whichever."""
        if self.dawdling:
            self.dawdling.pop(self.random.randrange(len(self.dawdling))).set(None)
            self.flows.run_ready()

    def let_all_arrive(self) -> None:
        while self.dawdling:
            self.arrive()
            self.check()

    def any_span(self) -> tuple[int, int]:
        """A few pages, or two halves of huge ones, or a huge one, or all."""
        start = self.random.randrange(RAM // PAGE_SIZE) * PAGE_SIZE
        size = self.random.choice([PAGE_SIZE, PAGE_SIZE, 5 * PAGE_SIZE, M2])
        if size == M2:
            start &= -M2
        return start, min(start + size, RAM)

    def fault(self) -> None:
        self.start(self._fault(self.any_span()[0], write=self.random.random() < 0.5))

    async def _fault(self, iova: int, *, write: bool) -> None:
        self.codes[await self.hwpt.fault(request(iova, write=write))] += 1

    def cpu_touches(self) -> None:
        self.host.page_size = self.random.choice([PAGE_SIZE, PAGE_SIZE, M2])
        start, _ = self.any_span()
        hva = HVA + start
        whole = hva & -M2
        empty = all(not whole <= page < whole + M2 for page in self.host.pages)
        if self.host.page_size == M2 and not empty:
            self.host.page_size = PAGE_SIZE
        page = self.host.fault_in(hva)
        self.notes.told(Gfn(page.hva - HVA >> 12), page.size >> 12)
        self.host.page_size = PAGE_SIZE

    def host_gives_up(self) -> None:
        start, end = self.any_span()
        self.start(self.host.give_up(HVA + start, HVA + end))

    def host_collapses(self) -> None:
        """A huge page takes the place of whatever is there."""
        start = self.any_span()[0] & -M2
        self.start(self.host.change(HVA + start, HVA + start + M2, lambda: self._collapse(HVA + start)))

    def _collapse(self, hva: int) -> None:
        self.host.remove(hva, hva + M2)
        self.host.page_size = M2
        self.host.fault_in(hva)
        self.host.page_size = PAGE_SIZE

    def device_reads(self) -> None:
        """Through its TLB, the IOTLB, the table: what it is given must be the process's."""
        page = IovaPfn(self.any_span()[0] >> 12)
        if page not in self.endpoint.tlb:
            entry = self.unit.translation_request(RID, page, bits.READ)
            if not entry.rights:
                return
            inside = (page << 12) % size_of_level(entry.level)
            self.endpoint.tlb[page] = entry.hpa + inside
        assert self.endpoint.tlb[page] in self.live(), f"I6: page {page:#x} -> {self.endpoint.tlb[page]:#x}"

    def remap(self) -> None:
        """All of it goes and comes back, a page further on or not."""
        self.start(self._remap(self.random.choice([0, PAGE_SIZE])))

    async def _remap(self, shift: int) -> None:
        await self.ioas.unmap(Iova(0), (1 << 64) - 1)
        await self._map(shift, RAM - PAGE_SIZE, HVA)

    async def _map(self, iova: int, size: int, hva: int) -> None:
        try:
            await self.ioas.map(CallerMm(MM, UserFd(0)), Hva(hva), size, Iova(iova), writable=True)
        except UapiError:
            assert len(list(self.ioas.areas)) == 1, "another remap was first"

    def pin(self) -> None:
        """A few pages, where others are pinned too."""
        start = M2 - 8 * PAGE_SIZE + self.random.randrange(12) * PAGE_SIZE
        self.start(self._pin(start, start + self.random.randrange(1, 8) * PAGE_SIZE))

    async def _pin(self, start: int, end: int) -> None:
        with may_refuse(errno.EFAULT, errno.EAGAIN, errno.ENOMEM):
            self.pinned.append(await self.hwpt.pin(Iova(start), end - start))

    def unpin(self) -> None:
        """Of one request, in whatever order they came."""
        if self.pinned:
            name = self.pinned.pop(self.random.randrange(len(self.pinned)))
            self.start(self.hwpt.unpin(name))

    def end(self) -> None:
        """Everything arrives; leaves and pins are compared as iommufdd's CHECK does; nothing stays pinned."""
        self.let_all_arrive()
        checked = self.flows.start(check_ioas(self.ioas))
        self.let_all_arrive()
        assert checked.result() == []
        while self.pinned:
            self.unpin()
        self.let_all_arrive()

    # -- what must hold ------------------------------------------------------------------------------------

    def live(self) -> set[int]:
        """Frames that somebody has."""
        pinned = [page for pages in self.host.pins.values() for page in pages]
        return {
            page.hpa + at
            for page in [*self.host.pages.values(), *pinned]
            for at in range(0, page.size, PAGE_SIZE)
        }

    def check(self) -> None:
        live = self.live()
        for pin in self.hwpt.pins:
            self._check_pin(pin)
        for page, cached in self.unit.iotlb.entries(2):
            self._check_frames(f"IOTLB {page:#x}", cached.hpa, size_of_level(cached.level), live)
        for page, hpa in self.endpoint.tlb.items():
            assert hpa in live, f"I6: device TLB {page:#x} -> {hpa:#x}"
        for leaf in self.hwpt.table.leaves_in(Iova(0), self.hwpt.table.limit):
            size = size_of_level(leaf.level)
            self._check_frames(f"leaf {leaf.iova:#x}", leaf.hpa, size, live)
            for at in range(0, size, PAGE_SIZE):
                self._check_now(Iova(leaf.iova + at), leaf.hpa + at, writable=leaf.writable)

    def _check_pin(self, pin: MirrorPin) -> None:
        hva, hpa, *_ = pin.part
        held = self.host.pins.get((pin.name, hva), [])
        assert hpa in [page.hpa + hva - page.hva for page in held], f"I28: {pin.start:#x}: not so at the host"
        for leaf in self.hwpt.table.leaves_in(pin.start, pin.end - pin.start):
            assert leaf.hpa - leaf.iova == hpa - pin.start, f"I28: {leaf.iova:#x} is pinned, and elsewhere"
        assert self.hwpt.table.leaf_at(pin.start) is not None, f"I28: {pin.start:#x} is pinned, and absent"

    def _check_frames(self, what: str, hpa: int, size: int, live: set[int]) -> None:
        gone = [frame for frame in range(hpa, hpa + size, PAGE_SIZE) if frame not in live]
        assert not gone, f"I6: {what} -> {gone[0]:#x}, given up"

    def _check_now(self, iova: Iova, hpa: int, *, writable: bool) -> None:
        area = self.ioas.areas.at(iova)
        if area is None or iova in self.hwpt.pins:
            return  # being taken out, or kept
        hva = area.hva_of(iova)
        if not self.host.is_changing(hva, hva + PAGE_SIZE):
            page: HmmPage | None = self.host.page_at(hva)
            assert page is not None, f"R1: iova {iova:#x} is mapped, the host has nothing there"
            assert page.hpa + hva - page.hva == hpa, f"R1: iova {iova:#x} -> {hpa:#x}, not the host's page"
            assert page.writable or not writable
