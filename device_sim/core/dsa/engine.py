"""Engines and groups: who runs which descriptor next.

Models [DSA 3]: a group has work queues and engines, and its engines take work from no other group, so a queue
whose descriptors all wait for pages stops nobody outside its group.  An engine runs one descriptor at a time.
Descriptors of batches go before the queues; queues are served in turn (WQCAP says there are no priorities).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from device_sim.core.dsa.wq import Job, WorkQueue
from protocol.flow import Flow


class EngineGroup:
    """`run(job)` is a flow that lasts as long as the engine is busy with it."""

    def __init__(
        self,
        queues: list[WorkQueue],
        engines: int,
        run: Callable[[Job], Flow[None]],
        spawn: Callable[[Flow[None]], None],
    ) -> None:
        self.engines = engines
        self._queues = deque(queues)
        self._run = run
        self._spawn = spawn
        self._staged: deque[Job] = deque()
        self._running = 0

    def stage(self, job: Job) -> None:
        """A descriptor that a batch has fetched."""
        self._staged.append(job)
        self.kick()

    def kick(self) -> None:
        """There is work: engines that idle take it."""
        while self._running < self.engines and self._has_work():
            self._running += 1
            self._spawn(self._engine())

    def _has_work(self) -> bool:
        return bool(self._staged) or any(queue.waiting for queue in self._queues)

    async def _engine(self) -> None:
        while (job := self._next()) is not None:
            await self._run(job)
        self._running -= 1

    def _next(self) -> Job | None:
        if self._staged:
            return self._staged.popleft()
        for _ in range(len(self._queues)):
            queue = self._queues[0]
            self._queues.rotate(-1)
            if queue.waiting:
                return queue.waiting.popleft()
        return None
