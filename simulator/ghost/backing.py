"""What is behind each page of a view, by the host's word: windows onto address spaces, what these map, pins.

A view is what a guest or a device addresses: the slots of a VM's address space, the areas of an IOAS.  Its
windows show pages of spaces: processes, files.  Several roots translate one view.  Where a view shows a space
that is not watched (`Shown.space` None) nothing is known, and nobody is judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

from protocol.pt.bits import READ, WRITE
from simulator.ghost.spans import Spans, Translation

Name = Hashable


@dataclass(frozen=True, slots=True)
class Shown:
    """Pages of `space` from `page` on; `rights`: all that may be done to them there."""

    space: Name | None
    page: int
    rights: int

    def moved(self, pages: int) -> Shown:
        return Shown(self.space, self.page + pages, self.rights)


@dataclass(frozen=True, slots=True)
class Truth:
    """What is behind pages start..end of a view: nothing, or `translation`, unless it is not `known`."""

    start: int
    end: int
    shown: Shown | None
    translation: Translation | None

    @property
    def known(self) -> bool:
        return self.shown is None or self.shown.space is not None

    def shows_less(self, used: Translation) -> bool:
        """Does the window lack the right to write that is used there?"""
        return self.shown is not None and bool(used.rights & WRITE & ~self.shown.rights)


class Backing:
    def __init__(self) -> None:
        self.views: dict[Name, Spans[Shown]] = {}
        self.spaces: dict[Name, Spans[Translation]] = {}
        self._pins: dict[tuple[Name, int], Counter[int]] = {}
        self._leaving: Counter[tuple[Name, int, int]] = Counter()  # pins of a page that nobody asks for
        self._failed: Counter[int] = Counter()  # of a frame, how many entries say so
        self._let_go: dict[Name, list[tuple[Name, int, int]]] = {}  # by who answered: of which space

    def view(self, name: Name) -> Spans[Shown]:
        return self.views.setdefault(name, Spans())

    def space(self, name: Name) -> Spans[Translation]:
        return self.spaces.setdefault(name, Spans())

    def of(self, view: Name, start: int, end: int) -> Iterator[Truth]:
        """In order, without a gap."""
        at = start
        for low, high, shown in self.view(view).within(start, end):
            if at < low:
                yield Truth(at, low, None, None)
            yield from self._through(low, high, shown)
            at = high
        if at < end:
            yield Truth(at, end, None, None)

    def _through(self, low: int, high: int, shown: Shown) -> Iterator[Truth]:
        if shown.space is None:
            yield Truth(low, high, shown, None)
            return
        at, shift = low, low - shown.page
        for a, b, value in self.space(shown.space).within(shown.page, shown.page + high - low):
            if at < a + shift:
                yield Truth(at, a + shift, shown.moved(at - low), None)
            at = a + shift
            there = Translation(value.frame, value.rights & shown.rights)
            yield Truth(at, b + shift, shown.moved(at - low), there)
            at = b + shift
        if at < high:
            yield Truth(at, high, shown.moved(at - low), None)

    def shown_in(self, space: Name, start: int, end: int) -> Iterator[tuple[Name, int, int, int]]:
        """Where pages start..end of a space are seen: (view, first page, behind the last, first of space)."""
        for name, windows in self.views.items():
            for low, high, shown in windows:
                first = max(start, shown.page)
                last = min(end, shown.page + high - low)
                if shown.space == space and first < last:
                    yield name, low + first - shown.page, low + last - shown.page, first

    def lose_host(self) -> None:
        """No space is any more, nor what is pinned in one; windows that are left show nobody knows what."""
        self.spaces.clear()
        self._pins.clear()
        self._leaving.clear()
        self._failed.clear()
        self._let_go.clear()
        for view in self.views.values():
            for start, end, shown in view:
                view.put(start, end, replace(shown, space=None))

    # -- memory that failed ----------------------------------------------------------------------------

    def failed(self, frame: int, change: int) -> None:
        """So many entries more say that its memory failed."""
        self._failed[frame] += change

    def names_failed(self, frame: int, pages: int) -> bool:
        return any(self._failed[each] > 0 for each in range(frame, frame + pages)) if self._failed else False

    # -- pins ------------------------------------------------------------------------------------------

    def pin(self, name: Name, page: int, frame: int) -> None:
        """`name`: the view or the space whose page it is."""
        self._pins.setdefault((name, page), Counter())[frame] += 1

    def there(self, name: Name, page: int) -> Truth:
        """What is behind a page of a view, or of a space; of one that is not watched nothing is known."""
        if name in self.views:
            return next(self.of(name, page, page + 1))
        shown = Shown(name if name in self.spaces else None, page, READ | WRITE)
        return next(self._through(page, page + 1, shown))

    def leave(self, name: Name, page: int, frame: int) -> None:
        """Nobody asks for the pin any more; it is let go of when nobody reaches the page."""
        self._leaving[name, page, frame] += 1

    def asked_for(self, name: Name, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Of pages start..end those that are pinned by that name and are to stay: (page, frame)."""
        for (where, page), frames in self._pins.items():
            if where == name and start <= page < end:
                for frame, count in frames.items():
                    if count > self._leaving[name, page, frame]:
                        yield page, frame

    def unpin(self, name: Name, page: int, frame: int) -> bool:
        """Was it pinned?"""
        if self._leaving[name, page, frame]:
            self._leaving[name, page, frame] -= 1
        pins = self._pins.get((name, page))
        if pins is None or not pins[frame]:
            return False
        pins[frame] -= 1
        if not pins[frame]:
            del pins[frame]
        if not pins:
            del self._pins[name, page]
        return True

    def unpinned(self, view: Name, truth: Truth, frame: int) -> Iterator[Truth]:
        """What of it is not pinned, where its first page is `frame` and the others are those behind."""
        if not self._pins:
            yield truth
            return
        for n in range(truth.end - truth.start):
            shown = None if truth.shown is None else truth.shown.moved(n)
            page = truth.start + n
            seen = shown is not None and self._pinned(shown.space, shown.page, frame + n)
            if not seen and not self._pinned(view, page, frame + n):
                there = None if truth.translation is None else truth.translation.moved(n)
                yield Truth(page, page + 1, shown, there)

    def _pinned(self, name: Name, page: int, frame: int) -> bool:
        pins = self._pins.get((name, page))
        return pins is not None and pins[frame] > 0

    def seen(self, name: Name, page: int) -> list[tuple[Name, int]]:
        """In which views the page is, of a view or of a space, and as which."""
        if name in self.views:
            return [(name, page)]
        return [(view, first) for view, first, _, _ in self.shown_in(name, page, page + 1)]

    def replaced(
        self, space: Name, start: int, end: int, was: Translation, now: Translation | None
    ) -> Iterator[int]:
        """Which of pages start..end of the space are pinned, by it or by a view, and are another frame's at
        once: nobody gave them up."""
        if not self._pins or now is None or now.frame == was.frame:
            return
        for page in range(start, end):
            seen = [(space, page), *self.seen(space, page)]
            if any(self._pinned(name, at, was.frame + page - start) for name, at in seen):
                yield page

    def pinned_frames(self) -> Iterator[tuple[Name, int, int]]:
        for (name, page), frames in self._pins.items():
            for frame in frames:
                yield name, page, frame

    # -- changes under way -----------------------------------------------------------------------------

    def let_go(self, who: Name, space: Name, start: int, end: int) -> None:
        self._let_go.setdefault(who, []).append((space, start, end))

    def changed(self, who: Name, space: Name, start: int, end: int) -> None:
        """He was told that the change is made.  What he was never asked of is nothing."""
        ranges = self._let_go.get(who, [])
        if (space, start, end) in ranges:
            ranges.remove((space, start, end))

    def is_let_go(self, who: Name, truth: Truth) -> bool:
        if truth.shown is None:
            return False
        first, last = truth.shown.page, truth.shown.page + truth.end - truth.start
        return any(
            space == truth.shown.space and start < last and first < end
            for space, start, end in self._let_go.get(who, [])
        )
