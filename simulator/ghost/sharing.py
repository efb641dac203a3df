"""Which processes have each frame: what several have is writable to none, unless a file's (I21).

Put down frame by frame as their page tables change; no page of the host's is asked who maps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from protocol.pt.bits import WRITE
from simulator.ghost.backing import Name
from simulator.ghost.spans import Run, Spans, Translation, side_by_side
from simulator.ghost.violation import Verdicts


class _Mapper(NamedTuple):
    """`shift`: from frames to pages of the space."""

    space: Name
    shift: int
    writable: bool


@dataclass(frozen=True, slots=True)
class _Mappers:
    of: frozenset[_Mapper]

    def moved(self, _: int) -> _Mappers:
        return self


class Sharing:
    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
        self._had: Spans[_Mappers] = Spans()

    def maps(self, space: Name, run: Run[Translation]) -> None:
        """Frames of no file."""
        mapper = _mapper(space, run)
        for first, end, mappers in self._change(run, lambda of: of | {mapper}):
            spaces = {each.space for each in mappers.of}
            writers = sorted(f"{each.space}" for each in mappers.of if each.writable)
            if len(spaces) > 1 and writers:
                what = f"frames {first:#x}..{end:#x} are of {' and '.join(sorted(map(str, spaces)))}"
                self._verdicts.say("I21", f"{what}, writable to {writers[0]}")

    def unmaps(self, space: Name, run: Run[Translation]) -> None:
        """Those of files, too."""
        mapper = _mapper(space, run)
        self._change(run, lambda of: of - {mapper})

    def forget(self) -> None:
        """The host died."""
        self._had = Spans()

    def _change(
        self, run: Run[Translation], change: Callable[[frozenset[_Mapper]], frozenset[_Mapper]]
    ) -> list[Run[_Mappers]]:
        """What the frames of the run have now."""
        start, end, there = run
        first, last = there.frame, there.frame + end - start
        now: list[Run[_Mappers]] = []
        for low, high, was, _ in side_by_side(self._had.clear(first, last), [], first, last):
            if mappers := change(frozenset() if was is None else was.of):
                now.append((low, high, _Mappers(mappers)))
                self._had.put(*now[-1])
        return now


def _mapper(space: Name, run: Run[Translation]) -> _Mapper:
    start, _, there = run
    return _Mapper(space, start - there.frame, bool(there.rights & WRITE))
