"""A thread of a simulated process: where it stands, what it waits for, and so what it could do next."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from greenlet import greenlet

from simulator.kernel.files import Memory
from simulator.kernel.process import SimPoller, SimProcess
from simulator.search.option import Option, Touch
from simulator.world.fate import Fate
from simulator.world.places import TIME_PASSES, queues_of

Event = tuple[int, int]  # of a poller: fd, what
Access = tuple[Memory, int, int, bool]  # where in bytes, how many, does it store?


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
    access: Access | None = None  # which that is, if its places are not among its touches yet
    waits: Sequence[SimPoller] = ()
    is_woken: Callable[[], bool] | None = None
    deadline_ns: int | None = None
    told: Event | None = None
    state: frozenset[Touch] = frozenset()  # which each step of its touches
    steps: list[Candidate] = field(default_factory=list)  # what it could do
    steps_of: int = -1  # when what it waits for was of that version

    def stands(self, option: Option, access: Access | None = None) -> None:
        """It is about to do that."""
        self.standing, self.access = True, access
        self.steps = [Candidate(option, self)]

    def waits_for(
        self,
        pollers: Sequence[SimPoller],
        is_woken: Callable[[], bool] | None = None,
        deadline_ns: int | None = None,
    ) -> None:
        self.standing, self.steps_of = False, -1
        self.waits, self.is_woken, self.deadline_ns = pollers, is_woken, deadline_ns

    def goes_on(self, event: Event | None = None) -> None:
        """It runs, and is told that."""
        self.waits_for(())
        self.access, self.told = None, event

    def deliveries(self, woken: int) -> list[Candidate]:
        """What it waits for and is there.  `woken`: how often anybody was."""
        version = woken
        for poller in self.waits:
            version += poller.version
        if self.steps_of != version:
            self.steps_of = version
            self.steps = list(_deliveries(self))
        return self.steps

    def timer(self) -> Candidate:
        return Candidate(Option(f"{self.name}<timer", "time is up", self.state | TIME_PASSES), self)

    def can_go_at(self) -> int | None:
        """When it could go on at the latest by itself; None: never."""
        if self.standing or self.deadline_ns is None:
            return self.stopped_ns or None
        return max(self.deadline_ns, self.stopped_ns)

    def take(self) -> Event | None:
        event, self.told = self.told, None
        return event


def _deliveries(thread: SimThread) -> Iterator[Candidate]:
    for poller in thread.waits:
        for fd, what in poller.ready():
            file = poller.file(fd)
            touches = thread.state | queues_of(file, bool(what & ~select.EPOLLIN))
            yield Candidate(Option(f"{thread.name}<{file.name}", "is told", touches), thread, (fd, what))
    if thread.is_woken is not None and thread.is_woken():
        yield Candidate(Option(f"{thread.name}<woken", "is woken", thread.state), thread)
