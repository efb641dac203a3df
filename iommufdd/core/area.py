"""The areas of an IOAS: which iova stands for which address of the process, and where more may go.

Models iopt_area, iopt_alloc_iova and iopt_iova_ranges [iommufd io_pagetable.c].  Interrupt messages go to
0xFEExxxxx, so nothing is mapped there; what an HWPT's table does not reach is not allowed while there is
one.  Alignment is always a page: the kernel lets an IOAS without domains take bytes.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

from iommufdd.core.hmm import HmmPage
from protocol.errors import UapiError
from protocol.hva_index import HvaIndex
from protocol.units import (
    LEVEL_4K,
    PAGE_OFFSET_MASK,
    PAGE_SIZE,
    Hpa,
    Hva,
    Iova,
    Level,
    align_down,
    align_up,
    size_of_level,
)

ULONG_MAX = (1 << 64) - 1  # the last byte of an address space
BEYOND = Iova(ULONG_MAX + 1)
MESSAGES_START, MESSAGES_END = 0xFEE0_0000, 0xFEF0_0000
USER_END = 1 << 57
_IOVA = attrgetter("iova")
A = TypeVar("A", bound=int)  # an address of one kind
Span = tuple[A, A]  # start, end
ROOM = (Iova(PAGE_SIZE), Iova(ULONG_MAX - PAGE_SIZE))  # first, last of what is given without being asked for


@dataclass(slots=True, eq=False)
class Area:
    """`hva` is where it begins in the process, or its offset in the file whose pages it shows."""

    iova: Iova
    size: int
    hva: Hva
    writable: bool

    @property
    def end(self) -> Iova:
        return Iova(self.iova + self.size)

    @property
    def hva_end(self) -> Hva:
        return Hva(self.hva + self.size)

    def hva_of(self, iova: Iova) -> Hva:
        return Hva(iova - self.iova + self.hva)

    def iova_of(self, hva: Hva) -> Iova:
        return Iova(hva - self.hva + self.iova)

    def leaves(
        self, page: HmmPage, start: Iova, end: Iova, max_huge_page_level: Level
    ) -> Iterator[tuple[Iova, Hpa, Level]]:
        """(iova, hpa, level) of what maps start..end as far as `page` has it: each leaf as large as the page,
        the area and both alignments allow, so that the first and the last may reach beyond.
        """
        if page.size == PAGE_SIZE:  # most are, and one leaf is all there can be
            at = self.iova_of(page.hva)
            if max(start, self.iova) <= at < min(end, self.end):
                yield at, page.hpa, LEVEL_4K
            return
        low, high = max(self.iova, self.iova_of(page.hva)), min(self.end, self.iova_of(page.end))
        to_hpa = page.hpa - self.iova_of(page.hva)
        at, end = max(start, low), min(end, high)
        while at < end:
            level = max_huge_page_level
            while level > LEVEL_4K:
                size = size_of_level(level)
                first = align_down(at, size)
                if low <= first and first + size <= high and not to_hpa % size:
                    break
                level = Level(level - 1)
            else:
                size, first = size_of_level(LEVEL_4K), at
            yield first, Hpa(first + to_hpa), level
            at = Iova(first + size)


class Areas:
    """In order of iova; none overlaps another."""

    def __init__(self) -> None:
        self.width = 64  # address bits every HWPT reaches
        self._allowed: list[Span[Iova]] = []  # (first, last) each, in order, apart; empty: everything
        self._areas: list[Area] = []
        self._by_hva = HvaIndex()  # named by their iovas

    def __iter__(self) -> Iterator[Area]:
        return iter(list(self._areas))

    def __contains__(self, area: Area) -> bool:
        return self.at(area.iova) is area

    def at(self, iova: Iova) -> Area | None:
        index = bisect_right(self._areas, iova, key=_IOVA) - 1
        if index < 0:
            return None
        area = self._areas[index]
        return area if iova < area.end else None

    def within(self, start: Iova, end: Iova) -> list[Area]:
        """Those that have a part in start..end."""
        first = bisect_right(self._areas, start, key=_IOVA)
        if first and start < self._areas[first - 1].end:
            first -= 1
        return self._areas[first : bisect_left(self._areas, end, key=_IOVA)]

    def of_hva(self, start: Hva, end: Hva) -> Iterator[tuple[Area, Span[Iova]]]:
        """Each area that maps part of hva range start..end, and the iovas of that part."""
        for area in [self.at(Iova(name)) for name in self._by_hva.near(start, end)]:
            assert area is not None, "an area is where its name says"
            first, last = max(start, area.hva), min(end, area.hva_end)
            if first < last:
                yield area, (area.iova_of(first), area.iova_of(last))

    def add(self, area: Area) -> None:
        self._areas.insert(bisect_left(self._areas, area.iova, key=_IOVA), area)
        self._by_hva.add(area.iova, area.hva, area.size)

    def remove(self, area: Area) -> None:
        assert area in self, "an area goes once"
        del self._areas[bisect_left(self._areas, area.iova, key=_IOVA)]
        self._by_hva.remove(area.iova, area.hva, area.size)

    # -- where --------------------------------------------------------------------------------------------

    @property
    def available(self) -> list[Span[Iova]]:
        """What may be mapped, (first, last) each: all that is not reserved."""
        return _available(self.width)

    def allow(self, spans: Sequence[Span[Iova]]) -> None:
        """From now on these (first, last), which do not overlap, stay available, and `room` is found in them
        alone; none: everything.  What lies at a given iova is not asked [iopt_set_allow_iova].  EADDRINUSE:
        not all of it is available.
        """
        for first, last in spans:
            if not _within(first, last, self.available):
                raise UapiError(
                    errno.EADDRINUSE,
                    f"iovas {first:#x}..{last:#x} cannot be kept: available is {_hex(self.available)}",
                )
        self._allowed = []
        for first, last in sorted(spans):
            if self._allowed and self._allowed[-1][1] + 1 == first:
                first, _ = self._allowed.pop()
            self._allowed.append((first, last))

    def check_reach(self, width: int) -> None:
        """EADDRINUSE: an area, or what is to stay available, is beyond an HWPT's address bits
        [iopt_reserve_iova].
        """
        for area in self:
            if area.end - 1 >> width:
                raise UapiError(
                    errno.EADDRINUSE,
                    f"area {area.iova:#x}+{area.size:#x}: the HWPT has {width} address bits",
                )
        for first, last in self._allowed:
            if last >> width:
                raise UapiError(
                    errno.EADDRINUSE,
                    f"iovas {first:#x}..{last:#x} are to stay available: the HWPT has {width} address bits",
                )

    def check(self, iova: Iova, size: int) -> None:
        """EINVAL, EOVERFLOW, EEXIST: an area cannot lie there [iopt_check_iova]."""
        if iova & PAGE_OFFSET_MASK:
            raise UapiError(errno.EINVAL, f"iova {iova:#x} is not aligned to a page")
        if iova + size - 1 > ULONG_MAX:
            raise UapiError(errno.EOVERFLOW, f"iova {iova:#x}+{size:#x} is beyond 64 bits")
        if not _within(iova, Iova(iova + size - 1), self.available):
            raise UapiError(errno.EINVAL, f"iova {iova:#x}+{size:#x}: not in {_hex(self.available)}")
        for area in self.within(iova, Iova(iova + size)):
            raise UapiError(
                errno.EEXIST, f"iova {iova:#x}+{size:#x}: {area.iova:#x}+{area.size:#x} is mapped"
            )

    def room(self, alignment_of: int, size: int) -> Iova:
        """The first iova but 0 where an area fits, aligned as the memory is, which `alignment_of` stands for
        (0: to anything) [iopt_alloc_iova].  ENOSPC;
        EOVERFLOW: half of all iovas, or more.
        """
        if size >= ULONG_MAX // 2:
            raise UapiError(errno.EOVERFLOW, f"room for {size:#x} bytes: that is half of all iovas")
        alignment = 1 << (size - 1).bit_length()
        if alignment_of:
            alignment = min(alignment, alignment_of & -alignment_of)
        for first, last in _overlaps(self._allowed or [ROOM], [ROOM], self.available):
            at = align_up(first, alignment)
            for area in self.within(first, Iova(last + 1)):
                if at + size <= area.iova:
                    break
                at = align_up(max(at, area.end), alignment)
            if at + size - 1 <= last:
                return at
        raise UapiError(
            errno.ENOSPC,
            f"no room for {size:#x} bytes aligned to {alignment:#x} in {_hex(self._allowed or [ROOM])}",
        )


def _available(width: int) -> list[Span[Iova]]:
    return [(Iova(0), Iova(MESSAGES_START - 1)), (Iova(MESSAGES_END), Iova((1 << width) - 1))]


def _within(first: Iova, last: Iova, spans: list[Span[Iova]]) -> bool:
    return any(start <= first and last <= end for start, end in spans)


def _overlaps(*lists: list[Span[Iova]]) -> list[Span[Iova]]:
    """What all have, (first, last) each."""
    found = [(Iova(0), Iova(ULONG_MAX))]
    for spans in lists:
        pairs = [(max(a, b), min(c, d)) for a, c in found for b, d in spans]
        found = [(first, last) for first, last in pairs if first <= last]
    return found


def check_memory(hva: Hva, size: int) -> None:
    """EINVAL, EOVERFLOW: no memory of a process is that, nor part of a file."""
    if not size or (hva | size) & PAGE_OFFSET_MASK:
        raise UapiError(errno.EINVAL, f"{hva:#x}+{size:#x}: not whole pages")
    if hva + size > ULONG_MAX:
        raise UapiError(errno.EOVERFLOW, f"{hva:#x}+{size:#x} is beyond 64 bits")


def check_user(hva: Hva, size: int) -> None:
    """EFAULT: no memory of a process is that."""
    if hva + size > USER_END:
        raise UapiError(errno.EFAULT, f"user_va {hva:#x}+{size:#x}: no user address")


def without(span: Span[A], holes: Iterable[Span[A]]) -> Iterator[Span[A]]:
    """What is left of `span`."""
    start, end = span
    for first, last in sorted(holes):
        if last <= start or end <= first:
            continue
        if start < first:
            yield start, first
        start = max(start, last)
    if start < end:
        yield start, end


def _hex(spans: list[Span[Iova]]) -> str:
    return ", ".join(f"{first:#x}..{last:#x}" for first, last in spans)
