"""Accesses, by what the host has there now: to frames that are in use, and with no right but its (I6, I21).

Who reaches a page as a view shows it, a process's own, and whole frames that the host copies.
"""

from __future__ import annotations

from protocol.pt.bits import WRITE
from simulator.ghost import heard
from simulator.ghost.backing import Backing, Name
from simulator.ghost.ledger import Ledger
from simulator.ghost.spans import Translation, frame_of
from simulator.ghost.violation import Verdicts


class AccessJudge:
    def __init__(self, verdicts: Verdicts, hearing: heard.Heard, frames: Ledger, backing: Backing) -> None:
        self._verdicts = verdicts
        self._hearing = hearing
        self._frames = frames
        self._backing = backing

    def used(self, who: str, view: Name, page: int, frame: int, *, write: bool) -> None:
        """A piece of an access, within a page, through a translation of the view."""
        self._hearing.look(heard.USES)
        what = f"{who} {'stores to' if write else 'loads from'} frame {frame:#x} as page {page:#x}"
        given_up = self._frames.given_up(frame)
        if given_up is not None:
            self._verdicts.say("I6", f"{what}: freed, {given_up.name} gave it up")
            return
        for truth in self._backing.of(view, page, page + 1):
            if truth.shows_less(Translation(frame, WRITE if write else 0)):
                self._verdicts.say("I21", f"{what}: beyond permission, it is shown to be read")
                return
            if not truth.known or not list(self._backing.unpinned(view, truth, frame)):
                return
            there = truth.translation
            if truth.shown is None:
                self._verdicts.say("R21", f"{what}: foreign, the view has no such page")
            elif there is None or there.frame != frame:
                kind = "lost" if write else "stale"
                self._verdicts.say("I6", f"{what}: {kind}, the host has {frame_of(there)} there")
            elif write and not there.rights & WRITE:
                self._verdicts.say("I21", f"{what}: beyond permission, the host has it read-only")

    def copied(self, frame: int, pages: int) -> None:
        """The host reads or writes frames of somebody's whole."""
        self._hearing.look(heard.LOOKS_FRAMES)
        for page in range(frame, frame + pages):
            given_up = self._frames.given_up(page)
            if given_up is not None:
                self._verdicts.say(
                    "I6", f"the host copies frame {page:#x}: freed, {given_up.name} gave it up"
                )
                return

    def touched(self, who: str, space: Name, page: int, frame: int, *, write: bool) -> None:
        """A process's own access, or one made on its behalf at a host address."""
        self._hearing.look(heard.USES)
        what = f"{who} {'stores to' if write else 'loads from'} frame {frame:#x} at {page << 12:#x}"
        there = self._backing.space(space).get(page)
        given_up = self._frames.given_up(frame)
        if given_up is not None:
            self._verdicts.say("I6", f"{what}: freed, {given_up.name} gave it up")
        elif there is None or there.frame != frame:
            self._verdicts.say("I6", f"{what}: stale, the process has {frame_of(there)} there")
        elif write and not there.rights & WRITE:
            self._verdicts.say("I21", f"{what}: beyond permission, it is read-only")
