"""A part of a run: before it and behind it all is by default, and the strategy hears nothing of it.

A story's machine is brought up, and taken down; what is searched is what happens between.  That may happen in
rounds, each a schedule of its own: bringing a machine up takes longer than most of what is searched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from simulator.search.option import UNTOUCHED, Option, Strategy, Touch, touching


class Excerpt:
    """Strategy: `inner`, while open.  A step under way when it opens or closes belongs to the time before."""

    def __init__(self, inner: Strategy, rounds: int = 1, *, stands_first: bool = False) -> None:
        """`stands_first`: before it is opened for the first time, as between two rounds."""
        self.watches = False
        self.is_silent = True
        """Nothing is asked, nor told of the step that is under way: each is the default."""
        self._open = self._step_is_inside = False
        self.inner = inner
        self.between: Callable[[], None] = lambda: None
        """Called in the story, behind each of its rounds; when it returns, `inner` is the next one's."""
        self.was_last = False
        """Or the round before it was the last, though there could be more."""
        self.was_opened = False
        """In the round under way: one in which it was not is no schedule of anything."""
        self.opened: Callable[[], None] = lambda: None
        self.closes: Callable[[], None] = lambda: None
        """Called in the story, first and last of what is searched."""
        self._stands_first = stands_first
        self.heard: Callable[[], frozenset[Touch]] = lambda: UNTOUCHED
        """What whoever judges the run goes by, of what he heard since this was asked last: a step touches
        it of which he hears.
        """
        self._rounds = rounds

    @property
    def inner(self) -> Strategy:
        return self._inner

    @inner.setter
    def inner(self, strategy: Strategy) -> None:
        self._inner = strategy
        self._is_inside(self._step_is_inside)

    def _is_inside(self, inside: bool) -> None:
        """The step that is under way."""
        self._step_is_inside = inside
        self.watches = self._inner.watches and (self._open or inside)
        self.is_silent = not (self._open or self.watches)

    def rounds(self) -> Iterator[int]:
        """Of the story, in one machine, which each leaves as it found it."""
        for number in range(self._rounds):
            self.was_opened = False
            yield number
            self.between()
            if self.was_last:
                return

    def open(self) -> None:
        self.was_opened = True
        if self._stands_first:
            self._stands_first = False
            self.between()
            self._step_is_inside = True  # none is under way
        self.heard()
        self._open = True
        self._is_inside(self._step_is_inside)
        self.opened()

    def close(self) -> None:
        self.closes()
        self._open = False
        self._is_inside(self._step_is_inside and self._inner.watches)  # or nobody is to be told of it

    def __enter__(self) -> None:
        self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def choose(self, options: Sequence[Option]) -> int:
        if self._step_is_inside is not self._open:
            self._is_inside(self._open)
        return self._inner.choose(options) if self._open else 0

    def took(self, step: Option) -> None:
        if self._step_is_inside:
            self._inner.took(touching(step, self.heard()))
        if self._step_is_inside is not self._open:
            self._is_inside(self._open)

    def ended(self, failed: bool) -> bool:
        self._open = False
        self._is_inside(False)
        return self._inner.ended(failed)
