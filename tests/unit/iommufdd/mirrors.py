"""A mirror of 16 huge pages' worth of a host's memory, and a host that takes a page away under a fault."""

from __future__ import annotations

from tests.unit.iommufdd.spaces import HVA, Space, mapped, request

K4, M2 = 4 << 10, 2 << 20
RAM = 16 * M2


class Mirrored(Space):
    """16 pages of 2 MiB at iova 0, one mirror."""

    def __init__(
        self, *, page_size: int = K4, table_pages: int = 64, writable: bool = True, premap_pages: int = 1
    ) -> None:
        super().__init__(on_demand=True, table_pages=table_pages, premap_pages=premap_pages)
        self.host.page_size = page_size
        self.map(0, RAM, writable=writable)
        self.hwpt_ = self.mirror()
        self.asked()

    def fault(self, iova: int, *, write: bool = False) -> int:
        return self.world.run(self.hwpt_.fault(request(iova, write=write)))

    def lose_a_part(self) -> None:
        """A host that tells of no more than the page that goes."""
        part = HVA + 7 * K4, HVA + 8 * K4
        self.world.run(self.host.change(*part, lambda: self.host.remove(*part)))

    @property
    def leaves(self) -> list[tuple[int, int, int, bool]]:
        return mapped(self.hwpt_)


class Raced(Mirrored):
    """The answer to a fault is made, and then on its way while the host takes the page away."""

    def __init__(self, page_size: int = K4) -> None:
        super().__init__(page_size=page_size)
        self.hops = 0
        self.host.hop = self._hop

    async def _hop(self) -> None:
        self.hops += 1
        if self.hops == 2:
            await self.host.give_up(HVA + 3 * K4, HVA + 4 * K4)
