"""What the ghost heard of, and where it may make a difference: which orders of two steps he can tell apart.

Each aspect of what he goes by is a place, which a step touches that he hears of (`search/option.py`).
Those that only look there commute: he judges both alike, whichever comes first.  Epochs say only which of two
came first, and he compares none but those of one aspect.
"""

from __future__ import annotations

Effect = tuple[str, bool]
"""An aspect, and whether something changes there."""

OF_FRAMES = "owners of frames"
OF_TABLE_PAGES = "owners of table pages"
OF_ROOTS = "roots"  # which there are, of whom
OF_ENTRIES = "entries"  # and what they were; since when what was cached of them is out of date
OF_HOST = "host"  # what it has behind each page, and what of it is pinned
OF_WINDOWS = "windows"  # which pages show anything, whatever the host has there
OF_LET_GO = "let go"  # what is about to be taken, by who knows of it
OF_CACHES = "caches"  # fills commute, each is of its own; who looks at all of them does not
OF_STORES = "stores"  # to pages that log: one store more says nothing of another
OF_FUNCTIONS = "functions"  # what each may do, and whether it is on an HWPT
OF_LEADING = "leading entries"  # which of them a unit has cached
OF_GROUPS = "groups"  # of page requests

ASPECTS = (
    *(OF_FRAMES, OF_TABLE_PAGES, OF_ROOTS, OF_ENTRIES, OF_HOST, OF_LET_GO, OF_CACHES, OF_STORES),
    *(OF_WINDOWS, OF_FUNCTIONS, OF_LEADING, OF_GROUPS),
)


def looks(*aspects: str) -> frozenset[Effect]:
    return frozenset((aspect, False) for aspect in aspects)


def changes(*aspects: str) -> frozenset[Effect]:
    return frozenset((aspect, True) for aspect in aspects)


MAY_CHANGE_ALL = changes(*ASPECTS)
TAKES_FRAMES = changes(OF_FRAMES)
GIVES_FRAMES_UP = changes(OF_FRAMES, OF_CACHES) | looks(OF_ROOTS, OF_ENTRIES, OF_HOST)
TAKES_TABLE = changes(OF_TABLE_PAGES)
GIVES_TABLE_UP = changes(OF_TABLE_PAGES, OF_CACHES) | looks(OF_ROOTS, OF_ENTRIES)
READS_TABLE = looks(OF_TABLE_PAGES)
MAKES_ROOT = changes(OF_ROOTS, OF_ENTRIES)
ENDS_ROOT = changes(OF_ROOTS, OF_ENTRIES, OF_CACHES)
STORES_ENTRY = changes(OF_ENTRIES) | looks(OF_ROOTS, OF_HOST, OF_LET_GO)
CHANGES_HOST = changes(OF_HOST)
CHANGES_WINDOW = changes(OF_HOST, OF_WINDOWS)
LETS_GO = changes(OF_LET_GO)
IS_TAKEN = changes(OF_CACHES) | looks(OF_ROOTS, OF_ENTRIES)
FILLS = looks(OF_ROOTS, OF_ENTRIES, OF_CACHES)
EMPTIES = looks(OF_CACHES)
ISSUES = changes(OF_ENTRIES)  # or at least it comes before or behind what changes there
IS_COMPLETE = changes(OF_CACHES)
USES = looks(OF_FRAMES, OF_HOST)
USES_ROOT = looks(OF_ROOTS)
FAULTS_IN = looks(OF_ROOTS, OF_ENTRIES, OF_HOST)
LOOKS_FRAMES = looks(OF_FRAMES)
IS_STORED = looks(OF_STORES)
TELLS_OF_STORES = changes(OF_STORES)
LOOKS_FOR_PAGES = looks(OF_ROOTS, OF_WINDOWS)
CHANGES_FUNCTION = changes(OF_FUNCTIONS)
LOOKS_AT_FUNCTION = looks(OF_FUNCTIONS)
LEAVES_HWPT = changes(OF_FUNCTIONS, OF_CACHES)
LEADS = looks(OF_LEADING)  # who stores such entries is one
CACHES_LEADING = changes(OF_LEADING)
CHANGES_GROUP = changes(OF_GROUPS)
LOOKS_AT_GROUPS = looks(OF_GROUPS)


class Heard:
    def __init__(self) -> None:
        self.now = 0
        self.changes = 0  # all but fills and accesses
        self.effects: set[Effect] = set()
        """Of what was heard since they were `taken` last."""

    def change(self, effects: frozenset[Effect]) -> int:
        self.changes += 1
        return self.look(effects)

    def look(self, effects: frozenset[Effect]) -> int:
        """A fill or an access."""
        self.effects |= effects
        self.now += 1
        return self.now

    def also(self, effects: frozenset[Effect]) -> None:
        """It shows only now what the last one is judged by; or no epoch is kept of it."""
        self.effects |= effects

    def taken(self) -> frozenset[Effect]:
        effects = frozenset(self.effects)
        self.effects.clear()
        return effects
