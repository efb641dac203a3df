"""An IOAS's tables against the host: is a leaf what the process has there now, or what is pinned for it?

A frame tag sees a walk that began before the frame was given up; a device that walks a stale leaf after the
frame was reused sees a tag that fits.  So the host, which is another process, is asked about every leaf, and
about every pin (I28).  Both are compared in the turn of its answer: pins unless their books are being
changed, leaves of a mirror but for what was invalidated behind the answer.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter

from iommufdd.core.area import Area, Span
from iommufdd.core.hmm import HmmPage, HostPin, Lookup, ProcessMemory
from iommufdd.core.hwpt_mirror import HwptMirror
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.io_pagetable import IoLeaf
from iommufdd.core.ioas import Ioas
from iommufdd.core.ioas_on_demand import IoasOnDemand
from iommufdd.core.pages import Pages
from iommufdd.core.source import Source
from protocol.errors import UapiError
from protocol.units import PAGE_SIZE, Hva, Iova

_LOOK = 1024 * PAGE_SIZE  # asked about at once


async def check_ioas(ioas: Ioas) -> list[str]:
    """The sentences that do not hold.  Of a host that is gone nothing is asked, its frames are gone too."""
    found: list[str] = []
    with _unless_gone():
        if isinstance(ioas, IoasOnDemand):
            # await: found, ioas: cannot change: our own list; one that is destroyed meanwhile has nothing
            async with ioas.lock:
                if ioas.mm_cookie:
                    # await: found: cannot change: our own list
                    await _check_mirrors(ioas, found)
        else:
            for pages in ioas.pages:
                # await: found, ioas, each pages: they may be let go of; asked again: `pages.pins`
                # (tests/unit/iommufdd/test_ioas_check.py::test_pages_let_go_of_meanwhile_are_not_wrong)
                await _check_pages(pages, found)
            for source in ioas.sources:
                # await: found, each source: it may be let go of; asked again: `source.pages`
                # (tests/unit/iommufdd/test_ioas_check.py::test_pages_let_go_of_meanwhile_are_not_wrong)
                await _check_total(source, found)
    return found


@contextmanager
def _unless_gone() -> Iterator[None]:
    try:
        yield
    except UapiError as error:
        if error.errno not in (errno.ENODEV, errno.EPERM):  # the host, or the process
            raise


# -- pinned pages ----------------------------------------------------------------------------------------


async def _check_pages(pages: Pages, found: list[str]) -> None:
    """What the books have pinned is, and is what each area shows, in every HWPT."""
    at = Hva(0)
    while (pins := next((pins for pins in pages.pins if pins.end > at), None)) is not None:
        at = max(at, pins.start)
        # await: at, found, pages, pin, pins, start: the books may change; asked again: `is_changing`
        # (tests/unit/iommufdd/test_ioas_check.py::test_pages_let_go_of_meanwhile_are_not_wrong)
        answer = await pages.source.host.pinned(at, pins.end - at, area=pages.number)
        if pages.is_changing or pins not in pages.pins:
            return
        stop = min(answer.end, pins.end)
        steps = [(start, pins.step) for start in range(at, stop, pins.step)]
        if [(pin.hva, min(pin.size, pins.step)) for pin in answer.pins] != steps:
            found.append(f"I28: {at:#x}..{stop:#x} is pinned, not so at the host")
        there = [HmmPage(*pin, writable=pages.writable) for pin in answer.pins]
        for area, hwpts in pages.shown.items():
            first, last = max(at, area.hva), min(stop, area.hva_end)
            if first < last:
                for hwpt in hwpts:
                    span = area.iova_of(first), area.iova_of(last)
                    found += _all_of(hwpt, area, there, *span)
        at = stop


async def _check_total(source: Source, found: list[str]) -> None:
    # await: found, source: the books may change; asked again: `is_changing`
    # (tests/unit/iommufdd/test_ioas_check.py::test_pages_let_go_of_meanwhile_are_not_wrong)
    total = (await source.host.pinned(Hva(0), PAGE_SIZE, area=0)).total
    users = [pages for pages in source.pages if isinstance(pages, Pages)]
    if any(pages.is_changing for pages in users):
        return
    pinned = sum((pins.end - pins.start) // pins.step for pages in users for pins in pages.pins)
    if total != pinned:
        found.append(f"I28: the host has {total} pins, the books of whose memory it is {pinned}")


async def _pinned(host: ProcessMemory, hva: Hva, size: int, number: int) -> list[HostPin]:
    pins: list[HostPin] = []
    at, end = hva, Hva(hva + size)
    while at < end:
        # await: host, pins: cannot change: the lock of the IOAS is held
        answer = await host.pinned(at, end - at, area=number)
        pins += answer.pins
        at = answer.end
    return pins


# -- mirrors ---------------------------------------------------------------------------------------------


async def _check_mirrors(ioas: IoasOnDemand, found: list[str]) -> None:
    """With its lock held: pins and areas stay as they are."""
    pins = 0
    for mirror in ioas.mirrors:
        # await: found, ioas, each mirror: cannot change: the lock is held
        pins += await _check_mirror_pins(mirror, ioas.watched.host, found)
    # await: found, ioas: cannot change: the lock is held
    total = (await ioas.watched.host.pinned(Hva(0), PAGE_SIZE, area=0)).total
    if total != pins:
        found.append(f"I28: the host has {total} pins, mirrors of IOAS {ioas.id} {pins}")
    for mirror in ioas.mirrors:
        # await: found, ioas, each mirror: cannot change: the lock is held
        await _check_mirror(ioas, mirror, ioas.watched.host, found)


async def _check_mirror_pins(hwpt: HwptMirror, host: ProcessMemory, found: list[str]) -> int:
    """What it believes pinned is, and is mapped; how many pins that is."""
    for run in hwpt.pins.runs():
        hva, size = run[0].part.hva, run[-1].end - run[0].start
        # await: found, host, hwpt, pin, run, each run, size: cannot change: the lock of the IOAS is held
        theirs = await _pinned(host, hva, size, run[0].name)
        if [pin[:2] for pin in theirs] != [pin.part[:2] for pin in run]:
            found.append(
                f"I28: HWPT {hwpt.id}: iova {run[0].start:#x}+{size:#x} is pinned, not so at the host"
            )
    pinned = len(hwpt.pins.owed)
    for pin in hwpt.pins:
        pinned += 1
        found += _all_of(hwpt, pin.area, [pin.part], pin.start, pin.end)
    return pinned


async def _check_mirror(ioas: IoasOnDemand, hwpt: HwptMirror, host: ProcessMemory, found: list[str]) -> None:
    """What is not pinned maps what the process has there now."""
    at = Iova(0)
    while (first := next(hwpt.table.leaves_in(at, hwpt.table.limit - at), None)) is not None:
        at = max(at, first.iova)
        end = first.end
        area = ioas.areas.at(at)
        if area is None:
            found.append(f"I28: HWPT {hwpt.id}: iova {at:#x} -> {first.hpa:#x}, in no area")
            at = end
            continue
        with ioas.watched.lookups.begin() as lookup:
            size = min(area.end, max(end, Iova(at + _LOOK))) - at
            # await: area, at, found, host, hwpt, ioas: cannot change: the lock is held | lookup: what it
            # found may go; asked again: `_fresh`
            # (tests/unit/iommufdd/test_ioas_check.py::test_what_went_behind_the_answer_is_not_wrong)
            there = await host.range_fault(area.hva_of(at), size, write=False, fault=False)
            stop = min(area.iova_of(there.end), area.end)
            for leaf in hwpt.table.leaves_in(at, stop - at):
                part = max(leaf.iova, at), min(leaf.end, stop)
                for start, last in _fresh(hwpt, area, lookup, *part):
                    found += _differences(hwpt, area, leaf, there.pages, (start, last), "is the host's")
        at = stop


def _fresh(hwpt: HwptMirror, area: Area, lookup: Lookup, start: Iova, end: Iova) -> Iterator[Span[Iova]]:
    """The parts that are not pinned and of which nothing went behind the answer."""
    for first, last in hwpt.pins.unpinned_in(start, end):
        if not lookup.stale(area.hva_of(first), area.hva_of(last)):
            yield first, last
            continue
        for at in map(Iova, range(first, last, PAGE_SIZE)):
            end = Iova(at + PAGE_SIZE)
            if not lookup.stale(area.hva_of(at), area.hva_of(end)):
                yield at, end


# -- leaves ----------------------------------------------------------------------------------------------


def _all_of(hwpt: HwptPaging, area: Area, pages: Sequence[HmmPage], start: Iova, end: Iova) -> Iterator[str]:
    """Is start..end mapped to the pinned `pages`, all of it?"""
    at = start
    for leaf in hwpt.table.leaves_in(start, end - start):
        if leaf.iova > at:
            break
        at, last = min(leaf.end, end), at
        yield from _differences(hwpt, area, leaf, pages, (last, at), "is pinned")
    if at < end:
        yield f"I28: HWPT {hwpt.id}: iova {at:#x} is pinned, and absent"


def _differences(
    hwpt: HwptPaging, area: Area, leaf: IoLeaf, pages: Sequence[HmmPage], part: Span[Iova], what: str
) -> Iterable[str]:
    """Of a part of a leaf, from `pages`, which are in order: the first, if any."""
    at, end = part
    while at < end:
        hva, hpa = area.hva_of(at), leaf.hpa + at - leaf.iova
        index = bisect_right(pages, hva, key=attrgetter("hva")) - 1
        page = pages[index] if index >= 0 and hva < pages[index].end else None
        maps = f"I28: HWPT {hwpt.id}: iova {at:#x} -> {hpa:#x}"
        if page is None:
            return [f"{maps}, nothing there {what}"]
        if page.hpa + hva - page.hva != hpa:
            return [f"{maps}, {page.hpa + hva - page.hva:#x} {what}"]
        if leaf.writable and not (page.writable and area.writable):
            return [f"{maps} is writable, what {what} is not"]
        at = area.iova_of(page.end)
    return []
