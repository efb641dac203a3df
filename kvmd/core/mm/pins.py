"""What one mirror has pinned: by the area its caller named, and the first byte that was asked for of a page.

Pins of one page are counted one by one, and whoever takes his own back takes no other's.  Looking for those
of a range goes over the range or over the pins, whichever is fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kvmd.core.mm.page import Page
from protocol.units import PAGE_SHIFT, PAGE_SIZE, Hva, Level, Pfn, pages_of_level, size_of_level


class PinnedRun(NamedTuple):
    """npages from hva on, which is what was asked for of a page, are pinned at pfn and those behind it."""

    hva: Hva
    pfn: Pfn
    npages: int


@dataclass(frozen=True, slots=True, eq=False)
class PinnedPage:
    """One pin: of the `level` that the process maps there, which may be a part of `page`.  Two of them are
    two, though they are alike.
    """

    page: Page
    pfn: Pfn
    level: Level
    size: int  # bytes of it that were asked for
    by_offset: bool  # in a file, and not by an address of the process

    @property
    def npages(self) -> int:
        return pages_of_level(self.level)


class PinsByArea:
    """`len` is how many pins there are."""

    def __init__(self) -> None:
        self._areas: dict[int, dict[Hva, tuple[PinnedPage, ...]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Hva, PinnedPage]]:
        for pins in self._areas.values():
            for at, held in pins.items():
                for pinned in held:
                    yield at, pinned

    def add(self, area: int, at: Hva, pinned: PinnedPage) -> None:
        pins = self._areas.setdefault(area, {})
        pins[at] = (*pins.get(at, ()), pinned)
        self._count += 1

    def remove(self, area: int, at: Hva, pinned: PinnedPage) -> bool:
        """Whether it was still there."""
        pins = self._areas.get(area, {})
        held = list(pins.get(at, ()))
        if pinned not in held:
            return False
        held.remove(pinned)
        self._count -= 1
        if held:
            pins[at] = tuple(held)
        else:
            del pins[at]
            if not pins:
                del self._areas[area]
        return True

    def last(self, area: int, at: Hva) -> PinnedPage | None:
        """The latest pin of the page that begins at `at`."""
        held = self._areas.get(area, {}).get(at)
        return None if held is None else held[-1]

    def within(self, area: int, start: Hva, end: Hva) -> list[Hva]:
        """Where pages of start..end are pinned."""
        pins = self._areas.get(area, {})
        if (end - start) >> PAGE_SHIFT < len(pins):
            return [Hva(at) for at in range(start, end, PAGE_SIZE) if at in pins]
        return [at for at in pins if start <= at < end]

    def some_area(self) -> tuple[int, Hva, Hva]:
        """One of the areas with pins, and the range they lie in."""
        area, pins = next(iter(self._areas.items()))
        return area, min(pins), Hva(max(pins) + 1)

    def runs(self, area: int, start: Hva, end: Hva, most: int, looks: int) -> tuple[list[PinnedRun], Hva]:
        """What is pinned there, in order, until there are `most`, or so many pages were looked at; and where
        that stopped."""
        found: list[PinnedRun] = []
        pins = self._areas.get(area, {})
        if (end - start) >> PAGE_SHIFT <= len(pins):
            end = Hva(min(end, start + looks * PAGE_SIZE))
        for at in sorted(self.within(area, start, end)):
            if len(found) >= most:
                return found, at
            for pinned in pins[at]:
                inside = at % size_of_level(pinned.level) >> PAGE_SHIFT
                found.append(PinnedRun(at, Pfn(pinned.pfn + inside), pinned.npages - inside))
        return found, end
