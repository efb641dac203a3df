"""What a scheduler asks a strategy: which of the steps that could be taken now is taken.

A schedule is the sequence of the answers.  The scheduler asks only where there is more than one option, so
that seed and answers replay a run exactly; option 0 is the default (stay in the running process, the first
ready fd, one frame a receive), so that a shrunk story reads "all defaults but these".

An option says beforehand what it touches, as far as is known; what it touched in the end (a step may send a
message) it says when it has been taken.  Two steps are dependent if they have a place in common and one of
them writes it.  Schedules that order their dependent steps alike are one Mazurkiewicz trace: they end
alike, and any one of them stands for all.  A scheduler therefore names

- a word of memory `("word", frame, index)`, which a load reads and a store writes;
- the two ends of a channel `("channel", name)`, written by whoever sends on it and by its delivery, and read
  by who goes on because nothing was there, of all channels where he looked, or was refused what he asked of
  one; the name that a socket is bound to is such a place;
- the state of a process `("process", name)`, written by each delivery to it and by each step of it that may
  use what another delivery changed;
- the clock, which a timer writes that came because nothing else could, and each step reads that came before
  or behind it;
- whoever judges the run, and goes by what came before what;
- whatever else steps have in common: an allocator, an eventfd.

What enables a step, or keeps it from being taken, touches a place that the step touches as well, and the
step's option says that one beforehand.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Set
from functools import lru_cache
from typing import NamedTuple, Protocol

STOP = -1
"""Instead of a place: no more of this run is wanted.  The scheduler gives the run up."""


class Touch(NamedTuple):
    """One access of a step."""

    place: Hashable
    writes: bool


MERGED = 1 << 14  # steps that are remembered with what they came to touch: most come again
UNTOUCHED: frozenset[Touch] = frozenset()


class Option(NamedTuple):
    """One step that could be taken now, or has been.

    `actor` is the one deterministic sequence it belongs to: a process's running greenlet, one channel's
    deliveries, a timer, a fault that could be injected.  Steps of one actor are never reordered.  An actor
    that may go on in several ways (receive one frame or two) has an option for each, with labels of their
    own.  `actor` and `label` are the same whenever the same step comes again: no address, fd number or
    time.

    Deliveries to the process (or thread) `X` are called `X<...`: it takes them when it has no step of its own
    to take, so that no state offers both (`exclusive`).  A step of its, or a delivery, that is asked in the
    middle how to go on (which flow first) is called `X/...` there: nobody else is on offer (`is_within`).
    A timer is called `X<timer`; what is searched in full offers it where nothing else can come (`is_timer`).
    """

    actor: str
    label: str
    touches: frozenset[Touch] = UNTOUCHED


def touching(step: Option, touches: Set[Touch]) -> Option:
    """That step, of which it turned out that it touches those as well."""
    return _merged(step, frozenset(touches)) if touches else step


@lru_cache(MERGED)
def _merged(step: Option, touches: frozenset[Touch]) -> Option:
    return Option(step.actor, step.label, step.touches | touches)


class UnrepeatableError(Exception):
    """The same answers led elsewhere: the run depends on something that the schedule does not decide."""


class Strategy(Protocol):
    """Chooses one schedule after the other."""

    @property
    def watches(self) -> bool:
        """Does it want to be told of each step (`took`)?  The scheduler may skip the call where not.  It says
        the same within a schedule.
        """

    def choose(self, options: Sequence[Option]) -> int:
        """The place in `options`, two or more, of the step to take next, or STOP."""

    def took(self, step: Option) -> None:
        """A step has been taken, with all that it touched: each one, those without alternative too."""

    def ended(self, failed: bool) -> bool:
        """The run is over, by itself or by STOP; `failed`: an invariant broke.  Is there another schedule?

        Called by whoever runs schedules one after the other, not by the scheduler.
        """


class Search(Strategy, Protocol):
    """A strategy that can say how far it has come."""

    @property
    def redundant(self) -> bool:
        """Is all that the run under way, or over and not `ended`, can come to explored elsewhere?  It may not
        have been stopped: behind its last choice nobody asks.
        """

    def summary(self) -> str:
        """One line; "all" stands in it only if there is no other schedule."""


def exclusive(one: str, other: str) -> bool:
    """Are they a process and a delivery to it, or is one a timer?  They are never on offer together."""
    if is_timer(one) or is_timer(other):
        return True
    return one.startswith(f"{other}<") or other.startswith(f"{one}<")


def is_timer(actor: str) -> bool:
    return actor.endswith("<timer")


def process_of(actor: str) -> str:
    """Whose step it is."""
    return actor.partition("<")[0].partition("/")[0]


def is_within(actor: str) -> bool:
    """Does it go on with the step before, so that nobody comes between?"""
    return "/" in actor.partition("<")[0]


def dependent(one: frozenset[Touch], other: frozenset[Touch]) -> bool:
    """Have they a place in common that one of them writes?"""
    return any(a.place == b.place and (a.writes or b.writes) for a in one for b in other)
