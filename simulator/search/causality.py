"""Which steps of a run had to come before which: the order of dependent steps, and what runs have in
common.

A run's Mazurkiewicz trace is its steps with the order of those that are dependent.  `Causality` keeps that
order as it grows, as sets of places in the run (bits of an int); `Fingerprint` is a number that two runs
have in common if they are one trace, without keeping anything of the run.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from functools import cache
from hashlib import blake2b

from simulator.search.option import Option

KNOWN = 1 << 16  # steps, and places, that are remembered of other runs
_MASK = (1 << 64) - 1


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


class _Place:
    """Who wrote it last in this run, and the sum of those who read it since; an actor writes its own."""

    __slots__ = ("readers", "run", "writer")

    def __init__(self) -> None:
        self.run = self.writer = self.readers = 0


_Known = tuple[int, tuple[tuple[_Place, bool], ...]]


class Fingerprint:
    """Of the trace of one run after the other.  A step's own number comes from its label and the numbers of
    the steps that it follows directly; the trace's is their sum, in which the order of independent steps is
    lost.

    Numbers in names are left out: which frame, or socket, it is follows from what its actor saw before.
    """

    def __init__(self) -> None:
        self._run = self._sum = 0
        self._places: dict[Hashable, _Place] = {}
        self._known: dict[Option, _Known] = {}  # most steps come again, in this run and the next

    @property
    def value(self) -> int:
        return self._sum & _MASK

    def begin(self) -> None:
        """Another run."""
        self._sum = 0
        self._run += 1
        if len(self._places) > KNOWN:
            self._known.clear()
            self._places.clear()

    def add(self, steps: Iterable[Option]) -> None:
        """The next of this run."""
        run, known = self._run, self._known
        for step in steps:
            name, touched = known.get(step) or self._learns(step)
            follows = 0
            for place, writes in touched:
                if place.run != run:
                    place.run, place.writer, place.readers = run, 0, 0
                elif writes:
                    follows += place.writer + place.readers
                else:
                    follows += place.writer
            number = hash((name, follows))  # of numbers: no interpreter has another
            for place, writes in touched:
                if writes:
                    place.writer, place.readers = number, 0
                elif place.writer != number:
                    place.readers += number
            self._sum += number

    def _learns(self, step: Option) -> _Known:
        if len(self._known) > KNOWN:
            self._known.clear()
        places = [(("actor", step.actor), True), *step.touches]
        touched = tuple((self._places.setdefault(place, _Place()), writes) for place, writes in places)
        found = self._known[step] = _number(step.actor, step.label), touched
        return found
