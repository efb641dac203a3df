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

Told = Callable[[int, int], bool]  # does a report tell of (number of a slot, page of it)?


class StoreRecord:
    """Of one VM."""

    def __init__(self, slots: Memslots) -> None:
        self._slots = slots
        self._untold: dict[int, set[int]] = {}  # number of a slot -> pages of it
        self._reports: list[Told] = []  # on their way
        self._down: set[tuple[int, Gfn]] = set()  # put down since anything of this changed: nothing to add

    def stored(self, as_id: int, gfn: Gfn) -> None:
        """A store to a page of `gfn` is made in this turn."""
        if not self._slots.logging or (as_id, gfn) in self._down:
            return
        slot = self._slots.find(gfn, as_id)
        if slot is None or not slot.logs:
            return
        page = gfn - slot.base_gfn
        if not any(told(slot.number, page) for told in self._reports):
            self._untold.setdefault(slot.number, set()).add(page)
            self._down.add((as_id, gfn))

    @contextmanager
    def telling(self, told: Told) -> Iterator[None]:
        """Around a report, from when its bits are taken until user space has it."""
        for number, pages in self._untold.items():
            pages.difference_update([page for page in pages if told(number, page)])
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
            self._untold.pop(slot.number, None)

    def untold(self) -> Iterator[tuple[Memslot, Gfn]]:
        for number, pages in self._untold.items():
            slot = self._slots.numbered(number)
            assert slot is not None, "its pages went with it"
            for page in pages:
                yield slot, Gfn(slot.base_gfn + page)
