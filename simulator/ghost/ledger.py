"""Who has each frame, and each table page, and when it was given up."""

from __future__ import annotations

from simulator.ghost.spans import Owner, Spans


class Ledger:
    """Of pages by number; one that was never taken is nobody's."""

    def __init__(self) -> None:
        self._owners: Spans[Owner] = Spans()
        self._given_up: Spans[Owner] = Spans()

    def forget(self) -> None:
        """Nobody ever had any."""
        self._owners, self._given_up = Spans(), Spans()

    def take(self, epoch: int, first: int, pages: int, owner: str) -> list[str]:
        """Who has some of them already."""
        others = self._owners.put(first, first + pages, Owner(owner, epoch))
        self._given_up.clear(first, first + pages)
        return [other.name for _, _, other in others]

    def give_up(self, epoch: int, first: int, pages: int) -> bool:
        """Had somebody all of them?"""
        had = self._owners.clear(first, first + pages)
        for start, end, owner in had:
            self._given_up.put(start, end, Owner(owner.name, epoch))
        return sum(end - start for start, end, _ in had) == pages

    def leave(self, owner: str) -> set[int]:
        """He died: nobody has what he had, nor gave it up.  Its pages."""
        pages: set[int] = set()
        for spans in (self._owners, self._given_up):
            for start, end, had in spans:
                if had.name == owner:
                    spans.clear(start, end)
                    pages.update(range(start, end))
        return pages

    def owner(self, page: int) -> Owner | None:
        return self._owners.get(page)

    def has(self, page: int, owner: str) -> bool:
        had = self._owners.get(page)
        return had is not None and had.name == owner

    def given_up(self, page: int) -> Owner | None:
        """Who had it last, and since when he has not."""
        return self._given_up.get(page)
