"""The mappings of a process: ordered, split where a change begins or ends, merged where nothing differs.

Models the VMA tree [mm vma.c]: each VMA is a range with one protection, one kind of backing and one set
of advice; two that touch and differ in nothing become one again, so a protection that comes and goes
leaves no trace. A file knows which processes map it: the list tells it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Flag, auto
from typing import Protocol

from kvmd.core.mm.mappable import Mappable, MappingSpace
from protocol.flow import Wait
from protocol.units import Hva, Level, align_up


class FaultHandler(Protocol):
    """Who answers a mapping's faults in user space (`userfaultfd.Userfaultfd`)."""

    def ask(self, hva: Hva, *, write: bool, wp: bool, user: bool) -> Wait[None]:
        """A fault at `hva`: what it sleeps on.  EFAULT: such faults are not answered."""

    def wake(self, start: Hva, end: Hva) -> None:
        """Every fault of the range is tried again."""


class Prot(Flag):
    """WRITE without READ is a protection of its own: a CPU that may write a page reads it as well, while
    get_user_pages asks for VM_READ [mm gup.c]."""

    NONE = 0
    READ = auto()
    WRITE = auto()


@dataclass(slots=True, eq=False)
class Vma:
    """`start..end`, backed by pages of one size; of a file from its byte `offset` on, or anonymous."""

    start: Hva
    end: Hva
    prot: Prot
    level: Level
    file: Mappable | None = None
    offset: int = 0
    shared: bool = False
    huge: bool | None = None  # MADV_HUGEPAGE, MADV_NOHUGEPAGE, neither
    mergeable: bool = False  # MADV_MERGEABLE
    uffd: FaultHandler | None = None
    uffd_missing: bool = False
    uffd_wp: bool = False
    readable: bool = field(init=False)  # what `prot` says, for every fault to see at once
    writable: bool = field(init=False)

    def __post_init__(self) -> None:
        self.protect(self.prot)

    def protect(self, prot: Prot) -> None:
        self.prot = prot
        self.readable, self.writable = Prot.READ in prot, Prot.WRITE in prot

    def forget_uffd(self) -> None:
        self.uffd, self.uffd_missing, self.uffd_wp = None, False, False

    def part(self, start: Hva, end: Hva) -> Vma:
        return replace(self, start=start, end=end, offset=self.offset_of(start))

    def offset_of(self, hva: Hva) -> int:
        """The byte of its file that is mapped at `hva`."""
        return self.offset + hva - self.start if self.file is not None else 0

    def _nature(self) -> tuple[object, ...]:
        advice = self.huge, self.mergeable
        return (
            self.prot,
            self.level,
            self.file,
            self.shared,
            advice,
            self.uffd,
            self.uffd_missing,
            self.uffd_wp,
        )

    def continues(self, left: Vma) -> bool:
        """Whether the two could be one, `left` being the lower."""
        return (
            left.end == self.start
            and left._nature() == self._nature()
            and (self.file is None or left.offset_of(self.start) == self.offset)
        )


class Vmas:
    """The VMAs of `space`, in order."""

    def __init__(self, space: MappingSpace) -> None:
        self._space = space
        self._list: list[Vma] = []

    def __iter__(self) -> Iterator[Vma]:
        return iter(self._list)

    def __len__(self) -> int:
        return len(self._list)

    def find(self, hva: Hva) -> Vma | None:
        at = bisect_right(self._list, hva, key=_start) - 1
        return self._list[at] if at >= 0 and hva < self._list[at].end else None

    def overlapping(self, start: Hva, end: Hva) -> list[Vma]:
        at = max(bisect_right(self._list, start, key=_start) - 1, 0)
        found = []
        for vma in self._list[at:]:
            if vma.start >= end:
                break
            if vma.end > start:
                found.append(vma)
        return found

    def insert(self, vma: Vma) -> None:
        self._list.insert(bisect_right(self._list, vma.start, key=_start), vma)
        if vma.file is not None:
            vma.file.attach(self._space)

    def next(self, hva: Hva) -> Vma | None:
        """The first that ends beyond `hva` [find_vma]."""
        at = bisect_right(self._list, hva, key=_end)
        return self._list[at] if at < len(self._list) else None

    def remove(self, vma: Vma) -> None:
        del self._list[bisect_right(self._list, vma.start, key=_start) - 1]
        if vma.file is not None:
            vma.file.detach(self._space)

    def isolate(self, start: Hva, end: Hva) -> list[Vma]:
        """The VMAs that make up start..end, those at its edges split off from their rest."""
        for edge in (start, end):
            vma = self.find(edge)
            if vma is not None and vma.start < edge:
                rest = vma.part(edge, vma.end)
                vma.end = edge
                self.insert(rest)
        return self.overlapping(start, end)

    def merge(self, start: Hva, end: Hva) -> None:
        """Join what became alike in or next to start..end."""
        vmas = self.overlapping(Hva(max(start - 1, 0)), Hva(end + 1))
        for left, right in zip(reversed(vmas[:-1]), reversed(vmas[1:]), strict=True):
            if right.continues(left):
                left_end = right.end
                self.remove(right)
                left.end = left_end

    def gap(self, base: Hva, limit: Hva, size: int, alignment: int) -> Hva:
        """The lowest place from `base` on where `size` bytes fit."""
        hva = base
        for vma in self.overlapping(base, limit):
            if hva + size <= vma.start:
                break
            hva = Hva(align_up(max(hva, vma.end), alignment))
        return hva

    def first_hole(self, start: Hva, end: Hva) -> Hva | None:
        """The first address of the range where nothing is mapped."""
        at = start
        for vma in self.overlapping(start, end):
            if vma.start > at:
                break
            at = vma.end
        return at if at < end else None


def _start(vma: Vma) -> Hva:
    return vma.start


def _end(vma: Vma) -> Hva:
    return vma.end
