"""A PCIe function with ATS and PRI: how its DMA finds host memory, and what it does on a miss.

Models the translation side of an endpoint [PCIe 10]: a device TLB, translation requests on a miss, page
requests when the answer lacks the right and the access may block (block on fault), a new translation
request after each success, because the response carries no translation.  DMA itself is a copy of host
memory.

I6, the device's half: in debug builds every access compares the tag of each frame, before and after, with the
one it had when it was walked; `stale` counts frames touched after they were given up.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from device_sim.core import msi
from device_sim.core.devtlb import DevTlb, HpaRun
from device_sim.core.dmar import NOT_PRESENT, RemappingUnit, RequestRefused
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.pri import PageAccess, PageRequestInterface
from device_sim.core.traits import InvalidateCompletion, Traits
from protocol.errors import UapiError
from protocol.hw.qi import ALL_PAGES, ResponseCode
from protocol.pt import bits
from protocol.units import PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE, Hpa, Iova, IovaPfn, iova_pfn_of

GROUP_PAGES = 8  # as many pages as one group asks for
MAX_REQUESTS = 64  # page requests for one page, answered Success, before the device gives up on it (R20)
MAX_STALE_NOTES = 16
MAX_LATENCIES = 4096


@dataclass(frozen=True, slots=True)
class DmaRange:
    iova: Iova
    size: int
    write: bool


class FaultCause(Enum):
    ABSENT = auto()  # and not asked for
    INVALID = auto()  # asked for, and refused or in vain; or what its translation leads to takes no access
    ERROR = auto()  # the translation request was answered UR or CA, or the page request Response Failure


class DmaFault(Exception):
    """The access cannot be made."""

    def __init__(self, iova: Iova, write: bool, why: FaultCause) -> None:
        super().__init__(f"{'write' if write else 'read'} of iova {iova:#x}: {why.name.lower()}")
        self.iova = iova
        self.write = write
        self.why = why


class Function:
    """`clock` gives nanoseconds: latencies are from the first refused translation to the granted one."""

    def __init__(
        self,
        rid: int,
        unit: RemappingUnit,
        memory: PhysicalMemory,
        clock: Callable[[], int],
        traits: Traits | None = None,
    ) -> None:
        self.rid = rid
        self.traits = traits or Traits()
        self.io_faults = 0  # accesses that needed a page request and were granted
        self.fault_latencies_ns: deque[int] = deque(maxlen=MAX_LATENCIES)
        self._clock = clock
        self.devtlb = DevTlb()
        self.pri = PageRequestInterface(rid, unit.prq, self.traits.pri_capacity)
        self.pasid_enabled = False
        self.ats_enabled = False
        self.dma_enabled = False
        self.stale = 0
        self.stale_notes: list[str] = []
        self._late = False  # is there an invalidation that the unit does not wait for any more?
        self._unit = unit
        self._memory = memory
        unit.add_endpoint(rid, self)
        if self.traits.pri_on:
            self.pri.enable(self.pri.capacity)

    # -- what the remapping unit sends -----------------------------------------------------------------

    def invalidate_translations(self, start: IovaPfn, npages: int) -> bool:
        """An ATS invalidation: DMA is not in the middle of anything here, so it completes at once, unless the
        function is one that does not.  What is late comes before the next is completed.
        """
        completion = self.traits.invalidate_completion
        late = completion is InvalidateCompletion.LATE and not self._late
        if late or completion is InvalidateCompletion.NEVER:
            self._late = late
            return False
        if self._late:
            self._late = False
            self._unit.unexpected_completion(self.rid)
        self.devtlb.invalidate(start, npages)
        return True

    def page_response(self, prgi: int, code: ResponseCode) -> None:
        self.pri.respond(prgi, code)

    def configure(
        self,
        *,
        pasid: bool | None = None,
        ats: bool | None = None,
        pri_allocation: int | None = None,
        bus_master: bool | None = None,
    ) -> None:
        """Config space; what is not named stays as it is.  With ATS or bus mastering off there is no DMA.

        EINVAL: the function has no such capability, or the order is wrong: PASID before ATS, ATS before
        page requests [PCIe 10].  EBUSY: page requests are on already.
        """
        self._check(pasid, ats, pri_allocation)
        if pasid is not None:
            self.pasid_enabled = pasid
        if ats is not None:
            self.ats_enabled = ats
        if bus_master is not None:
            self.dma_enabled = bus_master
        if pri_allocation:
            self.pri.enable(pri_allocation)
        elif pri_allocation is not None and self.pri.enabled:
            self.pri.disable()
        if not (self.ats_enabled and self.dma_enabled):
            self.devtlb.invalidate(IovaPfn(0), ALL_PAGES)

    def _check(self, pasid: bool | None, ats: bool | None, pri_allocation: int | None) -> None:
        absent = (
            (pasid and not self.traits.pasid, "it has no PASID"),
            (ats and not self.traits.ats, "it has no ATS"),
            (pri_allocation and not self.traits.pri, "it has no page requests"),
            (pasid is not None and pasid != self.pasid_enabled and self.ats_enabled, "PASID after ATS"),
            (pri_allocation and not (self.ats_enabled if ats is None else ats), "page requests need ATS"),
        )
        for wrong, why in absent:
            if wrong:
                raise UapiError(errno.EINVAL, f"rid {self.rid:#x}: {why}")
        if pri_allocation and self.pri.enabled:
            raise UapiError(errno.EBUSY, f"rid {self.rid:#x}: page requests are on already")

    def stop(self) -> None:
        """The driver is gone: no translation, no page request; as after a reset."""
        self.configure(ats=False, bus_master=False, pri_allocation=0)
        self.configure(pasid=False)
        self._late = False  # who waited for it no more is gone
        if self.traits.pri_on:
            self.pri.enable(self.pri.capacity)

    # -- DMA -------------------------------------------------------------------------------------------

    async def make_accessible(self, ranges: list[DmaRange], *, block: bool) -> None:
        """Have the first page that misses of each range, and those that miss after it, translated.

        Returns once at least the first missing page of each range is in the device TLB.  Raises DmaFault: one
        page was asked for again and again in vain; an access that gets on takes as many requests as it takes.
        """
        began = None
        tries: dict[IovaPfn, int] = {}  # by the page that was first in the request
        while True:
            missing = self._translate_missing(ranges)
            if not missing:
                if began is not None:
                    self.io_faults += 1
                    self.fault_latencies_ns.append(self._clock() - began)
                return
            if began is None:
                began = self._clock()
            first = missing[0]
            if not (block and self.pri.enabled):
                raise DmaFault(Iova(first.page << PAGE_SHIFT), first.write, FaultCause.ABSENT)
            tried = tries.get(first.page, 0)
            if tried == MAX_REQUESTS:
                raise DmaFault(Iova(first.page << PAGE_SHIFT), first.write, FaultCause.INVALID)
            tries[first.page] = tried + 1
            # await: began, first, missing, ranges: pages may be there now, which costs a request; asked
            # again: the next round translates
            # (tests/unit/device_sim/test_function_off.py::test_a_page_that_comes_meanwhile_is_found)
            # | asked: page requests go off; asked again: `_open` of pri.py
            # (tests/unit/device_sim/test_function_off.py::test_page_requests_gone_meanwhile_end_it)
            # | tries: cannot change: our own count
            await self._unit.prq.wait_accepting()  # asking an overflowed queue again is no use
            # await: began, first, ranges, asked: an answer is no translation, and may be old; asked again:
            # the next round
            # (tests/unit/device_sim/test_function.py::test_a_page_taken_after_the_answer_is_asked_for)
            # | tries: cannot change: our own count
            code = await self.pri.request(missing[: min(GROUP_PAGES, self.pri.allocation)])
            if code is not ResponseCode.SUCCESS:
                why = FaultCause.ERROR if code is ResponseCode.FAILURE else FaultCause.INVALID
                raise DmaFault(Iova(first.page << PAGE_SHIFT), first.write, why)

    def _translate_missing(self, ranges: list[DmaRange]) -> list[PageAccess]:
        """Translation requests for what the device TLB lacks; the accesses that were not granted."""
        refused: dict[IovaPfn, PageAccess] = {}
        for dma in ranges:
            asked = 0
            at = dma.iova
            end = dma.iova + dma.size
            while at < end and asked < GROUP_PAGES:
                _, covered = self.devtlb.runs(at, end - at, dma.write)
                at = Iova(at + covered)
                if covered and at < end:
                    at = Iova(at & ~PAGE_OFFSET_MASK)
                if at >= end:
                    break
                if msi.touches(at, 1):
                    if at == dma.iova:  # what is behind memory is met when that is done
                        self._interrupt_request(dma)
                    break
                asked += 1
                page = iova_pfn_of(at)
                if not self._translate(page, dma.write):
                    if page not in refused or dma.write:
                        refused[page] = PageAccess(page, dma.write)
                    at = Iova((at | PAGE_OFFSET_MASK) + 1)
        return list(refused.values())

    def _interrupt_request(self, dma: DmaRange) -> None:
        """There is nothing to translate; only a message may go there."""
        if not self.dma_enabled:
            raise DmaFault(dma.iova, dma.write, FaultCause.ABSENT)
        try:
            size = _one_request(dma.iova, dma.size)
            self._unit.interrupt_request(self.rid, dma.iova, size, write=dma.write)
        except RequestRefused:
            raise DmaFault(dma.iova, dma.write, FaultCause.INVALID) from None

    def _is_message(self, iova: Iova, size: int) -> bool:
        """An interrupt message, which needs no translation."""
        return self.dma_enabled and msi.is_message(iova, size)

    def _write_message(self, iova: Iova, data: bytes) -> bool:
        """A write the device TLB has nothing for: perhaps an interrupt message."""
        if not self._is_message(iova, len(data)):
            return False
        self._unit.interrupt(msi.InterruptMessage(self.rid, iova, int.from_bytes(data, "little")))
        return True

    def _translate(self, page: IovaPfn, write: bool) -> bool:
        """One ATS translation request; whether the device TLB now allows the access."""
        need = bits.WRITE if write else bits.READ
        self.devtlb.misses += 1
        if not (self.ats_enabled and self.dma_enabled):
            raise DmaFault(Iova(page << PAGE_SHIFT), write, FaultCause.ABSENT)
        try:
            entry = self._unit.translation_request(self.rid, page, need)
        except RequestRefused:  # UR or CA
            raise DmaFault(Iova(page << PAGE_SHIFT), write, FaultCause.ERROR) from None
        if entry is not NOT_PRESENT:
            tag = entry.tag if self._memory.tags is not None else None
            self.devtlb.fill(page, entry.hpa, entry.level, entry.rights, tag)
        return entry.rights & need != 0

    def accessible(self, dma: DmaRange) -> int:
        """How many bytes of it, from the front, are translated; or those of an interrupt message."""
        translated = self.devtlb.runs(dma.iova, dma.size, dma.write)[1]
        if not translated and dma.write:
            size = _one_request(dma.iova, dma.size)
            return size if self._is_message(dma.iova, size) else 0
        return translated

    def read(self, iova: Iova, size: int) -> bytes | None:
        """The bytes, or None if part of them is not translated."""
        runs, covered = self.devtlb.runs(iova, size, write=False)
        if covered < size:
            return None
        self._count_hits(iova, size)
        self._note_stale("after", iova, size, write=False)
        data = b"".join(self._pieces(runs, iova, False))
        self._note_stale("while", iova, size, write=False)
        return data

    def write(self, iova: Iova, data: bytes) -> bool:
        """Store; False, and nothing stored, if part of the range is not translated."""
        runs, covered = self.devtlb.runs(iova, len(data), write=True)
        if covered < len(data):
            return self._write_message(iova, data)
        self._count_hits(iova, len(data))
        self._note_stale("after", iova, len(data), write=True)
        at = 0
        for piece in self._pieces(runs, iova, True):
            piece[:] = data[at : at + len(piece)]
            at += len(piece)
        self._note_stale("while", iova, len(data), write=True)
        return True

    def copy(self, src: Iova, dst: Iova, size: int) -> int:
        """Copy as much from the front as both sides are translated for; how many bytes."""
        src_runs, readable = self.devtlb.runs(src, size, False)
        dst_runs, writable = self.devtlb.runs(dst, size, True)
        count = min(readable, writable)
        if not count:
            size = _one_request(dst, size)
            message = self.read(src, size) if self._is_message(dst, size) else None
            return size if message is not None and self._write_message(dst, message) else 0
        self._count_hits(src, count)
        self._count_hits(dst, count)
        tagged = self._memory.tags is not None
        if tagged:
            self._note_stale("after", src, count, write=False)
            self._note_stale("after", dst, count, write=True)
        if len(src_runs) + len(dst_runs) > 2 or not self._copy_run(src_runs[0], dst_runs[0], count):
            self._copy_pieces(self._pieces(src_runs, src, False), self._pieces(dst_runs, dst, True), count)
        if tagged:
            self._note_stale("while", src, count, write=False)
            self._note_stale("while", dst, count, write=True)
        return count

    def _count_hits(self, iova: Iova, size: int) -> None:
        self.devtlb.hits += (iova + size - 1 >> PAGE_SHIFT) - (iova >> PAGE_SHIFT) + 1

    def _copy_run(self, src_run: HpaRun, dst_run: HpaRun, count: int) -> bool:
        """The usual copy: one piece of host memory to another.  False if either leaves its window."""
        source, target = self._memory.frame(src_run[0]), self._memory.frame(dst_run[0])
        if source is None or target is None:
            return False
        (src, src_at), (dst, dst_at) = source, target
        if src_at + count > len(src) or dst_at + count > len(dst):
            return False
        dst[dst_at : dst_at + count] = src[src_at : src_at + count]
        return True

    def _copy_pieces(self, src_pieces: list[memoryview], dst_pieces: list[memoryview], count: int) -> None:
        src, dst = iter(src_pieces), iter(dst_pieces)
        source, target = next(src), next(dst)
        while count:
            step = min(len(source), len(target), count)
            target[:step] = source[:step]
            count -= step
            if count:
                source = source[step:] if step < len(source) else next(src)
                target = target[step:] if step < len(target) else next(dst)

    def _pieces(self, runs: list[HpaRun], iova: Iova, write: bool) -> list[memoryview]:
        """Each run as memory, in two where a window ends and the next begins.

        Raises DmaFault where the table points outside memory.
        """
        pieces = []
        at = behind = 0  # bytes of the access
        for hpa, size in runs:
            behind += size
            while at < behind:
                place = self._memory.frame(hpa)
                if place is None:
                    raise DmaFault(Iova(iova + at >> PAGE_SHIFT << PAGE_SHIFT), write, FaultCause.INVALID)
                view, offset = place
                piece = view[offset : offset + behind - at]
                pieces.append(piece)
                at += len(piece)
                if at < behind:
                    hpa = Hpa(hpa + len(piece))
        return pieces

    # -- the debug check -------------------------------------------------------------------------------

    def _note_stale(self, when: str, iova: Iova, size: int, *, write: bool) -> None:
        """Compare every frame's tag with the one it was walked under; asked on both sides of an access."""
        tags = self._memory.tags
        if tags is None:
            return
        for page in range(iova >> PAGE_SHIFT, (iova + size - 1 >> PAGE_SHIFT) + 1):
            cached = self.devtlb.tag_of(IovaPfn(page), write)
            if cached is not None and tags.read(cached[0]) != cached[1]:
                self.stale += 1
                if len(self.stale_notes) < MAX_STALE_NOTES:
                    what = "written" if write else "read"
                    self.stale_notes.append(
                        f"I6: pfn {cached[0]:#x} {what} as page {page:#x} {when} it was given up"
                    )


def _one_request(iova: Iova, size: int) -> int:
    """Bytes of the first memory request of an access: none crosses a 4 KiB boundary [PCIe 2.2.7]."""
    return min(size, PAGE_SIZE - (iova & PAGE_OFFSET_MASK))
