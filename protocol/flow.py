"""Waiting without a scheduler of its own: one-shot results, and flows that await them.

The kernel code we model waits in the middle (fault a page in, flush and be acked, drain).  A core writes
such a path as an `async def` in the order the kernel runs it and awaits `Wait` objects; whoever owns a
`Flows` drives it: a daemon's message loop inline, a test by hand, a simulator in the order its seed picks.
No trio task, lock or event is made for it (docs/decisions/0003).

Promises:
* Between two awaits a flow is atomic: setting a `Wait` never runs another flow, it only makes it ready.
* Flows made ready run in the order they were made ready, unless a subclass picks otherwise.
* A flow that ends in an exception hands it to its `Wait`; that of a spawned one, which nobody awaits, goes
  to `on_crash`.

Why a core needs no lock for what it does between two awaits, and what that rests on:
* `Wait.set` in the middle of a change must not run who waits for it: that flow would see half of the change.
  `_suspend`'s callback only makes it ready; `run_ready` runs it when the setter has come to its own await
  (tests/unit/protocol/test_flow.py::test_a_flow_that_sets_its_neighbours_wait_is_not_interrupted_by_it).
* A reader that came after a writer must not overtake it for ever: `RwLock` lets in who waits in the order
  they came, and a reader behind a writer waits
  (::test_a_lock_lets_readers_in_together_and_everybody_in_the_order_they_came).
* A callback with a bug must not leave the others asleep: `Wait._call` goes on with the rest, then raises.
What it does not give: anything read before an await may have changed after it.  That is said, and held, at
each await (docs/awaits.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Wait(Generic[T]):
    """A result that is set once.  Await it in a flow, or attach `on_done` callbacks."""

    __slots__ = ("_callbacks", "_done", "_error", "_value")

    def __init__(self) -> None:
        self._done = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Wait[T]], None]] = []

    @property
    def done(self) -> bool:
        return self._done

    def set(self, value: T) -> None:
        assert not self._done, "a Wait is set once"
        self._value = value
        self._finish()

    def fail(self, error: BaseException) -> None:
        assert not self._done, "a Wait is set once"
        self._error = error
        self._finish()

    def _finish(self) -> None:
        self._done = True
        callbacks, self._callbacks = self._callbacks, []
        self._call(iter(callbacks))

    def _call(self, callbacks: Iterator[Callable[[Wait[T]], None]]) -> None:
        """All of them, even if one has a bug: who waits behind it must not wait for ever."""
        try:
            for callback in callbacks:
                callback(self)
        except Exception:
            self._call(callbacks)
            raise

    def on_done(self, callback: Callable[[Wait[T]], None]) -> None:
        """Call `callback(self)` once set; at once if it already is.  It must not run a flow."""
        if self._done:
            callback(self)
        else:
            self._callbacks.append(callback)

    def result(self) -> T:
        assert self._done, "result() before the Wait was set"
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def __await__(self) -> Generator[Wait[T], None, T]:
        if not self._done:
            yield self
        return self.result()


def done(value: T) -> Wait[T]:
    """A Wait that never makes anybody wait."""
    wait: Wait[T] = Wait()
    wait.set(value)
    return wait


Flow = Coroutine[Any, None, T]


class _Started(Generic[T]):
    __slots__ = ("coro", "done")

    def __init__(self, coro: Flow[T], done: Wait[T]) -> None:
        self.coro = coro
        self.done = done


class Flows:
    """Runs flows up to their next wait.  Not re-entrant: `run_ready` is called from the top level only."""

    def __init__(self, on_crash: Callable[[BaseException], None] | None = None) -> None:
        self._ready: deque[_Started[Any]] = deque()
        self._waiting: dict[_Started[Any], None] = {}
        self._on_crash = on_crash

    def start(self, coro: Flow[T]) -> Wait[T]:
        """Run `coro` until it first waits.  Its result, or its error, is for whoever looks at the Wait."""
        done: Wait[T] = Wait()  # not Wait[T](), which costs twenty times as much
        running = _Started(coro, done)
        self._step(running)
        return running.done

    def begin(self, coro: Flow[T]) -> T | Wait[T]:
        """Like `start`, for callers who want a flow that never waits to cost next to nothing: its result,
        or its exception, is the call's; a Wait only if there is one.
        """
        try:
            wait = coro.send(None)
        except StopIteration as stop:
            result: T = stop.value
            return result
        done: Wait[T] = Wait()
        self._suspend(_Started(coro, done), wait)
        return done

    def spawn(self, coro: Flow[None]) -> None:
        """Start a flow nobody awaits; if it raises, `on_crash` is told."""
        self.start(coro).on_done(self._check_crash)

    def run_ready(self) -> None:
        """Run every ready flow to its next wait, and those they make ready, until none is."""
        while self._ready:
            self._step(self._pick())

    @property
    def has_ready(self) -> bool:
        return bool(self._ready)

    @property
    def waiting(self) -> int:
        """How many flows wait for something; nobody else holds them."""
        return len(self._waiting)

    def report(self, error: BaseException) -> None:
        """A bug surfaced where nobody waits for it."""
        if self._on_crash is None:
            raise error
        self._on_crash(error)

    def close(self) -> None:
        """Give up every flow: each sees GeneratorExit at its await."""
        for running in (*self._waiting, *self._ready):
            running.coro.close()
        self._waiting.clear()
        self._ready.clear()

    def _pick(self) -> _Started[Any]:
        return self._ready.popleft()

    def _step(self, running: _Started[Any]) -> None:
        try:
            wait = running.coro.send(None)
        except StopIteration as stop:
            running.done.set(stop.value)
        except Exception as error:
            running.done.fail(error)
        else:
            self._suspend(running, wait)

    def _suspend(self, running: _Started[Any], wait: object) -> None:
        assert isinstance(wait, Wait), f"a flow may await only a Wait, not {wait!r}"
        self._waiting[running] = None

        def resume(_: Wait[Any]) -> None:
            if self._waiting.pop(running, running) is None:
                self._ready.append(running)

        wait.on_done(resume)

    def _check_crash(self, wait: Wait[None]) -> None:
        try:
            wait.result()
        except Exception as error:
            self.report(error)


class RwLock:
    """A lock flows sleep on: first come, first served; readers that stand together go together.

    What the kernel has as a mutex is one that is only ever taken for writing: `async with` does that.
    """

    def __init__(self) -> None:
        self._readers = 0
        self._writer = False
        self._queue: deque[tuple[bool, Wait[None]]] = deque()

    async def acquire(self, *, write: bool) -> None:
        if self._queue or self._writer or (write and self._readers):
            wait: Wait[None] = Wait()
            self._queue.append((write, wait))
            await wait  # whoever lets us in has counted us
        else:
            self._enter(write)

    def release(self) -> None:
        assert self._writer or self._readers, "released more often than acquired"
        if self._writer:
            self._writer = False
        else:
            self._readers -= 1
        while self._queue and not self._writer:
            write, wait = self._queue[0]
            if write and self._readers:
                return
            self._queue.popleft()
            self._enter(write)
            wait.set(None)

    async def __aenter__(self) -> None:
        await self.acquire(write=True)

    async def __aexit__(self, *_: object) -> None:
        self.release()

    @property
    def is_held(self) -> bool:
        return self._writer or self._readers > 0

    def _enter(self, write: bool) -> None:
        if write:
            self._writer = True
        else:
            self._readers += 1
