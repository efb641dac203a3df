"""A planted bug is sought by the small stories on every design, as people would seek it who do not know it.

Each pair of a story and a design has a strategy of its own, with a seed of its own (by one seed all would
have the same luck: a story runs much alike on two designs), and turns.  A schedule that does not come to the
planted lines is one of the clean code, and one whose trace was played before finds what that one found.  The
share of a pair's last turn that was neither is what the pair is worth: schedules are shared out by it, and
what is worth nothing by now is asked again from time to time.  Who comes there in the making of its machine
only, as nearly all do to the lines of an attach, is worth little: no schedule is about that.  What is worth
asking first is told by some schedules of each pair with nothing planted, in which the lines of all plants
tell.

Each pair is searched once with its story's own faults and once with all kinds of them, which nobody scouts: a
schedule with faults takes as long as some without, and each has so much less of a share.

What fails without coming to the planted lines, in the making of its machine neither, is no find: it is the
clean code that fails, and whoever seeks is told so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qemu_shim.vmm.designs import DESIGNS
from simulator.command import find as story_of
from simulator.command import story_text
from simulator.faults.kinds import FAULTED_COST, FAULTS
from simulator.planted.hunt import Catch
from simulator.planted.met import met
from simulator.planted.plant import Plant, telling
from simulator.search.explore import Found, Player, RunEnd, Start, Tally, explore, replayed, smallest
from simulator.search.option import Option, Search, Strategy
from simulator.search.replay import Replay
from simulator.search.strategies import DEFAULT, STRATEGIES
from simulator.stories.library import STORIES
from simulator.world.forked import Forked
from simulator.world.schedule import Judged

FIRST_TURN = 4  # schedules: all pairs have had theirs within a thousand, most of them sooner
LONGEST_TURN = 64  # in one machine, which costs as much to make as ten schedules
WORTH_MIN = 1 / 64
WORTH_OF_MAKING = 1 / 16
UNKNOWN_WORTH = 1 / 4  # of a pair with faults, or a story: they come to lines that nothing else does
SCOUTED = 3  # schedules of each pair
REPLAYS = 50  # to shrink one story: as long as some hundred schedules take


class CleanCodeFails(Exception):
    """Which invariant broke with no planted line come to, and the story that repeats it."""


def pairs() -> list[tuple[str, str]]:
    """Every story on every design it can be played on; the design that is argued about first."""
    return [
        (name, design)
        for design in reversed(DESIGNS)
        for name, story in STORIES.items()
        if design in story.playable
    ]


class _Opened:
    """Strategy: another one; `opened` is called before it is asked for the first time."""

    def __init__(self, strategy: Strategy, opened: Callable[[], None]) -> None:
        self._strategy = strategy
        self._opened: Callable[[], None] | None = opened
        self.watches = strategy.watches

    def choose(self, options: Sequence[Option]) -> int:
        if self._opened is not None:
            self._opened()
            self._opened = None
        return self._strategy.choose(options)

    def took(self, step: Option) -> None:
        self._strategy.took(step)

    def ended(self, failed: bool) -> bool:
        return self._strategy.ended(failed)


class _Meeting:
    """Player: another one, and which plants' lines its schedules came to.  `forks`: its machine is made, and
    each schedule begins where it stands.
    """

    def __init__(self, player: Player, *, forks: bool = False) -> None:
        self._player = player
        self._forks = forks
        self._schedules = 0
        self._met = Counter[str]()
        self._made = set[str]()  # came there in the making of a machine

    def __call__(self, strategy: Strategy) -> RunEnd:
        met()
        end = self._player(strategy if self._forks else _Opened(strategy, self._opened))
        self._met.update(met())
        self._schedules += 1
        return end

    def _opened(self) -> None:
        self._made |= met()

    def worths(self) -> Mapping[str, float]:
        """Of each plant."""
        worths = dict.fromkeys(self._made, WORTH_OF_MAKING)
        for plant, times in self._met.items():
            worths[plant] = max(worths.get(plant, 0.0), times / self._schedules)
        return worths

    def finish(self) -> RunEnd:
        return self._player.finish()

    def renew(self) -> None:
        self._player.renew()


@dataclass(slots=True)
class _Pair:
    """A story on a design, and how far its search is."""

    judged: Judged
    seed: int  # of its search
    search: Search
    compares: bool  # its strategy does: each schedule begins in one state
    worth: float
    least: float = WORTH_MIN  # it is worth
    schedules: int = 0
    over: bool = False
    _traces: set[int] = field(default_factory=set, init=False)  # a copy begins with none

    @property
    def due(self) -> float:
        """Whose is least has the next turn."""
        cost = FAULTED_COST if self.judged.faults else 1
        return cost * (1 + self.schedules) / max(self.worth, self.least)

    def player(self, rounds: int) -> Player:
        return Forked(self.judged) if self.compares else self.judged(rounds)

    def turn(self, schedules: int, enough: Callable[[Tally], bool]) -> Tally:
        meeting = _Meeting(self.player(schedules), forks=self.compares)
        tally = explore(meeting, self.search, self.seed, schedules, enough)
        played, known = tally.schedules + tally.given_up, len(self._traces)
        self._traces |= tally.traces
        self.worth = sum(meeting.worths().values()) * (len(self._traces) - known) / played
        self.schedules += played
        self.over = tally.over
        return tally


Reach = Mapping[tuple[str, str], Mapping[str, float]]
"""Of each pair the share of its schedules that come to each plant's lines."""


def scouted(plants: Iterable[Plant]) -> Reach:
    """Told by some schedules of each pair with none of them in.  CleanCodeFails."""
    shares: dict[tuple[str, str], dict[str, float]] = {}
    with telling(plants):
        for story, design in pairs():
            judged = Judged(story_of, story, design)
            meeting = _Meeting(judged(SCOUTED))
            for found in explore(meeting, STRATEGIES[DEFAULT].make(0), 0, SCOUTED).found:
                raise _clean_code_fails(judged, found)
            shares[story, design] = dict(meeting.worths())
    return shares


def find(
    strategy: str,
    seed: int,
    most: int,
    worth: Callable[[tuple[str, str]], float] = lambda pair: 1.0,
    stop: Callable[[], bool] = lambda: False,
    plays: Callable[[str], bool] = lambda story: True,
    replays: int = REPLAYS,
) -> Catch | None:
    """What is planted is in.  At most `most` schedules, of seeds from `seed` on; None also if every strategy
    has seen all there is, or if `stop` says so behind a schedule.  CleanCodeFails.
    `worth`: of each pair, to begin with.  `plays`: is it one of the stories to be played?  `replays`: to
    shrink what is found, 0: it stays as long as it is.
    """

    def enough(tally: Tally) -> bool:
        return bool(tally.found) or stop()

    def least(pair: tuple[str, str]) -> float:
        """A few schedules do not show what a story with faults of its own comes to."""
        return UNKNOWN_WORTH if STORIES[pair[0]].faults else WORTH_MIN

    named = STRATEGIES[strategy]
    searched = [
        _Pair(Judged(story_of, *pair), own, named.make(own), not named.seeded, worth(pair), least(pair))
        for own, pair in enumerate(pairs(), seed)
        if plays(pair[0])
        if named.seeded or not STORIES[pair[0]].faults  # who compares schedules knows of none
    ]
    if named.seeded:
        searched += [
            replace(
                pair,
                judged=replace(pair.judged, faults=tuple(FAULTS)),
                search=named.make(pair.seed),
                worth=max(pair.worth, UNKNOWN_WORTH),
                least=WORTH_MIN,
            )
            for pair in searched
        ]
    done = 0
    while searched and done < most and not stop():
        pair = min(searched, key=lambda pair: pair.due)
        turn = min(max(FIRST_TURN, pair.schedules), LONGEST_TURN, most - done)
        tally = pair.turn(turn, enough)
        if tally.found:
            return _caught(pair.judged, tally.found[0], done, replays)
        done += tally.schedules + tally.given_up
        if pair.over:
            searched.remove(pair)
    return None


def _caught(judged: Judged, found: Found, done: int, replays: int) -> Catch:
    small, _ = smallest(judged, found, replays)
    shrunk = found if small is None else small
    end = shrunk.result
    if not comes_to_the_plant(judged, shrunk):
        raise _clean_code_fails(judged, shrunk)
    return Catch(
        end.invariant,
        done + shrunk.schedule,
        shrunk.chosen if replays and small else None,
        judged.scenario,
        judged.design,
        ",".join(judged.faults),
    )


def _clean_code_fails(judged: Judged, found: Found) -> CleanCodeFails:
    end = found.result
    return CleanCodeFails(f"{end.invariant}: {end.sentence}\n{story_text(judged, found)}")


def comes_to_the_plant(start: Start, found: Found) -> bool:
    """Asked of a machine of its own, the making of which counts as well."""
    met()
    replayed(start, found.before, Replay(found.answers))
    return bool(met())
