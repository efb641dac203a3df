"""HWPTs: a domain that devices can be attached to; and the one an IOAS has, which maps nothing.

Models struct iommufd_hw_pagetable and IOMMUFD_OBJ_HWPT_PAGING [iommufd hw_pagetable.c].  Departure: an IOAS
here has no mappings, so the table of its HWPTs is one empty root, and a device attached to it reaches
nothing; it is what a device is replaced from and to.
"""

from __future__ import annotations

import errno
from contextlib import suppress

from iommufdd.core.domain import Domain
from iommufdd.core.hardware import Memory, Unit
from iommufdd.core.object import Object
from protocol.errors import UapiError


class Ioas(Object):
    """An IO address space; `users` are its HWPTs."""


class Hwpt(Object):
    """`users` counts the devices attached, `attached` maps their functions to the unit before each."""

    needs_iopf = False  # do pages come only when a device asks for them?

    def __init__(self, domain: Domain, memory: Memory) -> None:
        super().__init__()
        self.domain = domain
        self.attached: dict[int, Unit] = {}
        self.memory = 0  # the set of windows the units walk it in
        self._bus = memory

    @property
    def rids(self) -> list[int]:
        return list(self.attached)

    def behind(self, unit: Unit) -> list[int]:
        """The functions attached behind that unit."""
        return [rid for rid, other in self.attached.items() if other is unit]

    async def pin(self, iova: int, size: int) -> None:
        """What a device reaches there must never be absent.  EINVAL: pages do not come and go here."""
        raise UapiError(errno.EINVAL, f"HWPT {self.id} has no pages that could be absent: nothing to pin")

    async def unpin(self, iova: int, size: int) -> None:
        """The same range, once."""

    async def pin_all(self, *, on: bool) -> None:
        """The same for everything there is, and will be."""

    async def destroy(self) -> None:
        """The units let go of the memory."""
        assert not self.attached, f"HWPT {self.id} destroyed with {len(self.attached)} functions attached"
        with suppress(UapiError):  # the silicon is gone, and every lease with it
            await self._bus.remove_memory(self.memory)


class HwptPaging(Hwpt):
    def __init__(self, domain: Domain, memory: Memory, ioas: Ioas) -> None:
        super().__init__(domain, memory)
        self.ioas = ioas
        ioas.users += 1

    async def destroy(self) -> None:
        await super().destroy()
        self.ioas.users -= 1
