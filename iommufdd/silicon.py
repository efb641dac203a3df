"""The silicon as the VT-d driver reaches it: capabilities, PASID entries, queues, interrupts."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iommufdd.core import qi
from protocol.errors import UapiError
from protocol.hw.caps import Cap, Ecap
from protocol.hw.qi import Descriptor, ResponseCode
from protocol.rpc.channel import Body, Channel, PeerGone, Reply
from protocol.rpc.loop import Loop
from protocol.rpc.service import Notification, Service
from protocol.rpc.socket import connect
from protocol.trace import TRACE, PrqReport
from protocol.uapi import link as uapi
from protocol.units import Pasid

# Of a queue of thousands; a message of its own for the head would wake the silicon in the middle of a fault.
HEAD_LAG_MAX = 64


class Silicon:
    """`on_page_requests(entries, overflow)`, `on_faults(records)` and `on_gone()` are the interrupts."""

    def __init__(
        self,
        loop: Loop,
        on_page_requests: Callable[[bytes, bool], None],
        on_faults: Callable[[bytes], None],
        on_gone: Callable[[], None],
    ) -> None:
        self.loop = loop
        self.cap = Cap(0)
        self.ecap = Ecap(0)
        self.functions: list[tuple[int, str]] = []
        self.on_page_requests = on_page_requests
        self.on_faults = on_faults
        self._on_gone = on_gone
        self._link: Channel | None = None
        self._consumed = 0  # entries of the page request queue, its head not moved past them yet

    async def probe(self, path: Path) -> None:
        """Take the unit and read what it can do.  Raises UapiError, OSError."""
        door = Channel(self.loop, await connect(path), "device_sim")
        try:
            reply = await door.ask("LINK")
        finally:
            door.close()
        sock = socket.socket(fileno=reply.fds.take(0))
        self._link = Channel(
            self.loop,
            sock,
            "link",
            on_notify=INTERRUPTS.bind_notify(self),
            on_close=lambda _: self._on_gone(),
        )
        caps = (await self._link.ask("CAPS")).body
        self.cap, self.ecap = Cap(caps["cap"]), Ecap(caps["ecap"])
        self.functions = [(rid, name) for rid, name, _, _ in caps["functions"]]

    @property
    def alive(self) -> bool:
        return self._link is not None and not self._link.closed

    async def write_pasid_entry(self, rid: int, pasid: Pasid, entry: bytes) -> None:
        await self._ask("PASID_ENTRY", {"rid": rid, "pasid": pasid, "entry": entry})

    async def set_function(self, rid: int, *, ats: bool, pri_allocation: int, bus_master: bool) -> None:
        body = {"rid": rid, "ats": ats, "pri_allocation": pri_allocation, "bus_master": bus_master}
        await self._ask("FUNCTION", body)

    async def submit(self, descriptors: list[Descriptor]) -> None:
        reply = await self._ask("QI", {"descriptors": qi.ring(descriptors)})
        if reply.body["status"] != [qi.DONE]:
            raise UapiError(errno.EIO, f"invalidation queue: wait completed with {reply.body['status']}")

    def respond(self, rid: int, prgi: int, code: ResponseCode) -> None:
        """A page group response; nobody waits for it."""
        descriptor = qi.page_group_response(rid, prgi, code)
        body = {"descriptors": qi.ring([descriptor]), "prq_consumed": self._consumed}
        self._consumed = 0
        self._post("QI", body)

    def consumed(self, entries: int, *, clear_overflow: bool) -> None:
        """Move the page request queue's head: along with the next response, unless that could matter."""
        self._consumed += entries
        if clear_overflow or self._consumed >= HEAD_LAG_MAX:
            body = {"prq_consumed": self._consumed, "prq_clear": clear_overflow}
            self._consumed = 0
            self._post("QI", body)

    async def add_memory(self, windows: list[Any], fds: list[int]) -> int:
        """Hand over windows, an fd each, and the lease: the fds become the link's."""
        reply = await self._ask("MEMORY_ADD", {"windows": windows}, fds)
        memory: int = reply.body["memory"]
        return memory

    async def remove_memory(self, memory: int) -> None:
        await self._ask("MEMORY_REMOVE", {"memory": memory})

    async def portal(self, rid: int) -> int:
        """The fd that stands for a function's BARs."""
        return (await self._ask("PORTAL", {"rid": rid})).fds.take(0)

    async def _ask(self, op: str, body: Body, fds: list[int] | None = None) -> Reply:
        assert self._link is not None
        try:
            return await self._link.call(op, body, fds or [])
        except PeerGone:
            raise UapiError(errno.ENODEV, "the remapping unit is gone") from None

    def _post(self, op: str, body: Body) -> None:
        assert self._link is not None
        self._link.notify(op, body)


def _page_requests(silicon: Silicon, message: uapi.PageRequests) -> None:
    if TRACE.on:
        for event in PrqReport.of_queue(message.entries):
            TRACE.emit(event)
    silicon.on_page_requests(message.entries, message.overflow)


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
