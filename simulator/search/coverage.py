"""What runs have shown of a story: which step came directly behind which, and which accesses raced.

Two accesses race if they are dependent and their actors differ; a pair is ordered, so its other order is
another thing to cover.  Only labels count, so that the thousandth delivery is nothing new.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from zlib import crc32

from simulator.search.causality import unnumbered
from simulator.search.option import Option


@cache
def _number(*names: str) -> int:
    return crc32("\0".join(map(unnumbered, names)).encode())


class Coverage:
    """Of all runs so far.  What is covered is a set of numbers: sets of several processes can be joined."""

    def __init__(self) -> None:
        self.covered: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self._new = 0
        self._last: Option | None = None
        self._writer: dict[Hashable, Option] = {}
        self._readers: dict[Hashable, dict[str, Option]] = {}  # since it was written, the last of each actor

    def took(self, step: Option) -> None:
        if self._last is not None and self._last.actor != step.actor:
            self._cover("then", self._last, step)
        for touch in step.touches:
            if writer := self._writer.get(touch.place):
                self._cover("race", writer, step)
            if touch.writes:
                for reader in self._readers.pop(touch.place, {}).values():
                    self._cover("race", reader, step)
        for touch in step.touches:
            if touch.writes:
                self._writer[touch.place] = step
            else:
                self._readers.setdefault(touch.place, {})[step.actor] = step
        self._last = step

    def _cover(self, how: str, one: Option, other: Option) -> None:
        if one.actor == other.actor:
            return
        number = _number(how, one.actor, one.label, other.actor, other.label)
        self._new += number not in self.covered
        self.covered.add(number)

    def ended(self) -> int:
        """The run is over: how many things it was the first to show."""
        new = self._new
        self._begin()
        return new
