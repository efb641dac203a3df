"""By turns: the schedules of several strategies, one of each and again.

What one of them finds late another finds soon, and which is which depends on the story; by turns nobody need
know.  A schedule is its strategy's by its number alone, so that a seed says all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from simulator.search.option import Option, Search


class Mixed:
    """Strategy without end, if none of `searches` has one: each as it is alone, and hears of its own runs."""

    def __init__(self, *searches: Search) -> None:
        self._searches = searches
        self._ended = 0

    @property
    def _now(self) -> Search:
        return self._searches[self._ended % len(self._searches)]

    @property
    def watches(self) -> bool:
        return self._now.watches

    @property
    def redundant(self) -> bool:
        return self._now.redundant

    def choose(self, options: Sequence[Option]) -> int:
        return self._now.choose(options)

    def took(self, step: Option) -> None:
        self._now.took(step)

    def ended(self, failed: bool) -> bool:
        goes_on = self._now.ended(failed)
        self._ended += 1
        return goes_on

    def summary(self) -> str:
        return "by turns: " + "; ".join(search.summary() for search in self._searches)
