"""What of a mirror is pinned, for a device that must not meet an absent page there.

Models FOLL_LONGTERM pins beside an mmu notifier [mm gup.c]: the page stays in its frame and mapped, whatever
the process does with its address, and others fault beside it.  Once the last pin of a page goes it is taken
out, flushed and only then unpinned: by now the process may have something else there.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from iommufdd.core.area import Area, Span, without
from iommufdd.core.hmm import MAX_TRIES, HostPage, Lookup
from iommufdd.core.io_pagetable import Change
from protocol.errors import UapiError
from protocol.units import PAGE_OFFSET_MASK, PAGE_SHIFT

if TYPE_CHECKING:
    from iommufdd.core.hwpt_mirror import HwptMirror


class Pin(NamedTuple):
    """start..end of one area; `number` is that of the request, here and at the host."""

    start: int
    end: int
    number: int


class MirrorPins:
    """Whoever calls what awaits holds the lock of the IOAS."""

    def __init__(self, hwpt: HwptMirror) -> None:
        self._hwpt = hwpt
        self._ioas = hwpt.ioas
        self._pins: list[Pin] = []

    def __bool__(self) -> bool:
        return bool(self._pins)

    def __contains__(self, iova: int) -> bool:
        return any(pin.start <= iova < pin.end for pin in self._pins)

    @property
    def spans(self) -> list[Span]:
        return [(pin.start, pin.end) for pin in self._pins]

    async def pin(self, iova: int, size: int) -> int:
        """All of it or none; the request's number.  EINVAL: not whole pages; EFAULT: not all of it is in
        areas; ENOMEM, EAGAIN, the host's errnos.
        """
        end = iova + size
        if size <= 0 or (iova | size) & PAGE_OFFSET_MASK or end - 1 >> self._hwpt.domain.width:
            raise UapiError(errno.EINVAL, f"pin of {iova:#x}+{size:#x}: not whole pages of the domain")
        number, at = self._ioas.new_number(), iova
        try:
            while at < end:
                at = await self._pin_some(number, at, end)
        except UapiError:
            await self.unpin(number)
            raise
        return number

    def drop(self, area: Area) -> list[Pin]:
        """An area goes: its pins hold nothing from now on; `let_go` of each once nobody reaches it."""
        gone = [pin for pin in self._pins if area.iova <= pin.start < area.end]
        self._pins = [pin for pin in self._pins if pin not in gone]
        return gone

    async def let_go(self, area: Area, pin: Pin) -> None:
        self._ioas.counts.pinned_pages -= pin.end - pin.start >> PAGE_SHIFT
        with suppress(UapiError):  # the host is gone
            await self._ioas.live_host.unpin(area.hva_of(pin.start), pin.end - pin.start, area=pin.number)

    async def unpin(self, number: int) -> None:
        """What is left of a request."""
        for pin in [pin for pin in self._pins if pin.number == number]:
            self._pins.remove(pin)
            area = self._ioas.areas.at(pin.start)
            assert area is not None, "pins go with their area"
            await self._hwpt.give_up(self._hwpt.take_unpinned([(pin.start, pin.end)]))
            await self.let_go(area, pin)

    async def _pin_some(self, number: int, start: int, end: int) -> int:
        """Pin and map from `start` on; where it stopped."""
        area = self._ioas.areas.at(start)
        if area is None:
            raise UapiError(errno.EFAULT, f"pin of iova {start:#x}: it is in no area")
        hva, size = area.hva_of(start), min(end, area.end) - start
        for _ in range(MAX_TRIES):
            changes: list[Change] = []
            with self._ioas.lookups.begin() as lookup:
                found = await self._ioas.live_host.pin(hva, size, write=area.writable, area=number)
                pin = Pin(start, min(area.iova_of(found.end), start + size), number)
                self._ioas.counts.pinned_pages += pin.end - start >> PAGE_SHIFT
                try:
                    held = self._hold(lookup, area, found.pages, pin, changes)
                except UapiError:
                    await self._hwpt.flush(changes)
                    await self.let_go(area, pin)
                    raise
            await self._hwpt.flush(changes)
            if held:
                return pin.end
            await self.let_go(area, pin)
        raise UapiError(errno.EAGAIN, f"pin of iova {start:#x}: the host took it away {MAX_TRIES} times")

    def _hold(
        self, lookup: Lookup, area: Area, pages: Sequence[HostPage], pin: Pin, changes: list[Change]
    ) -> bool:
        """Map what was pinned and keep it mapped, unless the process has something else there by now.  A huge
        leaf that reaches beyond is split first: what is beyond must be able to go alone.  ENOMEM.
        """
        if lookup.stale(area.hva_of(pin.start), area.hva_of(pin.end)):
            return False
        for part in without((pin.start, pin.end), self.spans):
            changes.append(self._hwpt.take(*part))
        self._hwpt.put(area, [_part(area, page, pin) for page in pages], pin.start, pin.end, changes)
        self._pins.append(pin)
        return True


def _part(area: Area, page: HostPage, pin: Pin) -> HostPage:
    """Only what is pinned is mapped as pinned: a leaf must not reach beyond it."""
    first, last = max(page.hva, area.hva_of(pin.start)), min(page.end, area.hva_of(pin.end))
    return HostPage(first, page.hpa + first - page.hva, last - first, page.writable)
