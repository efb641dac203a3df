"""Schedules one after the other, counted: what a campaign does in each of its processes.

Pure over the function that runs one schedule; whoever has a clock or a signal says when it is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from simulator.search.coverage import Coverage
from simulator.search.option import Option, Strategy
from simulator.search.replay import Answers, Recorded, Replay
from simulator.search.shrink import REPLAYS_MAX, shrink
from simulator.search.strategies import Search


@dataclass(frozen=True, slots=True)
class RunEnd:
    """Of one run: the invariant that broke, and its sentence; none of both if all held."""

    invariant: str = ""
    sentence: str = ""


RunOne = Callable[[Strategy], RunEnd]


@dataclass(frozen=True, slots=True)
class Found:
    """A schedule that broke an invariant, the `schedule`-th of its strategy with that seed, from 1 on."""

    seed: int
    schedule: int
    result: RunEnd
    answers: Answers
    trace: int


@dataclass(slots=True)
class Tally:
    """What some schedules came to; those of several processes can be added up."""

    schedules: int = 0  # runs to their end
    given_up: int = 0  # by the strategy: they are explored elsewhere
    traces: set[int] = field(default_factory=set)
    covered: set[int] = field(default_factory=set)
    found: list[Found] = field(default_factory=list)
    over: bool = False  # the strategy has no other schedule
    summary: str = ""  # the strategy's own

    def add(self, other: Tally) -> None:
        self.schedules += other.schedules
        self.given_up += other.given_up
        self.traces |= other.traces
        self.covered |= other.covered
        self.found += other.found
        self.over = self.over or other.over
        self.summary = other.summary


class _Watched(Recorded):
    """Recorded, and counted in a coverage."""

    def __init__(self, strategy: Strategy, coverage: Coverage) -> None:
        super().__init__(strategy)
        self._coverage = coverage

    def took(self, step: Option) -> None:
        self._coverage.took(step)
        super().took(step)


def explore(
    run_one: RunOne,
    strategy: Search,
    seed: int,
    schedules: int,
    enough: Callable[[Tally], bool] = lambda tally: False,
) -> Tally:
    """At most `schedules` of `strategy`, which was made of `seed`; `enough` is asked behind each."""
    coverage = Coverage()
    tally = Tally(covered=coverage.covered)
    watched = _Watched(strategy, coverage)
    for number in range(1, schedules + 1):
        result = run_one(watched)
        coverage.ended()
        if watched.stopped:
            tally.given_up += 1
        else:
            tally.schedules += 1
            tally.traces.add(watched.trace)
        if result.invariant:
            tally.found.append(Found(seed, number, result, watched.answers, watched.trace))
        tally.over = not watched.ended(bool(result.invariant))
        if tally.over or enough(tally):
            break
    tally.summary = strategy.summary()
    return tally


def smallest(run_one: RunOne, found: Found, replays_max: int = REPLAYS_MAX) -> tuple[Found, int]:
    """The shrunk schedule that breaks the same invariant, replayed once more for its own trace and
    sentence; and how many replays it took.
    """

    def fails(answers: Answers) -> bool:
        return run_one(Replay(answers)).invariant == found.result.invariant

    shrunk = shrink(found.answers, fails, replays_max)
    recorded = Recorded(Replay(shrunk.answers))
    result = run_one(recorded)
    assert result.invariant == found.result.invariant, "a schedule that failed does not fail again"
    return replace(found, result=result, answers=recorded.answers, trace=recorded.trace), shrunk.replays + 1
