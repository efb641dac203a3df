"""An HWPT on an IOAS on demand: a mirror of what the process has mapped, as far as a device asked for it.

Models the design the review compared sharing with [RFC 00/42]: an IO page fault finds its area, has the host
fault the page in, and maps it as large as host page, area and unit allow; before the host changes a range it
is taken out, a huge leaf split, and units and devices flushed.  A page that a device must not miss is pinned
and stays mapped whatever the host does around it.

Invariant I5 has a second home here: what the host said is stored in the turn in which it is still fresh.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from iommufdd.core.area import Area, Span, without
from iommufdd.core.domain import Domain
from iommufdd.core.hardware import Memory
from iommufdd.core.hmm import Found, HostPage, Lookup
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.io_pagetable import Change, IoPageTable
from protocol.errors import UapiError
from protocol.hw.prq import PageRequest
from protocol.units import LEVEL_4K, PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE, align_down, size_of_level

if TYPE_CHECKING:
    from iommufdd.core.ioas_on_demand import IoasOnDemand


class Pin(NamedTuple):
    """start..end of one area, pinned for a device; `number`: at the host."""

    start: int
    end: int
    number: int


MAX_TRIES = 64  # each further one: the host took the page away meanwhile


class HwptMirror(HwptPaging):
    needs_iopf = True
    ioas: IoasOnDemand

    def __init__(
        self, domain: Domain, memory: Memory, ioas: IoasOnDemand, table: IoPageTable, premap_pages: int = 1
    ) -> None:
        super().__init__(domain, memory, ioas, table)
        self._premap = premap_pages * PAGE_SIZE  # from the page that faulted on, as far as the area goes
        self._pins: list[Pin] = []
        self._pinning_all = 0

    # -- a page request --------------------------------------------------------------------------------

    async def fault_in(self, request: PageRequest) -> None:
        """EFAULT: in no area, or not to be written; the host's errnos; EAGAIN: it would not hold still."""
        iova, write = align_down(request.addr, PAGE_SIZE), request.write
        for _ in range(MAX_TRIES):
            area = self.ioas.areas.at(iova)
            if area is None or (write and not area.writable):
                what = "is in no area" if area is None else "is not to be written"
                raise UapiError(errno.EFAULT, f"iova {iova:#x} {what}")
            if self._serves(iova, write=write):
                self.ioas.counts.io_faults_spurious += 1
                return
            end = min(iova + self._premap, area.end)
            with self.ioas.lookups.begin() as lookup:
                found = await self._populated(area, iova, end, write=write)
                self.ioas.counts.io_faults_major += found.major
                changes = self.install(lookup, area, found.pages, iova, end)
            if changes is not None:
                await self.flush(changes)
            if self._serves(iova, write=write):
                self.ioas.counts.io_faults_spurious += changes is None  # somebody else was first
                return
            self.ioas.counts.io_fault_retries += 1
        raise UapiError(errno.EAGAIN, f"iova {iova:#x}: the host took the page away {MAX_TRIES} times")

    async def _populated(self, area: Area, iova: int, end: int, *, write: bool) -> Found:
        """iova..end as the host has it then; the page at `iova` alone, if all of it cannot be had."""
        host, hva = self.ioas.live_host, area.hva_of(iova)
        try:
            return await host.range_fault(hva, end - iova, write=write, fault=True)
        except UapiError:
            if end - iova == PAGE_SIZE:
                raise
        return await host.range_fault(hva, PAGE_SIZE, write=write, fault=True)

    def _serves(self, iova: int, *, write: bool) -> bool:
        leaf = self.table.leaf_at(iova)
        return leaf is not None and (leaf.writable or not write)

    def install(
        self, lookup: Lookup, area: Area, pages: Sequence[HostPage], start: int, end: int
    ) -> list[Change] | None:
        """Map start..end as far as `pages`, which `lookup` found, are what the host still has; None: nothing
        of it was new.  ENOMEM.
        """
        if area not in self.ioas.areas:
            return None
        changes = None
        for page in pages:
            writable = page.writable and area.writable
            largest = LEVEL_4K if self._pins else self.table.max_leaf
            for iova, hpa, level in area.leaves(page, start, end, largest):
                hva, size = area.hva_of(iova), size_of_level(level)
                there = self.table.leaf_at(iova)
                if lookup.stale(hva, hva + size) or self._is_pinned(iova):
                    continue
                if there is None or there != (iova, level, hpa, writable):
                    changes = changes or []
                    changes.append(self.put_run(iova, [hpa], level, writable=writable))
        return changes

    # -- the host takes away ---------------------------------------------------------------------------

    def take_unpinned(self, spans: Iterable[Span]) -> list[Change]:
        pinned = [(pin.start, pin.end) for pin in self._pins]
        return [self.take(*part) for span in spans for part in without(span, pinned)]

    async def area_left(self, area: Area) -> None:
        """Nothing of an area is mapped or pinned any more when this returns."""
        pins = [pin for pin in self._pins if area.iova <= pin.start < area.end]
        self._pins = [pin for pin in self._pins if pin not in pins]
        await self.give_up([self.take(area.iova, area.end)])
        for pin in pins:
            await self._let_go(area, pin)

    # -- pinning ---------------------------------------------------------------------------------------

    async def pin(self, iova: int, size: int) -> None:
        """EINVAL: not whole pages; EFAULT: not all of it is in areas; ENOMEM, EAGAIN, the host's errnos."""
        async with self.ioas.lock:
            await self._pin(iova, size)

    async def unpin(self, iova: int, size: int) -> None:
        async with self.ioas.lock:
            await self._unpin(iova, size)

    async def pin_all(self, *, on: bool) -> None:
        async with self.ioas.lock:
            areas = list(self.ioas.areas)
            if on:
                for n, area in enumerate(areas):
                    try:
                        await self._pin(area.iova, area.size)
                    except UapiError:
                        for done in areas[:n]:
                            await self._unpin(done.iova, done.size)
                        raise
                self._pinning_all += 1
            else:
                self._pinning_all -= 1
                for area in areas:
                    await self._unpin(area.iova, area.size)

    async def area_entered(self, area: Area) -> None:
        """Whoever pins everything pins what is new, too."""
        for _ in range(self._pinning_all):
            await self._pin(area.iova, area.size)

    async def _pin(self, iova: int, size: int) -> None:
        end = iova + size
        if size <= 0 or (iova | size) & PAGE_OFFSET_MASK or end - 1 >> self.domain.width:
            raise UapiError(errno.EINVAL, f"pin of {iova:#x}+{size:#x}: not whole pages of the domain")
        at = iova
        try:
            while at < end:
                at = await self._pin_some(at, end)
        except UapiError:
            await self._unpin(iova, at - iova)
            raise

    async def _pin_some(self, start: int, end: int) -> int:
        """Pin and map from `start` on; where it stopped."""
        area = self.ioas.areas.at(start)
        if area is None:
            raise UapiError(errno.EFAULT, f"pin of iova {start:#x}: it is in no area")
        hva, size = area.hva_of(start), min(end, area.end) - start
        number = self.ioas.new_number()
        for _ in range(MAX_TRIES):
            changes: list[Change] = []
            with self.ioas.lookups.begin() as lookup:
                found = await self.ioas.live_host.pin(hva, size, write=area.writable, area=number)
                pin = Pin(start, min(area.iova_of(found.end), start + size), number)
                self.ioas.counts.pinned_pages += pin.end - start >> PAGE_SHIFT
                try:
                    held = self._hold(lookup, area, found.pages, pin, changes)
                except UapiError:
                    await self._let_go(area, pin)
                    raise
            await self.flush(changes)
            if held:
                return pin.end
            await self._let_go(area, pin)
        raise UapiError(errno.EAGAIN, f"pin of iova {start:#x}: the host took it away {MAX_TRIES} times")

    def _hold(
        self, lookup: Lookup, area: Area, pages: Sequence[HostPage], pin: Pin, changes: list[Change]
    ) -> bool:
        """Map what was pinned and keep it mapped, unless the process has something else there by now.
        ENOMEM.
        """
        if lookup.stale(area.hva_of(pin.start), area.hva_of(pin.end)):
            return False
        self.put(area, [_part(area, page, pin) for page in pages], pin.start, pin.end, changes)
        self._pins.append(pin)
        return True

    async def _unpin(self, iova: int, size: int) -> None:
        """Of each page one pin, as they were made; one that the host has elsewhere by now goes."""
        at = iova
        end = iova + size
        while (pin := next((p for p in self._pins if p.start == at and p.end <= end), None)) is not None:
            self._pins.remove(pin)
            area = self.ioas.areas.at(at)
            assert area is not None, "pins go with their area"
            await self.give_up(self.take_unpinned([(pin.start, pin.end)]))
            await self._let_go(area, pin)
            at = pin.end

    async def _let_go(self, area: Area, pin: Pin) -> None:
        self.ioas.counts.pinned_pages -= pin.end - pin.start >> PAGE_SHIFT
        with suppress(UapiError):  # the host is gone
            await self.ioas.live_host.unpin(area.hva_of(pin.start), pin.end - pin.start, area=pin.number)

    def _is_pinned(self, iova: int) -> bool:
        return any(pin.start <= iova < pin.end for pin in self._pins)


def _part(area: Area, page: HostPage, pin: Pin) -> HostPage:
    """Only what is pinned is mapped as pinned: a leaf must not reach beyond it."""
    first, last = max(page.hva, area.hva_of(pin.start)), min(page.end, area.hva_of(pin.end))
    return HostPage(first, page.hpa + first - page.hva, last - first, page.writable)
