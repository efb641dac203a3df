"""What leads to a page, by what the host has there: what is stored, and what is left of what is taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from protocol.pt.bits import WRITE
from simulator.ghost import heard
from simulator.ghost.backing import Backing, Name, Truth
from simulator.ghost.caches import Caches, said
from simulator.ghost.lent import RootFacts
from simulator.ghost.spans import Translation, frame_of
from simulator.ghost.tables import Retranslated, ShadowTables
from simulator.ghost.violation import Verdicts


class HostJudge:
    def __init__(
        self,
        verdicts: Verdicts,
        hearing: heard.Heard,
        roots: Mapping[int, RootFacts],
        closed: Set[int],
        backing: Backing,
        tables: ShadowTables,
        caches: Caches,
    ) -> None:
        self._verdicts = verdicts
        self._hearing = hearing
        self._roots = roots
        self._closed = closed
        self._backing = backing
        self._tables = tables
        self._caches = caches

    def entry_stored(self, change: Retranslated) -> None:
        """What is stored is what the host has there now, and nobody has let go of (steps 4 and 5)."""
        facts = self._roots[change.root]
        if facts.view is None or change.after is None:
            return
        for truth in self._backing.of(facts.view, change.start, change.end):
            stored = change.after.moved(truth.start - change.start)
            if truth.shows_less(stored):  # pinned or not: what is shown to be read is
                what = f"root {change.root:#x} is stored page {truth.start:#x} -> frame {stored.frame:#x}"
                self._verdicts.say("I21", f"{what} writable, and shows it to be read")
                continue
            for part in self._backing.unpinned(facts.view, truth, stored.frame) if truth.known else ():
                new = change.before is None or change.before.frame != change.after.frame
                self._judge_stored(change.root, facts, part, stored.moved(part.start - truth.start), new)

    def _judge_stored(
        self, root: int, facts: RootFacts, truth: Truth, stored: Translation, new: bool
    ) -> None:
        """`new`: not only rights that come back to what will be cleared with the others."""
        what = f"root {root:#x} is stored page {truth.start:#x} -> frame {stored.frame:#x}"
        if truth.translation is None or truth.translation.frame != stored.frame:
            self._verdicts.say("I5", f"{what}, the host has {frame_of(truth.translation)} there")
        elif stored.rights & WRITE and not truth.translation.rights & WRITE:
            self._verdicts.say("I21", f"{what} writable, which it is not in the host")
        elif new and self._backing.is_let_go(facts.filler, truth):
            self._verdicts.say("I5", f"{what}, which {facts.filler} has let go of")

    def lent_lost(self, change: Retranslated) -> None:
        """By a root that is lent: what is pinned there stays as it is, with W and D (I22)."""
        facts, before = self._roots[change.root], change.before
        if facts.view is None or before is None:
            return
        for page, frame in self._backing.asked_for(facts.view, change.start, change.end):
            was = before.moved(page - change.start)
            now = None if change.after is None else change.after.moved(page - change.start)
            if was.frame == frame and (now is None or not now.gives(was)):
                what = f"root {change.root:#x}, which is lent, loses page {page:#x}"
                self._verdicts.say("I22", f"{what}, which is pinned in frame {frame:#x}")

    def hidden(self, view: Name, gone: Iterable[Truth]) -> None:
        """Windows went, and no entry and no cache has anything of them, whatever it is that they showed, and
        whoever has it pinned."""
        self._hearing.also(heard.IS_TAKEN)
        walked = [root for root, facts in self._roots.items() if facts.view == view]
        for window in (truth for truth in gone if truth.shown is not None):
            for root in (root for root in walked if root not in self._closed):
                for start, _, value in self._tables.roots[root].within(window.start, window.end):
                    what = f"page {start:#x} of {view} is shown no more while root {root:#x} maps it"
                    self._verdicts.say("R21", f"{what} to frame {value.frame:#x}")
            for cached in self._caches.translations():
                facts_of = self._roots.get(cached.root)
                overlaps = cached.start < window.end and window.start < cached.end
                if facts_of is not None and facts_of.view == view and overlaps:
                    page = max(cached.start, window.start)
                    what = f"page {page:#x} of {view} is shown no more, {said(cached)} has it"
                    self._verdicts.say(self._caches.rule("R21", cached), what)

    def taken(self, view: Name, taken: Truth, rule: str) -> None:
        """No entry and no cache has what was just taken: frames, or with I21 the right to write them."""
        self._hearing.also(heard.IS_TAKEN)
        assert taken.translation is not None
        for gone in self._backing.unpinned(view, taken, taken.translation.frame):
            assert gone.translation is not None
            self._judge_gone(view, gone, gone.translation, rule, WRITE if rule == "I21" else 0)

    def _judge_gone(self, view: Name, gone: Truth, lost: Translation, rule: str, need: int) -> None:
        walked = [root for root, facts in self._roots.items() if facts.view == view]
        for root in (root for root in walked if root not in self._closed):
            for start, _, value in self._tables.roots[root].within(gone.start, gone.end):
                if value.frame == lost.frame + start - gone.start and value.rights & need == need:
                    self._verdicts.say(
                        "I11" if rule == "I6" else rule,
                        f"frame {value.frame:#x} is taken while root {root:#x} maps page {start:#x} to it",
                    )
        for cached in self._caches.translations():
            facts_of = self._roots.get(cached.root)
            if facts_of is None or facts_of.view != view or cached.translation.rights & need != need:
                continue
            start = max(cached.start, gone.start)
            frame = cached.translation.frame + start - cached.start
            if start < min(cached.end, gone.end) and frame == lost.frame + start - gone.start:
                which = self._caches.rule(rule, cached)
                self._verdicts.say(which, f"page {start:#x} of {view} is taken, {said(cached)} has it")
