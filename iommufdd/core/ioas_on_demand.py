"""An IOAS on demand: nothing is pinned, pages come when a device asks or KVM says so, and go with the host.

Models what the review of the series asked iommufd to have first, native IO page faults [RFC review]: an area
is a range of the process's memory that is watched (mmu_interval_notifier), every HWPT a mirror of it.
Departure: memory is watched once, so that it cannot be in two areas, and is one process's.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Protocol

from iommufdd.core.area import Area, check_user
from iommufdd.core.counts import Counts
from iommufdd.core.hmm import CallerMm, UserFd
from iommufdd.core.hwpt_mirror import HwptMirror
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.ioas import Ioas
from iommufdd.core.source import Sources
from iommufdd.core.watched import WatchedMemory
from protocol.errors import UapiError
from protocol.units import PAGE_SIZE, Hva, Iova, align_down, align_up


class FaultSubscription(Protocol):
    """Hears what the vCPUs of a VM fault in."""

    def hang_up(self) -> None: ...


class IoasOnDemand(Ioas):
    """`mm_cookie`: whose memory it is; 0: nobody's so far.  `following`: whose faults it hears of, if any."""

    def __init__(self, counts: Counts, sources: Sources) -> None:
        super().__init__(counts, sources)
        self.watched = WatchedMemory(self.areas, counts)
        self.mm_cookie = 0
        self.following: FaultSubscription | None = None

    async def enter_memory(
        self, mm: CallerMm, iova: Iova, size: int, hva: Hva, fd: UserFd | None, *, writable: bool
    ) -> None:
        assert fd is None, "pages of a file are pinned"
        check_user(hva, size)
        if self.mm_cookie not in (0, mm.cookie):
            raise UapiError(
                errno.EINVAL, f"IOAS {self.id} is on demand and maps another process's memory: one for all"
            )
        if self.watched.source is None:
            # await: asked: cannot change: the lock is held
            self.watched.source = await self._source_of(mm)
            self.mm_cookie = mm.cookie
        await self.enter(Area(iova, size, hva, writable))

    @property
    def mirrors(self) -> list[HwptMirror]:
        return [hwpt for hwpt in self.hwpts if isinstance(hwpt, HwptMirror)]

    async def enter(self, area: Area) -> None:
        # await: area: cannot change: the caller's own, nobody else has it yet
        await self.watched.host.watch(area.hva, area.size)
        self.areas.add(area)
        try:
            for hwpt in self.mirrors:
                # await: area, each hwpt: cannot change: the lock is held, mirrors come and go under it
                await hwpt.pins.area_entered(area)
        except UapiError:
            await self.leave(area)
            raise

    async def leave(self, area: Area) -> None:
        """No fault maps anything of it from now on, and no pin holds anything of it, of whichever mirror.
        UapiError: a unit did not forget it: it stays, with nothing pinned, and is to be unmapped again.
        """
        self.areas.remove(area)
        for hwpt in self.mirrors:
            hwpt.pins.drop(area)
            hwpt.take(area.iova, area.end)
        try:
            for hwpt in self.mirrors:
                # await: area, each hwpt: cannot change: the lock is held, mirrors come and go under it
                await hwpt.pins.give_back()
        except UapiError:
            self.areas.add(area)
            raise
        with suppress(UapiError):  # the host is gone
            await self.watched.host.unwatch(area.hva, area.size)

    def check_there(self) -> None:
        if any(self.areas) and self.watched.host.is_gone:
            raise UapiError(errno.ENODEV, f"IOAS {self.id}: KVM went away, and with it what its areas show")

    async def fill(self, hwpt: HwptPaging) -> None:
        self.hwpts.append(hwpt)

    async def drop(self, hwpt: HwptPaging) -> None:
        """Nobody walks its table: its pins end with it, whoever asks for them or gives them back later."""
        if isinstance(hwpt, HwptMirror):
            await hwpt.pins.end()

    async def invalidate(self, start: Hva, size: int) -> None:
        """The host is about to take hva range start..start+size away: nobody uses it when this returns, which
        is the ack.  UapiError, which is none: a unit refused.
        """
        self.counts.hmm_invalidations += 1
        start, end = align_down(start, PAGE_SIZE), align_up(Hva(start + size), PAGE_SIZE)
        self.watched.lookups.invalidate(start, end)
        spans = [span for _, span in self.areas.of_hva(start, end)]
        mirrors = self.mirrors
        for hwpt in mirrors:
            hwpt.take_unpinned(spans)
        for hwpt in mirrors:
            # await: each hwpt: it may be destroyed, its table another's; asked again: `IoPageTable.flushed`
            # (tests/unit/iommufdd/test_hwpt_mirror.py::test_a_mirror_destroyed_while_it_is_flushed)
            await hwpt.give_up()

    async def destroy(self) -> None:
        following, self.following = self.following, None
        if following is not None:
            following.hang_up()
        await super().destroy()

    async def look(self, iova: Iova, size: int) -> bool:
        """Map what the host has there now, for every HWPT; was there anything to map?"""
        mapped = False
        last = Iova(iova + size)
        for area in self.areas.within(iova, last):
            at, end = max(iova, area.iova), min(last, area.end)
            while at < end:
                with self.watched.lookups.begin() as lookup:
                    # await: area, each area, at, end: it may go; asked again: `install`
                    # (tests/unit/iommufdd/test_notes.py::test_an_area_gone_under_a_look_is_not_mapped) |
                    # lookup: the host may take away what it found; asked again: `Lookup.stale`
                    # (tests/unit/iommufdd/test_notes.py::test_what_the_host_took_meanwhile_is_not_mapped)
                    found = await self.watched.host.range_fault(
                        area.hva_of(at), end - at, write=False, fault=False
                    )
                    stop = min(area.iova_of(found.end), end)
                    mirrors = self.mirrors
                    for hwpt in mirrors:
                        mapped |= hwpt.install(lookup, area, found.pages, at, stop)
                for hwpt in mirrors:
                    # await: area, each area, end, stop: it may go; asked again: `install`
                    # (tests/unit/iommufdd/test_notes.py::test_an_area_gone_under_a_look_is_not_mapped) | each
                    # hwpt: it may be destroyed; asked again: `IoPageTable.flushed`
                    # (tests/unit/iommufdd/test_hwpt_mirror.py::test_a_mirror_destroyed_while_it_is_flushed)
                    await hwpt.flush()
                at = stop
        return mapped
