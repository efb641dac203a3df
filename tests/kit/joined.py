"""kvmd's core, iommufdd's HWPT and driver, and a unit with a function before it, over the same memory: a
table, shared or a mirror, from the host's page to the byte that a device stores, with nothing but the cores
in between.

Kicks, events, acks and page requests are on their way until `step` or `settle` has them arrive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from device_sim.core.dmar import RemappingUnit
from device_sim.core.function import DmaFault, DmaRange, Function
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.traits import capabilities
from iommufdd.core.counts import Counts
from iommufdd.core.domain import Domain
from iommufdd.core.hmm import CallerMm, HmmPage, HmmRange, Invalidate, PinnedRange, UserFd
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.hwpt_kvm import HwptKvm
from iommufdd.core.hwpt_mirror import HwptMirror
from iommufdd.core.io_pagetable import IoPageTable
from iommufdd.core.ioas_on_demand import IoasOnDemand
from iommufdd.core.kvm_domain import KvmDomain
from iommufdd.core.source import Source, Sources
from kvmd.core.export.tdp_fd import TdpFaultType
from kvmd.core.faults.page_fault import IO_ERRNO, RESOLVED
from kvmd.core.mm.hmm import FoundPages, Mirror
from protocol.errors import UapiError
from protocol.flow import Flow, Flows, Wait
from protocol.hostmem import HIGH_RAM_START, LOW_RAM_START, Window, WindowKind
from protocol.hw.pasid_entry import RID_PASID
from protocol.hw.prq import PageRequest
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.units import (
    GIB,
    LEVEL_1G,
    PAGE_SHIFT,
    PAGE_SIZE,
    Gfn,
    GfnSpan,
    Gpa,
    Hpa,
    Hva,
    Iova,
    Level,
    size_of_level,
)
from tests.kit.importer import HandLease
from tests.kit.kvmd import World
from tests.kit.linked_unit import LinkedUnit

RID, DID = 0x6A08, 7
REQUEST_BYTES = 32
OWN_TABLES_AT, OWN_TABLES = Hpa(512 * GIB), 64 * PAGE_SIZE
Answer = TypeVar("Answer")


class AlwaysThere:
    """The bus between unit and memory."""

    alive = True

    async def remove_memory(self, memory: int) -> None: ...


class TdpInProcess:
    """A TDP FD's ops, without the messages."""

    def __init__(self, joined: Joined) -> None:
        self._joined = joined

    async def fault(self, gfn: Gfn, *, read: bool, write: bool, exec: bool) -> None:
        kind = TdpFaultType(read=read, write=write, exec=exec)
        result = await self._joined.exported.fault(self._joined.vm.fault_path, 77, gfn, kind)
        if result not in RESOLVED:
            raise UapiError(IO_ERRNO[result], f"gfn {gfn:#x}: {result.name.lower()}")

    async def pin(self, gfn: Gfn, npages: int) -> int:
        return await self._joined.vm.pinning.pin(self._joined.account, GfnSpan.of_pages(gfn, npages))

    async def pin_all(self) -> int:
        return await self._joined.vm.pinning.pin_all(self._joined.account)

    async def unpin(self, pin: int) -> None:
        await self._joined.vm.pinning.unpin(self._joined.account, pin)

    async def unregister(self) -> None: ...
    def release(self) -> None: ...


class JoinedSilicon(World):
    """kvmd's core, a unit and its driver.  `pick` chooses what arrives next; `hwpt` and `domain` are to come,
    and then `attach`.
    """

    hwpt: Hwpt
    domain: Domain

    def __init__(
        self,
        pick: Callable[[list[str]], str] = lambda due: due[0],
        flows: Flows | None = None,
        **host: Any,
    ) -> None:
        super().__init__(**host)
        self.flows = self.flows if flows is None else flows
        self.accesses = 0  # of the device, made
        self.memory = PhysicalMemory()
        for kind, base, view in (
            (WindowKind.TABLES, LOW_RAM_START, memoryview(self.bare.tables)),
            (WindowKind.FRAMES, HIGH_RAM_START, memoryview(self.bare.frames)),
            (WindowKind.FRAME_TAGS, HIGH_RAM_START, self.bare.tags._words.cast("B")),
        ):
            self.memory.add(Window(kind, base, len(view), view), lambda: None)
        self.unit = RemappingUnit(*capabilities(), 46, self.memory)
        self.function = Function(RID, self.unit, self.memory, lambda: 0)
        self.linked = LinkedUnit(self.flows, self.unit, self.memory, pick)
        self.linked.driver.tables.add_function(RID, ats=True, pasid=True, pri=True)
        self._groups: dict[int, list[PageRequest]] = {}

    def attach(self) -> None:
        driver = self.linked.driver
        driver.put_pasid_entry(RID, RID_PASID, self.domain.pasid_entry(driver.ecap))
        self.hwpt.attached[RID] = driver  # all that `forget` asks of a unit
        self.function.configure(pasid=True)
        self.function.configure(ats=True)
        self.function.configure(pri_allocation=64, bus_master=True)

    # -- what is on its way --------------------------------------------------------------------------------

    def step(self) -> bool:
        """One kick or event arrives, and who became ready runs; False: nothing is on its way."""
        if self.linked.due:
            self.linked.arrive()
        elif not self.linked.page_requests:
            return False
        self._take_requests()
        self.flows.run_ready()
        return True

    def settle_all(self) -> None:
        self.flows.run_ready()
        while self.step():
            pass

    def _take_requests(self) -> None:
        for entries, _ in self.linked.page_requests:
            for at in range(0, len(entries), REQUEST_BYTES):
                request = PageRequest.from_bytes(entries[at : at + REQUEST_BYTES])
                self._groups.setdefault(request.prgi, []).append(request)
                if request.last:
                    self.flows.spawn(self._serve(request.prgi, self._groups.pop(request.prgi)))
        self.linked.page_requests.clear()

    async def _serve(self, prgi: int, requests: Sequence[PageRequest]) -> None:
        codes = [await self.hwpt.fault(request) for request in requests]
        self.linked.driver.respond(RID, prgi, max(codes))

    # -- the device ----------------------------------------------------------------------------------------

    async def dma(self, gfn: int, data: bytes | None) -> None:
        """An access within a page; one that cannot be made is given up."""
        iova = Iova(gfn * PAGE_SIZE)
        size = 8 if data is None else len(data)
        for _ in range(4):
            try:
                await self.function.make_accessible([DmaRange(iova, size, data is not None)], block=True)
            except DmaFault:
                return
            done = self.function.read(iova, size) if data is None else self.function.write(iova, data)
            if done:
                self.accesses += 1
                return

    async def dma_copy(self, src: int, dst: int) -> None:
        """64 bytes from one page to another, likewise."""
        source, target = (Iova(gfn * PAGE_SIZE) for gfn in (src, dst))
        ranges = [DmaRange(source, 64, False), DmaRange(target, 64, True)]
        for _ in range(4):
            try:
                await self.function.make_accessible(ranges, block=True)
            except DmaFault:
                return
            if self.function.copy(source, target, 64):
                self.accesses += 1
                return


class Joined(JoinedSilicon):
    """The shared table: the HWPT is KVM's."""

    def __init__(self, *silicon: Any, **host: Any) -> None:
        super().__init__(*silicon, **host)
        self.exported = self.export()
        self.account = self.vm.pinning.open()
        meta = self.exported.meta
        self.domain = domain = KvmDomain(meta.root_hpa, meta.level, DID, LEVEL_1G)
        self.hwpt = HwptKvm(domain, AlwaysThere(), TdpInProcess(self))
        self.exported.register_importer("iommufd", self)
        self.attach()

    def invalidate(self, start: int, size: int, epoch: int) -> Wait[None]:
        assert isinstance(self.hwpt, HwptKvm)
        return self.flows.start(self.hwpt.invalidate(Gpa(start), size, epoch))


class MemoryInProcess:
    """A process's memory as iommufdd has it: kvmd's mirror, and messages that keep their order each way until
    `arrive` lets the next one through.
    """

    def __init__(self, mirror: Mirror, flows: Flows) -> None:
        self._mirror = mirror
        self._flows = flows
        self.on_invalidate: Invalidate | None = None
        self.on_their_way: tuple[deque[Wait[None]], deque[Wait[None]]] = deque(), deque()  # to kvmd, back

    def arrive(self, back: bool) -> bool:
        """False: there is none."""
        queue = self.on_their_way[back]
        if queue:
            queue.popleft().set(None)
        return bool(queue)

    def _send(self, back: bool) -> Wait[None]:
        self.on_their_way[back].append(Wait())
        return self.on_their_way[back][-1]

    def invalidate(self, start: int, size: int, seq: int) -> Wait[None]:
        """To the mirror's ops: behind whatever was answered before."""
        return self._flows.start(self._invalidate(self._send(True), start, size))

    async def _invalidate(self, told: Wait[None], start: int, size: int) -> None:
        await told
        assert self.on_invalidate is not None
        await self.on_invalidate(Hva(start), size)
        await self._send(False)

    async def _ask(self, asked: Callable[[], Flow[Answer]]) -> Answer:
        await self._send(False)
        try:
            answer = await asked()
        except UapiError:
            await self._send(True)
            raise
        await self._send(True)
        return answer

    async def watch(self, hva: Hva, size: int) -> None:
        await self._send(False)
        self._mirror.watch(hva, size)
        await self._send(True)

    async def unwatch(self, hva: Hva, size: int) -> None:
        await self._send(False)
        self._mirror.unwatch(hva, size)
        await self._send(True)

    async def range_fault(self, hva: Hva, size: int, *, write: bool, fault: bool) -> HmmRange:
        return _range(await self._ask(lambda: self._mirror.range_fault(hva, size, write=write, fault=fault)))

    async def pin(self, hva: Hva, size: int, *, write: bool, area: int, file: int = 0) -> HmmRange:
        return _range(await self._ask(lambda: self._mirror.pin(hva, size, write=write, area=area, file=file)))

    async def unpin(self, hva: Hva, size: int, *, area: int) -> None:
        await self._ask(lambda: self._mirror.unpin(hva, size, area=area))

    async def pinned(self, hva: Hva, size: int, *, area: int) -> PinnedRange:
        raise NotImplementedError

    async def open_file(self, fd: UserFd) -> int:
        raise NotImplementedError

    async def close_file(self, file: int) -> None: ...
    async def change_process(self, mm_fd: UserFd) -> None: ...
    async def undo_change_process(self) -> None: ...
    def release(self) -> None: ...


def _range(found: FoundPages) -> HmmRange:
    pages = [
        HmmPage(page.hva, Hpa(page.pfn << PAGE_SHIFT), size_of_level(page.level), page.writable)
        for page in found.pages
    ]
    return HmmRange(pages, found.end, found.major)


class JoinedMirror(JoinedSilicon):
    """The mirror: an HWPT of iommufdd's own on an IOAS on demand, which shows `pages` of the process."""

    def __init__(self, *silicon: Any, **host: Any) -> None:
        super().__init__(*silicon, **host)
        mirror = Mirror(self.mm)
        self.host_memory = MemoryInProcess(mirror, self.flows)
        self.run(mirror.register(self.host_memory, HandLease()))
        self.ioas = IoasOnDemand(Counts(), Sources(self._connect))
        self.host_memory.on_invalidate = self.ioas.invalidate
        tables = bytearray(OWN_TABLES)
        self.memory.add(
            Window(WindowKind.TABLES, OWN_TABLES_AT, OWN_TABLES, memoryview(tables)), lambda: None
        )
        writer = TableWriter(OWN_TABLES_AT, memoryview(tables))
        table = IoPageTable(writer, TablePool(writer, OWN_TABLES), Level(4), LEVEL_1G)
        self.domain = Domain(table.root, Level(4), DID, LEVEL_1G)
        self.hwpt = HwptMirror(self.domain, AlwaysThere(), self.ioas, self.ioas.watched, table)
        self.flows.spawn(self.ioas.add_hwpt(self.hwpt))
        self.settle_all()
        self.attach()

    async def _connect(self, mm: CallerMm, on_invalidate: Invalidate) -> Source:
        return Source(self.host_memory, AlwaysThere(), 0)

    def show(self, gfn: int, pages: int, hva: int) -> Wait[Any]:
        caller = CallerMm(self.mm.cookie or 0, UserFd(0))
        size, iova = pages * PAGE_SIZE, Iova(gfn * PAGE_SIZE)
        return self.flows.start(self.ioas.map(caller, Hva(hva), size, iova, writable=True))

    def step(self) -> bool:
        """A message either way, a kick or an event."""
        ways = [back for back in (False, True) if self.host_memory.on_their_way[back]]
        if ways and (not self.linked.due or self.toss()):
            back = ways[0] if len(ways) == 1 else self.toss()
            self.host_memory.arrive(back)
            if self.toss():  # one recv may bring two
                self.host_memory.arrive(back)
            self.flows.run_ready()
            return True
        return super().step()

    def toss(self) -> bool:
        """Which of two comes first."""
        return False
