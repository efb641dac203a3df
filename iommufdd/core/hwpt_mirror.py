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

from iommufdd.core.area import Area, Span
from iommufdd.core.domain import Domain
from iommufdd.core.hardware import MemoryBus
from iommufdd.core.hmm import MIRROR_TRIES, HmmPage, HmmRange, Lookup
from iommufdd.core.hwpt_paging import HwptPaging, MappedIoas
from iommufdd.core.io_pagetable import IoPageTable
from iommufdd.core.mirror_pins import MirrorPins
from iommufdd.core.watched import WatchedMemory
from protocol.errors import UapiError
from protocol.hw.prq import PageRequest
from protocol.units import LEVEL_4K, PAGE_SIZE, Hva, Iova, align_down, size_of_level


class HwptMirror(HwptPaging):
    needs_iopf = True

    def __init__(
        self,
        domain: Domain,
        memory: MemoryBus,
        ioas: MappedIoas,
        watched: WatchedMemory,
        table: IoPageTable,
        premap_pages: int = 1,
    ) -> None:
        super().__init__(domain, memory, ioas, table)
        self._premap = premap_pages * PAGE_SIZE  # from the page that faulted on, as far as the area goes
        self.pins = MirrorPins(self, watched)
        self._watched = watched

    # -- a page request --------------------------------------------------------------------------------

    async def fault_in(self, request: PageRequest) -> None:
        """EFAULT: in no area, or not to be written; the host's errnos; EAGAIN: it would not hold still."""
        iova, write = align_down(request.addr, PAGE_SIZE), request.write
        for _ in range(MIRROR_TRIES):
            area = self._watched.areas.at(iova)
            if area is None or (write and not area.writable):
                what = "is in no area" if area is None else "is not to be written"
                raise UapiError(errno.EFAULT, f"iova {iova:#x} {what}")
            if self._serves(iova, write=write):
                self.ioas.counts.io_faults_spurious += 1
                return
            end = min(Iova(iova + self._premap), area.end)
            with self._watched.lookups.begin() as lookup:
                # await: area, end: it may go, and with it what is found there; asked again: `install`
                # (tests/unit/iommufdd/test_hwpt_mirror.py::test_an_area_gone_under_a_fault_is_not_mapped) |
                # asked: another fault may map the page; asked again: `install`
                # (tests/unit/iommufdd/test_hwpt_mirror.py::test_two_faults_on_one_page_map_it_once) | lookup:
                # the host may take away what it found; asked again: `Lookup.stale`
                # (tests/unit/iommufdd/test_hwpt_mirror.py::test_what_went_behind_the_answer_is_not_mapped)
                found = await self._populated(area, iova, end, write=write)
                self.ioas.counts.io_faults_major += found.major
                new = self.install(lookup, area, found.pages, iova, end)
            if new:
                # await: new, asked: the leaf may be taken out again; asked again: `_serves`
                # (tests/unit/iommufdd/test_hwpt_mirror.py::test_a_page_gone_in_a_flush_is_asked_for_again)
                await self.flush()
            if self._serves(iova, write=write):
                self.ioas.counts.io_faults_spurious += not new  # somebody else was first
                return
            self.ioas.counts.io_fault_retries += 1
        raise UapiError(errno.EAGAIN, f"iova {iova:#x}: the host took the page away {MIRROR_TRIES} times")

    async def _populated(self, area: Area, iova: Iova, end: Iova, *, write: bool) -> HmmRange:
        """iova..end as far as the host has it then, or has memory for it; the page at `iova` alone, if what
        is behind it cannot be had at all.
        """
        host, hva = self._watched.host, area.hva_of(iova)
        try:
            # await: host, hva: cannot change: memory on demand is of one process, an area does not move
            return await host.range_fault(hva, end - iova, write=write, fault=True)
        except UapiError:
            if end - iova == PAGE_SIZE:
                raise
        return await host.range_fault(hva, PAGE_SIZE, write=write, fault=True)

    def _serves(self, iova: Iova, *, write: bool) -> bool:
        leaf = self.table.leaf_at(iova)
        return leaf is not None and (leaf.writable or not write)

    def install(self, lookup: Lookup, area: Area, pages: Sequence[HmmPage], start: Iova, end: Iova) -> bool:
        """Map start..end as far as `pages`, which `lookup` found, are what the host still has; was any of it
        new?  ENOMEM.
        """
        new = False
        if area not in self._watched.areas:
            return new
        for page in pages:
            writable = page.writable and area.writable
            max_huge_page_level = LEVEL_4K if self.pins else self.max_huge_page_level
            for iova, hpa, level in area.leaves(page, start, end, max_huge_page_level):
                hva, size = area.hva_of(iova), size_of_level(level)
                if lookup.stale(hva, Hva(hva + size)) or iova in self.pins:
                    continue
                if self.table.leaf_at(iova) != (iova, level, hpa, writable):
                    self.put_run(iova, [hpa], level, writable=writable)
                    new = True
        return new

    # -- the host takes away ---------------------------------------------------------------------------

    def take_unpinned(self, spans: Iterable[Span[Iova]]) -> None:
        for span in spans:
            for part in self.pins.unpinned_in(*span):
                self.take(*part)

    # -- pinning ---------------------------------------------------------------------------------------

    async def pin(self, iova: Iova, size: int) -> int:
        async with self.ioas.lock:
            self._check_there()
            return await self.pins.pin(iova, size)

    async def pin_all(self) -> int:
        async with self.ioas.lock:
            self._check_there()
            return await self.pins.pin_everything()

    async def unpin(self, pin: int) -> None:
        async with self.ioas.lock:
            await self.pins.unpin(pin)

    def _check_there(self) -> None:
        """Its pins ended with it, while we waited for the lock."""
        if self not in self.ioas.hwpts:
            raise UapiError(errno.EINVAL, f"pin on HWPT {self.id}: it was destroyed meanwhile")
