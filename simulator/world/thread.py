"""A thread of a simulated process: where it stands, what it waits for, and so what it could do next."""

from __future__ import annotations

import select
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from greenlet import greenlet

from simulator.kernel.files import Interest
from simulator.kernel.process import SimPoller, SimProcess
from simulator.search.option import UNTOUCHED, Option, Touch
from simulator.world.fate import Fate
from simulator.world.places import TIME_PASSES, queues_of

Event = tuple[int, int]  # of a poller: fd, what
IsWoken = Callable[[], bool]
_IN = select.EPOLLIN
NEVER_NS = 1 << 63
MADE = 1 << 16  # steps of a thread that are remembered


class Candidate(NamedTuple):
    option: Option
    thread: SimThread
    event: Event | None = None  # what the thread is told that waits for one


@dataclass(eq=False, slots=True)
class SimThread:
    """One of a process's; `waits` for these pollers, or for `is_woken`, or until `deadline_ns`."""

    process: SimProcess
    name: str
    greenlet: greenlet
    fate: Fate | None = None
    over: bool = False
    taken: int = 0  # steps
    stopped_ns: int = 0  # it does nothing until then
    standing: bool = False  # it could go on, with its one step
    waits: Sequence[SimPoller] = ()
    is_woken: IsWoken | None = None
    deadline_ns: int | None = None
    told: Event | None = None
    state: frozenset[Touch] = frozenset()  # which each step of its touches
    steps: Sequence[Candidate] = ()  # what it could do
    stale: bool = True  # what it waits for may be there by now, and is not in `steps`
    asleep_until: int = 0  # nothing will be there for it before then, unless it `stirs`
    made: dict[Hashable, Candidate] = field(default_factory=dict)  # most steps come again and again

    @property
    def where(self) -> str:
        stands = self.standing and self.steps[0].option.label
        return f"{self.name} stands: {stands}" if stands else f"{self.name} waits"

    def stands(self, label: str, touches: frozenset[Touch] = UNTOUCHED) -> None:
        """It is about to do that, which touches what each step of its does, and those."""
        self.standing, self.steps = True, (self.own(label, touches),)

    def own(self, label: str, touches: frozenset[Touch]) -> Candidate:
        key = label, touches
        return self.made.get(key) or self._makes(key, Option(self.name, label, self.state | touches))

    def _told(self, found: Interest) -> Candidate:
        file, ready = found.file, found.ready
        peer = file.peer if ready & ~_IN else None  # it has to do with the other end, too
        key = found, ready, peer
        known = self.made.get(key)
        if known is not None:
            return known
        touches = self.state | queues_of(file, peer is not None)
        return self._makes(key, Option(f"{self.name}<{file.name}", "is told", touches), (found.fd, ready))

    def _makes(self, key: Hashable, option: Option, event: Event | None = None) -> Candidate:
        if len(self.made) >= MADE:
            self.made.clear()
        made = self.made[key] = Candidate(option, self, event)
        return made

    def waits_for(
        self,
        pollers: Sequence[SimPoller],
        is_woken: IsWoken | None = None,
        deadline_ns: int | None = None,
    ) -> None:
        self._leaves()
        self.waits, self.is_woken, self.deadline_ns = pollers, is_woken, deadline_ns
        for poller in pollers:
            poller.stirs = self.stirs

    def stirs(self) -> None:
        """What it waits for has changed."""
        self.stale, self.asleep_until = True, 0

    def _leaves(self) -> None:
        """It does not stand there any more, nor wait."""
        self.standing = False
        self.stirs()
        for poller in self.waits:
            poller.stirs = None

    def goes_on(self, event: Event | None = None) -> None:
        """It runs, and is told that."""
        self._leaves()
        self.told = event
        self.waits, self.is_woken, self.deadline_ns = (), None, None

    def could_take(self, now: int) -> Sequence[Candidate]:
        """The steps it could take, if it is not over."""
        if self.stopped_ns > now:
            return ()
        if self.standing:
            return self.steps
        if self.stale:
            self.stale, self.steps = False, self._deliveries()
        if not self.steps:
            deadline = self.deadline_ns
            if deadline is not None and deadline <= now:
                return (self.timer(),)
            self.asleep_until = NEVER_NS if deadline is None else deadline
        return self.steps

    def _deliveries(self) -> Sequence[Candidate]:
        """What it waits for and is there."""
        steps: list[Candidate] = []
        for poller in self.waits:
            steps += map(self._told, poller.found())
        if self.is_woken is not None and self.is_woken():
            steps.append(Candidate(Option(f"{self.name}<woken", "is woken", self.state), self))
        return steps

    def timer(self) -> Candidate:
        return Candidate(Option(f"{self.name}<timer", "time is up", self.state | TIME_PASSES), self)

    def can_go_at(self, now: int) -> int | None:
        """When it could go on at the latest by itself; None: it can now, or never."""
        if self.standing or self.deadline_ns is None:
            return self.stopped_ns if self.stopped_ns > now else None
        return max(self.deadline_ns, self.stopped_ns)

    def take(self) -> Event:
        """What it was told."""
        event, self.told = self.told, None
        assert event is not None, "nobody told it anything"
        return event
