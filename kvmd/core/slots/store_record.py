"""What was stored for the guest in slots that log, and user space was not told of yet: the judge of the log.

Models nothing of the kernel's.  A store is put down where it is made, under its gfn and the slot that has the
gfn in that turn; nothing the log goes by is asked, no bit, no entry, no slot found before.  A page is struck
out when user space is told of it.  One that is here, in no bitmap and in no ring is lost (I25).

A store made while a report of its page is on its way is told by that report: user space copies a page after
it was told of it.  What devices store kvmd does not see; a test that plays a device puts that down, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmd.core.slots.memslot import Memslot, Memslots
from protocol.units import Gfn

REGION_PAGES = 4096  # are put down as one number, a bit a page

Told = Callable[[int, int], int]  # which pages a report tells of, of (number of a slot, region of it)


class StoreRecord:
    """Of one VM."""

    def __init__(self, slots: Memslots) -> None:
        self._slots = slots
        self._untold: dict[tuple[int, int], int] = {}  # (number of a slot, region of it) -> pages
        self._reports: list[Told] = []  # on their way
        # Put down since anything of this changed, so that there is nothing to add: address space, gfns.
        self._down: dict[tuple[int, int], int] = {}

    def stored(self, as_id: int, gfn: Gfn) -> None:
        """A store to a page of `gfn` is made in this turn."""
        if not self._slots.logging:
            return
        here, bit = (as_id, gfn // REGION_PAGES), 1 << gfn % REGION_PAGES
        down = self._down.get(here, 0)
        if down & bit:
            return
        slot = self._slots.find(gfn, as_id)
        if slot is None or not slot.logs:
            return
        region, index = divmod(gfn - slot.base_gfn, REGION_PAGES)
        if not any(told(slot.number, region) >> index & 1 for told in self._reports):
            self._untold[slot.number, region] = self._untold.get((slot.number, region), 0) | 1 << index
            self._down[here] = down | bit

    @contextmanager
    def telling(self, told: Told) -> Iterator[None]:
        """Around a report, from when its bits are taken until user space has it."""
        self._untold = {
            where: left for where, pages in self._untold.items() if (left := pages & ~told(*where))
        }
        self._reports.append(told)
        self._down.clear()
        try:
            yield
        finally:
            self._reports.remove(told)

    def replaced(self, slot: Memslot) -> None:
        """What `slot` was is another slot now, or none; one that was moved may go on with its log."""
        self._down.clear()
        now = self._slots.numbered(slot.number)
        if now is None or not now.logs:
            self._untold = {where: pages for where, pages in self._untold.items() if where[0] != slot.number}

    def untold(self) -> Iterator[tuple[Memslot, Gfn]]:
        for (number, region), pages in self._untold.items():
            slot = self._slots.numbered(number)
            assert slot is not None, "its pages went with it"
            for index in range(REGION_PAGES):
                if pages >> index & 1:
                    yield slot, Gfn(slot.base_gfn + region * REGION_PAGES + index)
