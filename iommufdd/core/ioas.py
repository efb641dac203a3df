"""An IO address space: areas of one process's memory, and the HWPTs whose tables they fill.

Models IOMMUFD_OBJ_IOAS [iommufd ioas.c], its io_pagetable [iommufd io_pagetable.c] and pages
[iommufd pages.c]: an area's pages are pinned once, when the first HWPT needs them, and go with the last; a
further HWPT takes them from the table of the first.  What fails leaves nothing mapped and nothing pinned.
`lock` is held by whoever changes areas or HWPTs, and never waited for by who answers the host.

Order of taking away: entries, units, pages.  Departure: all memory of one IOAS is of one process.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

from iommufdd.core.area import BEYOND, ULONG_MAX, Area, Areas, Span, check_memory
from iommufdd.core.counts import Counts
from iommufdd.core.hardware import Memory
from iommufdd.core.hmm import HostMemory
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.object import Object
from protocol.errors import UapiError
from protocol.flow import RwLock
from protocol.units import PAGE_SHIFT

# Become the user of a process's memory: it, and the set of windows the units were given for it.
Connect = Callable[[], Coroutine[Any, None, tuple[HostMemory, int]]]


class Ioas(Object):
    """`users` are its HWPTs, and requests under way.  `mm`: whose memory it is; 0: nobody's so far."""

    def __init__(self, counts: Counts, memory: Memory) -> None:
        super().__init__()
        self.counts = counts
        self.areas = Areas()
        self.hwpts: list[HwptPaging] = []
        self.lock = RwLock()
        self.mm = 0
        self.large_pages = True
        self.host: HostMemory | None = None
        self.bus = memory  # of the units that have the process's memory, or would get it
        self._memory = 0
        self._numbers = count(1)

    @property
    def lent(self) -> bool:
        """Were units given the process's memory?"""
        return self._memory != 0

    def new_number(self) -> int:
        """Whose pins they are, as the host is told."""
        return next(self._numbers)

    # -- options ---------------------------------------------------------------------------------------

    async def set_large_pages(self, *, on: bool) -> None:
        """Leaves may be larger than 4 KiB from now on, or not.  EINVAL: they may be there already
        [iopt_disable_large_pages].
        """
        async with self.lock:
            if not on and self.large_pages and self.hwpts and any(self.areas):
                raise UapiError(
                    errno.EINVAL,
                    f"IOAS {self.id} is mapped with large pages: choose before it has HWPT and area",
                )
            self.large_pages = on

    async def allow_iovas(self, spans: Sequence[Span]) -> None:
        """What `Areas.allow` says.  EADDRINUSE."""
        async with self.lock:
            self.areas.allow(spans)

    # -- areas -----------------------------------------------------------------------------------------

    async def map(
        self, mm: int, connect: Connect, hva: int, size: int, iova: int | None, *, writable: bool
    ) -> int:
        """The iova, which is `iova` if that is given.  EINVAL: not whole pages, not allowed, another process;
        EOVERFLOW; EEXIST; ENOSPC; EFAULT and ENOMEM of what is to be pinned; ENODEV: the host is gone.
        """
        async with self.lock:
            check_memory(hva, size)
            if iova is None:
                iova = self.areas.room(hva, size)
            self.areas.check(iova, size)
            if self.mm not in (0, mm):
                raise UapiError(errno.EINVAL, f"IOAS {self.id} maps another process's memory: one for all")
            if self.host is None:
                self.host, self._memory = await connect()
                self.mm = mm
            await self.enter(Area(self.new_number(), iova, size, hva, writable))
        return iova

    async def unmap(self, iova: int, size: int) -> int:
        """Whole areas; the bytes.  0 and all ones is everything, the last byte too [iommufd ioas.c].  EINVAL,
        EOVERFLOW; ENOENT: nothing is there, or an area sticks out, with those before it unmapped.
        """
        async with self.lock:
            everything = (iova, size) == (0, ULONG_MAX)
            if not everything:
                _check_range(iova, size)
            end = BEYOND if everything else iova + size
            unmapped = 0
            for area in self.areas.within(iova, end):
                if area.iova < iova or end < area.end:
                    raise UapiError(
                        errno.ENOENT, f"unmap {iova:#x}+{size:#x} cuts area {area.iova:#x}+{area.size:#x}"
                    )
                await self.leave(area)
                unmapped += area.size
            if not unmapped and not everything:
                raise UapiError(errno.ENOENT, f"unmap {iova:#x}+{size:#x}: nothing is mapped there")
            return unmapped

    async def enter(self, area: Area) -> None:
        """A new area, with the lock held: it is there whole, or not at all and this raises."""
        if self.hwpts:
            await self._pin(area)
        self.areas.add(area)

    async def leave(self, area: Area) -> None:
        """An area goes, with the lock held.  UapiError: a unit did not forget it: its pages stay pinned."""
        self.areas.remove(area)
        if self.hwpts:
            await self._unpin(area, area.end)

    # -- HWPTs -----------------------------------------------------------------------------------------

    async def add_hwpt(self, hwpt: HwptPaging) -> None:
        """Fill a table that nobody walks yet.  EADDRINUSE: an area is out of its reach; ENOMEM, EFAULT."""
        async with self.lock:
            self.areas.check_reach(hwpt.domain.width)
            await self.fill(hwpt)
            self._set_width()

    async def fill(self, hwpt: HwptPaging) -> None:
        """Take an HWPT in, with the lock held."""
        if self.hwpts:
            for area in self.areas:
                hwpt.copy(self.hwpts[0], area)
            self.hwpts.append(hwpt)
            return
        self.hwpts.append(hwpt)
        pinned: list[Area] = []
        try:
            for area in self.areas:
                await self._pin(area)
                pinned.append(area)
        except UapiError:
            for area in pinned:
                await self._unpin(area, area.end)
            self.hwpts.remove(hwpt)
            raise

    async def remove_hwpt(self, hwpt: HwptPaging) -> None:
        """Nobody walks its table any more."""
        async with self.lock:
            if hwpt in self.hwpts:
                await self.drop(hwpt)
                self.hwpts.remove(hwpt)
                self._set_width()

    async def drop(self, hwpt: HwptPaging) -> None:
        """Let an HWPT go, with the lock held: the pages of the last are not needed."""
        if len(self.hwpts) == 1:
            for area in self.areas:
                await self._unpin(area, area.end)

    def _set_width(self) -> None:
        self.areas.width = min((hwpt.domain.width for hwpt in self.hwpts), default=64)

    async def invalidate(self, start: int, size: int) -> None:
        """The host takes memory away: pinned pages are not concerned."""

    # -- the end -----------------------------------------------------------------------------------------

    async def destroy(self) -> None:
        """Nothing uses it: everything is unmapped, and the process is let go of."""
        async with self.lock:
            for area in self.areas:
                await self.leave(area)
            await self._let_go()
            if self.host is not None:
                self.host.release()

    async def lose_host(self) -> None:
        """The host is gone, and nothing is attached: what its pages were is not to be reached again."""
        async with self.lock:
            for hwpt in self.hwpts:
                hwpt.take(0, hwpt.table.limit)
            for hwpt in self.hwpts:
                with suppress(UapiError):  # a unit refused
                    await hwpt.give_up()
            await self._let_go()

    async def _let_go(self) -> None:
        memory, self._memory = self._memory, 0
        if memory:
            with suppress(UapiError):  # the silicon is gone, and every lease with it
                await self.bus.remove_memory(memory)

    # -- pages ---------------------------------------------------------------------------------------------

    async def _pin(self, area: Area) -> None:
        """Pin an area and map it in every HWPT."""
        host = self.live_host
        at = area.iova
        try:
            while at < area.end:
                found = await host.pin(area.hva_of(at), area.end - at, write=area.writable, area=area.number)
                start, at = at, min(area.iova_of(found.end), area.end)
                self.counts.pinned_pages += at - start >> PAGE_SHIFT
                for hwpt in self.hwpts:
                    hwpt.put(area, found.pages, start, at)
                    await hwpt.flush()
        except UapiError:
            await self._unpin(area, at)
            raise

    async def _unpin(self, area: Area, end: int) -> None:
        """Unmap an area and unpin it up to `end`."""
        for hwpt in self.hwpts:
            hwpt.take(area.iova, area.end)
        for hwpt in self.hwpts:
            await hwpt.give_up()
        if end > area.iova:
            with suppress(UapiError):  # the host is gone
                await self.live_host.unpin(area.hva, end - area.iova, area=area.number)
            self.counts.pinned_pages -= end - area.iova >> PAGE_SHIFT

    @property
    def live_host(self) -> HostMemory:
        assert self.host is not None, "an area has memory of some process"
        return self.host


def _check_range(iova: int, size: int) -> None:
    if not size:
        raise UapiError(errno.EINVAL, "unmap of no bytes")
    if iova + size - 1 > ULONG_MAX:
        raise UapiError(errno.EOVERFLOW, f"unmap {iova:#x}+{size:#x} is beyond 64 bits")
