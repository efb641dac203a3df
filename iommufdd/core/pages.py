"""Memory that areas show: pinned once, however many areas of however many IOASes show it.

Models struct iopt_pages [iommufd pages.c]: an area shows a part of it, IOMMU_IOAS_COPY makes further areas of
the same pages.  What an area needs first is pinned; what another shows already is read back from a table of
its HWPTs [iopt_area_fill_domain]; a pin goes with the last area that shows a byte of it.  Addresses are the
process's, or offsets in a file.

Order of taking away: entries, units, pages.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from operator import attrgetter
from typing import NamedTuple

from iommufdd.core.area import Area, Span, without
from iommufdd.core.counts import Counts
from iommufdd.core.hmm import HmmPage, HmmRange
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.source import Source, Sources
from protocol.errors import UapiError
from protocol.flow import RwLock
from protocol.units import PAGE_SHIFT, PAGE_SIZE, Hpa, Hva, size_of_level


class Pins(NamedTuple):
    """Of `step` bytes each, one behind the other from `start` to `end`, which is at `hpa`.  Where it is is
    not kept of pages of 4 KiB (0): no area shows a part of one.
    """

    start: Hva
    end: Hva
    step: int
    hpa: Hpa = Hpa(0)

    def part(self, start: Hva, end: Hva) -> Pins:
        return Pins(start, end, self.step, Hpa(self.hpa and self.hpa + start - self.start))

    def whole(self, span: Span[Hva]) -> Span[Hva]:
        """The part of these that `span` meets, in whole pins; nothing has its end before its start."""
        first = max(span[0] - self.start, 0) // self.step
        last = -(-max(min(span[1], self.end) - self.start, 0) // self.step)
        return Hva(self.start + first * self.step), Hva(self.start + last * self.step)


class Pages:
    """`start`: the first address of all that was mapped; `file`: at the host, 0: memory of the process.
    `users` hold it: areas, and requests under way.
    """

    def __init__(
        self, counts: Counts, sources: Sources, source: Source, start: Hva, file: int, *, writable: bool
    ) -> None:
        self.source = source
        self.start = start
        self.file = file
        self.writable = writable
        self.pins: list[Pins] = []  # in order, apart
        self.shown: dict[Area, list[HwptPaging]] = {}  # by which areas, mapped in which HWPTs
        self.users = 0
        self._counts = counts
        self._sources = sources
        self.number = source.new_number()
        self._lock = RwLock()
        source.pages[self] = not file

    def get(self) -> None:
        self.users += 1

    async def put(self) -> None:
        self.users -= 1
        if not self.users:
            assert not self.shown, "an area that is mapped holds its pages"
            if self.file:
                with suppress(UapiError):  # the host is gone
                    await self.source.host.close_file(self.file)
            await self._sources.put(self.source, self)

    def alignment_of(self, address: Hva) -> int:
        """What an iova for `address` is to be aligned to, at most [iopt_alloc_area_pages]; 0: to anything."""
        return address - self.start if self.file else address

    @property
    def is_changing(self) -> bool:
        """May the books differ from what the host has pinned?"""
        return self._lock.is_held

    def check_there(self) -> None:
        """ENODEV: the host is gone, or the units that its windows were lent to: nobody is shown more of it,
        though what is shown may not be taken away yet.
        """
        if not self.source.is_there:
            raise UapiError(errno.ENODEV, f"pages at {self.start:#x} went with KVM, or with their units")

    # -- showing -------------------------------------------------------------------------------------------

    async def show(self, area: Area, hwpts: list[HwptPaging]) -> None:
        """Pin what nobody shows yet and map it all in `hwpts`, the live list of the area's IOAS; or nothing.
        ENOMEM, EFAULT, the host's errnos; ENODEV: the host is gone.  If a unit does not forget what was half
        mapped, the area is in `shown` all the same.
        """
        # await: area, hwpts: cannot change: the lock of its IOAS is held
        async with self._lock:
            at, end = area.hva, area.hva_end
            try:
                while at < end:
                    # await: area, hwpts, page, at, end: cannot change: both locks are held
                    found = await self._find(at, end)
                    start, at = at, found.end
                    # of a larger page only that: the rest may be shown in other frames, pinned before these
                    pages = [page.part(start, at) for page in found.pages]
                    for hwpt in hwpts:
                        hwpt.put(area, pages, area.iova_of(start), area.iova_of(at))
                        # await: area, hwpts, each hwpt, page, pages, start, at, end: cannot change: the
                        # locks
                        await hwpt.flush()
                self.check_there()  # who looks for whatever shows it does not see this area yet
            except UapiError:
                self.shown[area] = hwpts
                await self._hide(area)
                raise
            self.shown[area] = hwpts

    async def hide(self, area: Area) -> None:
        """Unmap it, and unpin what no other shows.  UapiError: a unit did not forget it: it stays in `shown`,
        and pinned, with nothing mapped, and is to be hidden again.
        """
        # await: area: cannot change: the lock of its IOAS is held
        async with self._lock:
            await self._hide(area)

    async def _hide(self, area: Area) -> None:
        for hwpt in self.shown[area]:
            hwpt.take(area.iova, area.end)
        for hwpt in self.shown[area]:
            # await: area, each hwpt: cannot change: both locks are held
            await hwpt.give_up()
        del self.shown[area]
        for start, end in self._release(area):
            with suppress(UapiError):  # the host is gone
                # await: each start, start, end: cannot change: our own list, which the books have no more
                await self.source.host.unpin(start, end - start, area=self.number)
            self._counts.pinned_pages -= end - start >> PAGE_SHIFT

    async def _find(self, at: Hva, end: Hva) -> HmmRange:
        """From `at` on: what one area shows, one pin has, or one answer of the host, which is pinned."""
        self.check_there()
        for area, hwpts in self.shown.items():
            if area.hva <= at < area.hva_end:
                return self._read_back(area, hwpts[0], at, min(end, area.hva_end))
        for pins in self.pins:
            if pins.start <= at < pins.end:
                assert pins.hpa, "each page of 4 KiB that is pinned some area shows"
                pinned = HmmPage(pins.start, pins.hpa, pins.end - pins.start, self.writable)
                return HmmRange([pinned], min(end, pins.end))
        taken = [*(area.hva for area in self.shown), *(pins.start for pins in self.pins)]
        end = min([end, *(start for start in taken if at < start)])
        # await: end: cannot change: the lock is held
        found = await self.source.host.pin(
            at, end - at, write=self.writable, area=self.number, file=self.file
        )
        stop = min(found.end, end)
        self._counts.pinned_pages += stop - at >> PAGE_SHIFT
        for page in found.pages:
            self._pinned(max(at, page.hva), min(page.end, stop), page)
        return HmmRange(found.pages, stop)

    def _read_back(self, area: Area, hwpt: HwptPaging, at: Hva, end: Hva) -> HmmRange:
        """ENODEV: what was mapped is not any more."""
        leaves = list(hwpt.table.leaves_in(area.iova_of(at), end - at))
        pages = [
            HmmPage(area.hva_of(leaf.iova), leaf.hpa, size_of_level(leaf.level), self.writable)
            for leaf in leaves
        ]
        if sum(min(page.end, end) - max(page.hva, at) for page in pages) != end - at:
            why = "an IOAS that showed it lost a KVM, or a unit has not forgotten it: unmap it there"
            raise UapiError(errno.ENODEV, f"{at:#x}..{end:#x}: {why}")
        return HmmRange(pages, end)

    # -- books of what is pinned -----------------------------------------------------------------------------

    def _pinned(self, start: Hva, end: Hva, page: HmmPage) -> None:
        """One pin more, of what is asked for of `page`."""
        step = end - start
        pins = Pins(start, end, step, Hpa(page.hpa + start - page.hva) if step > PAGE_SIZE else Hpa(0))
        at = bisect_right(self.pins, start, key=attrgetter("start"))
        if at and _continues(self.pins[at - 1], pins):
            self.pins[at - 1] = self.pins[at - 1]._replace(end=end)
        else:
            self.pins.insert(at, pins)

    def _release(self, area: Area) -> list[Span[Hva]]:
        """The pins that meet `area` and no other leave the books; those side by side are one span."""
        span = area.hva, area.hva_end
        kept, gone = [], []
        for pins in self.pins:
            others = [pins.whole((other.hva, other.hva_end)) for other in self.shown]
            released = list(without(pins.whole(span), [other for other in others if other[0] < other[1]]))
            for start, end in without((pins.start, pins.end), released):
                kept.append(pins.part(start, end))
            gone += released
        self.pins = kept
        return list(_joined(gone))

    # -- what must hold ------------------------------------------------------------------------------------

    def check(self) -> list[str]:
        """I26 for pinned IOASes: each byte shown is pinned, once, and what is pinned some area shows,
        unless it is being changed.
        """
        if self.is_changing:
            return []
        found, last = [], 0
        shown = [(area.hva, area.hva_end) for area in self.shown]
        for start, end, step, _ in self.pins:
            if start < last:
                found.append(f"I26: {start:#x} is pinned twice")
            last = end
            for pin in range(start, end, step):
                if not any(first < pin + step and pin < stop for first, stop in shown):
                    found.append(f"I26: {pin:#x} is pinned for no area")
        for span in shown:
            found += [
                f"I26: {left[0]:#x}..{left[1]:#x} is shown and not pinned"
                for left in without(span, [(pins.start, pins.end) for pins in self.pins])
            ]
        return found


def _continues(pins: Pins, more: Pins) -> bool:
    behind = (pins.end, pins.step) == (more.start, more.step)
    return behind and (not more.hpa or pins.hpa + pins.end - pins.start == more.hpa)


def _joined(spans: list[Span[Hva]]) -> Iterator[Span[Hva]]:
    start, end = spans[0] if spans else (Hva(0), Hva(0))
    for first, last in spans[1:]:
        if first != end:
            yield start, end
            start = first
        end = last
    if start < end:
        yield start, end
