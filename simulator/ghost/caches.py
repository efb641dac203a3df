"""What caches hold: translations, and pointers to tables; since when, and since when they are out of date.

A cached translation has ended from the store that changed its entry on; one that is filled later, from a
cache or a walk that was under way, ended as long ago (`History`).  It may stay until a flush that was issued
after its end is complete, and no longer.  Rights that were added end nothing: an entry that lacks a right is
walked again [VT-d 6.2.1].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from simulator.ghost.holders import UNIT_CACHES
from simulator.ghost.spans import Translation, merged
from simulator.ghost.tables import Retranslated, ShadowTables

REMEMBERED = 1 << 14  # translations that have ended

Holder = tuple[str, ...]  # a cache: what it is and whose


@dataclass(slots=True, eq=False)
class CachedTranslation:
    holder: Holder
    root: int
    start: int
    end: int
    translation: Translation
    filled: int
    ended: int | None  # out of date since


@dataclass(slots=True, eq=False)
class CachedPointer:
    """To `table`, which translates start..end of `root`."""

    holder: Holder
    root: int
    start: int
    end: int
    table: int
    ended: int | None


def said(cached: CachedTranslation | CachedPointer) -> str:
    who = " ".join(cached.holder)
    if isinstance(cached, CachedPointer):
        return f"{who}'s pointer for {cached.start:#x}..{cached.end:#x}"
    return f"{who}'s translation of {cached.start:#x}..{cached.end:#x} to frame {cached.translation.frame:#x}"


class NeverSo(LookupError):
    """The root never translated the pages so."""


class History:
    """Of each page of each root, what it translated to and until when."""

    def __init__(self, tables: ShadowTables) -> None:
        self._tables = tables
        self._ended: deque[tuple[int, Retranslated]] = deque(maxlen=REMEMBERED)
        self._obsolete: dict[int, int] = {}

    def end(self, epoch: int, change: Retranslated) -> None:
        self._ended.append((epoch, change))

    def make_obsolete(self, epoch: int, root: int) -> None:
        self._obsolete.setdefault(root, epoch)

    def is_obsolete(self, root: int) -> bool:
        return root in self._obsolete

    def forget(self, root: int) -> None:
        """Where it lay may lie another's soon."""
        self._obsolete.pop(root, None)

    def drop(self, epoch: int, root: int) -> None:
        for start, end, value in self._tables.roots[root]:
            self.end(epoch, Retranslated(root, start, end, value, None))
        self.forget(root)

    def holds(self, root: int, start: int, end: int, value: Translation) -> bool:
        """Does the root translate all of start..end so now?"""
        spans = self._tables.roots.get(root)
        runs = [] if spans is None else spans.within(start, end)
        rest = [(a, b, Translation(now.frame, now.rights & value.rights)) for a, b, now in runs]
        return merged(rest) == [(start, end, value)]

    def ended(self, root: int, start: int, end: int, value: Translation) -> int | None:
        """Since when it is not so any more; None: it is so.  Raises NeverSo."""
        if self.holds(root, start, end, value):
            return self._obsolete.get(root)
        for epoch, change in reversed(self._ended):
            if change.root == root and change.before and change.start < end and start < change.end:
                page = max(start, change.start)
                if change.before.moved(page - change.start).gives(value.moved(page - start)):
                    return epoch
        raise NeverSo(f"{start:#x}..{end:#x} of root {root:#x}")


class Caches:
    def __init__(self) -> None:
        self._translations: dict[Holder, dict[tuple[int, int], CachedTranslation]] = {}
        self._pointers: dict[Holder, dict[tuple[int, int], CachedPointer]] = {}
        self.driverless = False  # the units' driver died, and they have not been told
        self.unanswered: set[Holder] = set()  # walk on, and their driver is told nothing any more

    def translations(self) -> Iterator[CachedTranslation]:
        for held in self._translations.values():
            yield from held.values()

    def pointers(self) -> Iterator[CachedPointer]:
        for held in self._pointers.values():
            yield from held.values()

    def of_root(self, kinds: Iterable[str], root: int) -> Iterator[CachedTranslation | CachedPointer]:
        """What caches of these kinds have of it."""
        for cached in self.everything():
            if cached.root == root and cached.holder[0] in kinds:
                yield cached

    def find(self, holder: Holder, page: int) -> CachedTranslation | None:
        held = self._translations.get(holder, {})
        return next((cached for cached in held.values() if cached.start <= page < cached.end), None)

    def leads_astray(self, root: int, page: int) -> int | None:
        """Has a cache a pointer for it to a table that was cut off, as it may for a while?  Since when."""
        for cached in self.pointers():
            if cached.root == root and cached.start <= page < cached.end and cached.ended is not None:
                return cached.ended
        return None

    def held(self, holder: Holder) -> list[CachedTranslation]:
        return list(self._translations.get(holder, {}).values())

    def everything(self) -> Iterator[CachedTranslation | CachedPointer]:
        yield from self.pointers()  # a translation may be out of date because of one
        yield from self.translations()

    def put(self, cached: CachedTranslation) -> None:
        self._translations.setdefault(cached.holder, {})[cached.start, cached.end] = cached

    def put_pointer(self, cached: CachedPointer) -> None:
        self._pointers.setdefault(cached.holder, {})[cached.start, cached.end] = cached

    def keep(self, holder: Holder, keys: Iterable[tuple[int, int]]) -> None:
        """Of its translations only these (first page, the page behind the last) are left."""
        _keep(self._translations, holder, set(keys))

    def keep_pointers(self, holder: Holder, keys: Iterable[tuple[int, int]]) -> None:
        _keep(self._pointers, holder, set(keys))

    def rename(self, root: int, name: int) -> None:
        for cached in self.everything():
            if cached.root == root:
                cached.root, cached.ended = name, None

    def rule(self, rule: str, cached: CachedTranslation | CachedPointer) -> str:
        """What is broken by what is still cached; behind a dead driver only the lease answers (I13)."""
        unanswered = self.driverless and cached.holder[0] in UNIT_CACHES
        return "I13" if unanswered or (rule != "I15" and cached.holder in self.unanswered) else rule

    def process_gone(self, name: str, kinds: Iterable[str]) -> None:
        """And caches of these kinds with it."""
        if name in ("iommufdd", "device_sim"):
            self.driverless = name == "iommufdd"
        for translations in [held for holder, held in self._translations.items() if holder[0] in kinds]:
            translations.clear()
        for pointers in [held for holder, held in self._pointers.items() if holder[0] in kinds]:
            pointers.clear()

    def end(self, epoch: int, change: Retranslated, history: History) -> None:
        """What was cached of it is out of date from now on; what was so elsewhere is so still."""
        for cached in self.translations():
            overlaps = cached.start < change.end and change.start < cached.end and cached.root == change.root
            if overlaps and cached.ended is None:
                low, high = max(cached.start, change.start), min(cached.end, change.end)
                value = cached.translation.moved(low - cached.start)
                if not history.holds(cached.root, low, high, value):
                    cached.ended = epoch

    def end_root(self, epoch: int, root: int) -> None:
        for cached in self.everything():
            if cached.root == root and cached.ended is None:
                cached.ended = epoch

    def end_pointers(self, epoch: int, table: int) -> None:
        for cached in self.pointers():
            if cached.table == table and cached.ended is None:
                cached.ended = epoch

    def survivors(
        self, kinds: Iterable[str], root: int, start: int, end: int, issued: int
    ) -> Iterator[CachedTranslation | CachedPointer]:
        """What caches of these kinds have of start..end that ended before `issued`."""
        for cached in self.everything():
            overlaps = cached.root == root and cached.start < end and start < cached.end
            if overlaps and cached.holder[0] in kinds and cached.ended is not None and cached.ended <= issued:
                yield cached


def _keep(
    books: dict[Holder, dict[tuple[int, int], CachedTranslation]]
    | dict[Holder, dict[tuple[int, int], CachedPointer]],
    holder: Holder,
    keys: set[tuple[int, int]],
) -> None:
    held = books.get(holder)
    if held:
        for key in [key for key in held if key not in keys]:
            del held[key]
