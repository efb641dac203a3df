"""Page requests of one function: groups, their indices, and the credits that bound them.

Models the page request interface [PCIe 10.4]: every request counts against the allocation until its group is
answered; a group has an index of its own until then, and exactly one answer (I8).  Failure disables the
interface; what still waits fails with it.  Two accesses that miss the same page share one request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from device_sim.core.prq import PrqWriter
from protocol.flow import Wait
from protocol.hw.prq import PRGI_MAX, PageRequest
from protocol.hw.qi import ResponseCode
from protocol.units import PAGE_SHIFT, Iova, IovaPfn


class PageAccess(NamedTuple):
    """A page that is wanted, and for what."""

    page: IovaPfn
    write: bool


class _RequestGroup(NamedTuple):
    accesses: Sequence[PageAccess]
    answered: Wait[ResponseCode]


class PageRequestInterface:
    def __init__(self, rid: int, queue: PrqWriter, capacity: int) -> None:
        self.enabled = False
        self.capacity = capacity
        self.allocation = 0  # requests that may be outstanding: no group is larger
        self.groups = 0
        self.unexpected_responses = 0
        self._rid = rid
        self._queue = queue
        self._credits = 0
        self._indices = min(capacity, PRGI_MAX + 1)  # as many as groups can be out
        self._next_index = 0
        self._groups: dict[int, _RequestGroup] = {}
        self._outstanding: dict[PageAccess, Wait[ResponseCode]] = {}
        self._waiting: deque[_RequestGroup] = deque()  # for credits or an index

    def enable(self, allocation: int) -> None:
        """Up to `allocation` requests may be outstanding."""
        self.enabled = True
        self._credits = self.allocation = min(allocation, self.capacity)

    def disable(self) -> None:
        """No more requests; nobody will answer those that are out."""
        self.enabled = False
        groups = [*self._groups.values(), *self._waiting]
        self._groups.clear()
        self._waiting.clear()
        self._outstanding.clear()
        for group in groups:
            group.answered.set(ResponseCode.FAILURE)

    async def request(self, accesses: Sequence[PageAccess]) -> ResponseCode:
        """Ask for pages as one group, or join those that ask for the same already.

        The answer is that of our own group, or Success if there is none: another may be invalid for a page
        that is not ours, so whoever joined it looks again.  Failure is of the whole function.
        """
        assert 0 < len(accesses) <= self.capacity, f"a group of {len(accesses)} pages"
        joined = []
        mine = []
        for access in accesses:
            # A page asked for writing will be readable too.
            out = self._outstanding.get(access) or self._outstanding.get(PageAccess(access.page, True))
            if out is None:
                mine.append(access)
            else:
                joined.append(out)
        own = [self._open(mine)] if mine else []
        # await: joined, own: cannot change: each is set once
        codes = [await wait for wait in (*joined, *own)]
        if ResponseCode.FAILURE in codes:
            return ResponseCode.FAILURE
        return codes[-1] if own else ResponseCode.SUCCESS

    def _open(self, accesses: Sequence[PageAccess]) -> Wait[ResponseCode]:
        group = _RequestGroup(accesses, Wait())
        if not self.enabled:
            group.answered.set(ResponseCode.FAILURE)
            return group.answered
        for access in accesses:
            self._outstanding[access] = group.answered
        self._waiting.append(group)
        self._send_waiting()
        return group.answered

    def _send_waiting(self) -> None:
        """In order: a group that does not fit holds up those behind it."""
        while (
            self._waiting
            and len(self._waiting[0].accesses) <= self._credits
            and len(self._groups) < self._indices
        ):
            group = self._waiting.popleft()
            index = self._free_index()
            self._groups[index] = group
            self._credits -= len(group.accesses)
            self.groups += 1
            for n, access in enumerate(group.accesses, 1):
                last = n == len(group.accesses)
                self._queue.submit(
                    PageRequest(
                        rid=self._rid,
                        prgi=index,
                        addr=Iova(access.page << PAGE_SHIFT),
                        last=last,
                        read=True,
                        write=access.write,
                    )
                )

    def _free_index(self) -> int:
        while self._next_index in self._groups:
            self._next_index = (self._next_index + 1) % self._indices
        index = self._next_index
        self._next_index = (index + 1) % self._indices
        return index

    def respond(self, index: int, code: ResponseCode) -> None:
        """A page group response arrived [PCIe 10.4]."""
        group = self._groups.pop(index, None)
        if group is None:
            self.unexpected_responses += 1  # UPRGI
            return
        for access in group.accesses:
            if self._outstanding.get(access) is group.answered:
                del self._outstanding[access]
        self._credits += len(group.accesses)
        group.answered.set(code)
        if code is ResponseCode.FAILURE:
            self.disable()
        else:
            self._send_waiting()

    @property
    def outstanding(self) -> int:
        """Groups that were sent and are not answered."""
        return len(self._groups)
