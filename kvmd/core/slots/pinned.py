"""Which guest frames of a VM are pinned for devices, and to what; a record that nothing here changes.

Models nothing of the kernel's (`export/pinning.py` pins and unpins).  Every writer of entries asks it what
must stay as it is, and a fault at a pinned gfn maps the pinned frame (I22).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kvmd.core.mm.page import MappedPage, Page
from kvmd.core.slots.memslot import Memslot
from protocol.pt.geometry import INDEX_BITS
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Pfn

AS_ID = 0  # what can be exported, and so what can be pinned


@dataclass(slots=True, eq=False)
class Pin:
    page: Page
    pfn: Pfn
    count: int = 0  # requests that hold it


class PinnedGfns(dict[Gfn, Pin]):
    """The pinned gfns of a VM; changed by `add` and `remove` alone."""

    def __init__(self) -> None:
        super().__init__()
        self._regions: Counter[int] = Counter()  # how many lie in each 2 MiB

    def holds(self, as_id: int, gfn: Gfn) -> bool:
        return as_id == AS_ID and gfn in self

    def any_in(self, as_id: int, span: GfnSpan) -> bool:
        """In one of the 2 MiB regions that a span touches."""
        if as_id != AS_ID or not self:
            return False
        regions = range(span.start >> INDEX_BITS, (span.end - 1 >> INDEX_BITS) + 1)
        if len(regions) > len(self._regions):
            return any(region in regions for region in self._regions)
        return any(region in self._regions for region in regions)

    def within(self, as_id: int, span: GfnSpan) -> list[Gfn]:
        if as_id != AS_ID:
            return []
        if span.npages < len(self):
            return [Gfn(gfn) for gfn in range(span.start, span.end) if gfn in self]
        return sorted(gfn for gfn in self if gfn in span)

    def add(self, gfn: Gfn, pin: Pin) -> None:
        self[gfn] = pin
        self._regions[gfn >> INDEX_BITS] += 1

    def remove(self, gfn: Gfn) -> Page:
        region = gfn >> INDEX_BITS
        self._regions[region] -= 1
        if not self._regions[region]:
            del self._regions[region]
        return self.pop(gfn).page

    def page_of(self, slot: Memslot, gfn: Gfn) -> MappedPage | None:
        """What a fault maps at a pinned gfn: the pinned frame, whatever the host has there by now."""
        pin = self.get(gfn) if slot.as_id == AS_ID else None
        return None if pin is None else MappedPage(slot.hva_of(gfn), pin.pfn, LEVEL_4K, writable=True)
