"""One schedule of a scenario, judged: what a search runs over and over."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.vmm.designs import DESIGNS
from simulator.faults.plan import Faults
from simulator.faults.play import playing_faulted
from simulator.ghost.ghost import Ghost
from simulator.ghost.heard import Effect
from simulator.ghost.probes.watch import Watch
from simulator.ghost.probes.watching import watching, wrapping
from simulator.ghost.violation import Verdicts, invariant_of
from simulator.planted.registry import planted
from simulator.search.excerpt import Excerpt
from simulator.search.explore import OTHER, STUCK, RunEnd
from simulator.search.option import UNTOUCHED, Strategy, Touch
from simulator.search.replay import Replay
from simulator.stories.story import SmallStory
from simulator.world.journal import Journal
from simulator.world.limits import Stopped, Stuck
from simulator.world.system import Played, clear_away, playing, uncollected


class Onlooker(Protocol):
    """Who wants to tell of what is played."""

    @property
    def journal(self) -> Journal: ...

    def sees(self, watch: Watch) -> None:
        """What the ghost of a machine goes by that is about to be made."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A scenario on a design, with a planted bug or none.  A worker is told its name and how to `find` it."""

    find: Callable[[str], Scenario | SmallStory]
    scenario: str
    design: str
    seed: int = 1  # of what the scenario leaves to chance
    params: Mapping[str, int] = field(default_factory=dict)
    plant: str = ""
    faults: Sequence[str] = ()  # beside the story's own, of which kinds (simulator/faults/kinds.py)

    def __call__(self, rounds: int = 1, onlooker: Onlooker | None = None) -> Living:
        """What plays its schedules, at most `rounds` of a small story in one machine."""
        return Living(self, rounds, onlooker)


class Living:
    """Player: schedule after schedule in one machine, until something breaks or it has seen `rounds`.  Each
    is judged when its round is over, and the last one again when its machine is: or what broke in a round
    would be another failure where that is the last, as it is where it is played again.
    """

    def __init__(
        self, judged: Judged, rounds: int, onlooker: Onlooker | None = None, *, stands_first: bool = False
    ) -> None:
        """`stands_first`: the first schedule is to be told of when its excerpt is about to open."""
        self._judged = judged
        self._rounds = rounds
        self._stands_first = stands_first
        self._onlooker = onlooker
        self._excerpt: Excerpt | None = None
        self._ends: Generator[RunEnd] | None = None
        self._wraps: Generator[None] | None = None  # from the first machine on, until this player is dropped
        self._round = 0
        self._stops = 0  # in this machine, until it has seen all its rounds

    def __call__(self, strategy: Strategy) -> RunEnd:
        if self._ends is None:
            self._begin(strategy)
        elif self._excerpt is not None:
            self._excerpt.inner = strategy
        assert self._ends is not None
        end, number = next(self._ends), self._round
        self._round += 1
        self._stops -= 1
        if not (end.over or self._stops):
            end = self._plays_on()
        if end.over:
            self.renew()
        return end._replace(round=number)

    def finish(self) -> RunEnd:
        end = RunEnd()
        if self._ends is not None and self._excerpt is not None:  # it stands between two rounds
            self._excerpt.inner = Replay(())
            end = self._plays_on()._replace(round=self._round - 1)
        self.renew()
        return end

    def _plays_on(self) -> RunEnd:
        """To the end of the machine, which stands behind its last round."""
        assert self._ends is not None
        if self._excerpt is not None:
            self._excerpt.was_last = True
        return next(self._ends)

    def renew(self) -> None:
        self._excerpt = None
        if self._ends is not None:
            self._ends.close()
        self._ends = None
        clear_away()

    def _begin(self, strategy: Strategy) -> None:
        """What plays does not know this player, so that one that is dropped takes its machine along."""
        if self._wraps is None:
            self._wraps = wrapping()
            next(self._wraps)
        found = self._judged.find(self._judged.scenario)
        if isinstance(found, SmallStory):
            strategy = self._excerpt = Excerpt(strategy, self._rounds, stands_first=self._stands_first)
        self._ends = _uncollected(_ends(self._judged, found, strategy, self._onlooker))
        self._round, self._stops = 0, self._rounds + self._stands_first


def _uncollected(ends: Generator[RunEnd]) -> Generator[RunEnd]:
    """Until the machine is let go, all of which would be looked at, and kept for longer."""
    with uncollected():
        yield from ends


def _ends(
    judged: Judged, found: Scenario | SmallStory, strategy: Strategy, onlooker: Onlooker | None
) -> Generator[RunEnd]:
    """Of schedule after schedule in one machine."""
    verdicts = Verdicts()
    ghost = Ghost(verdicts)
    own = found.faults if isinstance(found, SmallStory) else ()
    faults = Faults([*dict.fromkeys((*judged.faults, *own))])
    journal = None if onlooker is None else onlooker.journal
    with (
        planted(judged.plant) if judged.plant else nullcontext(),
        watching(ghost) as watch,
        closing(_machine(judged, found, strategy, faults, journal)) as machine,
    ):
        if onlooker is not None:
            onlooker.sees(watch)
        if isinstance(strategy, Excerpt):
            strategy.opened, strategy.closes = faults.begin, faults.end
            heard = ghost.heard
            strategy.heard = lambda: _touches(heard.taken()) if heard.effects else UNTOUCHED
        try:
            while True:
                problems = next(machine)
                yield _judged(verdicts, faults, [*problems, *_unopened(strategy, faults)])
        except StopIteration as ended:
            played: Played = ended.value
            problems = [*played.problems, *_unopened(strategy, faults)]
            if not problems:
                watch.settled()
            yield _judged(verdicts, faults, problems)._replace(over=True)
        except Stopped:
            yield _judged(verdicts, faults, [])._replace(over=True)
        except Stuck as stuck:
            faults.end()  # who was killed or stood still is told of there
            if faults.buffer is not None and faults.buffer.missed:
                verdicts.say("R15", f"nobody can go on: {faults.buffer.missed}")
            ghost.liveness.stuck()
            yield _judged(verdicts, faults, [f"{STUCK}: {stuck}"])


def _machine(
    judged: Judged, found: Scenario | SmallStory, strategy: Strategy, faults: Faults, journal: Journal | None
) -> Generator[list[str], None, Played]:
    design = DESIGNS[judged.design]
    scenario = calm = found if isinstance(found, Scenario) else found.scenario(Excerpt(Replay(())))
    if isinstance(found, SmallStory):
        assert isinstance(strategy, Excerpt), "a small story is an excerpt"
        scenario = found.scenario(strategy)
    if faults.kinds:
        return playing_faulted(scenario, calm, design, strategy, faults, judged.seed, judged.params, journal)
    return playing(scenario, design, strategy, judged.seed, judged.params, journal)


def _unopened(strategy: Strategy, faults: Faults) -> list[str]:
    """Of a small story, a round in which no schedule was chosen: it would be counted as one that held."""
    if not isinstance(strategy, Excerpt) or strategy.was_opened or faults.excuses:
        return []
    return ["the story did not open its excerpt (`with excerpt:`): nothing of it was searched"]


@cache
def _touches(effects: frozenset[Effect]) -> frozenset[Touch]:
    return frozenset(Touch(("judge", aspect), changes) for aspect, changes in effects)


def _judged(verdicts: Verdicts, faults: Faults, problems: list[str]) -> RunEnd:
    return _broken(verdicts, problems)._replace(faulted=faults.struck)


def _broken(verdicts: Verdicts, problems: list[str]) -> RunEnd:
    """What the ghost saw came first: it judges each step, the scenario and the daemons at their end.  Of what
    these say, what names its invariant says what it is, and the rest is what came of it.
    """
    for violation in verdicts.found:
        return RunEnd(violation.invariant, violation.sentence, over=True)
    for problem in problems:
        if named := invariant_of(problem):
            return RunEnd(named, problem, over=True)
    for problem in problems:
        return RunEnd(STUCK if problem.startswith(STUCK) else OTHER, problem, over=True)
    return RunEnd(over=False)
