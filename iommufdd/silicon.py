"""The silicon as the VT-d driver finds it: units, what they share with us in memory, functions.

A `Silicon` lives as long as its link.  What was made of it answers ENODEV from then on, for good; units that
come back are other units, found by another probe (docs/decisions/0015).
Must hold: what waits for a unit to forget something waits until the silicon has let go of what it was lent.
Where the link breaks beside it, it lives, and walks, until it hears of that (I13).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NoReturn

import structlog
from pydantic import ValidationError

from iommufdd.core.counts import UnitCounts
from iommufdd.core.hardware import FunctionInfo, LentMemory
from iommufdd.core.hwpt import NOT_LENT
from iommufdd.core.intel_iommu import IntelIommu, UnitMemory
from iommufdd.lent import LentWindows
from iommufdd.unit_memory import LinkMemory
from iommufdd.unit_port import UnitPort
from protocol.errors import PeerError, UapiError, shown
from protocol.hw.caps import Cap, Ecap
from protocol.kernel.port import StreamSocket
from protocol.rpc.channel import Body, Channel, PeerGone, Reply
from protocol.rpc.lease import LeaseSocket
from protocol.rpc.loop import Loop
from protocol.trace import TRACE, PrqReport
from protocol.uapi import link as uapi

log = structlog.get_logger("iommufdd")


class Silicon:
    """`on_page_requests(unit, entries, overflow)` and `on_faults(records)` are interrupts."""

    def __init__(
        self,
        loop: Loop,
        counts: UnitCounts,
        on_page_requests: Callable[[IntelIommu, bytes, bool], None],
        on_faults: Callable[[list[bytes]], None],
        on_gone: Callable[[], None],
    ) -> None:
        self.loop = loop
        self.units: list[IntelIommu] = []
        self.functions: list[tuple[FunctionInfo, IntelIommu]] = []
        self.counts = counts
        self.on_page_requests = on_page_requests
        self.on_faults = on_faults
        self._on_gone = on_gone
        self._link: Channel | None = None
        self._lease: LeaseSocket | None = None  # ends when it holds nothing any more
        self._ports: list[UnitPort] = []

    async def probe(self, sock: StreamSocket) -> None:
        """Through device_sim's front door: take the units, read what they and the functions can do.  EBUSY:
        another driver has them, or had a moment ago.  UapiError, OSError, PeerError: and nothing is kept.
        """
        link = await self._take(Channel(self.loop, sock, "device_sim"))
        self._link = Channel(self.loop, link, "link", on_close=lambda _: self._gone())
        try:
            await self._bring_up(await self._capabilities())
        except BaseException:
            self._link.close()
            raise

    async def _take(self, door: Channel) -> StreamSocket:
        try:
            fds = (await door.call("LINK")).fds
        finally:
            door.close()
        try:
            link = self.loop.kernel.socket_of(fds.peek(0))
            fds.take(0)
            return link
        finally:
            fds.close()

    async def _capabilities(self) -> uapi.CapsReply:
        try:
            caps = uapi.CapsReply.model_validate(await self.ask("CAPS", {}))
        except ValidationError as error:
            raise PeerError(f"device_sim: {error.error_count()} mistakes in what it says it is") from None
        for found in caps.functions:
            if found.unit >= len(caps.units):
                raise PeerError(f"device_sim: {found.name} is behind unit {found.unit}, which is not there")
        if len({found.rid for found in caps.functions}) < len(caps.functions):
            raise PeerError("device_sim: two functions have one requester id")
        return caps

    async def _bring_up(self, caps: uapi.CapsReply) -> None:
        """The units translate, nothing as yet, when this returns [Linux intel/iommu.c init_dmars]."""
        memory = LinkMemory(self.loop.kernel, len(caps.units), len(caps.functions))
        lent, self._lease = memory.lend(self.loop)
        await self.add_memory(lent)
        for number, ((cap, ecap), lies) in enumerate(zip(caps.units, memory.of_units(), strict=True)):
            self.units.append(await self._unit(number, Cap(cap), Ecap(ecap), lies))
        for found in caps.functions:
            info = FunctionInfo(**found.model_dump(exclude={"unit"}))
            unit = self.units[found.unit]
            unit.tables.add_function(info.rid, ats=info.ats, pasid=info.pasid, pri=info.pri)
            self.functions.append((info, unit))
        for unit in self.units:
            await unit.bring_up()

    async def _unit(self, number: int, cap: Cap, ecap: Ecap, memory: UnitMemory) -> IntelIommu:
        """Its registers and events are ours."""
        assert self._link is not None
        port = UnitPort(self.loop, f"unit {number}", self._link.close)
        self._ports.append(port)
        registers = port.take((await self._ask("UNIT", {"unit": number}, [port.give_store_page()])).fds)
        unit = IntelIommu(
            number,
            cap,
            ecap,
            registers,
            memory,
            self.counts,
            self._page_requests,
            self.on_faults,
            self._end_dma,
        )
        port.serve(unit)
        return unit

    def _page_requests(self, unit: IntelIommu, entries: bytes, overflow: bool) -> None:
        if TRACE.on:
            for event in PrqReport.of_queue(entries, unit.page_requests.seq):
                TRACE.emit(event)
        self.on_page_requests(unit, entries, overflow)

    def _broken(self, why: str) -> NoReturn:
        """Who says what cannot be loses the link: ENODEV."""
        assert self._link is not None
        log.error("the silicon is not to be trusted: its link ends", why=why)
        self._link.close()
        raise UapiError(errno.ENODEV, f"device_sim: {why}")

    def close(self) -> None:
        """We end: the lease does with us, or when nobody walks what we lent."""
        if self._link is not None:
            self._link.close()

    def _gone(self) -> None:
        """The link is."""
        for unit in self.units:
            unit.lost()
        for port in self._ports:
            port.close()
        self._on_gone()
        if self._lease is not None:
            self._lease.ended.on_done(lambda _: self._let_go())

    def _let_go(self) -> None:
        """Whoever waits for a unit does not any more."""
        for unit in self.units:
            unit.gone()

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

    async def _end_dma(self, rid: int) -> None:
        """Of a function that its unit's driver gives up."""
        log.error("a function completes no invalidations: it is taken off the bus", rid=f"{rid:#x}")
        await self.set_function(rid, bus_master=False)

    async def add_memory(self, lent: LentMemory) -> int:
        """Hand over windows, an fd each, and the lease: the fds become the link's."""
        assert isinstance(lent, LentWindows), "what is lent was made by our own clients"
        answer = await self.ask("MEMORY_ADD", {"windows": lent.windows}, lent.take_fds())
        memory = answer.get("memory")
        if type(memory) is not int or memory <= NOT_LENT:
            self._broken(f"a set of windows that is called {shown(memory)}")
        return memory

    async def remove_memory(self, memory: int) -> None:
        await self.ask("MEMORY_REMOVE", {"memory": memory})

    async def portal(self, rid: int) -> int:
        """The fd that stands for a function's BARs."""
        fds = (await self._ask("PORTAL", {"rid": rid}, [])).fds
        try:
            return fds.take(0)
        finally:
            fds.close()

    async def ask(self, op: str, body: Body, fds: list[int] | None = None) -> Body:
        """The answer, which has no fds to be kept.  ENODEV once the silicon is gone."""
        reply = await self._ask(op, body, fds or [])
        reply.fds.close()
        return reply.body

    async def _ask(self, op: str, body: Body, fds: list[int]) -> Reply:
        assert self._link is not None
        try:
            return await self._link.call(op, body, fds)
        except PeerGone:
            raise UapiError(errno.ENODEV, "the remapping unit is gone") from None
