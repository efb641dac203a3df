"""Another driver, with hardware of its own, that imports a TDP FD beside iommufdd (B-09).

It faults in what its VMM asks for.  Its walker goes through what KVM's table has by now, and keeps
translations and pointers to tables as a remapping unit does, until it is told to drop them.  It acks late,
and in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from protocol.hostmem import WindowKind
from protocol.kernel.port import Mapping
from protocol.pt.bits import READ, WRITE
from protocol.pt.geometry import INDEX_BITS
from protocol.pt.mem import TableReader
from protocol.pt.meta import ExportedTdpMeta
from protocol.pt.walk import Outcome, Walk, second_stage_rules, walk
from protocol.rpc.channel import Body, Channel, Fds
from protocol.rpc.loop import Loop
from protocol.rpc.socket import connect
from protocol.units import LEVEL_4K, PAGE_SHIFT, PAGE_SIZE, WHOLE_SIZE, Hpa, Level, pages_of_level
from simulator.world.scheduler import World

_RULES = second_stage_rules(52, Level(3), snoop_control=False)
_TABLE_MASK = (1 << INDEX_BITS + PAGE_SHIFT) - 1  # the address bits a level-1 table translates
_NONE = Hpa(0)
EVERY_PAGE = 1 << 52  # more than any address has
_PATIENCE_S = 0.001  # between two of its acks: some five hundred steps of those who are busy


@dataclass(frozen=True, slots=True)
class Kept:
    """Of pages start..end: the first's frame and rights, or the table that translates them."""

    start: int
    end: int
    frame: int = 0
    rights: int = 0
    table: Hpa = _NONE

    @classmethod
    def of(cls, page: int, level: Level, **what: int) -> Kept:
        size = pages_of_level(level)
        start = page - page % size
        return cls(start, start + size, **what)  # type: ignore[arg-type]


class OtherDriver:
    """What kvmd refuses is an UapiError; PeerGone if it died."""

    _channel: Channel

    def __init__(self, loop: Loop, name: str) -> None:
        kernel: Any = loop.kernel
        assert isinstance(kernel.host.scheduler, World), "it is at home in the simulator"
        self._choose = kernel.host.scheduler.pick
        self.name = name
        self.root = Hpa(0)
        self.kept: list[Kept] = []
        self._kernel = loop.kernel
        self._wakes = trio.Event()
        self._levels = LEVEL_4K
        self._dies = False
        self._lease = -1
        self._mapping: Mapping | None = None
        self._tables: TableReader | None = None
        self._told: list[tuple[int, int, int]] = []  # request, pages start..end

    @classmethod
    async def of(cls, loop: Loop, door: Path, tdp_fd: int, name: str) -> OtherDriver:
        """By kvmd's door for importers; the TDP FD stays the caller's."""
        kernel, came = loop.kernel, Channel(loop, await connect(loop.kernel, door), "kvmd")
        try:
            reply = await came.ask("TDP_FD_GET", {}, [kernel.dup(tdp_fd)])
        finally:
            came.close()
        driver = cls(loop, name)
        sock = kernel.socket_of(reply.fds.take(0))
        driver._channel = Channel(
            loop, sock, name, on_request=driver._on_request, on_close=lambda _: driver._on_close()
        )
        return driver

    async def metadata(self) -> ExportedTdpMeta:
        return ExportedTdpMeta.from_bytes((await self._channel.ask("TDP_GET_METADATA")).body["meta"])

    async def register(self, meta: ExportedTdpMeta) -> None:
        """From now on its hardware may walk."""
        reply = await self._channel.ask("TDP_REGISTER_IMPORTER", {"name": self.name})
        for n, (kind, base, size) in enumerate(reply.body["windows"]):
            if kind == WindowKind.TABLES:
                self._mapping = self._kernel.map_peer(reply.fds.peek(n), size, writable=False)
                self._tables = TableReader(Hpa(base), self._mapping.view)
        self._lease = reply.fds.take(len(reply.body["windows"]))
        reply.fds.close()
        self.root, self._levels = meta.root_hpa, meta.level

    async def unregister(self) -> None:
        """Answered when it walks no more (`let_go`)."""
        await self._channel.ask("TDP_UNREGISTER_IMPORTER")

    async def fault_in(self, gpa: int, mm_fd: int) -> None:
        """To be stored to, for the process whose fd that is.  EINVAL: it is not the VM's (B-38)."""
        body = {"mm": self._kernel.cookie_of(mm_fd), "gfn": gpa >> PAGE_SHIFT}
        await self._channel.ask("TDP_FAULT", {**body, "read": True, "write": True, "exec": False})

    # -- what its hardware does ------------------------------------------------------------------------

    def look(self, gpa: int) -> None:
        """Its walker has the page's translation, if there is one."""
        if self._tables is None:
            return
        page = gpa >> PAGE_SHIFT
        found = self._walk(self._tables, gpa)
        if found.outcome is not Outcome.MAPPED:
            return
        frame = found.hpa(gpa & -PAGE_SIZE) >> PAGE_SHIFT
        leaf = Kept.of(page, found.level, rights=found.rights & (READ | WRITE))
        self.keep(Kept(leaf.start, leaf.end, frame - (page - leaf.start), leaf.rights))
        if found.level == LEVEL_4K:
            self.keep(Kept.of(page, Level(2), table=found.table))

    def _walk(self, tables: TableReader, gpa: int) -> Walk:
        for kept in self.kept:
            if kept.table and kept.start <= gpa >> PAGE_SHIFT < kept.end:
                return walk(tables, _RULES, kept.table, LEVEL_4K, gpa & _TABLE_MASK)
        return walk(tables, _RULES, self.root, self._levels, gpa)

    def keep(self, kept: Kept) -> None:
        self.forget(kept.start, kept.end, tables=bool(kept.table))
        self.kept.append(kept)

    def forget(self, start: int, end: int, tables: bool | None = None) -> None:
        """All of pages start..end, or of these only the pointers to tables, or only what is none."""
        self.kept = [
            kept
            for kept in self.kept
            if not (kept.start < end and start < kept.end and tables in (None, bool(kept.table)))
        ]

    # -- what it is told -------------------------------------------------------------------------------

    def _on_request(self, channel: Channel, request: int, body: Body, fds: Fds) -> None:
        start, size = body["start"], body["size"]
        end = EVERY_PAGE if size == WHOLE_SIZE else -(-(start + size) >> PAGE_SHIFT)
        self.told(request, start >> PAGE_SHIFT, end)

    def told(self, request: int, start: int, end: int) -> None:
        """To forget pages start..end."""
        self._told.append((request, start, end))
        self._wakes.set()

    async def serve(self) -> None:
        """It drops what it is told to and acks, until it is cancelled."""
        while True:
            while not self._told:
                self._wakes = trio.Event()
                await self._wakes.wait()
            await trio.sleep(_PATIENCE_S)
            if not self._told:  # it died meanwhile, and what it was told with it
                continue
            which = self._choose("ack", [f"{n}" for n in range(len(self._told))])
            request, start, end = self._told.pop(which)
            self.forget(start, end)
            self._channel.answer(request, {})
            self._channel.loop.settle()

    # -- how it ends -----------------------------------------------------------------------------------

    def _on_close(self) -> None:
        """kvmd is gone, or a message was: nobody would say what it is to drop."""
        if not self._dies:
            self.let_go()

    def hang_up(self) -> None:
        """The driver dies; its hardware walks on."""
        self._dies = True
        self._told.clear()
        self._channel.close()

    def let_go(self) -> None:
        """Its hardware walks no more, and has nothing left."""
        self.forget(0, EVERY_PAGE)
        if self._tables is not None and self._mapping is not None:
            self._tables.release()
            self._mapping.close()
            self._tables = None
            self._kernel.close(self._lease)
