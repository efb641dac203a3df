"""Page numbers to values, kept as runs: what is at the first page of a run says what is at every other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, Protocol, TypeVar


class _Movable(Protocol):
    def moved(self: _V, pages: int, /) -> _V: ...


_V = TypeVar("_V", bound=_Movable)
Run = tuple[int, int, _V]  # first page, the page behind its last, what is at the first


@dataclass(frozen=True, slots=True)
class Translation:
    """Pages from `frame` on; `rights`: of R, W, X and D (`protocol/pt/bits.py`).  D counts as one: a CPU
    stores through a cached translation only if D was set when it was cached.
    """

    frame: int
    rights: int

    def moved(self, pages: int) -> Translation:
        return self if not pages else Translation(self.frame + pages, self.rights)

    def gives(self, other: Translation) -> bool:
        """All that `other` gives."""
        return self.frame == other.frame and not other.rights & ~self.rights


@dataclass(frozen=True, slots=True)
class Owner:
    name: str
    since: int

    def moved(self, _: int) -> Owner:
        return self


class Spans(Generic[_V]):
    def __init__(self) -> None:
        self._starts: list[int] = []
        self._runs: list[Run[_V]] = []

    def __iter__(self) -> Iterator[Run[_V]]:
        return iter(list(self._runs))

    def get(self, page: int) -> _V | None:
        at = bisect_right(self._starts, page) - 1
        if at < 0:
            return None
        start, end, value = self._runs[at]
        return value.moved(page - start) if page < end else None

    def put(self, start: int, end: int, value: _V) -> list[Run[_V]]:
        """What was there."""
        was = self.clear(start, end)
        at = bisect_right(self._starts, start)
        self._starts.insert(at, start)
        self._runs.insert(at, (start, end, value))
        return was

    def clear(self, start: int, end: int) -> list[Run[_V]]:
        """What was there."""
        first, last, was = self._overlapping(start, end)
        kept: list[Run[_V]] = []
        for a, b, value in self._runs[first:last]:
            if a < start:
                kept.append((a, start, value))
            if b > end:
                kept.append((end, b, value.moved(end - a)))
        self._runs[first:last] = kept
        self._starts[first:last] = [run[0] for run in kept]
        return was

    def within(self, start: int, end: int) -> list[Run[_V]]:
        return self._overlapping(start, end)[2]

    def _overlapping(self, start: int, end: int) -> tuple[int, int, list[Run[_V]]]:
        """From which run to which, and those cut to start..end."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        if first < len(self._runs) and self._runs[first][1] <= start:
            first += 1
        last, cut = first, []
        while last < len(self._runs) and self._runs[last][0] < end:
            a, b, value = self._runs[last]
            low = max(a, start)
            cut.append((low, min(b, end), value.moved(low - a)))
            last += 1
        return first, last, cut


def merged(runs: Iterable[Run[_V]]) -> list[Run[_V]]:
    """Runs in order, those that go on one from the other made one."""
    found: list[Run[_V]] = []
    for start, end, value in runs:
        if found and found[-1][1] == start and found[-1][2].moved(start - found[-1][0]) == value:
            found[-1] = found[-1][0], end, found[-1][2]
        else:
            found.append((start, end, value))
    return found


def side_by_side(
    before: list[Run[_V]], after: list[Run[_V]], start: int, end: int
) -> Iterator[tuple[int, int, _V | None, _V | None]]:
    """start..end in pieces, with what two lists of runs have of each."""
    edges = sorted({start, end, *(edge for run in (*before, *after) for edge in run[:2])})
    old, new = iter(before), iter(after)
    was, now = next(old, None), next(new, None)
    for low, high in pairwise(edges):
        while was is not None and was[1] <= low:
            was = next(old, None)
        while now is not None and now[1] <= low:
            now = next(new, None)
        yield low, high, _at(was, low), _at(now, low)


def _at(run: Run[_V] | None, page: int) -> _V | None:
    return None if run is None or page < run[0] else run[2].moved(page - run[0])


def overlap(a: int, a_pages: int, b: int, b_pages: int) -> bool:
    return a < b + b_pages and b < a + a_pages


def frame_of(there: Translation | None) -> str:
    return "nothing" if there is None else f"frame {there.frame:#x}"
