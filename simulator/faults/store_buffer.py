"""A process's stores to structures wait in its processor's store buffer, in order, and others see them late.

Models x86-TSO [SDM 9.2]: who stored a word loads it back from the buffer, everybody else from memory.  As
late as can be: from the store on that the schedule says, each waits until something drains the buffer, and
then, if the schedule says so, until others have done what they can.  Hardware may let it go earlier, which
is what runs without this fault are of.  What drains:
  - a locked instruction, as in `full_fence`; and so each system call but that for the time, which the vDSO
    answers: what sockets, eventfds, epoll sets, fds and mappings are kept by is taken with locks;
  - a store of more than a word, or to a frame, and a slice of frames that may be stored to: none of these is
    buffered, and none may be seen before a store that waits;
  - a load that overlaps a waiting store and is not of just that word: what cannot be forwarded waits;
  - the process's death: a store that retired is made.
Nor is what only the model's checks look at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from simulator.kernel.files import Memory

BUFFER_STORES = 56  # of a Skylake core; then the oldest goes


class Word(NamedTuple):
    memory: Memory
    at: int  # byte
    size: int

    def overlaps(self, other: Word) -> bool:
        return (
            self.memory is other.memory and self.at < other.at + other.size and other.at < self.at + self.size
        )

    def __str__(self) -> str:
        return f"{self.memory.name}[{self.at >> 3}]"


class _Store(NamedTuple):
    word: Word
    value: int
    point: Callable[[], None]  # before it is made
    make: Callable[[], None]


class StoreBuffer:
    """Of `owner`'s processor.  `lingers`: called where something drains it, before the first is made."""

    def __init__(self, owner: str, lingers: Callable[[], None] = lambda: None) -> None:
        self.owner = owner
        self.missed = ""  # the last load of somebody else that a waiting store came too late for
        self._lingers = lingers
        self._waiting: deque[_Store] = deque()

    def store(self, word: Word, value: int, point: Callable[[], None], make: Callable[[], None]) -> None:
        if len(self._waiting) == BUFFER_STORES:
            self._let_go()
        self._waiting.append(_Store(word, value, point, make))

    def forwarded(self, word: Word) -> int | None:
        """What its owner loads; None: memory has it."""
        for store in reversed(self._waiting):
            if store.word == word:
                return store.value
            if store.word.overlaps(word):
                self.drain()
                break
        return None

    def settle(self, word: Word) -> None:
        """Its owner loads several words from there: no store is forwarded to such a load."""
        if any(store.word.overlaps(word) for store in self._waiting):
            self.drain()

    def seen_by(self, other: str, word: Word) -> None:
        """Another process loads that from memory."""
        if any(store.word.overlaps(word) for store in self._waiting):
            self.missed = f"{other} looked at {word} before {self.owner}'s store to it was there"

    def drain(self) -> None:
        """In order; others may come between."""
        if self._waiting:
            self._lingers()
        while self._waiting:
            self._let_go()

    def _let_go(self) -> None:
        """Of the oldest, which waits until it is made: by `make_all`, if that comes at the point."""
        oldest = self._waiting[0]
        oldest.point()
        if self._waiting and self._waiting[0] is oldest:
            self._waiting.popleft().make()

    def make_all(self) -> None:
        """At once, and not by its owner, which is in the middle of whatever it is."""
        while self._waiting:
            self._waiting.popleft().make()
