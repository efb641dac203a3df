"""Roots that devices alone walk: nothing is there to make one fault that needs not (I23).

What such a root translates it loses to whoever takes it: a change of the host's that was announced, a slot
that goes, pages that turn private.  And what a fault maps for CPUs it has from the same step on, if it was
asked to have it.  All of it happens in kvmd, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from protocol.pt.bits import DIRTY
from protocol.pt.geometry import INDEX_BITS
from simulator.ghost.backing import Backing, Name, Shown, Truth
from simulator.ghost.spans import Spans, Translation
from simulator.ghost.tables import Retranslated, ShadowTables
from simulator.ghost.violation import Verdicts

Pages = tuple[int, int]
"""The first, and the one behind the last."""


@dataclass(slots=True)
class _OwnRoot:
    """`filler` answers for it to the host; `beside`: it has what faults map for CPUs."""

    view: Name
    filler: Name
    beside: bool
    taking: list[Pages] = field(default_factory=list)


class OwnRoots:
    def __init__(self, verdicts: Verdicts, backing: Backing, tables: ShadowTables) -> None:
        self._verdicts = verdicts
        self._backing = backing
        self._tables = tables
        self._roots: dict[int, _OwnRoot] = {}
        self._addresses: dict[Name, Spans[Shown]] = {}  # of the process's, by view

    def lends(self, root: int, view: Name, filler: Name, *, beside: bool) -> None:
        self._roots[root] = _OwnRoot(view, filler, beside)

    def takes_back(self, root: int) -> None:
        self._roots.pop(root, None)

    def forget(self) -> None:
        """Who lent them died."""
        self._roots.clear()
        self._addresses.clear()

    def lies_at(self, view: Name, start: int, end: int, there: Shown | None) -> None:
        """These pages of it are of a slot, at these addresses of its process, whatever they show (None: of no
        slot)."""
        addresses = self._addresses.setdefault(view, Spans())
        addresses.clear(start, end)
        if there is not None:
            addresses.put(start, end, there)

    def takes(self, view: Name, pages: Pages) -> None:
        """What the view has there changes or goes, and nobody has it meanwhile."""
        for own in self._roots.values():
            if own.view == view:
                own.taking.append(pages)

    def has_taken(self, view: Name, pages: Pages) -> None:
        for own in self._roots.values():
            if own.view == view and pages in own.taking:
                own.taking.remove(pages)

    def changed(self, changes: Iterable[Retranslated]) -> None:
        """By one store, in one root."""
        for change in changes:
            own = self._roots.get(change.root)
            if own is not None and _is_less(change) and not self._is_taken(own, change):
                what = f"root {change.root:#x}, which devices alone walk, loses page {change.start:#x}"
                self._verdicts.say("I23", f"{what}, which nobody takes")

    def _is_taken(self, own: _OwnRoot, change: Retranslated) -> bool:
        if any(start < change.end and change.start < end for start, end in own.taking):
            return True
        assert change.before is not None
        for truth in self._backing.of(own.view, change.start, change.end):
            had = change.before.moved(truth.start - change.start)
            if truth.shown is None or truth.translation is None or truth.translation.frame != had.frame:
                return True  # the host has another page there, or none
            if self._backing.is_let_go(own.filler, truth):
                return True
        addresses = self._addresses.get(own.view, Spans[Shown]()).within(change.start, change.end)
        return any(  # a private page has one, too
            self._backing.is_let_go(own.filler, Truth(*run, None)) for run in addresses
        )

    def mapped(self, view: Name | None, root: int, page: int) -> None:
        """A fault has mapped the page in `root`, which CPUs walk, and there was memory for it everywhere."""
        if not self._has(root, page):
            return
        for other, own in self._roots.items():
            within = page >> INDEX_BITS * self._tables.level_of(other) == 0
            if own.view == view and own.beside and within and not self._has(other, page):
                self._verdicts.say("I23", f"page {page:#x} comes for CPUs alone, root {other:#x} lacks it")

    def _has(self, root: int, page: int) -> bool:
        spans = self._tables.roots.get(root)
        return spans is not None and spans.get(page) is not None


def _is_less(change: Retranslated) -> bool:
    """D is no device's matter."""
    if change.before is None:
        return False
    rights = change.before.rights & ~DIRTY
    return change.after is None or not change.after.gives(Translation(change.before.frame, rights))
