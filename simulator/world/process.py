"""What a simulated process runs on beside its kernel: a trio run of its own, and its flows.

`Io` is trio's view of the kernel, `VirtualClock` its clock; both ask the world.  A `SimFlows` lets the
strategy say which of the flows that are ready goes first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from protocol.flow import Flows
from protocol.rpc.loop import SERVE_NS
from simulator.kernel.process import SimPoller, SimProcess
from simulator.world import trio_run
from simulator.world.places import emptiness_of
from simulator.world.scheduler import World

SERVES_NS = SERVE_NS // 10
ROUNDING_S = 0.5e-9  # more than what floating point loses of an hour
LONG_S = 3600.0  # who sleeps longer sleeps until it is woken


class SimFlows(Flows):
    """The order of the flows of one process is the strategy's."""

    def __init__(self, world: World, on_crash: Callable[[BaseException], None]) -> None:
        super().__init__(on_crash)
        self._world = world

    def _pick(self) -> Any:
        ready = self._ready
        if len(ready) > 1:
            coros: list[Any] = [running.coro for running in ready]
            labels = [f"{n} {coro.__qualname__}" for n, coro in enumerate(coros)]
            number = self._world.pick("flow", labels)
            ready.rotate(-number)
            first = ready.popleft()
            ready.rotate(number)
            return first
        return ready.popleft()


class VirtualClock(trio.abc.Clock):
    """Virtual time.  Deadlines are sums in floating point, and which of two moments of the same nanosecond is
    the later one must not depend on how far the world's time has come: a deadline is over in its nanosecond.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.judges = False
        """It is asked next which deadlines are over."""

    def start_clock(self) -> None: ...

    def current_time(self) -> float:
        now = self._world.now_ns() / 1e9
        if self.judges:
            self.judges = False
            return now + ROUNDING_S
        return now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        left = deadline - self._world.now_ns() / 1e9
        return left if left > ROUNDING_S else 0.0


class Io:
    """Tasks that wait for an fd to be readable: the loop's, which waits for its poller."""

    def __init__(self, world: World, process: SimProcess, clock: VirtualClock) -> None:
        self._world = world
        self._process = process
        self._clock = clock
        self._parked: dict[SimPoller, trio.lowlevel.Task] = {}
        self._serves: trio.lowlevel.Task | None = None
        self._slept = False  # before trio was asked how long
        self._back_at = 0  # by then at the latest it goes by way of trio
        self._woken = False
        self._wakes: trio.lowlevel.Task | None = None

    def get_events(self, timeout: float, /) -> list[trio.lowlevel.Task]:
        slept, self._slept = self._slept, False
        ready = self._ready()
        if ready or slept:
            return ready
        if timeout > 0:
            self._sleeps(list(self._parked), timeout)
        else:
            self._world.point("goes on")
        return self._ready()

    def parks(self, poller: SimPoller) -> bool:
        """As who serves goes back to trio, and waits there where no other task can go on: that costs as much
        as a message, and is no step.  False: trio is to look itself, or who serves has served for long
        (SERVES_NS).
        """
        if not (timeout := self.rests(poller)):
            return False
        self._sleeps((poller,), timeout)
        deadline, asks = trio_run.next_deadline(), self._clock.deadline_to_sleep_time
        self._slept = self._has_others() or self._world.now_ns() >= self._back_at or asks(deadline) <= 0
        return not self._slept

    def rests(self, poller: SimPoller) -> float:
        """How long who serves may wait for what `poller` has not found.  0: trio is to look itself, at a
        deadline that is over, or at who was woken: what comes then comes behind that.
        """
        timeout = 0.0
        if trio.lowlevel.current_task() is self._serves and not self._has_others():
            timeout = self._clock.deadline_to_sleep_time(trio_run.next_deadline())
        if not timeout:
            self._world.touch(emptiness_of(poller.wanted.names))
        return timeout

    def _has_others(self) -> bool:
        """Trio has a task that can go on."""
        return self._woken or trio_run.others_go_on()

    def _sleeps(self, pollers: Sequence[SimPoller], timeout: float) -> None:
        self._world.wait(pollers, timeout if timeout < LONG_S else None, self._is_woken)

    def _is_woken(self) -> bool:
        return self._woken

    def _ready(self) -> list[trio.lowlevel.Task]:
        found = [task for poller, task in self._parked.items() if poller.found()] if self._parked else []
        if self._woken and self._wakes is not None:
            found.append(self._wakes)
        return found

    def process_events(self, events: list[trio.lowlevel.Task], /) -> None:
        for task in events:
            self._parked = {poller: other for poller, other in self._parked.items() if other is not task}
            if task is self._wakes:
                self._wakes, self._woken = None, False
            trio.lowlevel.reschedule(task)
        self._back_at = self._world.now_ns() + SERVES_NS
        self._clock.judges = True  # trio asks for the time next (`unrolled_run`)

    async def wait_readable(self, fd: int, /) -> None:
        poller, task = self._process.file(fd), trio.lowlevel.current_task()
        assert isinstance(poller, SimPoller), "it waits for one of its sockets beside its poller"
        self._parked[poller] = self._serves = task

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._parked[poller]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def wait_woken(self) -> None:
        self._wakes = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._wakes = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def wakeup_thread_and_signal_safe(self) -> None:
        self._woken = True
        self._world.woken()

    def close(self) -> None: ...


def run(world: World, process: SimProcess, main: Callable[[], Awaitable[Any]]) -> Any:
    """As `trio.run(main)` in that process; called in its thread."""
    clock = VirtualClock(world)
    io = Io(world, process, clock)
    process.parks = io.parks
    try:
        return trio_run.run(main, io, clock)
    finally:
        process.parks = None
