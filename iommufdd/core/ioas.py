"""An IO address space: areas of processes' memory, and the HWPTs whose tables they fill.

Models IOMMUFD_OBJ_IOAS [iommufd ioas.c] and its io_pagetable [iommufd io_pagetable.c]: an area's pages
(`pages.py`) are pinned when the first HWPT needs them, and go with the last; a further HWPT takes them from
the table of the first.  What fails leaves nothing mapped and nothing pinned.  `lock` is held by whoever
changes areas or HWPTs, and never waited for by who answers the host.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from iommufdd.core.area import BEYOND, ULONG_MAX, Area, Areas, Span, check_memory, check_user
from iommufdd.core.counts import Counts
from iommufdd.core.hmm import CallerMm, ProcessMemory, UserFd
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.object import Object
from iommufdd.core.pages import Pages
from iommufdd.core.source import Source, Sources
from protocol.errors import UapiError
from protocol.flow import RwLock
from protocol.units import PAGE_OFFSET_MASK, Hva, Iova


class Slice(NamedTuple):
    """A part of pages, which whoever has it holds [iopt_pages_list]."""

    pages: Pages
    hva: Hva
    size: int


class Ioas(Object):
    """`users` are its HWPTs, and requests under way."""

    def __init__(self, counts: Counts, sources: Sources) -> None:
        super().__init__()
        self.counts = counts
        self.areas = Areas()
        self.hwpts: list[HwptPaging] = []
        self.lock = RwLock()
        self.large_pages = True
        self.destroyed = False
        self._sources = sources
        self._pages: dict[Area, Pages] = {}

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

    async def allow_iovas(self, spans: Sequence[Span[Iova]]) -> None:
        """What `Areas.allow` says.  EADDRINUSE."""
        # await: spans: cannot change: the caller's own
        async with self.lock:
            self.areas.allow(spans)

    # -- areas -----------------------------------------------------------------------------------------

    async def map(
        self,
        mm: CallerMm,
        hva: Hva,
        size: int,
        iova: Iova | None,
        *,
        writable: bool,
        file: UserFd | None = None,
    ) -> Iova:
        """Map memory of `mm`; or, paid for by it, of the memfd `file`, where `hva` is an offset; the iova,
        which is `iova` if that is given.  EINVAL: not whole pages, not allowed, no memfd; EOVERFLOW; EEXIST;
        ENOSPC; EFAULT, ENOMEM, EINVAL: of what is to be pinned; ENODEV: the host is gone.
        """
        # await: iova: cannot change: the caller's own
        async with self.lock:
            self._check_there()
            check_memory(hva, size)
            iova = self._place(iova, hva if file is None else 0, size)
            # await: iova: cannot change: the lock keeps it free
            await self.enter_memory(mm, iova, size, hva, file, writable=writable)
        return iova

    async def enter_memory(
        self, mm: CallerMm, iova: Iova, size: int, hva: Hva, fd: UserFd | None, *, writable: bool
    ) -> None:
        """A new area of memory of `mm` or of the memfd `fd`, with the lock held: whole, or this raises."""
        if fd is None:
            check_user(hva, size)
        async with self._sources.lock:
            source = await self._source_of(mm)
            # await: source: cannot change: the lock of the sources, and it has a user now
            file = 0 if fd is None else await source.host.open_file(fd)
            pages = Pages(self.counts, self._sources, source, hva, file, writable=writable)
            pages.get()
        try:
            # await: pages: cannot change: we hold them
            await self.show(Area(iova, size, hva, writable), pages)
        finally:
            await pages.put()

    async def _source_of(self, mm: CallerMm) -> Source:
        """With the lock of the sources held."""
        return await self._sources.get(mm, self.invalidate, self)

    async def invalidate(self, start: Hva, size: int) -> None:
        """The host takes pages away: not those that are pinned."""

    async def slices(self, iova: Iova, size: int) -> list[Slice]:
        """What is mapped at iova..iova+size, without a gap; each is to be `put`.  EINVAL, EOVERFLOW; ENOENT:
        there is a gap [iopt_get_pages].
        """
        _check_range("copy of", iova, size)
        async with self.lock:
            found, at, end = [], iova, Iova(iova + size)
            while at < end:
                area = self.areas.at(at)
                if area is None:
                    raise UapiError(errno.ENOENT, f"copy of {iova:#x}+{size:#x}: nothing to copy at {at:#x}")
                stop = min(end, area.end)
                found.append(Slice(self._pages[area], area.hva_of(at), stop - at))
                at = stop
            for piece in found:
                piece.pages.get()
            return found

    async def map_slices(self, slices: Sequence[Slice], iova: Iova | None, *, writable: bool) -> Iova:
        """Map them one behind the other, all or none; the iova.  EINVAL, EOVERFLOW, EEXIST, ENOSPC; EPERM:
        the pages are not to be written; ENODEV: their units are gone; of pinning, as `map`.
        """
        first, size = slices[0], sum(piece.size for piece in slices)
        # await: slices, first, iova, size: cannot change: the caller holds the pages
        async with self.lock:
            self._check_there()
            if size & PAGE_OFFSET_MASK:
                raise UapiError(errno.EINVAL, f"length {size:#x}: not whole pages")
            iova = at = self._place(iova, first.pages.alignment_of(first.hva), size)
            entered: list[Area] = []
            try:
                for pages, hva, length in slices:
                    if writable and not pages.writable:
                        raise UapiError(errno.EPERM, f"pages at {hva:#x}: they were mapped to be read alone")
                    pages.check_there()
                    if hva & PAGE_OFFSET_MASK or length & PAGE_OFFSET_MASK:
                        raise UapiError(errno.EINVAL, f"pages at {hva:#x}+{length:#x}: not whole pages")
                    area = Area(at, length, hva, writable)
                    # await: each pages, entered, area, iova, at, length, asked: cannot change: the lock, and
                    # what may be written of pages is said when they are made
                    await self.show(area, pages)
                    entered.append(area)
                    at = Iova(at + length)
            except UapiError:
                for area in entered:
                    with suppress(UapiError):  # a unit has not forgotten it: it stays
                        # await: each area: cannot change: our own list
                        await self.leave(area)
                raise
        return iova

    def _check_there(self) -> None:
        """EBADF: the iommufd was closed while we waited for the lock."""
        if self.destroyed:
            raise UapiError(errno.EBADF, f"IOAS {self.id}: the iommufd was closed meanwhile")

    def _place(self, iova: Iova | None, alignment_of: int, size: int) -> Iova:
        """`iova`, or where there is room.  EINVAL, EOVERFLOW, EEXIST, ENOSPC."""
        if iova is None:
            iova = self.areas.room(alignment_of, size)
        self.areas.check(iova, size)
        return iova

    async def unmap(self, iova: Iova, size: int) -> int:
        """Whole areas; the bytes.  0 and all ones is everything, the last byte too [iommufd ioas.c].  EINVAL,
        EOVERFLOW; ENOENT: nothing is there, or an area sticks out, with those before it unmapped.
        """
        async with self.lock:
            everything = (iova, size) == (0, ULONG_MAX)
            if not everything:
                _check_range("unmap of", iova, size)
            end = BEYOND if everything else Iova(iova + size)
            unmapped = 0
            for area in self.areas.within(iova, end):
                if area.iova < iova or end < area.end:
                    raise UapiError(
                        errno.ENOENT, f"unmap {iova:#x}+{size:#x} cuts area {area.iova:#x}+{area.size:#x}"
                    )
                # await: each area, area, unmapped, asked: cannot change: the lock is held
                await self.leave(area)
                unmapped += area.size
            if not unmapped and not everything:
                raise UapiError(errno.ENOENT, f"unmap {iova:#x}+{size:#x}: nothing is mapped there")
            return unmapped

    async def show(self, area: Area, pages: Pages) -> None:
        """A new area, with the lock held: it is there whole, or not at all and this raises; but if a unit
        does not forget what was half mapped, it is there with nothing mapped.
        """
        pages.get()
        self.areas.add(area)
        self._pages[area] = pages
        if self.hwpts:
            try:
                # await: area, pages: cannot change: the lock is held, and the area holds the pages
                await pages.show(area, self.hwpts)
            except UapiError:
                if area not in pages.shown:
                    await self._forget(area)
                raise

    async def leave(self, area: Area) -> None:
        """An area goes, with the lock held.  UapiError: a unit did not forget it: it stays, and pinned, with
        nothing mapped, and is to be unmapped again.
        """
        if self.hwpts:
            # await: area: cannot change: the lock is held
            await self._pages[area].hide(area)
        await self._forget(area)

    async def _forget(self, area: Area) -> None:
        self.areas.remove(area)
        await self._pages.pop(area).put()

    # -- HWPTs -----------------------------------------------------------------------------------------

    async def add_hwpt(self, hwpt: HwptPaging) -> None:
        """Fill a table that nobody walks yet.  EADDRINUSE: an area is out of its reach; ENODEV: the host is
        gone, and what others had of the areas with it; ENOMEM, EFAULT.
        """
        # await: hwpt: cannot change: the caller's own, nobody else has it yet
        async with self.lock:
            if any(self.areas) and not all(other.maintained for other in self.hwpts):
                why = f"IOAS {self.id}: KVM is gone, and what it had of the areas with it: make another"
                raise UapiError(errno.ENODEV, why)
            self.check_there()
            self.areas.check_reach(hwpt.domain.width)
            # await: asked: cannot change: this is one of them by then, where who lost KVM finds it
            await self.fill(hwpt)
            self._set_width()

    def check_there(self) -> None:
        """ENODEV: what its areas show is going."""
        for pages in self.pages:
            pages.check_there()

    async def fill(self, hwpt: HwptPaging) -> None:
        """Take an HWPT in, with the lock held."""
        if self.hwpts:
            for area in self.areas:
                hwpt.copy(self.hwpts[0], area)
            self.hwpts.append(hwpt)
            return
        self.hwpts.append(hwpt)
        shown: list[Area] = []
        try:
            for area in self.areas:
                # await: area, shown, hwpt: cannot change: the lock is held
                await self._pages[area].show(area, self.hwpts)
                shown.append(area)
        except UapiError:
            for area in shown:
                # await: each area, hwpt: cannot change: the lock is held
                await self._pages[area].hide(area)
            self.hwpts.remove(hwpt)
            raise

    async def remove_hwpt(self, hwpt: HwptPaging) -> None:
        """Nobody walks its table any more."""
        # await: hwpt: cannot change: the caller's own, nobody else destroys it
        async with self.lock:
            if hwpt in self.hwpts:
                # await: hwpt: cannot change: the lock is held
                await self.drop(hwpt)
                self.hwpts.remove(hwpt)
                self._set_width()

    async def drop(self, hwpt: HwptPaging) -> None:
        """Let an HWPT go, with the lock held: the pages of the last are not needed."""
        if len(self.hwpts) == 1:
            for area in self.areas:
                await self._pages[area].hide(area)

    def _set_width(self) -> None:
        self.areas.width = min((hwpt.domain.width for hwpt in self.hwpts), default=64)

    # -- the end -----------------------------------------------------------------------------------------

    async def destroy(self) -> None:
        """Nothing uses it: everything is unmapped, and the processes are let go of."""
        async with self.lock:
            self.destroyed = True
            for area in self.areas:
                await self.leave(area)
            await self._sources.leave(self)

    @property
    def pages(self) -> list[Pages]:
        """What its areas show; what is on demand has none."""
        return list(dict.fromkeys(self._pages.values()))

    @property
    def sources(self) -> list[Source]:
        """Whose memory it maps or has mapped."""
        return list(dict.fromkeys((*self._sources.of(self), *(pages.source for pages in self.pages))))

    def maps(self, host: ProcessMemory) -> bool:
        return any(source.host is host for source in self.sources)

    async def lose_host(self) -> None:
        """The host is gone, and nothing is attached: what its pages were is not to be reached again."""
        async with self.lock:
            for hwpt in self.hwpts:
                hwpt.take(Iova(0), hwpt.table.limit)
            for hwpt in self.hwpts:
                with suppress(UapiError):  # a unit refused
                    await hwpt.give_up()

    def check(self) -> list[str]:
        """What does not hold, a sentence each."""
        found = [why for pages in self.pages for why in pages.check()]
        found += [why for hwpt in self.hwpts for why in hwpt.table.check()]
        return [f"{why} (IOAS {self.id})" for why in found]


def _check_range(what: str, iova: Iova, size: int) -> None:
    if not size:
        raise UapiError(errno.EINVAL, f"{what} no bytes")
    if iova + size - 1 > ULONG_MAX:
        raise UapiError(errno.EOVERFLOW, f"{what} {iova:#x}+{size:#x} is beyond 64 bits")
