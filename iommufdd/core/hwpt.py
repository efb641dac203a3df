"""HWPTs: a domain that devices can be attached to.

Models struct iommufd_hw_pagetable [iommufd hw_pagetable.c], and of an HWPT whose pages may be absent how an
IO page fault becomes a response code [RFC 15/42].

R8: every function attached, behind every unit, hears of a change.
I9: what was taken out of a table is gone for good once the wait descriptor behind its invalidation completed.
I13: what cannot be invalidated because the unit is gone is not walked any more either: the lease the unit
held has ended.
"""

from __future__ import annotations

import errno
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

from iommufdd.core import qi
from iommufdd.core.domain import Domain
from iommufdd.core.hardware import MemoryBus, Unit
from iommufdd.core.object import Object
from protocol.errors import EHWPOISON, UapiError
from protocol.flow import RwLock
from protocol.hw.prq import PageRequest
from protocol.hw.qi import ResponseCode
from protocol.units import Iova

NOT_LENT = 0  # units number what they are lent from 1 on
_OF_ONE_PAGE = (errno.EFAULT, errno.EINVAL, EHWPOISON)


class Former(NamedTuple):
    """What a function left behind: its unit, and whether it has a device TLB."""

    unit: Unit
    ats: bool


class Hwpt(Object):
    """`users` counts the devices attached, `attached` maps their functions to the unit before each."""

    needs_iopf = False  # do pages come only when a device asks for them?

    def __init__(self, domain: Domain, memory: MemoryBus) -> None:
        super().__init__()
        self.domain = domain
        self.attached: dict[int, Unit] = {}
        self.without_ats: set[int] = set()  # of those
        self.unforgotten: dict[int, Former] = {}  # left, though their unit refused to forget what they had
        self.maintained = True
        self.memory = NOT_LENT  # the set of windows the units walk it in
        self.faults: Counter[ResponseCode] = Counter()
        self._bus = memory
        self._giving_back = RwLock()

    def check_walkable(self) -> None:
        """ENODEV: the units that were given its memory are gone, or whoever keeps its table up to date."""
        if not self._bus.alive:
            raise UapiError(errno.ENODEV, f"HWPT {self.id}: its remapping units are gone: make another")
        if not self.maintained:
            raise UapiError(errno.ENODEV, f"HWPT {self.id}: KVM is gone, and nobody maintains its table")

    @property
    def rids(self) -> list[int]:
        return list(self.attached)

    def behind(self, unit: Unit) -> list[int]:
        """The functions attached behind that unit that have a device TLB: another completes no invalidation
        of one [Linux intel/iommu.c __iommu_flush_dev_iotlb]."""
        return [rid for rid, on in self.attached.items() if on is unit and rid not in self.without_ats]

    async def fault(self, request: PageRequest) -> ResponseCode:
        """Have one page mapped [RFC 15/42]."""
        code = ResponseCode.SUCCESS
        if request.addr >> self.domain.width:  # a guest address, so no CPU canonicality (defect B-31)
            code = ResponseCode.INVALID
        else:
            try:
                # await: code: cannot change: the answer in the making
                await self.fault_in(request)
            except UapiError as error:
                # Failure makes PCIe stop the function's page requests for good: only for what concerns
                # more than this page (defect B-37).
                code = ResponseCode.INVALID if error.errno in _OF_ONE_PAGE else ResponseCode.FAILURE
        self.faults[code] += 1
        return code

    async def fault_in(self, request: PageRequest) -> None:
        """The page that was asked for is there when this returns.  EINVAL: none comes when asked for."""
        raise UapiError(errno.EINVAL, f"HWPT {self.id} maps nothing at a page request")

    async def forget(self, start: Iova, size: int) -> None:
        """Every cached translation of the range is dropped when this returns; UapiError: a unit refused."""
        await self.forget_former()
        try:
            for unit in dict.fromkeys(self.attached.values()):
                rids = self.behind(unit) if unit.ecap.dt else []
                # await: each unit: cannot change: who comes meanwhile found nothing of it in the table, who
                # goes is flushed
                await unit.submit(qi.invalidate(unit.cap, self.domain.did, rids, start, size))
        except UapiError as error:
            if error.errno != errno.ENODEV:  # the silicon is gone, and with it what it cached
                raise

    async def forget_former(self) -> None:
        """What functions that left had, too; neither the domain id nor a page is given up before.  UapiError:
        their unit refuses still.
        """
        for rid, (unit, ats) in list(self.unforgotten.items()):
            try:
                # await: rid, each rid: cannot change: who asks meanwhile has it forgotten twice
                await unit.submit(qi.detach(self.domain.did, rid, unit.ecap, ats=ats))
            except UapiError as error:
                if error.errno != errno.ENODEV:  # the silicon is gone
                    raise
            self.unforgotten.pop(rid, None)

    async def pin(self, iova: Iova, size: int) -> int:
        """What a device reaches there must never be absent; the request's name.  EINVAL: pages do not come
        and go here."""
        raise UapiError(errno.EINVAL, f"HWPT {self.id} has no pages that could be absent: nothing to pin")

    async def pin_all(self) -> int:
        """The same for everything there is, and will be."""
        return await self.pin(Iova(0), 1 << self.domain.width)

    async def unpin(self, pin: int) -> None:
        """What is left of the request of that name: of another's nothing."""

    async def destroy(self) -> None:
        """The units let go of the memory, if they have not.  UapiError: one refuses to forget what it had of
        it, and nothing has changed.
        """
        assert not self.attached, f"HWPT {self.id} destroyed with {len(self.attached)} functions attached"
        await self.forget_former()
        await self.give_back()

    async def give_back(self) -> None:
        """The units have let go of the memory when this returns, whoever asked them first, and with that
        of the lease its owner may wait for (I13).
        """
        async with self._giving_back:
            memory, self.memory = self.memory, NOT_LENT
            if memory != NOT_LENT:
                with suppress(UapiError):  # the silicon is gone, and every lease with it
                    await self._bus.remove_memory(memory)
