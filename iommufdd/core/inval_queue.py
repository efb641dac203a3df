"""The invalidation queue, the driver's side: a ring in memory, waits that the unit answers in memory.

Models qi_submit_sync and qi_check_fault [Linux intel/dmar.c] on [VT-d 6.5.2].  Whoever submits sleeps until
the wait that ends his descriptors has stored its status; a page group response wants no wait.  The status of
the wait at index i of the ring is word i of memory that only the unit stores to.  Linux marks such a word
before and finds it changed; here each wait is given a number of its own, and is done when its word is that
number.

What keeps it safe:
  - descriptors are stored before the tail that shows them, and nothing between head and tail is touched but
    the descriptor at which the queue stopped;
  - an entry is used again only when what was submitted with it is done: a wait by its status, a response by
    the head;
  - the head is the unit's word: read once, and beyond what was queued it ends the link (I30).

A descriptor that the unit refuses (IQE) becomes a wait that does nothing, and its submitter is told.  What a
device did not complete in time (ITE) is submitted once more, then its submitter is told ETIMEDOUT.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum, auto

from iommufdd.core import qi
from iommufdd.core.counts import UnitCounts
from iommufdd.core.unit_registers import UnitRegisters
from protocol.errors import PeerError, UapiError
from protocol.flow import Wait
from protocol.hw.qi import IQEI, Descriptor, WaitDescriptor, encode
from protocol.hw.vtd_regs import IQERCD_IQEI, IQERCD_ITESID, Fsts, Reg, Ring
from protocol.lifecycle import LifeCycle
from protocol.units import Hpa

STATUS_BYTES = 4
UNANSWERED_MAX = 32  # responses in a row without a wait: behind that many one tells that there is room again
_RECOVERABLE = (IQEI.BAD_TYPE, IQEI.RESERVED_FIELD)
_NOTHING = encode(WaitDescriptor())


class QueueState(Enum):
    LINKED = auto()
    LOST = auto()  # the unit hears of nothing more, and may use what it has
    GONE = auto()  # the unit is: whoever waits is told


class QueueEvent(Enum):
    LOSE = auto()
    GO = auto()


QUEUE_LIFE = LifeCycle(
    "invalidation queue",
    QueueState.LINKED,
    {
        (QueueState.LINKED, QueueEvent.LOSE): QueueState.LOST,
        (QueueState.LINKED, QueueEvent.GO): QueueState.GONE,
        (QueueState.LOST, QueueEvent.GO): QueueState.GONE,
    },
)


class InvalidationTimeOut(UapiError):
    """ETIMEDOUT: function `rid` did not complete an invalidation, nor the same again."""

    def __init__(self, rid: int) -> None:
        super().__init__(errno.ETIMEDOUT, f"function {rid:#x} completes no invalidation")
        self.rid = rid


class _Submission:
    """Descriptors side by side in the ring; `end` is the position behind them, counted from the first
    ever.
    """

    __slots__ = ("descriptors", "done", "end", "error", "late", "retried", "status")

    def __init__(self, descriptors: Sequence[Descriptor], done: Wait[None] | None) -> None:
        self.descriptors = descriptors
        self.done = done
        self.end = 0
        self.status = 0  # what its wait stores
        self.error: UapiError | None = None  # one of its descriptors was refused
        self.late = False  # a device did not complete one of them in time
        self.retried = False

    @property
    def start(self) -> int:
        return self.end - len(self.descriptors)

    @property
    def drains(self) -> bool:
        """Are all page requests before it in memory once it is done?"""
        return any(
            isinstance(descriptor, WaitDescriptor) and descriptor.pd for descriptor in self.descriptors
        )


class InvalidationQueue:
    """`ring_view` is the ring, `status` the words of its waits, at `status_at`; `on_drained` looks at the
    page request queue.  Methods that look at what the unit stored raise PeerError when that cannot be.
    """

    def __init__(
        self,
        registers: UnitRegisters,
        ring: Ring,
        ring_view: memoryview,
        status: memoryview,
        status_at: Hpa,
        counts: UnitCounts,
        on_drained: Callable[[], None],
    ) -> None:
        self._registers = registers
        self._ring = ring
        self._view = ring_view
        self._status = status.cast("I")
        self._status_at = status_at
        self._counts = counts
        self._on_drained = on_drained
        self._head = self._tail = 0  # positions; the index of one is what is left modulo the ring
        self._number = 0  # of the last wait
        self._unanswered = 0
        self._flying: deque[_Submission] = deque()  # in the ring, the oldest first
        self._queued: deque[_Submission] = deque()  # found no room
        self._state = QUEUE_LIFE.born

    async def submit(self, descriptors: Sequence[Descriptor]) -> None:
        """Descriptors, the last a wait; returns when that is done.  EINVAL: one is no descriptor to this
        unit; InvalidationTimeOut; ENODEV: the unit is gone.
        """
        assert isinstance(descriptors[-1], WaitDescriptor), "the last is a wait"
        assert len(descriptors) < self._ring.entries, f"{len(descriptors)} descriptors are more than the ring"
        submission = _Submission(descriptors, Wait())
        assert submission.done is not None
        self._take(submission)
        # await: submission: cannot change: the queue's own, and done when this returns
        await submission.done
        if submission.error is not None:
            raise submission.error

    def post(self, descriptor: Descriptor) -> bool:
        """One that nobody waits for.  False: there is nobody to execute it any more."""
        self._unanswered += 1
        if self._unanswered < UNANSWERED_MAX:
            self._take(_Submission([descriptor], None))
        else:
            self._take(_Submission([descriptor, qi.wait()], Wait()))
        return self._state is QueueState.LINKED

    def _take(self, submission: _Submission) -> None:
        if self._state is QueueState.GONE:
            _fail(submission)
            return
        self._queued.append(submission)
        self._fill()

    def _fill(self) -> None:
        """What waits for room goes into the ring, in order, as far as it fits: one entry stays free."""
        filled = False
        while self._queued:
            submission = self._queued[0]
            used = self._tail - (self._flying[0].start if self._flying else self._tail)
            if used + len(submission.descriptors) >= self._ring.entries:
                break
            self._queued.popleft()
            self._put(submission)
            filled = True
        if filled:
            self._counts.kicks += 1
            self._registers.store(Reg.IQT, self._ring.offset(self._tail))
            self._registers.kick()

    def _put(self, submission: _Submission) -> None:
        submission.end = self._tail + len(submission.descriptors)
        descriptors = list(submission.descriptors)
        if submission.done is not None:
            self._unanswered = 0
            self._number = self._number % 0xFFFF_FFFF + 1
            submission.status = self._number
            descriptors[-1] = self._answered(submission)
        if not submission.retried:
            for descriptor in descriptors:
                self._counts.descriptors[qi.kind_of(descriptor)] += 1
        for n, raw in enumerate(qi.raw(descriptors)):
            self._store(self._tail + n, raw)
        self._tail = submission.end
        self._flying.append(submission)

    def _answered(self, submission: _Submission) -> WaitDescriptor:
        """Its last descriptor, with where and what to store, and an event."""
        wait = submission.descriptors[-1]
        assert isinstance(wait, WaitDescriptor)
        at = self._status_at + (submission.end - 1) % self._ring.entries * STATUS_BYTES
        return WaitDescriptor(
            if_=True, sw=wait.sw, fn=wait.fn, pd=wait.pd, status_data=submission.status, status_addr=at
        )

    def _store(self, position: int, raw: bytes) -> None:
        at = self._ring.offset(position)
        self._view[at : at + len(raw)] = raw

    # -- what the unit has done ------------------------------------------------------------------------

    def look(self) -> None:
        """Who is done is told, and what waits for room goes in."""
        head = self._read_head()
        while self._flying and self._is_done(self._flying[0], head):
            self._finish(self._flying.popleft())
        self._fill()

    def _is_done(self, submission: _Submission, head: int) -> bool:
        if submission.done is None:
            return submission.end <= head
        return self._status[(submission.end - 1) % self._ring.entries] == submission.status

    def _finish(self, submission: _Submission) -> None:
        if submission.late:
            self._again(submission)
        elif submission.done is not None:
            if submission.drains:
                self._on_drained()
            submission.done.set(None)

    def _read_head(self) -> int:
        """The position the unit's head stands at."""
        offset = self._registers.load(Reg.IQH)
        index = self._ring.index(offset)
        ahead = 0 if index is None else self._ring.distance(self._head % self._ring.entries, index)
        if index is None or self._head + ahead > self._tail:
            raise PeerError(f"I30: invalidation queue: the head is at {offset:#x}, where nothing was queued")
        self._head += ahead
        return self._head

    # -- when it stopped -------------------------------------------------------------------------------

    def recover(self, fsts: int) -> None:
        """FSTS said that the queue stopped [Linux intel/dmar.c qi_check_fault]; who calls kicks the unit."""
        head = self._read_head()
        error = self._registers.load(Reg.IQERCD)
        if fsts & Fsts.IQE:
            self._replace(head, IQERCD_IQEI.get(error))
        if fsts & Fsts.ITE:
            self._time_out(head, IQERCD_ITESID.get(error))
        self._registers.clear(Reg.FSTS, fsts & (Fsts.IQE | Fsts.ITE | Fsts.ICE))
        self.look()

    def _replace(self, head: int, iqei: int) -> None:
        """The descriptor at the head becomes one that can be executed and does nothing."""
        at_fault = next((s for s in self._flying if s.start <= head < s.end), None)
        if iqei not in _RECOVERABLE or at_fault is None:
            raise PeerError(f"invalidation queue: stopped at {head % self._ring.entries} for reason {iqei}")
        why = f"the unit refuses descriptor {at_fault.descriptors[head - at_fault.start]}: {IQEI(iqei).name}"
        at_fault.error = UapiError(errno.EINVAL, why)
        last = head == at_fault.end - 1 and at_fault.done is not None
        self._store(head, encode(replace(self._answered(at_fault), pd=False)) if last else _NOTHING)

    def _time_out(self, head: int, rid: int) -> None:
        """Waits before the head whose status was not stored are aborted, and done never."""
        aborted = []
        for submission in list(self._flying):
            if submission.done is None or submission.start >= head or self._is_done(submission, head):
                continue
            submission.late = True
            submission.error = InvalidationTimeOut(rid)
            if submission.end <= head:
                aborted.append(submission)
        for submission in aborted:
            self._flying.remove(submission)
            self._again(submission)

    def _again(self, submission: _Submission) -> None:
        """Once more, or its submitter is told."""
        assert submission.done is not None
        if submission.retried:
            submission.done.set(None)
            return
        submission.retried, submission.late, submission.error = True, False, None
        self._queued.append(submission)

    def lost(self) -> None:
        """The link to the unit is: what it has not done it may never do, and it may use what it has."""
        self._state = QUEUE_LIFE.after(self._state, QueueEvent.LOSE)

    def gone(self) -> None:
        """The unit is: nobody waits for it any more."""
        self._state = QUEUE_LIFE.after(self._state, QueueEvent.GO)
        ending = [*self._flying, *self._queued]
        self._flying.clear()
        self._queued.clear()
        for submission in ending:
            _fail(submission)


def _fail(submission: _Submission) -> None:
    if submission.done is not None:
        submission.error = UapiError(errno.ENODEV, "the remapping unit is gone")
        submission.done.set(None)
