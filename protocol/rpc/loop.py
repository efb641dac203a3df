"""The message loop: one epoll set, one trio task, no task per message.

All connections and listening sockets of a process belong to one level-triggered epoll set that a single
trio task owns.  Woken, it dispatches inline, runs the flows that became ready, sends what was written
in one go, and waits a little in its own set before it parks in trio again: during a burst no message
touches the trio scheduler (docs/decisions/0002).  Nothing else in the process may rely on a trio timer
finer than SERVE_NS.  Nobody who waits for an answer stops this loop (R27).
"""

from __future__ import annotations

import select
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

import trio

from protocol.flow import Flows, Wait
from protocol.kernel.asked import told
from protocol.kernel.port import Kernel

POLL_S = 0.010  # at least two ticks of the kernel's clock: a shorter wait costs a timer reprogram a message
SERVE_NS = 10_000_000  # of serving, then other trio tasks get a turn: one costs as much as a message
ASK_NS = 1_000_000  # of asking and being answered, then the other tasks of a client get a turn
MAX_EVENTS = 64  # of one wait; the default allocates room for a thousand each time
TICK_S = 0.001  # between two looks of who polls
WATCHDOG_S = 0.5
RECV_BYTES = 1 << 16

T = TypeVar("T")


class Flushable(Protocol):
    def flush(self) -> None: ...


class Loop:
    """Owns the epoll set of a process, and runs its flows; `kernel` is what both ask of the outside."""

    def __init__(self, kernel: Kernel, flows: Flows) -> None:
        self.kernel = kernel
        self.flows = flows
        self.buffer = memoryview(bytearray(RECV_BYTES))
        """What is received; handled before anybody of the process receives again."""
        self._epoll = kernel.poller()
        self._ready: dict[int, Callable[[int], None]] = {}
        self._gone: set[int] = set()  # fds that are watched no more, since events were last asked for
        self._dirty: list[Flushable] = []
        self._next_turn: Wait[None] = Wait()
        self._turned = kernel.event()
        self.register(self._turned.fd, self._on_turned)
        self._kicked = False  # a trio task was made runnable: go back to trio
        self._yield_at = 0
        self._ticks: list[Wait[None]] = []
        self._deadlines: dict[Wait[object], tuple[float, Callable[[], None]]] = {}

    def register(self, fd: int, callback: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """Call `callback(events)` whenever `fd` is ready.  OSError: no memory for it, and nothing is kept."""
        try:
            self._epoll.register(fd, events)
        except OSError as error:
            raise told(error, "cannot watch one fd more") from None
        self._ready[fd] = callback

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Before `fd` is closed, which takes it out of the set even if this fails."""
        del self._ready[fd]
        self._gone.add(fd)
        with suppress(OSError):
            self._epoll.unregister(fd)

    def mark_dirty(self, writer: Flushable) -> None:
        """`writer.flush()` is called once at the end of the current turn."""
        self._dirty.append(writer)

    def now(self) -> float:
        """Seconds, of a clock that never goes back."""
        return self.kernel.monotonic_ns() / 1e9

    def report(self, error: BaseException) -> None:
        """A bug of ours surfaced where nobody waits for it."""
        self.flows.report(error)

    def kick(self) -> None:
        self._kicked = True

    def next_turn(self) -> Wait[None]:
        """Set once whoever waits for this process now was served: what a long flow awaits now and then."""
        self._turned.signal()
        return self._next_turn

    def _on_turned(self, _: int) -> None:
        self._turned.drain()
        turned, self._next_turn = self._next_turn, Wait()
        turned.set(None)

    def turn(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` for events and serve them.  False when there were none, nor somebody who
        polls.
        """
        gone = self._gone
        gone.clear()
        events = self._epoll.poll(TICK_S if self._ticks else timeout_s, MAX_EVENTS)
        for fd, what in events:
            # an earlier event may have closed it, and made another file of that number, which is not meant
            callback = None if fd in gone else self._ready.get(fd)
            if callback is None:
                continue
            try:
                callback(what)
            except Exception as error:  # ours, not the peer's: channels turn those into a close
                self.report(error)
            self.settle()
        if self._ticks:
            self._fire_ticks()
            return True
        return bool(events)

    def tick(self) -> Wait[None]:
        """Set at the end of a turn to come: what a flow that polls awaits between two looks."""
        wait: Wait[None] = Wait()
        self._ticks.append(wait)
        return wait

    def _fire_ticks(self) -> None:
        ticks, self._ticks = self._ticks, []
        for wait in ticks:
            wait.set(None)
        self.settle()

    def settle(self) -> None:
        """Run ready flows and send what was written."""
        flows = self.flows
        while flows.has_ready or self._dirty:
            flows.run_ready()
            dirty, self._dirty = self._dirty, []
            for writer in dirty:
                writer.flush()

    def expire(self, wait: Wait[T], after_s: float, action: Callable[[], None]) -> None:
        """Call `action` if `wait` is not done within `after_s` (coarse: one watchdog for all)."""
        self._deadlines[wait] = (self.now() + after_s, action)  # type: ignore[index]

    async def serve(self) -> None:
        """Serve until cancelled: the process's only message task."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watchdog)
            monotonic_ns = self.kernel.monotonic_ns
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                limit = monotonic_ns() + SERVE_NS
                while self.turn(POLL_S):
                    if self._kicked or monotonic_ns() > limit:
                        self._kicked = False
                        await trio.lowlevel.checkpoint()
                        limit = monotonic_ns() + SERVE_NS

    async def result(self, wait: Wait[T]) -> T:
        """Let the calling trio task wait.  A quick answer is served right here, without a reschedule."""
        self.settle()
        while not wait.done:
            if not self.turn(POLL_S) or self._kicked:
                break
        if not wait.done:
            await self._park(wait)
        elif self.kernel.monotonic_ns() > self._yield_at:
            await trio.lowlevel.checkpoint()
            self._yield_at = self.kernel.monotonic_ns() + ASK_NS
        return wait.result()

    async def _park(self, wait: Wait[T]) -> None:
        task = trio.lowlevel.current_task()
        parked = True

        def wake(_: Wait[T]) -> None:
            nonlocal parked
            if parked:
                parked = False
                self._kicked = True
                trio.lowlevel.reschedule(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            nonlocal parked
            parked = False
            return trio.lowlevel.Abort.SUCCEEDED

        wait.on_done(wake)
        await trio.lowlevel.wait_task_rescheduled(abort)

    async def _watchdog(self) -> None:
        while True:
            await trio.sleep(WATCHDOG_S)
            now = self.now()
            for wait, (deadline, action) in list(self._deadlines.items()):
                if wait.done:
                    del self._deadlines[wait]
                elif now >= deadline:
                    del self._deadlines[wait]
                    action()
            self._fire_ticks()  # a flow may have begun to poll while nobody took turns

    def close(self) -> None:
        self.flows.close()
        self._turned.close()
        self._epoll.close()
