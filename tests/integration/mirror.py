"""Another MMU of a process that is the test itself: what it asks by name, and what it holds."""

from __future__ import annotations

from protocol.rpc.channel import Body
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.machine import Host
from qemu_shim.vmm.process import Process
from tests.kit.wire_importer import WireImporter


class WireMirror(WireImporter):
    """Of an mm fd.  `told` is what it was asked to let go of."""

    GET, TOLD = "HMM_MIRROR_GET", "HMM_INVALIDATE"

    @classmethod
    async def registered(cls, host: Host, process: Process, *, ack: bool = True) -> WireMirror:
        mirror = await cls.of(host, process._fd, ack=ack)
        await mirror.register()
        return mirror

    async def register(self, name: str = "") -> None:
        self.take(await self.channel.ask("HMM_REGISTER"))

    async def watch(self, start: int, size: int = PAGE_SIZE) -> None:
        await self.channel.ask("HMM_WATCH", {"start": start, "size": size})

    async def unwatch(self, start: int, size: int = PAGE_SIZE) -> None:
        await self.channel.ask("HMM_UNWATCH", {"start": start, "size": size})

    async def fault(self, start: int, size: int = PAGE_SIZE, *, write: bool = True) -> Body:
        body = {"start": start, "size": size, "write": write}
        found: Body = (await self.channel.ask("HMM_RANGE_FAULT", body)).body
        return found

    async def look(self, start: int, size: int = PAGE_SIZE) -> Body:
        body = {"start": start, "size": size, "write": False, "fault": False}
        found: Body = (await self.channel.ask("HMM_RANGE_FAULT", body)).body
        return found

    async def pin(self, start: int, size: int = PAGE_SIZE, *, write: bool = True, area: int = 0) -> Body:
        body = {"start": start, "size": size, "write": write, "area": area}
        found: Body = (await self.channel.ask("HMM_PIN", body)).body
        return found

    async def unpin(self, start: int, size: int = PAGE_SIZE, *, area: int = 0) -> int:
        reply = await self.channel.ask("HMM_UNPIN", {"start": start, "size": size, "area": area})
        count: int = reply.body["pages"]
        return count


async def host_memory(host: Host) -> Body:
    """What kvmd counts of the host's memory."""
    counted: Body = (await host.kvmd.stats())["memory"]
    return counted
