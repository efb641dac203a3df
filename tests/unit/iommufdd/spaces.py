"""An IOAS with the memory of a host that is a dict, and HWPTs on it before a unit that is a log."""

from __future__ import annotations

from collections.abc import Callable

from iommufdd.core.counts import Counts
from iommufdd.core.domain import Domain
from iommufdd.core.hmm import CallerMm, Invalidate, UserFd
from iommufdd.core.hwpt_mirror import HwptMirror
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.io_pagetable import IoPageTable
from iommufdd.core.ioas import Ioas
from iommufdd.core.ioas_on_demand import IoasOnDemand
from iommufdd.core.source import Source, Sources
from protocol.errors import UapiError
from protocol.hw.prq import PageRequest
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.units import LEVEL_1G, PAGE_SIZE, Hpa, Hva, Iova, Level
from tests.kit.host_memory import FakeHost
from tests.kit.iommufdd import RID, ROOT, Surroundings

HVA = 0x7000_0000_0000
MM, MEMORY = 77, 9
SUCCESS, INVALID, FAILURE = 0, 1, 0xF


class Space:
    """`world` is the unit and the memory bus."""

    def __init__(self, *, on_demand: bool = False, table_pages: int = 64, premap_pages: int = 1) -> None:
        self.premap_pages = premap_pages
        self.world = Surroundings()
        self.host = FakeHost(self.world.log)
        self.counts = Counts()
        self.connected = 0
        self.sources = Sources(self.connect)
        self.ioas = self.space(on_demand=on_demand)
        if isinstance(self.ioas, IoasOnDemand):
            self.host.told = self.ioas.invalidate
        writer = TableWriter(Hpa(ROOT), memoryview(bytearray(table_pages * PAGE_SIZE)))
        self.writer = writer
        self.pool = TablePool(writer, table_pages * PAGE_SIZE)

    def space(self, *, on_demand: bool = False) -> Ioas:
        """A further one of the same iommufd."""
        if on_demand:
            return IoasOnDemand(self.counts, Sources(self.connect))
        return Ioas(self.counts, self.sources)

    async def connect(self, mm: CallerMm, on_invalidate: Invalidate) -> Source:
        self.connected += 1
        return Source(self.host, self.world, MEMORY)

    def map(self, at: int | None, size: int, hva: int = HVA, *, writable: bool = True, mm: int = MM) -> int:
        flow = self.ioas.map(mm_of(mm), Hva(hva), size, iova_or_none(at), writable=writable)
        return self.world.run(flow)

    def unmap(self, iova: int, size: int) -> int:
        return self.world.run(self.ioas.unmap(Iova(iova), size))

    @property
    def demand(self) -> IoasOnDemand:
        assert isinstance(self.ioas, IoasOnDemand)
        return self.ioas

    async def invalidate(self, start: int, size: int) -> None:
        await self.demand.invalidate(Hva(start), size)

    def copy(
        self, src: Ioas, at: int, size: int, dst: Ioas, iova: int | None, *, writable: bool = True
    ) -> int:
        """IOMMU_IOAS_COPY."""
        return self.world.run(self.copying(src, at, size, dst, iova, writable=writable))

    async def copying(
        self, src: Ioas, at: int, size: int, dst: Ioas, iova: int | None, *, writable: bool = True
    ) -> int:
        slices = await src.slices(Iova(at), size)
        try:
            return await dst.map_slices(slices, iova_or_none(iova), writable=writable)
        finally:
            for piece in slices:
                await piece.pages.put()

    def hwpt(
        self, *, level: int = 4, max_leaf: Level = LEVEL_1G, attached: bool = True, on: Ioas | None = None
    ) -> HwptPaging:
        ioas = on or self.ioas
        table = IoPageTable(self.writer, self.pool, Level(level), max_leaf)
        domain = Domain(table.root, Level(level), 2 + len(ioas.hwpts), max_leaf)
        if isinstance(ioas, IoasOnDemand):
            made: HwptPaging = HwptMirror(domain, self.world, ioas, ioas.watched, table, self.premap_pages)
        else:
            made = HwptPaging(domain, self.world, ioas, table)
        self.world.run(ioas.add_hwpt(made))
        if attached:
            made.attached[RID] = self.world
        return made

    def mirror(self, *, max_leaf: Level = LEVEL_1G) -> HwptMirror:
        made = self.hwpt(max_leaf=max_leaf)
        assert isinstance(made, HwptMirror)
        return made

    def destroy(self, hwpt: HwptPaging) -> None:
        hwpt.attached.clear()
        self.world.run(hwpt.destroy())

    def asked(self) -> list[str]:
        """What was asked of host and unit, in order, since last looked."""
        found = [what for what, *_ in self.world.log]
        self.world.log.clear()
        return found


def iova_or_none(iova: int | None) -> Iova | None:
    return None if iova is None else Iova(iova)


def mm_of(cookie: int = MM) -> CallerMm:
    """A process, with an fd that nobody looks at."""
    return CallerMm(cookie, UserFd(cookie))


def outcome(call: Callable[[], object]) -> int:
    """0, or the errno it ends with."""
    try:
        call()
    except UapiError as error:
        return error.errno
    return 0


def mapped(hwpt: HwptPaging) -> list[tuple[int, int, int, bool]]:
    """(iova, level, hpa, writable) of every leaf."""
    return [tuple(leaf) for leaf in hwpt.table.leaves_in(Iova(0), hwpt.table.limit)]  # type: ignore[misc]


def request(iova: int, *, write: bool = False) -> PageRequest:
    return PageRequest(rid=RID, prgi=0, addr=Iova(iova), last=True, read=True, write=write)
