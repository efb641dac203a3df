"""Every interleaving that can make a difference: dynamic partial-order reduction, with sleep sets.

One run of each Mazurkiewicz trace is enough.  After each run the pairs of dependent steps that could have
come the other way round are sought in it, and the first of them is given an alternative ("source sets"
[DPOR POPL 2014]); sleep sets keep what has been explored from being explored again behind independent
steps, so that no trace counts twice (a run that nobody asks any more goes to its end).  Conflicts are taken
from every run: words that only a bad schedule touches are not known before it has been reached.  Steps that
others keep from being taken (a process that is busy, a full channel, a lock) need more than the last
dependent step to be looked at [DPOR POPL 2005, "may be co-enabled"].

What is promised when the search has ended: every trace, of the runs that ended by themselves.  A run that
fails ends there, so nothing is said of what would have come behind a failure.  A step that was on offer and
not taken when a run ended counts as one that could have come before any step that it depends on; a step
that another kept from being offered to the very end (a lock that is never given back) is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from simulator.search.causality import Causality
from simulator.search.option import (
    STOP,
    Option,
    Touch,
    UnrepeatableError,
    dependent,
    exclusive,
    is_timer,
    is_within,
)

Key = tuple[str, str]
Way = tuple[Key, ...]
"""A step, and how it went on where it was asked in the middle."""
Asleep = dict[Way, frozenset[Touch]]
_ANYTHING = Touch("what nobody was told of", True)
"""Of a step in which the run was cut: it depends on all that could come."""


class HiddenDependenceError(Exception):
    """A step enabled another one, and they touch nothing in common; or what cannot be on offer together is:
    the scheduler does not keep what `option.py` asks of it.
    """


def _key(option: Option) -> Key:
    return option.actor, option.label


def _hold_to_names(options: Sequence[Option]) -> None:
    """No process is on offer beside a delivery to it, and no timer beside anything."""
    actors = {option.actor for option in options}
    if timers := [actor for actor in actors if is_timer(actor)]:
        raise HiddenDependenceError(
            f"{min(timers)} is on offer beside other steps, which the passing of time decides"
        )
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
        explored = {way[0] for way in self.explored}
        return [key for key in wanted if key not in explored and (key,) not in self.asleep]


class Exhaustive:
    """Strategy: one run of every trace."""

    watches = True

    def __init__(self) -> None:
        self.traces = 0  # runs to their end, each of another trace
        self.pruned = 0  # runs given up: all that could come is explored elsewhere
        self.failed = 0  # of all runs; what would have come behind a failure is not known
        self.transitions = 0  # steps, each counted where it was taken first
        self.over = False
        self._path: list[_State] = []
        self._analysed = 0  # steps whose races an earlier run with the same beginning has shown
        self._begin()

    def _begin(self) -> None:
        self._run: list[Option] = []
        self.redundant = False

    def choose(self, options: Sequence[Option]) -> int:
        place = len(self._run)
        if self.redundant or (place == len(self._path) and not self._open(tuple(options))):
            return STOP
        state = self._path[place]
        _hold_to_names(options)
        keys = [_key(option) for option in options]
        if keys != [_key(option) for option in state.options]:
            raise UnrepeatableError(f"step {place} can be {keys}, in an earlier run {state.options}")
        return keys.index(state.taken)

    def took(self, step: Option) -> None:
        place = len(self._run)
        if self.redundant or (place == len(self._path) and not self._open((step,))):
            return
        state = self._path[place]
        if _key(step) != state.taken:
            raise UnrepeatableError(f"step {place} is {_key(step)}, in an earlier run {state.taken}")
        self.transitions += all(way[0] != state.taken for way in state.explored)
        state.explored[(state.taken,)] = step.touches
        parts = self._path[self._begin_of(place) : place + 1]
        for number, part in enumerate(parts[:-1]):  # the way of each is one longer now
            way = tuple(later.taken for later in parts[number:])
            part.explored[way] = part.explored.pop(way[:-1]) | step.touches
        self._run.append(step)

    def _open(self, options: tuple[Option, ...]) -> bool:
        """A state not seen before.  Is there anything to do in it that is not explored elsewhere?"""
        asleep = self._still_asleep(is_within(options[0].actor))
        awake = [option for option in options if (_key(option),) not in asleep]
        if not awake:
            self.redundant = True
            if is_within(options[0].actor):
                self._want_another(self._begin_of(len(self._path) - 1))
            return False
        in_part = {way[0] for way in asleep}
        first = next((option for option in awake if _key(option) not in in_part), awake[0])
        self._path.append(_State(options, asleep, _key(first), [first.actor]))
        return True

    def _want_another(self, place: int) -> None:
        """However the step at `place` goes on, it is explored elsewhere: it was asleep, which shows now."""
        state = self._path[place]
        awake = [option.actor for option in state.options if (_key(option),) not in state.asleep]
        state.wanted += [actor for actor in awake if actor not in state.wanted][:1]

    def _still_asleep(self, is_within_step: bool) -> Asleep:
        """What had been explored before the last step was, and does not depend on that step; within a step,
        the ways of it that were.
        """
        if not self._path:
            return {}
        last, step = self._path[-1], self._run[-1]
        asleep = last.asleep | last.explored
        found = {
            way: touches
            for way, touches in asleep.items()
            if way[0][0] != step.actor and _ANYTHING not in touches and not dependent(touches, step.touches)
        }
        if is_within_step:
            found |= {
                way[1:]: touches for way, touches in last.asleep.items() if way[0] == last.taken and way[1:]
            }
        return found

    def ended(self, failed: bool) -> bool:
        if self.redundant:
            self.pruned += 1
        else:
            self.traces += 1
        self.failed += failed
        if len(self._path) > len(self._run):
            self._cut()
        self._seek_races()
        while self._path:
            if following := self._path[-1].unexplored():
                self._path[-1].taken = following[0]
                self._analysed = self._begin_of(len(self._path) - 1)
                self._begin()
                return True
            self._path.pop()
        self.over = True
        return False

    def _cut(self) -> None:
        """The run ended in the middle of its last step: that may have touched whatever there is."""
        if len(self._path) > len(self._run) + 1:
            raise UnrepeatableError(f"{len(self._run)} steps, in an earlier run at least {len(self._path)}")
        offered = [option for state in self._path for option in state.options]
        places = {touch.place for step in (*offered, *self._run) for touch in step.touches}
        touches = frozenset(Touch(place, True) for place in places)
        self.took(Option(*self._path[-1].taken, touches | {_ANYTHING}))

    def _seek_races(self) -> None:
        self._whole, self._begins = self._whole_steps()
        for place, step in enumerate(self._whole.steps):
            if self._begins[place] >= self._analysed:
                self._hold_to_touches(step, place)
                self._seek_races_of(step, place)
        if not self.redundant:
            for option in self._never_taken():
                self._seek_races_of(option, len(self._begins))

    def _whole_steps(self) -> tuple[Causality, list[int]]:
        """Nobody comes between the parts of a step: the run by whole ones, and where each begins."""
        begins = [place for place, step in enumerate(self._run) if not place or not is_within(step.actor)]
        whole = Causality()
        for begin, end in pairwise([*begins, len(self._run)]):
            touches = frozenset(touch for part in self._run[begin:end] for touch in part.touches)
            whole.add(Option(self._run[begin].actor, self._run[begin].label, touches))
        return whole, begins

    def _hold_to_touches(self, step: Option, place: int) -> None:
        """What enabled a step is to be seen in what the two touch; else the reduction would rest on sand."""
        previous = (self._whole.of_actor(step.actor) & ((1 << place) - 1)).bit_length() - 1
        offered = self._first_offer(step.actor, previous + 1, place)
        if offered > previous + 1:
            enabler = self._whole.steps[offered - 1]
            if not dependent(enabler.touches, step.touches):
                raise HiddenDependenceError(f"{_key(enabler)} enabled {_key(step)}: no touch says so")

    def _never_taken(self) -> Iterator[Option]:
        """One option for each actor whose last offer was not taken, with all that it might have touched."""
        offered: dict[str, Option] = {}
        for begin, step in zip(self._begins, self._whole.steps, strict=True):
            for option in self._path[begin].options:
                before = offered.get(option.actor, option)
                offered[option.actor] = option._replace(touches=before.touches | option.touches)
            offered.pop(step.actor, None)
        yield from offered.values()

    def _seek_races_of(self, step: Option, place: int) -> None:
        """Which earlier steps could `step`, at `place`, have overtaken?"""
        if is_timer(step.actor):
            return  # nothing else could come
        before = self._whole.before
        earlier = (1 << place) - 1
        own = self._whole.of_actor(step.actor) & earlier
        previous = own.bit_length() - 1
        past = (before[previous] | own) if own else 0
        candidates = self._whole.dependent_on(step) & earlier & ~past
        while candidates:
            other = candidates.bit_length() - 1
            candidates &= ~(1 << other)
            if exclusive(self._whole.steps[other].actor, step.actor):
                continue  # while the one stood there, the other could not come
            offered = self._first_offer(step.actor, other, place) if previous < other else None
            if offered == other + 1:
                continue  # it was waiting for just that
            self._want(other, step, place)
            if offered == other:
                candidates &= ~before[other]  # they show when these two are the other way round
            # Else it cannot be told whether it could have come before `other`: the lock it takes next may
            # be the one that `other` gives back.  Then those before `other` count as well.

    def _first_offer(self, actor: str, since: int, place: int) -> int:
        states = (self._path[begin] for begin in self._begins[since:place])
        return next((found for found, state in enumerate(states, since) if state.offers(actor)), place)

    def _want(self, other: int, step: Option, place: int) -> None:
        """Some first step of what leads to `step` without `other` is to be explored where `other` was."""
        state = self._path[self._begins[other]]
        first, sofar = list[tuple[str, Way]](), 0
        for later in self._whole.not_after(other, place):
            if not self._whole.before[later] & sofar:
                first.append((self._whole.steps[later].actor, self._way(later)))
            sofar |= 1 << later
        if not (self._whole.dependent_on(step) | self._whole.of_actor(step.actor)) & sofar:
            taken = place < len(self._begins)
            first.insert(0, (step.actor, self._way(place) if taken else (_key(step),)))
        if any(actor in state.wanted or way in state.asleep for actor, way in first):
            return
        possible = [actor for actor, _ in first if state.offers(actor)]
        state.wanted += possible[:1]

    def _way(self, place: int) -> Way:
        begin, end = [*self._begins, len(self._run)][place : place + 2]
        return tuple(state.taken for state in self._path[begin:end])

    def _begin_of(self, place: int) -> int:
        """Where in the path the step began that goes on at `place`."""
        while place and self._path[place].is_inside():
            place -= 1
        return place

    def left(self) -> int:
        """Alternatives known of and not explored yet."""
        return sum(len(state.unexplored()) for state in self._path)

    def summary(self) -> str:
        """How far it came; "all" only if it came to an end."""
        failed = f", {self.failed} ended by a failure" if self.failed else ""
        if self.over:
            return f"all {self.traces} inequivalent interleavings, {self.pruned} pruned{failed}"
        return f"{self.traces} interleavings, {self.pruned} pruned{failed}, at least {self.left()} left"
