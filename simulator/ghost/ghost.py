"""The ghost: told what happens, step by step, and judging each step by all that happened before.

The windows in which what is old may still be used are written down in the package's header; here each judge
says which of them it closes.  Nothing is asked of the system: what is not told did not happen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from protocol.pt.bits import WRITE
from protocol.pt.geometry import ENTRY_BYTES
from protocol.units import PAGE_SIZE
from simulator.ghost import heard
from simulator.ghost.accesses import AccessJudge
from simulator.ghost.backing import Backing, Name, Shown, Truth
from simulator.ghost.caches import CachedPointer, CachedTranslation, Caches, History, Holder, NeverSo, said
from simulator.ghost.entries import judge_entry
from simulator.ghost.faults import FaultJudge
from simulator.ghost.functions import Functions
from simulator.ghost.groups import Groups
from simulator.ghost.held import Held
from simulator.ghost.holders import ALL_CACHES, GOES_WITH, IMPORTED_CACHES, UNIT_CACHES
from simulator.ghost.host import HostJudge
from simulator.ghost.ledger import Ledger
from simulator.ghost.lent import Lent, RootFacts
from simulator.ghost.liveness import Liveness
from simulator.ghost.mmus import Mmus
from simulator.ghost.own import OwnRoots
from simulator.ghost.sharing import Sharing
from simulator.ghost.spans import Owner, Run, Translation, frame_of, merged, overlap, side_by_side
from simulator.ghost.stores import DirtyReport, Stores
from simulator.ghost.tables import ShadowTables, Stored
from simulator.ghost.violation import Verdicts

BOUND_NS = 60 * 10**9  # of virtual time, in which all that is outstanding ends


class Ghost:
    def __init__(self, verdicts: Verdicts, bound_ns: int = BOUND_NS) -> None:
        self.heard = heard.Heard()
        self.verdicts = verdicts
        self.backing = Backing()
        self.sharing = Sharing(verdicts)
        self.held = Held(verdicts)
        self.tables = ShadowTables()
        self.history = History(self.tables)
        self.caches = Caches()
        self.frames = Ledger()
        self.table_pages = Ledger()
        self.groups = Groups(verdicts, self.heard)
        self.functions = Functions(verdicts, self.heard)
        self.stores = Stores(verdicts)
        self.liveness = Liveness(verdicts, bound_ns)
        self.faults = FaultJudge(verdicts, self.tables, self.history, self.backing)
        self.lent = Lent(verdicts)
        self.mmus = Mmus(verdicts, self.backing)
        self.own = OwnRoots(verdicts, self.backing, self.tables)
        self._roots: dict[int, RootFacts] = {}
        self._closed: set[int] = set()  # roots that nobody walks any more
        self.host = HostJudge(
            verdicts, self.heard, self._roots, self._closed, self.backing, self.tables, self.caches
        )
        self.accesses = AccessJudge(verdicts, self.heard, self.frames, self.backing)
        self._cut: dict[int, int] = {}  # of each table page, when it was cut off last
        self._lent: set[int] = set()  # roots that units may walk
        self._orphans: set[int] = set()  # roots whose maintainer died

    # -- frames ----------------------------------------------------------------------------------------

    def frames_taken(self, frame: int, pages: int, owner: str) -> None:
        for other in self.frames.take(self.heard.change(heard.TAKES_FRAMES), frame, pages, owner):
            self.verdicts.say("I6", f"frames {frame:#x}+{pages} go to {owner}, {other} has some of them")

    def frames_given_up(self, frame: int, pages: int) -> None:
        """Nothing leads there: no pin, no cache, no entry (step 6)."""
        for name, page, pinned in self.backing.pinned_frames():
            if frame <= pinned < frame + pages:
                self.verdicts.say("I22", f"frame {pinned:#x} is given up, page {page:#x} of {name} is pinned")
        if self.backing.names_failed(frame, pages):
            self.verdicts.say("I21", f"frame {frame:#x} is given up, entries say that it failed")
        if not self.frames.give_up(self.heard.change(heard.GIVES_FRAMES_UP), frame, pages):
            self.verdicts.say("I6", f"frames {frame:#x}+{pages} are given up twice")
        for cached in self.caches.translations():
            if (cached.root not in self._orphans or self.caches.driverless) and overlap(
                cached.translation.frame, cached.end - cached.start, frame, pages
            ):
                rule = self.caches.rule("I6", cached)
                self.verdicts.say(rule, f"frame {frame:#x} is given up, {said(cached)} has it")
        for root in (root for root in self.tables.roots if root not in self._closed):
            for start, end, value in self.tables.roots[root]:
                if overlap(value.frame, end - start, frame, pages):
                    page = start + max(frame - value.frame, 0)
                    where = f"{root:#x} maps page {page:#x} to it"
                    self.verdicts.say("I6", f"frame {frame:#x} is given up, {where}")

    # -- tables ----------------------------------------------------------------------------------------

    def table_taken(self, table: int, owner: str) -> None:
        for other in self.table_pages.take(self.heard.change(heard.TAKES_TABLE), table >> 12, 1, owner):
            self.verdicts.say("I7", f"table page {table:#x} goes to {owner}, {other} has it")

    def table_given_up(self, table: int) -> None:
        """Nobody sits in it: no pointer leads there (step 6)."""
        rule = _rule_of(self.table_pages.owner(table >> 12))
        if not self.table_pages.give_up(self.heard.change(heard.GIVES_TABLE_UP), table >> 12, 1):
            self.verdicts.say(rule, f"table page {table:#x} is given up twice")
        if self.tables.is_linked(table):
            self.verdicts.say(rule, f"table page {table:#x} is given up while it is linked")
        for cached in self.caches.pointers():
            if cached.table == table and cached.root not in self._orphans:
                which = self.caches.rule(rule, cached)
                self.verdicts.say(which, f"table page {table:#x} is given up, {said(cached)} leads there")

    def table_read(self, reader: str, table: int) -> None:
        """A walker loads an entry."""
        self.heard.look(heard.READS_TABLE)
        given_up = self.table_pages.given_up(table >> 12)
        if given_up is not None:
            rule = _rule_of(given_up)
            self.verdicts.say(rule, f"{reader} walks table page {table:#x}, which {given_up.name} gave up")

    def root_made(self, root: int, level: int, view: Name | None, filler: Name) -> None:
        self.heard.change(heard.MAKES_ROOT)
        self._roots[root] = RootFacts(view, filler)
        self._closed.discard(root)
        self.tables.add_root(root, level)

    def root_is_of(self, root: int, view: Name) -> None:
        """It was made before that was known; who fills the view fills it alone."""
        self.heard.change(heard.MAKES_ROOT)
        self._roots[root] = RootFacts(view, view)

    def root_lent(self, root: int) -> None:
        """Units will walk it, until it is taken back."""
        self._lent.add(root)
        self.lent.lends(self._roots[root].view, self.tables.level_of(root))

    def root_taken_back(self, root: int) -> None:
        self._lent.discard(root)
        self.lent.takes_back(self._roots[root].view)
        self.caches.unanswered |= {cached.holder for cached in self.caches.of_root(IMPORTED_CACHES, root)}

    def view_of(self, root: int) -> Name | None:
        facts = self._roots.get(root)
        return None if facts is None else facts.view

    def root_obsolete(self, root: int) -> None:
        """Nobody walks it after the flush that must follow (R3); no unit does now (I10)."""
        if root in self._lent:
            self.verdicts.say("I10", f"root {root:#x} is obsolete, and is lent")
        epoch = self.heard.change(heard.ENDS_ROOT)
        self.history.make_obsolete(epoch, root)
        self.caches.end_root(epoch, root)

    def root_gone(self, root: int) -> None:
        epoch = self.heard.change(heard.ENDS_ROOT)
        self.history.drop(epoch, root)
        self.caches.end_root(epoch, root)
        self._cut_off(epoch, self.tables.drop_root(root))
        del self._roots[root]

    def root_left(self, root: int) -> None:
        """Its last user is gone."""
        if root in self._roots:
            self.verdicts.say("I7", f"root {root:#x} is left, and nobody uses it")

    def entry_stored(self, at: int, entry: int, pieces: int = 1) -> None:
        """In so many stores."""
        judge_entry(self.verdicts, at, entry, pieces, linked=self.tables.is_linked(at & -PAGE_SIZE))
        self._stored(at, self.tables.store(at, entry))

    def table_filled(self, table: int, entries: Sequence[int]) -> None:
        """A whole page at once, which no walker may see (I4)."""
        if self.tables.is_linked(table):
            self.verdicts.say("I4", f"table {table:#x} is filled while it is linked")
        for stored in self.tables.fill_table(table, entries):
            self._stored(table, stored)

    def _stored(self, at: int, stored: Stored) -> None:
        for table in stored.linked:
            for index, entry in self.tables.entries(table):
                judge_entry(self.verdicts, table + index * ENTRY_BYTES, entry, 1, linked=True)
        if not stored.changes and not stored.cut and not stored.linked_twice:
            return
        epoch = self.heard.change(heard.STORES_ENTRY)
        for change in stored.changes:
            if change.lost:
                self.history.end(epoch, change)
                self.caches.end(epoch, change, self.history)
        self.own.changed(stored.changes)
        for change in stored.changes:
            if change.lost and change.root in self._lent:
                self.host.lent_lost(change)
        self._cut_off(epoch, stored.cut)
        for table in stored.linked_twice:
            self.verdicts.say("I18", f"table {table:#x} is linked a second time at {at:#x}")
        for change in stored.changes:
            if change.gained:
                self.host.entry_stored(change)

    def _cut_off(self, epoch: int, tables: Iterable[int]) -> None:
        for table in tables:
            self._cut[table] = epoch
            self.caches.end_pointers(epoch, table)

    # -- what the host has -----------------------------------------------------------------------------

    def shows(self, view: Name, start: int, end: int, shown: Shown) -> None:
        """A window: a slot, an area."""
        self.heard.change(heard.CHANGES_WINDOW)
        self.backing.view(view).put(start, end, shown)

    def hides(self, view: Name, start: int, end: int) -> None:
        """The window is gone, and nothing of it is reached (R21)."""
        self.heard.change(heard.CHANGES_WINDOW)
        gone = list(self.backing.of(view, start, end))
        self.backing.view(view).clear(start, end)
        self.host.hidden(view, gone)

    def converts(self, view: Name, start: int, end: int, others: Iterable[Name]) -> None:
        """Pages turn private, or shared: nothing leads to those that were there (R24); nor does another view
        lead there, of `others` that show the process's, where it becomes private."""
        self.heard.change(heard.CHANGES_WINDOW)
        gone = list(self.backing.of(view, start, end))
        self.backing.view(view).clear(start, end)
        for truth in gone:
            if truth.translation is None or truth.shown is None or truth.shown.space is None:
                continue
            self.host.taken(view, truth, "R24")
            first, last = truth.shown.page, truth.shown.page + truth.end - truth.start
            for other, low, high, page in list(self.backing.shown_in(truth.shown.space, first, last)):
                if other in others:
                    seen = self.backing.view(other).get(low)
                    there = truth.translation.moved(page - first)
                    self.host.taken(other, Truth(low, high, seen, there), "R24")

    def backs(
        self, space: Name, start: int, end: int, there: Translation | None, *, of_file: bool = False
    ) -> None:
        """Pages of a space are these frames from now on, or nothing (step 5)."""
        self.heard.change(heard.CHANGES_HOST)
        spans = self.backing.space(space)
        new: list[Run[Translation]] = [] if there is None else [(start, end, there)]
        before = merged(spans.clear(start, end))
        for run in before:
            self.sharing.unmaps(space, run)
        for run in new:
            spans.put(*run)
            if not of_file:
                self.sharing.maps(space, run)
        for low, high, was, now in side_by_side(before, new, start, end):
            if was is None or (now is not None and now.gives(was)):
                continue
            for page in self.backing.replaced(space, low, high, was, now):
                self.verdicts.say("I22", f"page {page:#x} of {space} is replaced, which is pinned")
            rule = "I6" if now is None or now.frame != was.frame else "I21"
            for view, first, last, page in self.backing.shown_in(space, low, high):
                lost = Translation(was.frame + page - low, was.rights if rule == "I6" else WRITE)
                shown = self.backing.view(view).get(first)
                self.host.taken(view, Truth(first, last, shown, lost), rule)

    def lets_go(self, filler: Name, space: Name, start: int, end: int) -> None:
        """It knows that these pages are taken, and stores no new entry for them until it is told that they
        were."""
        self.heard.change(heard.LETS_GO)
        self.backing.let_go(filler, space, start, end)

    def told_changed(self, filler: Name, space: Name, start: int, end: int) -> None:
        self.heard.change(heard.LETS_GO)
        self.backing.changed(filler, space, start, end)

    def pinned(self, name: Name, page: int, frame: int) -> None:
        """What the host has there in this step, or the pin holds what nobody has."""
        self.heard.change(heard.CHANGES_HOST)
        truth = self.backing.there(name, page)
        if truth.known and (truth.translation is None or truth.translation.frame != frame):
            what = f"page {page:#x} of {name} is pinned in frame {frame:#x}"
            self.verdicts.say("I5", f"{what}, the host has {frame_of(truth.translation)} there")
        self.backing.pin(name, page, frame)

    def pin_leaves(self, name: Name, page: int, frame: int) -> None:
        """Nobody asks for it any more."""
        self.heard.change(heard.CHANGES_HOST)
        self.backing.leave(name, page, frame)

    def unpinned(self, name: Name, page: int, frame: int) -> None:
        """Where the host has another page by now, nothing leads to this one (step 6)."""
        self.heard.change(heard.CHANGES_HOST)
        if not self.backing.unpin(name, page, frame):
            self.verdicts.say(
                "I22", f"page {page:#x} of {name} is unpinned from frame {frame:#x}: it was not"
            )
        for view, first in self.backing.seen(name, page):
            for truth in self.backing.of(view, first, first + 1):
                there = truth.translation
                if truth.known and (there is None or there.frame != frame):
                    self.host.taken(view, Truth(first, first + 1, truth.shown, Translation(frame, 0)), "I6")

    # -- caches ----------------------------------------------------------------------------------------

    def cached(self, holder: Holder, root: int, start: int, end: int, value: Translation) -> None:
        """A cache is filled: with what the root translates, or what it did until an end that still counts."""
        epoch = self.heard.look(heard.FILLS)
        if root in self._closed and holder[0] in UNIT_CACHES:
            self.verdicts.say("R28", f"{' '.join(holder)} is filled from root {root:#x}, which is closed")
        if root in self._orphans:
            self.caches.put(CachedTranslation(holder, root, start, end, value, epoch, None))
            return
        try:
            ended = self.history.ended(root, start, end, value)
        except NeverSo:
            what = f"{start:#x}..{end:#x} -> frame {value.frame:#x}, rights {value.rights:#x}"
            self.verdicts.say("R14", f"{' '.join(holder)} has {what}, which root {root:#x} never had")
            ended = epoch
        self.caches.put(CachedTranslation(holder, root, start, end, value, epoch, ended))

    def pointer_cached(self, holder: Holder, root: int, start: int, end: int, table: int) -> None:
        """To a table that is linked there, or was until an end that still counts."""
        epoch = self.heard.look(heard.FILLS)
        known = root in self._orphans or self.tables.leads(root, start, table)
        ended = None if known else self._cut.get(table, epoch)
        self.caches.put_pointer(CachedPointer(holder, root, start, end, table, ended))

    def keeps(self, holder: Holder, keys: Iterable[tuple[int, int]]) -> None:
        """Of its translations these are left."""
        self.heard.look(heard.EMPTIES)
        self.caches.keep(holder, keys)

    def keeps_pointers(self, holder: Holder, keys: Iterable[tuple[int, int]]) -> None:
        self.heard.look(heard.EMPTIES)
        self.caches.keep_pointers(holder, keys)

    def issues(self) -> int:
        """A flush or an invalidation is issued: of every change that was made before."""
        return self.heard.change(heard.ISSUES)

    def acked(self, root: int, start: int, end: int, issued: int) -> None:
        """Units have invalidated start..end, and the wait behind it is complete (step 3)."""
        self.heard.change(heard.IS_COMPLETE)
        for cached in self.caches.survivors(UNIT_CACHES, root, start, end, issued):
            rule = "R6" if isinstance(cached, CachedPointer) else "I9"
            self.verdicts.say(rule, f"an invalidation is complete, {said(cached)} is older")

    def flushed(self, root: int, start: int, end: int, issued: int) -> None:
        """All have acked (step 4)."""
        self.heard.change(heard.IS_COMPLETE)
        for cached in self.caches.survivors(ALL_CACHES, root, start, end, issued):
            rule = "R17"
            if cached.holder[0] in IMPORTED_CACHES:
                rule = self.lent.rule(cached.holder, self.view_of(root), issued)
            self.verdicts.say(self.caches.rule(rule, cached), f"a flush is over, {said(cached)} is older")

    # -- accesses --------------------------------------------------------------------------------------

    def device_used(self, holder: Holder, page: int, frame: int, *, write: bool) -> None:
        """A piece of an access, within a page, through a device TLB, whose entry says of which root it is.
        By one that it was not given it reaches nothing (R14).
        """
        cached = self.caches.find(holder, page)
        who = " ".join(holder)
        self.heard.look(heard.USES_ROOT)
        if cached is None:
            self.verdicts.say("R14", f"{who} uses page {page:#x}, which nobody granted it")
            return
        facts = self._roots.get(cached.root)
        if cached.root in self._closed:
            self.verdicts.say("R28", f"{who} uses page {page:#x} of root {cached.root:#x}, which is closed")
        elif cached.root in self._orphans:
            return  # he has not been told yet
        elif facts is None:
            self.verdicts.say("R10", f"{who} uses page {page:#x} of root {cached.root:#x}, which is gone")
        elif facts.view is not None:
            self.accesses.used(who, facts.view, page, frame, write=write)
            if write:
                self.stored(facts.view, page)

    def stored(self, view: Name, page: int) -> None:
        self.stores.stored(self.heard.look(heard.IS_STORED), view, page)

    def logs(self, view: Name, start: int, end: int, on: bool) -> None:
        self.heard.change(heard.TELLS_OF_STORES)
        self.stores.log(view, start, end, on)

    def moves_logged(self, view: Name, start: int, end: int, to: int) -> None:
        self.heard.change(heard.TELLS_OF_STORES)
        self.stores.move(view, start, end, to)

    def report_begins(self, view: Name, pages: Iterable[int]) -> DirtyReport:
        return self.stores.begin(self.heard.change(heard.TELLS_OF_STORES), view, pages)

    def settled(self) -> None:
        """Nothing is under way: every store is told, or will be, and what is outstanding will never end."""
        self.stores.settled(self.heard.change(heard.MAY_CHANGE_ALL))
        self.held.settled()
        self.liveness.stuck()

    # -- deaths ----------------------------------------------------------------------------------------

    def process_gone(self, name: str) -> dict[int, int]:
        """It died: what it cached is gone with it, what it had to end nobody waits for, and its memory is
        nobody's.  Who is lent its tables may walk on until he is told (`closed`, `unplugged`).

        By what names its roots are known from now on: where they lay another's may lie soon.
        """
        self.heard.change(heard.MAY_CHANGE_ALL)
        caches, unfinished = GOES_WITH.get(name, ((), ()))
        self.caches.process_gone(name, caches)
        self.liveness.forget(*unfinished)
        if name == "device_sim":
            self.groups.forget_all()
            self._closed |= {root for root in self._roots if self.table_pages.has(root >> 12, "iommufdd")}
        elif name == "kvmd":
            self.frames.forget()
            self.stores = Stores(self.verdicts)
            self._lent.clear()
            self.lent.forget()
            self.mmus.forget()
            self.own.forget()
            self.backing.lose_host()
            self.sharing.forget()
            self.held.forget()
        pages = self.table_pages.leave(name)
        orphans = [root for root in self._roots if root >> 12 in pages]
        renamed = {root: self._orphan(root) for root in orphans}
        self.tables.forget(page << 12 for page in pages)
        return renamed

    def _orphan(self, root: int) -> int:
        name = -1 - len(self._orphans)
        self._orphans.add(name)
        self.caches.rename(root, name)
        self.tables.drop_root(root)
        self.history.forget(root)
        del self._roots[root]
        return name

    def closed(self, root: int) -> None:
        """Who keeps it up to date died, or hung up, and no unit walks it from now on (R28)."""
        self.heard.change(heard.MAY_CHANGE_ALL)
        self._closed.add(root)
        for cached in self.caches.of_root(UNIT_CACHES, root):
            self.verdicts.say("R28", f"root {root:#x} is closed, {said(cached)} has some of it")

    def opened(self, root: int) -> None:
        """Units may walk it, as if for the first time."""
        self.heard.change(heard.MAKES_ROOT)
        self._closed.discard(root)

    def unplugged(self) -> None:
        """The driver of the units is gone, and what he lent them goes: nothing of it is left (R28)."""
        self.heard.change(heard.MAY_CHANGE_ALL)
        self.caches.driverless = False
        for cached in self.caches.everything():
            if cached.holder[0] in UNIT_CACHES:
                self.verdicts.say("R28", f"the units' driver is gone, {said(cached)} is left")


def _rule_of(owner: Owner | None) -> str:
    """What says how long a table page of his is held."""
    return "R23" if owner is not None and owner.name == "iommufdd" else "I7"
