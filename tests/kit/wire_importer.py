"""An importer of kvmd's that is the test itself, spoken over kvmd's own protocol."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Self

from protocol.flow import Wait
from protocol.rpc.channel import Body, Channel, Fds, Reply
from protocol.rpc.loop import Loop
from qemu_shim.vmm.machine import Host


class WireImporter:
    """An importer of a TDP FD, spoken over kvmd's own protocol.  It acks when `ack` says so."""

    GET, TOLD = "TDP_FD_GET", "TDP_INVALIDATE"

    def __init__(self, loop: Loop, fd: int, *, ack: bool = True) -> None:
        self.told: list[tuple[int, int]] = []
        self.windows: dict[str, tuple[int, int, int]] = {}  # kind -> (base, size, fd)
        self.lease = -1
        self.ack = ack
        self.waiting: list[int] = []
        self._arrived: list[Wait[None]] = []
        self._loop = loop
        self.channel = Channel(loop, socket.socket(fileno=fd), "test", on_request=self._on_request)

    @classmethod
    async def of(cls, host: Host, fd: int, *, ack: bool = True) -> Self:
        """Of what the kernel object behind `fd` lends."""
        reply = await host.kvmd._channel.ask(cls.GET, {}, [os.dup(fd)])
        return cls(host.loop, reply.fds.take(0), ack=ack)

    async def register(self, name: str = "test") -> None:
        self.take(await self.channel.ask("TDP_REGISTER_IMPORTER", {"name": name}))

    def take(self, reply: Reply) -> None:
        """What it is lent."""
        for n, (kind, base, size) in enumerate(reply.body["windows"]):
            self.windows[kind] = base, size, reply.fds.take(n)
        self.lease = reply.fds.take(len(self.windows))

    async def metadata(self) -> bytes:
        meta: bytes = (await self.channel.ask("TDP_GET_METADATA")).body["meta"]
        return meta

    async def wait_told(self) -> None:
        """Returns once something was told that is not acked."""
        while not self.waiting:
            arrived: Wait[None] = Wait()
            self._arrived.append(arrived)
            await self._loop.result(arrived)

    def ack_all(self) -> None:
        for request_id in self.waiting:
            self.channel.answer(request_id, {})
        self.waiting.clear()

    def end_lease(self) -> None:
        if self.lease >= 0:
            os.close(self.lease)
            self.lease = -1

    def close(self) -> None:
        self.channel.close()
        self.end_lease()
        for _, _, fd in self.windows.values():
            with suppress(OSError):
                os.close(fd)
        self.windows.clear()

    def _on_request(self, channel: Channel, request_id: int, body: Body, fds: Fds) -> None:
        assert body["op"] == self.TOLD, body
        self.told.append((body["start"], body["size"]))
        if self.ack:
            channel.answer(request_id, {})
            return
        self.waiting.append(request_id)
        arrived, self._arrived = self._arrived, []
        for wait in arrived:
            wait.set(None)
