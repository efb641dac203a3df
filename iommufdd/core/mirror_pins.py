"""What of a mirror is pinned, for a device that must not meet an absent page there.

Models FOLL_LONGTERM pins beside an mmu notifier [mm gup.c]: the page stays in its frame and mapped, whatever
the process does with its address, and others fault beside it.  Pins count: a request over what is pinned
holds the page that is mapped, though the process may have another there by now (I28), and each gives back
what it holds, by the name it was answered with.  Once nobody holds a page it is taken out, flushed and only
then unpinned.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter

from iommufdd.core.area import Area, Span, without
from iommufdd.core.hmm import MIRROR_TRIES, HmmPage
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.watched import WatchedMemory
from protocol.errors import UapiError
from protocol.units import PAGE_OFFSET_MASK, PAGE_SHIFT, Hpa, Hva, Iova


@dataclass(slots=True, eq=False)
class MirrorPin:
    """One page of the host, as far as it was asked for: start..end of an area maps it and nothing else.

    `name`: of the request that had the host pin it, there too; `holders`: how many requests hold it.
    """

    area: Area
    page: HmmPage
    start: Iova
    end: Iova
    name: int
    holders: int

    @property
    def part(self) -> HmmPage:
        """Only what is pinned is mapped as pinned: a leaf must not reach beyond it."""
        hva = self.area.hva_of(self.start)
        return HmmPage(
            hva, Hpa(self.page.hpa + hva - self.page.hva), self.end - self.start, self.page.writable
        )


class MirrorPins:
    """Whoever calls what awaits holds the lock of the IOAS, under which alone pins come and go."""

    def __init__(self, hwpt: HwptPaging, watched: WatchedMemory) -> None:
        self._hwpt = hwpt
        self._watched = watched
        self._pins: list[MirrorPin] = []  # in order, apart
        self._requests: dict[int, list[MirrorPin]] = {}  # by name, what each holds
        self._everything: list[int] = []  # those of them that hold what every area has
        self.owed: list[MirrorPin] = []  # in no book any more; units may still reach them

    def __bool__(self) -> bool:
        return bool(self._pins)

    def __iter__(self) -> Iterator[MirrorPin]:
        return iter(self._pins)

    def __contains__(self, iova: Iova) -> bool:
        return self._at(iova) is not None

    def runs(self) -> Iterator[list[MirrorPin]]:
        """Pins that follow each other in an area and were pinned by one request, together."""
        return _runs(self._pins)

    def unpinned_in(self, start: Iova, end: Iova) -> Iterator[Span[Iova]]:
        """The parts of start..end that are not pinned."""
        first = self._first(start)
        last = bisect_right(self._pins, end - 1, lo=first, key=attrgetter("start"))
        return without((start, end), ((pin.start, pin.end) for pin in self._pins[first:last]))

    def _at(self, iova: Iova) -> MirrorPin | None:
        first = self._first(iova)
        pin = self._pins[first] if first < len(self._pins) else None
        return pin if pin is not None and pin.start <= iova else None

    def _first(self, iova: Iova) -> int:
        """The first pin that ends behind `iova`."""
        return bisect_right(self._pins, iova, key=attrgetter("end"))

    # -- requests ----------------------------------------------------------------------------------------

    async def pin(self, iova: Iova, size: int) -> int:
        """All of it or none; the request's name.  EINVAL: not whole pages; EFAULT: not all of it is in areas;
        ENOMEM, EAGAIN, the host's errnos.
        """
        end = Iova(iova + size)
        if size <= 0 or (iova | size) & PAGE_OFFSET_MASK or end - 1 >> self._hwpt.domain.width:
            raise UapiError(errno.EINVAL, f"pin of {iova:#x}+{size:#x}: not whole pages of the domain")
        return await self._ask([(iova, end)])

    async def pin_everything(self) -> int:
        """What every area has, and every area that comes (`area_entered`); the request's name."""
        name = await self._ask([(area.iova, area.end) for area in self._watched.areas])
        self._everything.append(name)
        return name

    async def area_entered(self, area: Area) -> None:
        """Errors as of `pin`: then the area must go again."""
        for name in self._everything:
            # await: area: cannot change: the lock of the IOAS is held
            await self._pin_span(name, area.iova, area.end)

    async def unpin(self, name: int) -> None:
        """What the request still holds: nothing of what went with its area, nor of another request's."""
        if name in self._everything:
            self._everything.remove(name)
        held = self._requests.pop(name, [])
        for pin in held:
            pin.holders -= 1
        gone = [pin for pin in held if not pin.holders]
        if not gone:
            return
        self._forget()
        for run in _runs(gone):
            self._hwpt.take(run[0].start, run[-1].end)
        self.owed += gone
        await self.give_back()

    def drop(self, area: Area | None = None) -> None:
        """An area goes, or the mirror: requests hold nothing of it any more, and what was pinned is owed."""
        gone = [pin for pin in self._pins if area is None or pin.area is area]
        for pin in gone:
            pin.holders = 0
        for name, held in self._requests.items():
            self._requests[name] = [pin for pin in held if pin.holders]
        self._forget()
        self.owed += gone

    def _forget(self) -> None:
        """What nobody holds."""
        self._pins = [pin for pin in self._pins if pin.holders]

    async def give_back(self) -> None:
        """Nobody reaches what is owed when the host is told.  UapiError: a unit has not forgotten it: it is
        owed still.
        """
        await self._hwpt.give_up()
        await self._let_go_of_owed()

    async def end(self) -> None:
        """With the mirror, which nobody walks any more."""
        self.drop()
        await self._let_go_of_owed()

    async def _let_go_of_owed(self) -> None:
        owed, self.owed = self.owed, []
        await self.let_go(owed)

    async def let_go(self, pins: Iterable[MirrorPin]) -> None:
        """Nobody reaches them: the host may have the pages back."""
        for run in _runs(pins):
            hva, size = run[0].part.hva, run[-1].end - run[0].start
            self._watched.counts.pinned_pages -= size >> PAGE_SHIFT
            with suppress(UapiError):  # the host is gone
                # await: each run: cannot change: the caller's own pins, in no book any more
                await self._watched.host.unpin(hva, size, area=run[0].name)

    # -- pinning -----------------------------------------------------------------------------------------

    async def _ask(self, spans: Iterable[Span[Iova]]) -> int:
        name = self._watched.new_number()
        self._requests[name] = []
        try:
            for start, end in spans:
                # await: name, each start: cannot change: the lock of the IOAS is held, and the name is ours
                await self._pin_span(name, start, end)
        except UapiError:
            await self.unpin(name)
            raise
        return name

    async def _pin_span(self, name: int, start: Iova, end: Iova) -> None:
        while start < end:
            pin = self._at(start)
            if pin is None:
                first = self._first(start)
                gap_end = self._pins[first].start if first < len(self._pins) else end
                start = await self._pin_gap(name, start, min(gap_end, end))
                continue
            pin.holders += 1
            self._requests[name].append(pin)
            start = pin.end

    async def _pin_gap(self, name: int, start: Iova, end: Iova) -> Iova:
        """Pin and map from `start` on, as far as one answer of the host goes; where it stopped."""
        area = self._watched.areas.at(start)
        if area is None:
            raise UapiError(errno.EFAULT, f"pin of iova {start:#x}: it is in no area")
        hva, size = area.hva_of(start), min(end, area.end) - start
        for _ in range(MIRROR_TRIES):
            with self._watched.lookups.begin() as lookup:
                # await: area, asked, hva, size, pin: cannot change: the lock of the IOAS is held | lookup:
                # the process may have something else there before we hear of it; asked again: `Lookup.stale`
                # (tests/unit/iommufdd/test_mirror_pins.py::test_a_page_that_goes_meanwhile_is_pinned_anew)
                found = await self._watched.host.pin(hva, size, write=area.writable, area=name)
                pins = list(_pins_of(area, found.pages, start, Iova(start + size), name))
                self._watched.counts.pinned_pages += sum(pin.end - pin.start for pin in pins) >> PAGE_SHIFT
                if not lookup.stale(hva, Hva(hva + size)):
                    # await: asked: cannot change: what is pinned and mapped stays, whatever the process does
                    # from now on
                    return await self._map(pins)
            # await: area, asked, hva, size, pin: cannot change: the lock of the IOAS is held
            await self.let_go(pins)
        raise UapiError(errno.EAGAIN, f"pin of iova {start:#x}: the host took it away {MIRROR_TRIES} times")

    async def _map(self, pins: list[MirrorPin]) -> Iova:
        """Map what was pinned for a request, and keep it mapped; where it ends.  A huge leaf that reaches
        beyond is split first: what is beyond must be able to go alone.  ENOMEM, with none of it mapped or
        pinned.
        """
        start, end = pins[0].start, pins[-1].end
        self._hwpt.take(start, end)
        try:
            self._hwpt.put(pins[0].area, [pin.part for pin in pins], start, end)
        except UapiError:
            self._hwpt.take(start, end)
            self.owed += pins
            await self.give_back()
            raise
        at = self._first(start)
        self._pins[at:at] = pins
        self._requests[pins[0].name] += pins
        # await: end: cannot change: a number, and pins go under the lock
        await self._hwpt.flush()
        return end


def _pins_of(area: Area, pages: Iterable[HmmPage], start: Iova, end: Iova, name: int) -> Iterator[MirrorPin]:
    for page in pages:
        first, last = max(area.iova_of(page.hva), start), min(area.iova_of(page.end), end)
        if first < last:
            yield MirrorPin(area, page, first, last, name, holders=1)


def _runs(pins: Iterable[MirrorPin]) -> Iterator[list[MirrorPin]]:
    run: list[MirrorPin] = []
    for pin in pins:
        if run and (pin.start, pin.area, pin.name) != (run[-1].end, run[0].area, run[0].name):
            yield run
            run = []
        run.append(pin)
    if run:
        yield run
