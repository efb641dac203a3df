"""Entries of several words that lead a unit to a table: contexts, and those of PASIDs (I29).

A unit may read one at any time, word by word, and keep it until it is told to forget it.  So of an entry that
is present no word but the one with P is stored, and of one that a unit may still have from its cache none.
Named by what they are and of whom, as in ("PASID", rid): where they lie says nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from simulator.ghost import heard
from simulator.ghost.violation import Verdicts

PRESENT = 1 << 0  # of word 0

Entry = tuple[str, int]


class LeadingEntries:
    def __init__(self, verdicts: Verdicts, hearing: heard.Heard) -> None:
        self._verdicts = verdicts
        self._hearing = hearing
        self._words: dict[Entry, dict[int, int]] = defaultdict(dict)
        self._cached: dict[str, set[Entry]] = defaultdict(set)  # by unit

    def stored(self, entry: Entry, word: int, value: int) -> None:
        self._hearing.also(heard.LEADS)
        words = self._words[entry]
        before, words[word] = words.get(word, 0), value
        what = f"word {word} of the {entry[0]} entry of function {entry[1]:#x}"
        changed = before ^ value
        if word == 0:
            changed &= ~PRESENT
        if not changed:
            return
        if words.get(0, 0) & before & PRESENT if word == 0 else words.get(0, 0) & PRESENT:
            self._verdicts.say("I29", f"{what} is stored while the entry is present")
        for unit, cached in self._cached.items():
            if entry in cached:
                self._verdicts.say("I29", f"{what} is stored, and {unit} has not forgotten the entry")

    def cached(self, unit: str, entries: Iterable[Entry]) -> None:
        """All that the unit has of them by now."""
        now = set(entries)
        if now != self._cached[unit]:
            self._hearing.also(heard.CACHES_LEADING)
            self._cached[unit] = now

    def forget_all(self) -> None:
        """The units, or the driver, are gone."""
        self._hearing.also(heard.CACHES_LEADING)
        self._words.clear()
        self._cached.clear()
