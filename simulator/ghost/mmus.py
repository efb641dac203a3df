"""The MMUs that a host tells of what it does to a process: VMs, and mirrors outside of kvmd (I5, I27, R26).

Who they are, what they are asked and answered, and where a guest has private memory that none of them may
pass by.  All of it happens in kvmd, one after the other.
"""

from __future__ import annotations

from simulator.ghost.backing import Backing, Name, Shown
from simulator.ghost.spans import Run, Spans, Translation
from simulator.ghost.violation import Verdicts

Pages = tuple[Name, int, int]
"""Of a space: the first, and the one behind the last."""


class Mmus:
    def __init__(self, verdicts: Verdicts, backing: Backing) -> None:
        self._verdicts = verdicts
        self._backing = backing
        self._left: set[Name] = set()
        self._changing: dict[Name, list[Pages]] = {}
        self._watched: dict[Name, list[Pages]] = {}
        self._private: dict[Name, Spans[Shown]] = {}  # by view, what of its process's it has not

    def forget(self) -> None:
        """The host died."""
        self._left.clear()
        self._changing.clear()
        self._watched.clear()
        self._private.clear()

    def registers(self, who: Name) -> None:
        self._left.discard(who)

    def leaves(self, who: Name) -> None:
        """It is told of nothing from now on, and has nothing (R26)."""
        self._left.add(who)
        self._changing.pop(who, None)
        self._watched.pop(who, None)

    # -- what they are asked and answered --------------------------------------------------------------

    def is_asked(self, who: Name) -> None:
        """Which pages it used."""
        if who in self._left:
            self._verdicts.say("R26", f"{who} is asked which pages it used, and is registered no more")

    def hears(self, who: Name, pages: Pages) -> None:
        """That they are about to change."""
        self._changing.setdefault(who, []).append(pages)

    def hears_of_the_end(self, who: Name, pages: Pages) -> None:
        changing = self._changing.get(who, [])
        if pages in changing:
            changing.remove(pages)

    def is_answered(self, who: Name, pages: Pages) -> None:
        """What the process has there, to map it: not in the middle of a change (I5)."""
        space, start, end = pages
        for other, first, last in self._changing.get(who, ()):
            if other == space and start < last and first < end:
                what = f"{who} is answered pages {start:#x}..{end:#x} of {space}"
                self._verdicts.say("I5", f"{what}, of which {first:#x}..{last:#x} is being changed")

    # -- what they have --------------------------------------------------------------------------------

    def turns(self, view: Name, start: int, end: int, shared: Shown | None) -> None:
        """Pages of a guest's are private from now on, in place of `shared`, which nobody watches, nor has
        pinned by whatever name; or they are not (None)."""
        private = self._private.setdefault(view, Spans())
        private.clear(start, end)
        if shared is None:
            return
        private.put(start, end, shared)
        for who, ranges in self._watched.items():
            for watched in ranges:
                self._judge_reached(who, watched, view, (start, end, shared))
        pinned = {frame: name for name, _, frame in self._backing.pinned_frames()}
        there = self._backing.space(shared.space) if pinned else Spans[Translation]()
        for low, high, translation in there.within(shared.page, shared.page + end - start):
            for frame in range(translation.frame, translation.frame + high - low):
                if frame in pinned:
                    page = start + low - shared.page + frame - translation.frame
                    self._verdicts.say(
                        "I27", f"page {page:#x} of {view} turns private, {pinned[frame]} has it pinned"
                    )

    def maps(self, who: Name, pages: Pages) -> None:
        """It may reach them from now on, as an MMU of no guest (I27)."""
        for view, private in self._private.items():
            for run in private:
                self._judge_reached(who, pages, view, run)

    def _judge_reached(self, who: Name, pages: Pages, view: Name, private: Run[Shown]) -> None:
        (space, start, end), (low, high, shown) = pages, private
        if shown.space == space and start < shown.page + high - low and shown.page < end:
            what = f"{who} maps pages {start:#x}..{end:#x} of {space}"
            self._verdicts.say("I27", f"{what}, and {low:#x}..{high:#x} of {view} is private")

    def watches(self, who: Name, pages: Pages) -> None:
        """It may map them whenever it likes, until it gives them up."""
        self._watched.setdefault(who, []).append(pages)
        self.maps(who, pages)

    def unwatches(self, who: Name, pages: Pages) -> None:
        ranges = self._watched.get(who, [])
        if pages in ranges:
            ranges.remove(pages)

    def pins(self, who: Name, pages: Pages) -> None:
        """For itself, until it gives them up."""
        space, start, end = pages
        if who in self._left:
            what = f"pages {start:#x}..{end:#x} of {space} are pinned for {who}"
            self._verdicts.say("R26", f"{what}, which is registered no more")
        self.maps(who, pages)
