"""Schedules one after the other, counted: what a campaign does in each of its processes.

Pure over the function that runs one schedule; whoever has a clock or a signal says when it is enough.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Protocol

from simulator.search.coverage import Coverage
from simulator.search.option import Option, Search, Strategy
from simulator.search.replay import Answers, Recorded, Replay
from simulator.search.shrink import REPLAYS_MAX, shrink

OTHER = "check"
"""Instead of an invariant: what the scenario or a daemon says has none."""
STUCK = "stuck"
UNNAMED = (OTHER, STUCK)
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")


class RunEnd(NamedTuple):
    """Of one run: the invariant that broke (or one of UNNAMED), and its sentence; none of both if all held.

    `round`: how many runs there were in its machine before; `over`: there is none after it; `faulted`: it met
    a fault.
    """

    invariant: str = ""
    sentence: str = ""
    round: int = 0
    over: bool = True
    faulted: bool = False


class Player(Protocol):
    """What plays schedules, one after the other."""

    def __call__(self, strategy: Strategy) -> RunEnd:
        """One, in the machine of the one before, if that goes on."""

    def finish(self) -> RunEnd:
        """The last was that of its machine as well: what the end of that shows of it.  The next is the first
        in a new one.
        """

    def renew(self) -> None:
        """The same, and nobody looks at the end."""


Start = Callable[[int], Player]
"""A new one, of machines that come to their end with so many schedules, if not sooner."""


class PlayerLost(Exception):
    """What plays is gone, and what its schedule would have come to is not known."""


@dataclass(frozen=True, slots=True)
class Found:
    """A schedule that broke an invariant, the `schedule`-th of its strategy with that seed, from 1 on;
    `before`: those that were played in its machine before it.
    """

    seed: int
    schedule: int
    result: RunEnd
    answers: Answers
    trace: int
    before: tuple[Answers, ...] = ()

    @property
    def chosen(self) -> int:
        """How many answers are not the default, those before it too: without them it does not fail."""
        return sum(bool(answer) for answers in (*self.before, self.answers) for answer in answers)


def nth(found: Found, among: Sequence[Found]) -> int:
    """Which of its seed's failures it is, from 1 on."""
    return 1 + sum(other.seed == found.seed and other.schedule < found.schedule for other in among)


@dataclass(slots=True)
class Tally:
    """What some schedules came to; those of several processes can be added up, but for `summary`."""

    schedules: int = 0  # runs that count
    faulted: int = 0  # of them, those that met a fault
    given_up: int = 0  # by the strategy: they are explored elsewhere
    traces: set[int] = field(default_factory=set)
    covered: set[int] = field(default_factory=set)
    found: list[Found] = field(default_factory=list)  # in any run, those given up as well
    over: bool = False  # the strategy has no other schedule
    summary: str = ""  # the strategy's own

    def add(self, other: Tally) -> None:
        self.schedules += other.schedules
        self.faulted += other.faulted
        self.given_up += other.given_up
        self.traces |= other.traces
        self.covered |= other.covered
        self.found += other.found
        self.over = self.over or other.over


class _Watched(Recorded):
    """Recorded, and counted in a coverage."""

    def __init__(self, strategy: Strategy, coverage: Coverage) -> None:
        super().__init__(strategy)
        self._coverage = coverage

    def took(self, step: Option) -> None:
        self._coverage.took(step)
        super().took(step)


def explore(
    player: Player,
    strategy: Search,
    seed: int,
    schedules: int,
    enough: Callable[[Tally], bool] = lambda tally: False,
    coverage: Coverage | None = None,
) -> Tally:
    """At most `schedules` of `strategy`, which was made of `seed`; `enough` is asked behind each.  Who
    hands no `coverage` in is told of traces only, and sooner: it is asked at each step.
    """
    player.renew()
    tally = Tally() if coverage is None else Tally(covered=coverage.covered)
    watched = Recorded(strategy) if coverage is None else _Watched(strategy, coverage)
    before: list[Answers] = []
    for number in range(1, schedules + 1):
        result = player(watched)
        if coverage is not None:
            coverage.ended()
        if strategy.redundant:
            tally.given_up += 1
        else:
            tally.schedules += 1
            tally.faulted += result.faulted
            tally.traces.add(watched.trace)
        del before[result.round :]
        if result.invariant:
            tally.found.append(Found(seed, number, result, watched.answers, watched.trace, tuple(before)))
        before.append(watched.answers)
        tally.over = not watched.ended(bool(result.invariant))
        if tally.over or enough(tally):
            break
    end = player.finish()
    if end.invariant:
        *before, last = before
        number = tally.schedules + tally.given_up
        tally.found.append(Found(seed, number, end, last, watched.trace, tuple(before)))
    tally.summary = strategy.summary()
    return tally


def replayed(start: Start, before: Sequence[Answers], strategy: Strategy) -> RunEnd:
    """One schedule behind others in a machine of its own, to its end; the first that breaks something ends
    it.
    """
    player = start(len(before) + 1)
    for answers in before:
        end = player(Replay(answers))
        if end.invariant:
            return end
    return player(strategy)


def smallest(
    start: Start, found: Found, replays_max: int = REPLAYS_MAX
) -> tuple[Found, int] | tuple[None, int]:
    """The shrunk schedule that shows the same failure, with its own trace and sentence; and how many replays
    it took, of which the first and the last are not among `replays_max`.  What was played before it in its
    machine is left out if it fails without.  None: played again it does not fail so, and nothing is known of
    what is left out of it.
    """
    replays = 0

    def again(before: Sequence[Answers], answers: Answers) -> Found | None:
        recorded = Recorded(Replay(answers))
        result = replayed(start, before, recorded)
        if not _is_same(result, found.result, len(before)):
            return None
        return replace(
            found, result=result, answers=recorded.answers, trace=recorded.trace, before=tuple(before)
        )

    def fails(before: Sequence[Answers], answers: Answers) -> bool:
        nonlocal replays
        replays += 1
        return _is_same(replayed(start, before, Replay(answers)), found.result, len(before))

    whole = again(found.before, found.answers)
    if whole is None:
        return None, 1
    before = found.before
    size = len(before)
    while size:
        place = 0
        while place < len(before) and replays < replays_max:
            shorter = (*before[:place], *before[place + size :])
            if fails(shorter, found.answers):
                before = shorter
            else:
                place += size
        size //= 2
    shrunk = shrink(found.answers, partial(fails, before), replays_max - replays)
    if (before, shrunk.answers) == (whole.before, whole.answers):
        return whole, replays + 1
    return again(before, shrunk.answers) or whole, replays + 2


def _is_same(end: RunEnd, told: RunEnd, number: int) -> bool:
    """Is it the failure that was `told`, in that round?  What names no invariant is known by its sentence, in
    which numbers (of pages, of handles) may be others.
    """
    if (end.invariant, end.round) != (told.invariant, number):
        return False
    return end.invariant not in UNNAMED or _shape(end.sentence) == _shape(told.sentence)


def _shape(sentence: str) -> str:
    return _NUMBER.sub("0", sentence)
