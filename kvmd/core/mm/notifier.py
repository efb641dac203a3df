"""Telling secondary MMUs about a change before it is made, and that it was made.

Models mmu_notifier [mm mmu_notifier.c]: whoever maps pages of an address space by other means hears of a
change first, lets go of the range, and answers when nobody can use the old translation any more; then the
change is made and the end is told. A change may concern several address spaces: a page that a fork or a
file gave to more than one is taken from all of them at once.

Invariant I6 has its home in `edit_notified`: notify and wait, then edit, which releases what nobody counts
on, then the end. Whoever registers while a change is under way is told as well, before the edit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol, TypeVar

from kvmd.core.mm.memory import PageAllocator
from protocol.units import Hva

T = TypeVar("T")


class MmuNotifier(Protocol):
    """A secondary MMU that maps pages of an address space."""

    async def invalidate_range_start(self, start: Hva, end: Hva) -> None:
        """Stop using translations of start..end; returns when nobody can use them any more."""

    def invalidate_range_end(self, start: Hva, end: Hva) -> None:
        """The change is made; new translations may be looked up."""

    async def clear_flush_young(self, start: Hva, end: Hva) -> bool:
        """Whether a page of the range was used since it was last asked, which it is not from now on."""


class Notified(Protocol):
    """An address space, as whoever changes it tells of it."""

    id: int
    notifiers: list[MmuNotifier]
    memory: PageAllocator


class Range(NamedTuple):
    """start..end of one address space."""

    space: Notified
    start: Hva
    end: Hva


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same ranges, those of one address space that touch or overlap made one."""
    found: list[Range] = []
    for space, start, end in sorted(ranges, key=lambda r: (r.space.id, r.start)):
        if found and found[-1].space is space and start <= found[-1].end:
            found[-1] = Range(space, found[-1].start, max(end, found[-1].end))
        else:
            found.append(Range(space, start, end))
    return found


class ToldRanges:
    """Ranges that were told, to be asked of one page after the other."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self._edges: dict[Notified, tuple[list[Hva], list[Hva]]] = {}
        for space, start, end in joined(ranges):
            starts, ends = self._edges.setdefault(space, ([], []))
            starts.append(start)
            ends.append(end)

    def covers(self, inner: Range) -> bool:
        """Whether all of `inner` was."""
        starts, ends = self._edges.get(inner.space, ([], []))
        at = bisect_right(starts, inner.start) - 1
        return at >= 0 and inner.end <= ends[at]


async def edit_notified(ranges: Sequence[Range], edit: Callable[[], T]) -> T:
    """Have every notifier of `ranges` let go, make the change, say that it is made."""
    # await: edit: cannot change: the caller's own, who looks at the page table when it is called
    async with announced(ranges):
        return edit()


@asynccontextmanager
async def announced(ranges: Sequence[Range]) -> AsyncIterator[None]:
    """Inside, every notifier of `ranges` has let go of them and waits to hear that the change is made."""
    told: list[tuple[MmuNotifier, Hva, Hva]] = []
    known: set[tuple[MmuNotifier, Hva, Hva]] = set()
    try:
        while untold := [
            (space, notifier, start, end)
            for space, start, end in ranges
            for notifier in space.notifiers
            if (notifier, start, end) not in known
        ]:
            for space, notifier, start, end in untold:
                told.append((notifier, start, end))
                known.add(told[-1])
                space.memory.counters.notifier_calls += 1
                # await: each space, known, ranges, told: a notifier may register, or leave; asked again:
                # `untold`
                # (tests/unit/kvmd/mm/test_notifier.py::test_who_registers_meanwhile_is_told_before_the_edit,
                # tests/unit/kvmd/mm/test_notifier.py::test_who_leaves_before_it_acked_is_waited_for)
                await notifier.invalidate_range_start(start, end)
        yield
    finally:
        for notifier, start, end in told:
            notifier.invalidate_range_end(start, end)
