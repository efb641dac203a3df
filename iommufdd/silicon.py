"""The silicon as the VT-d driver reaches it: units, functions, PASID entries, queues, interrupts.

A `Silicon` lives as long as its link.  What was made of it answers ENODEV from then on, for good; units that
come back are other units, found by another probe (docs/decisions/0015).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from pydantic import ValidationError

from iommufdd.core import qi
from iommufdd.core.counts import UnitCounts
from iommufdd.core.hardware import FunctionInfo, LentMemory
from iommufdd.lent import LentWindows
from protocol.errors import PeerError, UapiError
from protocol.hw.caps import Cap, Ecap
from protocol.hw.prq import PAGE_REQUEST_SIZE
from protocol.hw.qi import Descriptor, ResponseCode
from protocol.rpc.channel import Body, Channel, PeerGone, Reply
from protocol.rpc.loop import Loop
from protocol.rpc.service import Notification, Service
from protocol.trace import TRACE, PrqReport
from protocol.uapi import link as uapi
from protocol.units import Pasid

# Of a queue of thousands; a message of its own for the head would wake the silicon in the middle of a fault.
HEAD_LAG_MAX = 64


class RemoteUnit:
    """One remapping unit."""

    def __init__(self, silicon: Silicon, number: int, cap: Cap, ecap: Ecap) -> None:
        self.number = number
        self.cap = cap
        self.ecap = ecap
        self._silicon = silicon
        self._consumed = 0  # entries of the page request queue, its head not moved past them yet

    async def write_pasid_entry(self, rid: int, pasid: Pasid, entry: bytes) -> None:
        await self._silicon.ask("PASID_ENTRY", {"rid": rid, "pasid": pasid, "entry": entry})

    async def submit(self, descriptors: list[Descriptor]) -> None:
        reply = await self._silicon.ask("QI", self._queue(descriptors))
        if reply.body["status"] != [qi.DONE]:
            raise UapiError(errno.EIO, f"invalidation queue: wait completed with {reply.body['status']}")

    def respond(self, rid: int, prgi: int, code: ResponseCode) -> bool:
        """A page group response; nobody waits for it.  False: there is nobody any more."""
        body = self._queue([qi.page_group_response(rid, prgi, code)])
        body["prq_consumed"] = self._consumed
        self._consumed = 0
        return self._silicon.post("QI", body)

    def _queue(self, descriptors: list[Descriptor]) -> Body:
        """One message, counted."""
        self._silicon.counts.kicks += 1
        self._silicon.counts.descriptors.update(map(qi.kind_of, descriptors))
        return {"unit": self.number, "descriptors": b"".join(qi.raw(descriptors))}

    def consumed(self, entries: int, *, clear_overflow: bool) -> None:
        """Move the page request queue's head: along with the next response, unless that could matter."""
        self._consumed += entries
        if clear_overflow or self._consumed >= HEAD_LAG_MAX:
            body = {"unit": self.number, "prq_consumed": self._consumed, "prq_clear": clear_overflow}
            self._consumed = 0
            self._silicon.post("QI", body)


class Silicon:
    """The interrupts: `on_page_requests(unit, entries, overflow)`, `on_faults(records)`, `on_gone()`."""

    def __init__(
        self,
        loop: Loop,
        counts: UnitCounts,
        on_page_requests: Callable[[RemoteUnit, bytes, bool], None],
        on_faults: Callable[[bytes], None],
        on_gone: Callable[[], None],
    ) -> None:
        self.loop = loop
        self.units: list[RemoteUnit] = []
        self.functions: list[tuple[FunctionInfo, RemoteUnit]] = []
        self.counts = counts
        self.on_page_requests = on_page_requests
        self.on_faults = on_faults
        self._on_gone = on_gone
        self._link: Channel | None = None

    async def probe(self, sock: socket.socket) -> None:
        """Through device_sim's front door: take the units, read what they and the functions can do.  EBUSY:
        another driver has them, or had a moment ago.  UapiError, OSError, PeerError: and nothing is kept.
        """
        link = await self._take(Channel(self.loop, sock, "device_sim"))
        told = INTERRUPTS.bind_notify(self)
        self._link = Channel(self.loop, link, "link", on_notify=told, on_close=lambda _: self._on_gone())
        try:
            self._enumerate((await self._link.call("CAPS")).body)
        except BaseException:
            self._link.close()
            raise

    async def _take(self, door: Channel) -> socket.socket:
        try:
            return socket.socket(fileno=(await door.call("LINK")).fds.take(0))
        finally:
            door.close()

    def _enumerate(self, body: Body) -> None:
        try:
            caps = uapi.CapsReply.model_validate(body)
        except ValidationError as error:
            raise PeerError(f"device_sim: {error.error_count()} mistakes in what it says it is") from None
        self.units = [
            RemoteUnit(self, number, Cap(cap), Ecap(ecap)) for number, (cap, ecap) in enumerate(caps.units)
        ]
        for found in caps.functions:
            if found.unit >= len(self.units):
                raise PeerError(f"device_sim: {found.name} is behind unit {found.unit}, which is not there")
            info = FunctionInfo(**found.model_dump(exclude={"unit"}))
            self.functions.append((info, self.units[found.unit]))

    @property
    def alive(self) -> bool:
        return self._link is not None and not self._link.closed

    @property
    def domain_ids(self) -> int:
        """How many every unit has."""
        return min(unit.cap.domain_ids for unit in self.units)

    async def set_function(
        self,
        rid: int,
        *,
        pasid: bool | None = None,
        ats: bool | None = None,
        pri_allocation: int | None = None,
        bus_master: bool | None = None,
    ) -> None:
        body = {"pasid": pasid, "ats": ats, "pri_allocation": pri_allocation, "bus_master": bus_master}
        await self.ask("FUNCTION", {"rid": rid, **body})

    async def add_memory(self, lent: LentMemory) -> int:
        """Hand over windows, an fd each, and the lease: the fds become the link's."""
        assert isinstance(lent, LentWindows), "what is lent was made by our own clients"
        reply = await self.ask("MEMORY_ADD", {"windows": lent.windows}, lent.take_fds())
        memory: int = reply.body["memory"]
        return memory

    async def remove_memory(self, memory: int) -> None:
        await self.ask("MEMORY_REMOVE", {"memory": memory})

    async def portal(self, rid: int) -> int:
        """The fd that stands for a function's BARs."""
        return (await self.ask("PORTAL", {"rid": rid})).fds.take(0)

    async def ask(self, op: str, body: Body, fds: list[int] | None = None) -> Reply:
        """ENODEV once the silicon is gone."""
        assert self._link is not None
        try:
            return await self._link.call(op, body, fds or [])
        except PeerGone:
            raise UapiError(errno.ENODEV, "the remapping unit is gone") from None

    def post(self, op: str, body: Body) -> bool:
        """False once the silicon is gone."""
        assert self._link is not None
        self._link.notify(op, body)
        return self.alive


def _page_requests(silicon: Silicon, message: uapi.PageRequests) -> None:
    if message.unit >= len(silicon.units):
        raise PeerError(f"page requests of unit {message.unit}, which is not there")
    if TRACE.on:
        for event in PrqReport.of_queue(message.entries):
            TRACE.emit(event)
    unit = silicon.units[message.unit]
    silicon.on_page_requests(unit, message.entries, message.overflow)
    unit.consumed(len(message.entries) // PAGE_REQUEST_SIZE, clear_overflow=message.overflow)


def _faults(silicon: Silicon, message: uapi.Faults) -> None:
    silicon.on_faults(message.records)


INTERRUPTS: Service[Silicon] = Service(
    "interrupts",
    {},
    notifications={
        "PAGE_REQUESTS": Notification(uapi.PageRequests, _page_requests),
        "FAULTS": Notification(uapi.Faults, _faults),
    },
)
