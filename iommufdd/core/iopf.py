"""IO page faults: requests gathered into groups, handled in order, each group answered once.

Models the IO page fault framework under the series [RFC 15/42], [RFC 23/42]: requests that are not the
last of their group wait for it; the last one makes the group run; faults of a group are handled in
order and the first that fails decides; then one page group response.  Requests without PASID are legal
(RFC-83); a stop marker is skipped; what the device may not ask is answered Invalid Request if it is the
last, and so is what cannot be read.

Of one unit so many groups are handled at a time as its workqueue runs (max_active); the others wait their
turn, and whoever takes their device off waits for them too.

Invariant I8: one response a group, sent even if its device is detached meanwhile, and even if handling it met
a bug of ours.  R12: of a function that is gone nothing is handled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum, auto

from iommufdd.core.counts import UnitCounts
from iommufdd.core.device import IommufdDevice
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.log import Log
from iommufdd.core.partial import PartialGroups
from protocol.flow import Flow
from protocol.hw.fields import FormatError
from protocol.hw.prq import PAGE_REQUEST_SIZE, PageRequest, reply_to
from protocol.hw.qi import ResponseCode
from protocol.units import Pasid

MAX_ACTIVE = 256  # of `alloc_workqueue(..., 0)` [Linux include/linux/workqueue.h WQ_DFL_ACTIVE]


class Verdict(Enum):
    HANDLE = auto()
    SKIP = auto()
    REFUSE = auto()


def judge(request: PageRequest) -> Verdict:
    """What the PRQ thread makes of one request, without looking at any domain [RFC 23/42]."""
    if request.is_stop_marker:
        return Verdict.SKIP
    privileged = request.priv and (request.read or request.write)
    if privileged or (request.exec and request.read) or request.pasid_present:
        return Verdict.REFUSE
    return Verdict.HANDLE


class Iopf:
    """The PRQ thread of one unit, and the queue it hands groups to.

    `find` gives the device bound behind this unit; `respond` sends a page group response, and says whether
    anybody is there to get it; `spawn` runs a flow.
    """

    def __init__(
        self,
        find: Callable[[int], IommufdDevice | None],
        respond: Callable[[int, int, ResponseCode, Pasid | None], bool],
        spawn: Callable[[Flow[None]], None],
        counts: UnitCounts,
        log: Log,
    ) -> None:
        self.partial = PartialGroups(counts)
        self.counts = counts
        self._find = find
        self._respond = respond
        self._spawn = spawn
        self._log = log
        self._waiting: deque[tuple[IommufdDevice, Hwpt, list[PageRequest]]] = deque()
        self._active = 0

    def prq_event(self, entries: bytes, *, overflow: bool) -> None:
        """The page request interrupt of the unit: every entry is taken [RFC 23/42].  After an overflow what
        waits for the last of its group is forgotten: that may have been dropped.
        """
        malformed = self.counts.malformed
        for at in range(0, len(entries), PAGE_REQUEST_SIZE):
            self.take(entries[at : at + PAGE_REQUEST_SIZE])
        if malformed < self.counts.malformed:
            self._log.warning("malformed page requests", count=self.counts.malformed - malformed)
        if overflow:
            held = self.partial.held
            self._log.warning("page request queue overflowed: partial groups are discarded", held=held)
            self.partial.discard()

    def take(self, raw: bytes) -> None:
        """One entry of the queue."""
        self.counts.page_requests += 1
        try:
            request = PageRequest.from_bytes(raw)
        except FormatError:
            self.counts.malformed += 1
            rid, prgi, pasid, answered = reply_to(raw)
            if answered:
                self.partial.forget(rid, prgi)
                self._answer(rid, prgi, ResponseCode.INVALID, pasid)
            return
        verdict = judge(request)
        if verdict is Verdict.SKIP or (verdict is Verdict.REFUSE and not request.last):
            return  # dropped; its group goes on without it
        device = self._find(request.rid)
        hwpt = None if device is None else device.asks_on
        if device is None or hwpt is None or not hwpt.needs_iopf:
            if request.last:  # the others have nothing their group could be handled with
                self._answer(request.rid, request.prgi, ResponseCode.INVALID, request.named_pasid)
            return
        group = self.partial.gather(request, hwpt)
        if group is None:
            return
        if verdict is Verdict.REFUSE:
            self._answer(request.rid, request.prgi, ResponseCode.INVALID, request.named_pasid)
        else:
            device.begin_group()
            self._waiting.append((device, hwpt, group))
            self._handle_next()

    def _handle_next(self) -> None:
        while self._waiting and self._active < MAX_ACTIVE:
            self._active += 1
            self._spawn(self._handle(*self._waiting.popleft()))

    async def _handle(self, device: IommufdDevice, hwpt: Hwpt, group: list[PageRequest]) -> None:
        code = ResponseCode.FAILURE  # for a device that waits while we meet a bug of ours
        try:
            # await: device, group: cannot change: whoever takes the device off waits for `end_group`
            code = await _fault_in(hwpt, group)
        finally:
            self._active -= 1
            try:
                self._answer(group[-1].rid, group[-1].prgi, code)
            finally:
                device.end_group()
                self._handle_next()

    def _answer(self, rid: int, prgi: int, code: ResponseCode, pasid: Pasid | None = None) -> None:
        self.counts.responses += 1
        if not self._respond(rid, prgi, code, pasid):
            self.counts.responses_lost += 1
            self._log.warning("page group response lost: no silicon", rid=rid, prgi=prgi, code=code.name)


async def _fault_in(hwpt: Hwpt, group: list[PageRequest]) -> ResponseCode:
    """In order, until one fails [RFC 15/42]."""
    for request in group:
        # await: hwpt, each request: cannot change: whoever takes the device off waits for `end_group`
        code = await hwpt.fault(request)
        if code is not ResponseCode.SUCCESS:
            return code
    return ResponseCode.SUCCESS
