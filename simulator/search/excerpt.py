"""A part of a run: before it and behind it all is by default, and the strategy hears nothing of it.

A story's machine is brought up and taken down each time; what is searched is what happens between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from simulator.search.option import Option, Strategy


class Excerpt:
    """Strategy: `inner`, while open.  A step under way when it opens or closes belongs to the time before."""

    def __init__(self, inner: Strategy) -> None:
        self._inner = inner
        self.watches = inner.watches
        self._open = self._step_is_inside = False

    def rounds(self) -> Iterator[int]:
        """Of the story, in one machine: each is a schedule of its own."""
        yield 0

    def open(self) -> None:
        self._open = True

    def close(self) -> None:
        self._open = False

    def __enter__(self) -> None:
        self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def choose(self, options: Sequence[Option]) -> int:
        self._step_is_inside = self._open
        return self._inner.choose(options) if self._open else 0

    def took(self, step: Option) -> None:
        if self._step_is_inside:
            self._inner.took(step)
        self._step_is_inside = self._open

    def ended(self, failed: bool) -> bool:
        self._open = self._step_is_inside = False
        return self._inner.ended(failed)
