"""The ghost beside one that keeps whole snapshots and looks through all of them at each step."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from protocol.pt.bits import READ, WRITE
from simulator.ghost.backing import Shown
from simulator.ghost.ghost import Ghost
from simulator.ghost.spans import Translation
from simulator.ghost.violation import Verdicts

ROOT, TABLE, FIRST_FRAME = 0x1000, 0x2000, 0x100
SIZE = 2  # pages, and frames
HOLDERS = (("devtlb", "a"), ("iotlb", "0"))
PAGES = st.integers(0, SIZE - 1)
FRAMES = st.integers(FIRST_FRAME, FIRST_FRAME + SIZE - 1)
RIGHTS = st.sampled_from((READ, READ | WRITE))
THERE = st.none() | st.tuples(FRAMES, RIGHTS)

There = tuple[int, int] | None  # frame, rights


class GhostSnapshot(NamedTuple):
    entries: tuple[There, ...]  # by page
    host: tuple[There, ...]
    owned: frozenset[int]


class Copy(NamedTuple):
    """What a cache has of a page, since when."""

    there: tuple[int, int]
    filled: int


def gives(there: There, other: tuple[int, int]) -> bool:
    return there is not None and there[0] == other[0] and not other[1] & ~there[1]


class GhostBesideSnapshots(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ghost = Ghost(Verdicts())
        self.ghost.table_taken(ROOT, "kvmd")
        self.ghost.root_made(ROOT, 2, "vm", "kvm")
        self.ghost.entry_stored(ROOT, TABLE | 7)
        self.ghost.shows("vm", 0, SIZE, Shown("mm", 0, READ | WRITE))
        nothing = (None,) * SIZE
        self.snapshots = [GhostSnapshot(nothing, nothing, frozenset())]
        self.caches: dict[tuple[str, str], dict[int, Copy]] = {holder: {} for holder in HOLDERS}
        self.issued: list[tuple[int, int]] = []  # the ghost's epoch, ours

    def judged(self, expected: set[str]) -> None:
        found = {violation.invariant for violation in self.ghost.verdicts.found}
        assert found == expected
        self.ghost.verdicts._found.clear()

    @property
    def now(self) -> GhostSnapshot:
        return self.snapshots[-1]

    def ended(self, page: int, copy: Copy) -> int | None:
        """The first snapshot that does not have what was cached any more."""
        held = [gives(snapshot.entries[page], copy.there) for snapshot in self.snapshots]
        if not held[copy.filled]:
            return next(n for n in range(copy.filled, -1, -1) if held[n]) + 1
        return next((n for n in range(copy.filled, len(held)) if not held[n]), None)

    def copies(self) -> list[tuple[int, Copy]]:
        return [copy for held in self.caches.values() for copy in held.items()]

    # -- what happens ------------------------------------------------------------------------------------

    @rule(page=PAGES, there=THERE)
    def store(self, page: int, there: There) -> None:
        entry = 0 if there is None else there[0] << 12 | there[1]
        self.ghost.entry_stored(TABLE + 8 * page, entry)
        before, entries, host = self.now.entries[page], list(self.now.entries), self.now.host[page]
        entries[page] = there
        self.snapshots.append(self.now._replace(entries=tuple(entries)))
        expected = set()
        if there is not None and not gives(before, there):
            if host is None or host[0] != there[0]:
                expected = {"I5"}
            elif there[1] & ~host[1]:
                expected = {"I21"}
        self.judged(expected)

    @rule(page=PAGES, there=THERE)
    def change(self, page: int, there: There) -> None:
        self.ghost.backs("mm", page, page + 1, None if there is None else Translation(*there))
        before, host = self.now.host[page], list(self.now.host)
        host[page] = there
        self.snapshots.append(self.now._replace(host=tuple(host)))
        expected = set()
        if before is not None and not gives(there, before):
            moved = there is None or there[0] != before[0]
            need = 0 if moved else WRITE
            entry = self.now.entries[page]
            if entry is not None and entry[0] == before[0] and entry[1] & need == need:
                expected.add("I11" if moved else "I21")
            for cached, (there_cached, _) in self.copies():
                if cached == page and there_cached[0] == before[0] and there_cached[1] & need == need:
                    expected.add("I6" if moved else "I21")
        self.judged(expected)

    @rule(frame=FRAMES)
    def take(self, frame: int) -> None:
        self.ghost.frames_taken(frame, 1, "mm")
        self.judged({"I6"} if frame in self.now.owned else set())
        self.snapshots.append(self.now._replace(owned=self.now.owned | {frame}))

    @rule(frame=FRAMES)
    def give_up(self, frame: int) -> None:
        self.ghost.frames_given_up(frame, 1)
        mapped = any(entry is not None and entry[0] == frame for entry in self.now.entries)
        cached = any(copy.there[0] == frame for _, copy in self.copies())
        self.judged({"I6"} if frame not in self.now.owned or mapped or cached else set())
        self.snapshots.append(self.now._replace(owned=self.now.owned - {frame}))

    @rule(holder=st.sampled_from(HOLDERS), page=PAGES, back=st.integers(0, 3), rights=RIGHTS)
    def fill(self, holder: tuple[str, str], page: int, back: int, rights: int) -> None:
        """With what the table has, or had a while ago, or a part of its rights."""
        there = self.snapshots[max(len(self.snapshots) - 1 - back, 0)].entries[page]
        if there is not None:
            there = there[0], there[1] & rights
            self.ghost.cached(holder, ROOT, page, page + 1, Translation(*there))
            self.caches[holder][page] = Copy(there, len(self.snapshots) - 1)
            self.judged(set())

    @rule(page=PAGES, frame=FRAMES)
    def fill_wrong(self, page: int, frame: int) -> None:
        """A cache has what the table never had; it loses it at once, so that nothing follows from it."""
        ever = any(gives(snapshot.entries[page], (frame, READ)) for snapshot in self.snapshots)
        self.ghost.cached(("devtlb", "b"), ROOT, page, page + 1, Translation(frame, READ))
        self.ghost.keeps(("devtlb", "b"), [])
        self.judged(set() if ever else {"R14"})

    @rule(holder=st.sampled_from(HOLDERS), kept=st.sets(PAGES))
    def drop(self, holder: tuple[str, str], kept: set[int]) -> None:
        held = self.caches[holder] = {
            page: copy for page, copy in self.caches[holder].items() if page in kept
        }
        self.ghost.keeps(holder, [(page, page + 1) for page in held])

    @rule()
    def issue(self) -> None:
        self.issued.append((self.ghost.issues(), len(self.snapshots) - 1))

    @precondition(lambda self: self.issued)
    @rule(which=st.integers(0, 9), start=PAGES, pages=st.integers(1, SIZE))
    def complete(self, which: int, start: int, pages: int) -> None:
        theirs, ours = self.issued.pop(which % len(self.issued))
        self.ghost.flushed(ROOT, start, start + pages, theirs)
        ends = [self.ended(page, copy) for page, copy in self.copies() if start <= page < start + pages]
        self.judged({"R17"} if any(end is not None and end <= ours for end in ends) else set())

    @rule(page=PAGES, frame=FRAMES, write=st.booleans())
    def use(self, page: int, frame: int, write: bool) -> None:
        ever = any(frame in snapshot.owned for snapshot in self.snapshots)
        self.ghost.accesses.used("dsa", "vm", page, frame, write=write)
        there = self.now.host[page]
        if (ever and frame not in self.now.owned) or there is None or there[0] != frame:
            self.judged({"I6"})
        else:
            self.judged({"I21"} if write and not there[1] & WRITE else set())


TestGhostBesideSnapshots = GhostBesideSnapshots.TestCase
TestGhostBesideSnapshots.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
