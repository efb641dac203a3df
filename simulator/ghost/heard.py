"""What the ghost heard of, and where it may make a difference: which orders of two steps he can tell apart.

Each aspect of what he goes by is a place, which a step touches that he hears of (`search/option.py`).
Those that only look there commute: he judges both alike, whichever comes first.  Epochs say only which of two
came first, and he compares none but those of one aspect.
"""

from __future__ import annotations

Effect = tuple[str, bool]
"""An aspect, and whether something changes there."""

FRAMES = "owners of frames"
TABLE_PAGES = "owners of table pages"
ROOTS = "roots"  # which there are, of whom
ENTRIES = "entries"  # and what they were; since when what was cached of them is out of date
HOST = "host"  # what it has behind each page, and what of it is pinned
LET_GO = "let go"  # what is about to be taken, by who knows of it
CACHES = "caches"  # filled and emptied, each by who has it: those commute; who looks at all of them does not
STORES = "stores"  # to pages that log: one store more says nothing of another

ASPECTS = (FRAMES, TABLE_PAGES, ROOTS, ENTRIES, HOST, LET_GO, CACHES, STORES)


def looks(*aspects: str) -> frozenset[Effect]:
    return frozenset((aspect, False) for aspect in aspects)


def changes(*aspects: str) -> frozenset[Effect]:
    return frozenset((aspect, True) for aspect in aspects)


EVERYTHING = changes(*ASPECTS)
TAKES_FRAMES = changes(FRAMES)
GIVES_FRAMES_UP = changes(FRAMES, CACHES) | looks(ROOTS, ENTRIES, HOST)
TAKES_TABLE = changes(TABLE_PAGES)
GIVES_TABLE_UP = changes(TABLE_PAGES, CACHES) | looks(ROOTS, ENTRIES)
READS_TABLE = looks(TABLE_PAGES)
MAKES_ROOT = changes(ROOTS, ENTRIES)
ENDS_ROOT = changes(ROOTS, ENTRIES, CACHES)
STORES_ENTRY = changes(ENTRIES) | looks(ROOTS, HOST, LET_GO)
CHANGES_HOST = changes(HOST)
LETS_GO = changes(LET_GO)
IS_TAKEN = changes(CACHES) | looks(ROOTS, ENTRIES)
FILLS = looks(ROOTS, ENTRIES, CACHES)
EMPTIES = looks(CACHES)
ISSUES = changes(ENTRIES)  # or at least it comes before or behind what changes there
IS_COMPLETE = changes(CACHES)
ACCESSES = looks(FRAMES, HOST)
ACCESSES_BY_ROOT = looks(ROOTS)
LOOKS_FRAMES = looks(FRAMES)
IS_STORED = looks(STORES)
LOGS = changes(STORES)


class Heard:
    def __init__(self) -> None:
        self.now = 0
        self.changes = 0  # all but fills and accesses
        self._effects: set[Effect] = set()

    def change(self, effects: frozenset[Effect]) -> int:
        self.changes += 1
        return self.look(effects)

    def look(self, effects: frozenset[Effect]) -> int:
        """A fill or an access."""
        self._effects |= effects
        self.now += 1
        return self.now

    def also(self, effects: frozenset[Effect]) -> None:
        """It shows only now what the last one is judged by."""
        self._effects |= effects

    def taken(self) -> frozenset[Effect]:
        """Of all that was heard since this was asked last."""
        effects = frozenset(self._effects)
        self._effects.clear()
        return effects
