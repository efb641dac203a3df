"""Which steps of a run had to come before which: the order of dependent steps, and what runs have in
common.

A run's Mazurkiewicz trace is its steps with the order of those that are dependent.  `Causality` keeps that
order as it grows, as sets of places in the run (bits of an int); `Fingerprint` is a number that two runs
have in common if they are one trace, without keeping anything of the run.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from functools import cache
from hashlib import blake2b

from simulator.search.option import Option

_MASK = (1 << 64) - 1
_UNTOUCHED = (0, 0)


@cache
def unnumbered(name: str) -> str:
    """Without the number of the frame that a page has this time, or of the socket: in another round of the
    same machine it is another one.  Which of several ways was picked stays.
    """
    return re.sub(r"(?<=[A-Za-z#[])\d+", "", name)


@cache
def _number(actor: str, label: str) -> int:
    said = f"{unnumbered(actor)}\0{unnumbered(label)}".encode()
    return int.from_bytes(blake2b(said, digest_size=8).digest(), "little")


class Causality:
    """Happens-before over the steps of one run."""

    def __init__(self) -> None:
        self.steps: list[Option] = []
        self.before: list[int] = []  # of each step: those that had to come before it, transitively
        self._of_actor: dict[str, int] = {}
        self._writers: dict[Hashable, int] = {}
        self._readers: dict[Hashable, int] = {}

    def add(self, step: Option) -> None:
        bit = 1 << len(self.steps)
        before = 0
        # The latest first: what is before one that has been taken in is in already.
        candidates = self.of_actor(step.actor) | self.dependent_on(step)
        while candidates:
            latest = candidates.bit_length() - 1
            before |= self.before[latest] | 1 << latest
            candidates &= ~before
        self.steps.append(step)
        self.before.append(before)
        self._of_actor[step.actor] = self.of_actor(step.actor) | bit
        for touch in step.touches:
            accesses = self._writers if touch.writes else self._readers
            accesses[touch.place] = accesses.get(touch.place, 0) | bit

    def of_actor(self, actor: str) -> int:
        return self._of_actor.get(actor, 0)

    def dependent_on(self, step: Option) -> int:
        """Those so far that touch what it touches, one of the two writing."""
        found = 0
        for touch in step.touches:
            found |= self._writers.get(touch.place, 0)
            if touch.writes:
                found |= self._readers.get(touch.place, 0)
        return found

    def not_after(self, place: int, end: int) -> list[int]:
        """Those between `place` and `end`, both left out, that did not have to come after it."""
        bit = 1 << place
        return [later for later in range(place + 1, end) if not self.before[later] & bit]


class Fingerprint:
    """Of the trace so far.  A step's own number comes from its label and the numbers of the steps that it
    follows directly; the trace's is their sum, in which the order of independent steps is lost.

    Numbers in names are left out: which frame, or socket, it is follows from what its actor saw before.
    """

    def __init__(self) -> None:
        self._sum = 0
        self._of_actor: dict[str, int] = {}
        self._accessed: dict[Hashable, tuple[int, int]] = {}
        """Who wrote the place last, and the sum of those who read it since."""

    @property
    def value(self) -> int:
        return self._sum & _MASK

    def add(self, step: Option) -> None:
        actor, label, touches = step
        accessed = self._accessed
        follows = self._of_actor.get(actor, 0)
        for place, writes in touches:
            writer, readers = accessed.get(place, _UNTOUCHED)
            follows += writer + readers if writes else writer
        number = hash((_number(actor, label), follows))  # of numbers: no interpreter has another
        self._of_actor[actor] = number
        for place, writes in touches:
            writer, readers = accessed.get(place, _UNTOUCHED)
            if writes:
                accessed[place] = number, 0
            elif writer != number:
                accessed[place] = writer, readers + number
        self._sum += number
