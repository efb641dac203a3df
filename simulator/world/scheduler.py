"""Who goes on: threads of the simulated processes, each a greenlet, and the virtual clock.

A thread stands still at a point: it is about to do, or has just done, what another process can notice, or it
waits.  There the next step is chosen among all that could be taken, by a `Strategy`, in the greenlet that
stopped, and control goes straight to the chosen one.  Between two points nobody else runs.

Time passes by STEP_NS with each step, so that who sleeps beside somebody busy wakes up; when nothing can
happen, it jumps to the first deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from functools import lru_cache, partial
from math import ceil
from types import SimpleNamespace

from greenlet import GreenletExit, getcurrent, greenlet

from protocol.errors import leaves
from protocol.kernel.port import Bytes
from protocol.rpc.loop import POLL_S
from protocol.rpc.session import HEADER, HEADER_BYTES
from simulator.kernel.files import Memory, OpenFile, StreamEnd
from simulator.kernel.process import SimHost, SimPoller, SimProcess
from simulator.search.excerpt import Excerpt
from simulator.search.option import STOP, UNTOUCHED, Option, Strategy, Touch, touching
from simulator.world import trio_run
from simulator.world.fate import Fate
from simulator.world.journal import Journal
from simulator.world.limits import LIMIT_CHOICES, LIMIT_NS, LIMIT_STEPS, Stopped, Stuck
from simulator.world.memory import watched
from simulator.world.outside import outside, raised_outside
from simulator.world.places import (
    OF_BOTH_ENDS,
    TIME_STANDS,
    access_of,
    closed_with,
    emptiness_of,
    queues_of,
    state_of,
    told_of,
    words_of,
)
from simulator.world.thread import Candidate, Event, IsWoken, SimThread

STEP_NS = 2_000
LOST_NS = 1e-3  # of a time-out, at most, in floating point
WORD_NS = 10  # a load or store
ACCESSES = 1 << 16  # that are remembered: most come again and again
PASSED = Option("", "")
_ALWAYS_ASKED = SimpleNamespace(is_silent=False)  # each strategy but an excerpt
FOR_OTHERS = frozenset({"send", "signal", "connect"})  # after these, who was told may be faster


class World:
    """The `Scheduler` of a `SimHost`."""

    def __init__(self, strategy: Strategy, journal: Journal | None = None, *, by_word: bool = True) -> None:
        self.host = SimHost(self)
        self.journal = journal  # None: nobody asks what happened
        self.threads: list[SimThread] = []
        self.failures: list[BaseException] = []  # that nobody in the system caught
        self.decisions = 0
        self._counted_from = 0  # of them, when the schedule began
        self._straight = 0  # steps since the last
        self._strategy = strategy
        self._excerpt = strategy if isinstance(strategy, Excerpt) else _ALWAYS_ASKED
        self._by_word = by_word  # each access of shared memory is a point
        self._now = 0
        self._changes = 0  # of anything that decides what can happen next
        self._alone_at, self._alone_until = -1, 0
        self._crowded_at = -1  # `_changes` when somebody else could take a step, and nobody has since
        self._main = getcurrent()  # where `run` is called
        self._running: SimThread | None = None
        self._awaited: SimThread | None = None  # by `run`
        self._given_up: BaseException | None = None
        self._closed = self._settling = False
        self._paused: SimThread | None = None
        self._taken: Option | None = None
        self._touched: set[Touch] = set()
        self._access = lru_cache(ACCESSES)(access_of)

    # -- threads ---------------------------------------------------------------------------------------

    def spawn(self, process: SimProcess, body: Callable[[], None], fate: Fate | None = None) -> SimThread:
        """It begins to run when it is chosen."""

        def life() -> None:
            trio_run.nothing_kept()
            try:
                body()
            except BaseException as error:
                if not (thread.over or isinstance(error, GreenletExit)):
                    self.failures.append(error)
            thread.over = True
            process.die()

        thread = SimThread(process, process.name, greenlet(life, self._main), fate)
        thread.state = state_of(process.name)
        thread.stands("begins", self._running.state if self._running is not None else UNTOUCHED)
        self.threads.append(thread)
        return thread

    def run(self, thread: SimThread) -> bool:
        """Until that one is over, or (False) somebody pauses.  Stuck, Stopped."""
        self._awaited = thread
        try:
            with outside(self._main):
                if self._paused is not None:  # it goes on at once, as if nothing had been
                    (self._running, self._paused) = (self._paused, None)
                    self._running.greenlet.switch()
                while not (thread.over or self._given_up or self._paused):
                    self._running = None
                    self._switch(None)
                self._tell_taken()
                if self._given_up is not None:
                    raise self._given_up
                return thread.over
        finally:
            self._running = None

    def crashes(self) -> list[BaseException]:
        """`failures` one by one."""
        return leaves(BaseExceptionGroup("", self.failures)) if self.failures else []

    def close(self) -> None:
        """Whoever has not come to its end ends where it stands, and nothing of it is heard."""
        self._closed = True
        kept = trio_run.kept()
        for thread in self.threads:
            if thread.greenlet:
                thread.over = True
                thread.greenlet.throw(GreenletExit)
        trio_run.restored(kept)
        self.threads.clear()
        self.failures.clear()
        self._running = self._awaited = None

    def tells(self, line: str) -> None:
        """Of what is no step of its own."""
        if self.journal is not None:
            self.journal.add(line)

    @property
    def running(self) -> str:
        """The process whose step this is; none's outside of `run`."""
        return "" if self._running is None else self._running.name

    @property
    def unfinished(self) -> bool:
        """Somebody stands in the middle, or was killed there."""
        return any(thread.greenlet for thread in self.threads)

    def kill(self, thread: SimThread) -> None:
        """As SIGKILL does: its fds are closed, by nobody who runs, and it does not go on."""
        self.tells(f"{thread.name} is killed")
        thread.over = True
        thread.waits_for(())
        running, self._running = self._running, None
        thread.process.die()
        self._running = running
        self._changes += 1

    def pause(self) -> None:
        """`run` returns; when it is called again, the running thread goes on."""
        assert self._running is not None, "nobody runs who could pause"
        self._paused = self._running
        self._counted_from = self.decisions
        self._goes_to(self._main)

    # -- choosing --------------------------------------------------------------------------------------

    def _switch(self, me: SimThread | None, cost_ns: int = STEP_NS) -> None:
        """The next step is taken; returns when it is `me`'s turn."""
        if self._closed:
            raise GreenletExit
        self._crowded_at = -1
        if not self._settling:
            self._now += cost_ns
        step = self._next(me)
        if step is None:
            if me is not None:
                self._goes_to(self._main)
            return  # it is its turn again
        _, thread, event = step
        thread.goes_on(event)
        self._running = thread
        if thread is not me:
            self._goes_to(thread.greenlet)

    def _goes_to(self, other: greenlet) -> None:
        """Returns when it is the turn of the greenlet that called, if ever."""
        kept = trio_run.kept()
        try:
            other.switch()
        finally:
            trio_run.restored(kept)
        if self._closed:
            raise GreenletExit

    def _next(self, me: SimThread | None) -> Candidate | None:
        """None: there is none, and `_given_up` says why, or `run` has what it waits for."""
        while (step := self._chosen(me)) is not None:
            option, thread, _ = step
            if thread.fate is None or not self._meets_fate(thread):
                thread.taken += 1
                self._take(option)
                return step
            if self._awaited is not None and self._awaited.over:
                break
        return None

    def _meets_fate(self, thread: SimThread) -> bool:
        fate = thread.fate
        if fate is None or thread.taken + 1 < fate.step:
            return False
        thread.fate = None
        if fate.stops_s is None:
            self.kill(thread)
        else:
            self.tells(f"{thread.name} is stopped")
            thread.stopped_ns = self._now + ceil(fate.stops_s * 1e9)
        return True

    def _chosen(self, me: SimThread | None) -> Candidate | None:
        self._straight += 1
        if self._excerpt.is_silent and self._straight <= LIMIT_STEPS:
            while (first := self._first(me)) is None and self._time_passes():
                pass
            return first
        while not (steps := self._steps(me)):
            if not self._time_passes():
                return None
        if self._straight > LIMIT_STEPS and len(steps) == 1:
            self._given_up = Stuck(f"{steps[0].option.actor} goes round in circles: {steps[0].option.label}")
            return None
        if len(steps) > 1:
            self._tell_taken()
            self.decisions, self._straight = self.decisions + 1, 0
            if self.decisions - self._counted_from > LIMIT_CHOICES:
                self._given_up = Stuck(f"all go round in circles: {'; '.join(self._standing())}")
                return None
            try:
                number = self._strategy.choose([step.option for step in steps])
            except Exception as error:
                raised_outside(self._main, error)
            if number == STOP:
                self._given_up = Stopped()
                return None
            return steps[number]
        return steps[0]

    def _time_passes(self) -> bool:
        """Until somebody can go on; False: nobody ever will."""
        times = [at for thread in self.threads if not thread.over and (at := thread.can_go_at(self._now))]
        if not times or min(times) > LIMIT_NS:
            self._given_up = Stuck("; ".join(self._standing()))
            return False
        self._now = max(self._now, min(times))
        return True

    def _steps(self, me: SimThread | None) -> list[Candidate]:
        """What could happen now; what `me` would do without anybody between comes first."""
        now = self._now
        steps = [] if me is None or me.over else [*me.could_take(now)]
        for thread in self.threads:
            if thread.asleep_until <= now and thread is not me and not thread.over:
                steps += thread.could_take(now)
        return steps

    def _first(self, me: SimThread | None) -> Candidate | None:
        """Of `_steps`."""
        now = self._now
        if me is not None and not me.over and (steps := me.could_take(now)):
            return steps[0]
        for thread in self.threads:
            if thread is not me and not thread.over and (steps := thread.could_take(now)):
                return steps[0]
        return None

    def _is_alone(self, me: SimThread) -> bool:
        """Nobody else could take a step; `access` goes by what was found last, while that holds."""
        if self._crowded_at == self._changes:
            return False
        until, now = LIMIT_NS, self._now
        for thread in self.threads:
            if thread is not me and not thread.over:
                if thread.asleep_until <= now and thread.could_take(now):
                    self._crowded_at = self._changes
                    return False
                until = min(until, thread.can_go_at(now) or until)
        self._alone_at, self._alone_until = self._changes, until
        return True

    def _standing(self) -> Iterator[str]:
        return (thread.where for thread in self.threads if not thread.over)

    def _take(self, option: Option) -> None:
        self._tell_taken()
        self._taken = option
        if self.journal is not None:
            self.journal.add(f"{option.actor}: {option.label}")

    def _tell_taken(self) -> None:
        if self._taken is not None and self._strategy.watches:
            if self._settling:
                self._touched |= TIME_STANDS
            try:
                self._strategy.took(touching(self._taken, self._touched))
            except Exception as error:
                raised_outside(self._main, error)
        self._taken = None
        self._touched.clear()

    # -- points ----------------------------------------------------------------------------------------

    def point(self, label: str) -> None:
        """The running thread is about to do that; others may come before it."""
        me = self._running
        if me is None or self._closed or (self._excerpt.is_silent and self._goes_straight_on(me, label)):
            return
        me.stands(label)
        self._switch(me)

    def _goes_straight_on(self, me: SimThread, label: str, cost_ns: int = STEP_NS) -> bool:
        """By default the running thread does, at a price: it need not be asked what it could do."""
        if me.over or me.fate is not None or self._straight >= LIMIT_STEPS:
            return False
        if not self._settling:
            self._now += cost_ns
        self._straight += 1
        me.taken += 1
        me.told = None
        self._taken = PASSED
        if self.journal is not None:
            self.journal.add(f"{me.name}: {label}")
        return True

    def _passes(self, actor: str, label: str) -> None:
        """A step by default, of which only the journal is told."""
        self._taken = PASSED
        if self.journal is not None:
            self.journal.add(f"{actor}: {label}")

    def picks_first(self) -> bool:
        """Would the running process `pick` the first, however often, and nobody hear of it?  Then it has."""
        if first := self.journal is None and self._excerpt.is_silent:
            self._taken = PASSED
        return first

    def pick(self, what: str, labels: Sequence[str], touches: Set[Touch] = frozenset()) -> int:
        """Which of several things the running process does next, within itself; it goes by those places."""
        if len(labels) == 1 or self._running is None or self._closed:
            return 0
        name = self._running.name
        if self._excerpt.is_silent:
            self._passes(f"{name}/{what}", labels[0])
            return 0
        self._tell_taken()
        self.decisions += 1
        touched = self._running.state | touches
        options = [Option(f"{name}/{what}", label, touched) for label in labels]
        try:
            number = self._strategy.choose(options)
        except Exception as error:
            raised_outside(self._main, error)
        if number == STOP:
            raised_outside(self._main, Stopped())
        self._take(options[number])
        return number

    def wait(
        self, pollers: Sequence[SimPoller], timeout_s: float | None, is_woken: IsWoken | None = None
    ) -> None:
        """The running thread sleeps until one of `pollers` has something, which the next `poll` of its is
        told, or `is_woken`, or time is up.  None: no limit.
        """
        me = self._running
        assert me is not None, "nobody runs who could wait"
        deadline = None if timeout_s is None else self._now + ceil(timeout_s * 1e9 - LOST_NS)
        me.waits_for(pollers, is_woken, deadline)
        self._switch(me)

    def settle(self, seconds: float) -> None:
        """The running thread does nothing for so long, whatever comes for it.  Meanwhile steps take no time:
        a timer comes where nothing else can, whichever order the rest came in.
        """
        self._settling = True
        try:
            self.wait((), seconds)
        finally:
            self._settling = False

    def woken(self) -> None:
        """Somebody's `is_woken` may say yes now."""
        for thread in self.threads:
            thread.stirs()
        self._changes += 1

    def access(self, memory: Memory, at: int, size: int, writes: bool) -> None:
        """The running thread is about to load from, or store to, those bytes."""
        me = self._running
        if me is None or self._closed or not memory.matters(me.name, writes):
            return
        known = self._alone_at == self._changes and self._now < self._alone_until
        is_alone = me.fate is None and (known or self._is_alone(me))  # who is to die may, between two stores
        if self._excerpt.is_silent:
            if is_alone and self.journal is None and not self._settling:
                return
            told = "" if self.journal is None else told_of(memory, at, writes)
            if is_alone and self._settling:
                self._passes(me.name, told)
            elif is_alone and self.journal is not None:
                self.journal.add(f"{me.name} {told}")
            if is_alone or self._goes_straight_on(me, told, WORD_NS):
                return
        told, words = self._access(memory, at, size, writes)
        if not is_alone:
            me.stands(told, words)
            self._switch(me, WORD_NS)
        elif self._settling or self._strategy.watches:  # a step is the same one, whoever else is about
            self._take(me.own(told, words).option)
        elif self.journal is not None:
            self.journal.add(f"{me.name} {told}")

    def note(self, memory: Memory, at: int, size: int, writes: bool) -> None:
        """The running thread loads or stores those bytes within its step."""
        if self._strategy.watches and memory.is_shared:
            self._touched.update(words_of(memory, at, size, writes))

    def touch(self, touches: Iterable[Touch]) -> None:
        """What the running thread does goes by those places, or changes them."""
        if self._strategy.watches:
            self._touched.update(touches)

    # -- the port `Scheduler` --------------------------------------------------------------------------

    def now_ns(self) -> int:
        return self._now

    def poll(self, poller: SimPoller, timeout_s: float, most: int) -> list[Event]:
        if self._closed:
            raise GreenletExit
        me, found = self._running, poller.found()
        if me is None:
            return poller.ready()[:most]
        if me.told is not None and (event := me.take()) in poller.ready():
            return [event]
        if found or timeout_s not in (0, POLL_S):
            self.wait((poller,), timeout_s)
        elif timeout_s == 0 or (parks := me.process.parks) is None:
            self.touch(emptiness_of(poller.wanted.names))
            return []
        elif not parks(poller):
            return []  # POLL_S is over: who served goes back to trio, where its other tasks have a turn
        return [] if me.told is None else [me.take()]

    def portion(self, process: SimProcess, end: StreamEnd) -> int:
        """One frame, or all there is."""
        there = end.unread
        if there <= HEADER_BYTES:
            return there
        first = HEADER_BYTES + int(HEADER.unpack(end.peek(HEADER_BYTES))[0])
        if first >= there:
            return there
        return (first, there)[self.pick("recv", ("one frame", "all frames"))]

    def happened(self, process: SimProcess, what: str, file: OpenFile, data: Bytes = b"") -> None:
        self._changes += 1
        if self._closed:
            return
        if self._strategy.watches:
            self._touched |= closed_with(file) if what == "close" else queues_of(file, what in OF_BOTH_ENDS)
        if self.journal is not None:
            self.journal.add(f"{process.name} {what} {file.name}", data)
        if what in FOR_OTHERS:
            self.point(f"has sent to {file.name}" if what == "send" else f"has told {file.name}")

    def looked(self, *files: OpenFile) -> None:
        self.touch(emptiness_of(tuple(file.name for file in files)))

    def discarded(self, memory: Memory, at: int, size: int) -> None:
        self.note(memory, at, size, True)

    def seen(self, process: SimProcess, memory: Memory, view: memoryview) -> memoryview:
        if not self._by_word:
            return view
        access, note = partial(self.access, memory), partial(self.note, memory)
        seen: memoryview = watched(memory.made_as, process.name, view, access, note)
        return seen
