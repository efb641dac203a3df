"""Faults, by what they may come to: each ends, in a root that is somebody's, and fails only where nothing is;
none waits for what is not its own.

That one ends at all is a matter of time (`Liveness`).
"""

from __future__ import annotations

from collections import Counter

from simulator.ghost.backing import Backing, Name
from simulator.ghost.caches import History
from simulator.ghost.spans import frame_of
from simulator.ghost.tables import ShadowTables
from simulator.ghost.violation import Verdicts

ASTRAY_MAX = 8  # asks in vain by way of one pointer: the flush may be on its way meanwhile


class FaultJudge:
    def __init__(self, verdicts: Verdicts, tables: ShadowTables, history: History, backing: Backing) -> None:
        self._verdicts = verdicts
        self._tables = tables
        self._history = history
        self._backing = backing
        self._astray: Counter[tuple[int, int, int]] = Counter()

    def given(self, root: int) -> None:
        """To a vCPU, or an importer, that asks for one of its role (R3)."""
        if self._history.is_obsolete(root):
            self._verdicts.say("R3", f"root {root:#x} is given to somebody new, and is obsolete")

    def maps_into(self, root: int) -> None:
        """One is about to store there (R3)."""
        if self._history.is_obsolete(root):
            self._verdicts.say("R3", f"a fault is about to map into root {root:#x}, which is obsolete")

    def tried(self, page: int, before: int, now: int) -> None:
        """In vain, and will again; `before` and `now`: how many changes the ghost has heard of (R2)."""
        if before == now:
            self._verdicts.say("R2", f"a fault on page {page:#x} is tried again, and nothing was in its way")

    def waits_for_acks(self, page: int, *, met_frozen: bool) -> None:
        """Of flushes that others issued, who may be waiting for it.  What is frozen comes back with them
        (R27)."""
        if not met_frozen:
            self._verdicts.say("R27", f"a fault on page {page:#x} waits for the acks of others' flushes")

    def failed(self, root: int, page: int, need: int) -> None:
        """It is told that nothing is there that it may have; somebody else may have been faster (I8)."""
        if self._has(root, page, need):
            self._verdicts.say("I8", f"a fault on page {page:#x} fails, root {root:#x} maps it")

    def is_not_granted(self, root: int, page: int, need: int, astray: int | None = None) -> None:
        """A unit says that nothing is there that the device may have, and nothing has changed since it was
        asked: a right that came is there for whoever asks [VT-d 6.2.1], or he asks for ever (R20).

        `astray`: since when a pointer that leads the unit there is one to a table that was cut off.  Whoever
        cut it off flushes that before he tells what came instead, so hardly any ask is in vain (R6).
        """
        if not self._has(root, page, need):
            return
        if astray is None:
            self._verdicts.say("R20", f"page {page:#x} is not granted, root {root:#x} maps it")
            return
        self._astray[root, page, astray] += 1
        if self._astray[root, page, astray] > ASTRAY_MAX:
            what = f"page {page:#x} is not granted again and again, root {root:#x} maps it"
            self._verdicts.say("R6", f"{what}: a pointer leads to a table that was cut off")

    def came(self, root: int, view: Name | None, page: int, asker: Name | None) -> None:
        """The page did, for another process than the one whose memory the view shows: what is mapped is what
        it has there itself (I11).  `asker` is its memory; None: it has none."""
        spans = self._tables.roots.get(root)
        mapped = None if spans is None else spans.get(page)
        shown = self._backing.view(view).get(page)
        if mapped is None or shown is None:
            return
        there = None if asker is None else self._backing.space(asker).get(shown.page)
        if there is None or there.frame != mapped.frame:
            what = f"page {page:#x} of {view} comes as frame {mapped.frame:#x} for {asker}"
            self._verdicts.say("I11", f"{what}, which has {frame_of(there)} there")

    def _has(self, root: int, page: int, need: int) -> bool:
        spans = self._tables.roots.get(root)
        there = None if spans is None else spans.get(page)
        return there is not None and there.rights & need == need
