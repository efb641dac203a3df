"""kvmd's core, iommufdd's HWPT and driver, and a unit with a function before it, over the same memory: one
shared table from the host's page to the byte that a device stores, with nothing but the cores in between.

Kicks, events, acks and page requests are on their way until `step` or `settle` has them arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from device_sim.core.dmar import RemappingUnit
from device_sim.core.function import DmaFault, DmaRange, Function
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.traits import capabilities
from iommufdd.core.hwpt_kvm import HwptKvm
from iommufdd.core.kvm_domain import KvmDomain
from kvmd.core.export.pinning import Account
from kvmd.core.export.tdp_fd import ExportedTdp, TdpFaultType
from kvmd.core.faults.page_fault import IO_ERRNO, RESOLVED
from protocol.errors import UapiError
from protocol.flow import Flows, Wait
from protocol.frame_tags import FrameTags
from protocol.hostmem import HIGH_RAM_START, LOW_RAM_START, Window, WindowKind
from protocol.hw.pasid_entry import RID_PASID
from protocol.hw.prq import PageRequest
from protocol.units import LEVEL_1G, PAGE_SIZE, Gfn, GfnSpan, Gpa, Iova
from tests.kit.kvmd import World
from tests.kit.linked_unit import LinkedUnit

RID, DID = 0x6A08, 7
REQUEST_BYTES = 32


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


class Joined(World):
    """The function is attached when this is made.  `pick` chooses what arrives next."""

    account: Account
    exported: ExportedTdp

    def __init__(
        self,
        pick: Callable[[list[str]], str] = lambda due: due[0],
        flows: Flows | None = None,
        **host: Any,
    ) -> None:
        super().__init__(**host)
        self.flows = self.flows if flows is None else flows
        self.accesses = 0  # of the device, made
        self.unit, self.function = self._silicon(self.bare.tables, self.bare.frames, self.bare.tags)
        self.linked = LinkedUnit(self.flows, self.unit, self._memory, pick)
        self.linked.driver.tables.add_function(RID, ats=True, pasid=True, pri=True)
        self._groups: dict[int, list[PageRequest]] = {}
        self.exported = self.export()
        self.account = self.vm.pinning.open()
        meta = self.exported.meta
        self.domain = KvmDomain(meta.root_hpa, meta.level, DID, LEVEL_1G)
        self.hwpt = HwptKvm(self.domain, AlwaysThere(), TdpInProcess(self))
        self.exported.register_importer("iommufd", self)
        self.attach()

    def _silicon(self, tables: bytearray, frames: Any, tags: FrameTags) -> tuple[RemappingUnit, Function]:
        self._memory = memory = PhysicalMemory()
        for kind, base, view in (
            (WindowKind.TABLES, LOW_RAM_START, memoryview(tables)),
            (WindowKind.FRAMES, HIGH_RAM_START, memoryview(frames)),
            (WindowKind.FRAME_TAGS, HIGH_RAM_START, tags._words.cast("B")),
        ):
            memory.add(Window(kind, base, len(view), view), lambda: None)
        cap, ecap = capabilities()
        unit = RemappingUnit(cap, ecap, 46, memory)
        return unit, Function(RID, unit, memory, lambda: 0)

    def attach(self) -> None:
        driver = self.linked.driver
        driver.put_pasid_entry(RID, RID_PASID, self.domain.pasid_entry(driver.ecap))
        self.hwpt.attached[RID] = driver  # all that `forget` asks of a unit
        self.function.configure(pasid=True)
        self.function.configure(ats=True)
        self.function.configure(pri_allocation=64, bus_master=True)

    # -- the importer ------------------------------------------------------------------------------------

    def invalidate(self, start: int, size: int, epoch: int) -> Wait[None]:
        return self.flows.start(self.hwpt.invalidate(Gpa(start), size, epoch))

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
