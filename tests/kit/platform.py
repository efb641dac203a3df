"""A platform with two functions behind one unit, an iommufd and device nodes, with nothing but the core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from iommufdd.core.counts import Counts, UnitCounts
from iommufdd.core.device import IommufdDevice
from iommufdd.core.fault_policy import FaultPolicy
from iommufdd.core.hardware import FunctionInfo, Hardware, LentMemory, Unit
from iommufdd.core.hmm import CallerMm, Invalidate
from iommufdd.core.hwpt_alloc import alloc_kvm, alloc_paging
from iommufdd.core.hwpt_kvm import Invalidate as TdpInvalidate
from iommufdd.core.ioas import Ioas
from iommufdd.core.iommufd import IommufdCtx
from iommufdd.core.platform import Platform
from iommufdd.core.vfio import VfioDeviceFile
from protocol.pt.mem import TableWriter
from protocol.pt.meta import ExportedTdpMeta
from protocol.pt.table_pool import TablePool
from protocol.units import PAGE_SIZE, Hpa, Level
from tests.kit.host_memory import FakeHost
from tests.kit.iommufdd import RID, ROOT, NoLog, Surroundings, function

MM = 77
META = ExportedTdpMeta(1, Level(4), Hpa(ROOT), Level(3), ((0x800,) * 5, (0x800,) * 5))


class LentNothing:
    def close(self) -> None: ...


class FakeHardware(Surroundings):
    """The unit, what is behind it, and the TDP FD: one log, in the order things were asked."""

    def __init__(self) -> None:
        super().__init__()
        self.domain_ids = 16
        self.on_invalidate: TdpInvalidate
        self.on_gone: Callable[[], None] = lambda: None
        self.meta = META

    @property
    def units(self) -> list[Unit]:
        return [self]

    @property
    def functions(self) -> list[tuple[FunctionInfo, Unit]]:
        return [(function(RID + 8 * n, group=n), self) for n in range(2)]

    async def add_memory(self, lent: LentMemory) -> int:
        await self._take("add_memory")
        return 5

    # -- the TDP FD --------------------------------------------------------------------------------------

    async def open(self) -> None:
        await self._take("open")

    async def metadata(self) -> ExportedTdpMeta:
        await self._take("metadata")
        return self.meta

    async def register(self) -> LentMemory:
        await self._take("register")
        return LentNothing()


class FakeMirror(FakeHost):
    def __init__(self, log: list[Any]) -> None:
        super().__init__(log)
        self.account = ""

    async def open(self) -> None:
        await self._asked("open")

    async def register(self, account: str) -> LentMemory:
        self.account = account
        await self._asked("register")
        return LentNothing()


class HwptTables:
    def __init__(self, pages: int = 64) -> None:
        self.writer = TableWriter(Hpa(ROOT), memoryview(bytearray(pages * PAGE_SIZE)))
        self.pool = TablePool(self.writer, pages * PAGE_SIZE)

    def lend(self) -> LentMemory:
        return LentNothing()


class TwoNodes:
    """`nodes`: both functions', open; `mirrors`: made so far, with who is to hear that one is gone."""

    def __init__(self) -> None:
        self.hardware = FakeHardware()
        self.probes = 0
        self.run, self.start = self.hardware.run, self.hardware.start
        self.platform = Platform(
            self.hardware, self._probe, FaultPolicy(), UnitCounts(), self.hardware.flows.spawn, NoLog()
        )
        self.platform.found(self.hardware)
        self.mirrors: list[FakeMirror] = []
        self.gone: list[Callable[[], None]] = []
        self.tables = HwptTables()
        self.ctx = self.iommufd()
        self.nodes = [self.open(n) for n in range(2)]
        self.hardware.log.clear()

    async def _probe(self) -> Hardware:
        self.probes += 1
        self.hardware = FakeHardware()
        return self.hardware

    def _mirror_of(self, mm: CallerMm, on_invalidate: Invalidate, on_gone: Callable[[], None]) -> FakeMirror:
        mirror = FakeMirror(self.hardware.log)

        def gone() -> None:
            mirror.is_gone = True
            on_gone()

        self.mirrors.append(mirror)
        self.gone.append(gone)
        return mirror

    def iommufd(self) -> IommufdCtx:
        return IommufdCtx(self.platform, Counts(), self._mirror_of, MM)

    def open(self, number: int) -> VfioDeviceFile:
        return self.run(self.platform.open(number, f"/dev/vfio/devices/vfio{number}"))

    def bind(self, number: int = 0, ctx: IommufdCtx | None = None) -> IommufdDevice:
        self.nodes[number].bind((ctx or self.ctx).objects)
        bound = self.nodes[number].bound
        assert bound is not None
        return bound

    async def kvm(self, device: IommufdDevice, flags: int = 0) -> int:
        return await alloc_kvm(self.ctx, device, self.hardware, flags)

    async def paging(self, device: IommufdDevice, ioas: Ioas) -> int:
        return await alloc_paging(self.ctx, device, ioas, self.tables, 1)

    def ioas(self, *, on_demand: bool = False) -> Ioas:
        return self.ctx.objects.get(self.ctx.ioas_alloc(on_demand=on_demand), Ioas)

    def asked(self) -> list[str]:
        """What was asked of hardware and hosts, in order, since last looked."""
        found = [what for what, *_ in self.hardware.log]
        self.hardware.log.clear()
        return found
