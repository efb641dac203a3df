"""Every interleaving that can make a difference: dynamic partial-order reduction, with sleep sets.

One run of each Mazurkiewicz trace is enough.  After each run the pairs of dependent steps that could have
come the other way round are sought in it, and the first of them is given an alternative ("source sets"
[DPOR POPL 2014]); sleep sets keep what has been explored from being explored again behind independent
steps, so that no trace is run to its end twice.  Conflicts are taken from every run: words that only a bad
schedule touches are not known before it has been reached.  Steps that others keep from being taken (a
process that is busy, a full channel, a lock) need more than the last dependent step to be looked at [DPOR
POPL 2005, "may be co-enabled"].

What is promised when the search has ended: every trace, of the runs that ended by themselves.  A run that
fails ends there, so nothing is said of what would have come behind a failure.  A step that was on offer and
not taken when a run ended counts as one that could have come before any step that it depends on; a step
that another kept from being offered to the very end (a lock that is never given back) is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from simulator.search.causality import Causality
from simulator.search.option import STOP, Option, Touch, dependent, exclusive, is_within

Key = tuple[str, str]
Asleep = dict[Key, frozenset[Touch]]


class UnrepeatableError(Exception):
    """The same answers led elsewhere: the run depends on something that the schedule does not decide."""


class HiddenDependenceError(Exception):
    """A step enabled another one, and they touch nothing in common; or what cannot be on offer together is:
    the scheduler does not keep what `option.py` asks of it.
    """


def _key(option: Option) -> Key:
    return option.actor, option.label


def _hold_to_names(options: Sequence[Option]) -> None:
    """No process is on offer beside a delivery to it."""
    actors = {option.actor for option in options}
    receivers = {actor.partition("<")[0] for actor in actors if "<" in actor}
    if both := receivers & actors:
        raise HiddenDependenceError(f"{min(both)} has a step to take, and deliveries to it are on offer")


@dataclass(slots=True)
class _State:
    """Before one step of the run: what could be taken, and what has been or will be explored from here."""

    options: tuple[Option, ...]
    asleep: Asleep
    taken: Key
    wanted: list[str]  # actors to explore, each in all the ways it may go on
    explored: Asleep = field(default_factory=dict)

    def offers(self, actor: str) -> bool:
        return any(option.actor == actor for option in self.options)

    def is_inside(self) -> bool:
        """Of a step: only how it goes on is asked for."""
        return is_within(self.options[0].actor)

    def unexplored(self) -> list[Key]:
        wanted = [_key(option) for option in self.options if option.actor in self.wanted]
        return [key for key in wanted if key not in self.explored and key not in self.asleep]


class Exhaustive:
    """Strategy: one run of every trace."""

    watches = True

    def __init__(self) -> None:
        self.traces = 0  # runs to their end, each of another trace
        self.pruned = 0  # runs given up: all that could come is explored elsewhere
        self.transitions = 0  # steps, each counted where it was taken first
        self.over = False
        self._path: list[_State] = []
        self._analysed = 0  # steps whose races an earlier run with the same beginning has shown
        self._begin()

    def _begin(self) -> None:
        self._run = Causality()
        self._redundant = False

    def choose(self, options: Sequence[Option]) -> int:
        place = len(self._run.steps)
        if self._redundant or (place == len(self._path) and not self._open(tuple(options))):
            return STOP
        state = self._path[place]
        _hold_to_names(options)
        keys = [_key(option) for option in options]
        if keys != [_key(option) for option in state.options]:
            raise UnrepeatableError(f"step {place} can be {keys}, in an earlier run {state.options}")
        return keys.index(state.taken)

    def took(self, step: Option) -> None:
        place = len(self._run.steps)
        if self._redundant or (place == len(self._path) and not self._open((step,))):
            return
        state = self._path[place]
        if _key(step) != state.taken:
            raise UnrepeatableError(f"step {place} is {_key(step)}, in an earlier run {state.taken}")
        self.transitions += _key(step) not in state.explored
        state.explored[_key(step)] = step.touches
        for part in self._path[self._begin_of(place) : place]:
            part.explored[part.taken] |= step.touches  # asleep, it is what the whole step may touch
        self._run.add(step)

    def _open(self, options: tuple[Option, ...]) -> bool:
        """A state not seen before.  Is there anything to do in it that is not explored elsewhere?"""
        asleep = self._still_asleep()
        awake = next((option for option in options if _key(option) not in asleep), None)
        if awake is None:
            self._redundant = True
        else:
            self._path.append(_State(options, asleep, _key(awake), [awake.actor]))
        return awake is not None

    def _still_asleep(self) -> Asleep:
        """What had been explored before the last step was, and does not depend on that step."""
        if not self._path:
            return {}
        last, step = self._path[-1], self._run.steps[-1]
        return {
            key: touches
            for key, touches in (last.asleep | last.explored).items()
            if key[0] != step.actor and not dependent(touches, step.touches)
        }

    def ended(self, failed: bool) -> bool:
        if self._redundant:
            self.pruned += 1
        else:
            self.traces += 1
        for state in self._path[len(self._run.steps) :]:  # the run ended in the middle of its last step
            state.explored[state.taken] = frozenset()
        self._seek_races()
        while self._path:
            if following := self._path[-1].unexplored():
                self._path[-1].taken = following[0]
                self._analysed = len(self._path) - 1
                self._begin()
                return True
            self._path.pop()
        self.over = True
        return False

    def _seek_races(self) -> None:
        steps = self._run.steps
        for place in range(self._analysed, len(steps)):
            self._hold_to_touches(steps[place], place)
            self._seek_races_of(steps[place], place)
        if not self._redundant:
            for option in self._never_taken():
                self._seek_races_of(option, len(steps))

    def _hold_to_touches(self, step: Option, place: int) -> None:
        """What enabled a step is to be seen in what the two touch; else the reduction would rest on sand."""
        previous = (self._run.of_actor(step.actor) & ((1 << place) - 1)).bit_length() - 1
        offered = self._first_offer(step.actor, previous + 1, place)
        if offered > previous + 1:
            enablers = self._run.steps[self._begin_of(offered - 1) : offered]
            if not any(dependent(enabler.touches, step.touches) for enabler in enablers):
                raise HiddenDependenceError(f"{_key(enablers[-1])} enabled {_key(step)}: no touch says so")

    def _never_taken(self) -> Iterator[Option]:
        """One option for each actor whose last offer was not taken, with all that it might have touched."""
        offered: dict[str, Option] = {}
        for state, step in zip(self._path, self._run.steps, strict=False):
            for actor in {option.actor for option in state.options}:
                of_actor = [option for option in state.options if option.actor == actor]
                touches = frozenset(touch for option in of_actor for touch in option.touches)
                offered[actor] = Option(actor, of_actor[0].label, touches)
            offered.pop(step.actor, None)
        yield from offered.values()

    def _seek_races_of(self, step: Option, place: int) -> None:
        """Which earlier steps could `step`, at `place`, have overtaken?"""
        earlier = (1 << place) - 1
        own = self._run.of_actor(step.actor) & earlier
        previous = own.bit_length() - 1
        past = (self._run.before[previous] | own) if own else 0
        candidates = self._run.dependent_on(step) & earlier & ~past
        while candidates:
            other = candidates.bit_length() - 1
            candidates &= ~(1 << other)
            begin, end = self._begin_of(other), self._end_of(other)
            if past >> begin & 1 or begin <= previous < end:
                continue
            if exclusive(self._run.steps[begin].actor, step.actor):
                continue  # while the one stood there, the other could not come
            offered = self._first_offer(step.actor, begin, place) if previous < begin else None
            if offered is not None and begin < offered <= end:
                continue  # it was waiting for just that
            self._want(begin, step, place)
            if offered == begin:
                candidates &= ~self._run.before[begin]  # they show when these two are the other way round
            # Else it cannot be told whether it could have come before `other`: the lock it takes next may
            # be the one that `other` gives back.  Then those before `other` count as well.

    def _begin_of(self, place: int) -> int:
        """Where the step began that goes on, at `place`, in one of several ways: nobody comes between."""
        while place and self._path[place].is_inside():
            place -= 1
        return place

    def _end_of(self, place: int) -> int:
        """Behind the step that `place` belongs to."""
        place += 1
        while place < len(self._run.steps) and self._path[place].is_inside():
            place += 1
        return place

    def _first_offer(self, actor: str, since: int, place: int) -> int:
        return next((state for state in range(since, place) if self._path[state].offers(actor)), place)

    def _want(self, other: int, step: Option, place: int) -> None:
        """Some first step of what leads to `step` without `other` is to be explored where `other` was."""
        state = self._path[other]
        between = self._run.not_after(other, place)
        first, sofar = list[Option](), 0
        for later in between:
            if not self._run.before[later] & sofar:
                first.append(self._run.steps[later])
            sofar |= 1 << later
        if not (self._run.dependent_on(step) | self._run.of_actor(step.actor)) & sofar:
            first.insert(0, step)
        if any(option.actor in state.wanted or _key(option) in state.asleep for option in first):
            return
        possible = [option.actor for option in first if state.offers(option.actor)]
        state.wanted += possible[:1]

    def left(self) -> int:
        """Alternatives known of and not explored yet."""
        return sum(len(state.unexplored()) for state in self._path)

    def summary(self) -> str:
        """How far it came; "all" only if it came to an end."""
        if self.over:
            return f"all {self.traces} inequivalent interleavings, {self.pruned} pruned"
        return f"{self.traces} interleavings, {self.pruned} pruned, at least {self.left()} left"
