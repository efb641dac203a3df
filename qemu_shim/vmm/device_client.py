"""The device as its guest reaches it, through the mapped BAR; and device_sim's front door."""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path

from protocol.errors import PeerError
from protocol.flow import Wait
from protocol.hw.dsa_regs import Command
from protocol.rpc.channel import Body, Channel, Fds
from protocol.rpc.loop import Loop
from protocol.rpc.socket import connect
from qemu_shim.guest.idxd_device import IdxdDevice

GONE = "the device is gone"
MAX_MESSAGES = 4096  # interrupt messages nobody took yet; older ones are lost


class DeviceSim:
    """The front door."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @classmethod
    async def connect(cls, loop: Loop, path: Path) -> DeviceSim:
        return cls(Channel(loop, await connect(loop.kernel, path), "device_sim"))

    async def stats(self) -> Body:
        return (await self._channel.ask("STATS")).body

    async def started_with(self) -> list[str]:
        """Its options, but for where its sockets are: `--devices 4`."""
        options: list[str] = (await self._channel.ask("STARTED_WITH")).body["options"]
        return options

    def close(self) -> None:
        self._channel.close()


class Portal:
    """Registers, work-queue portals, and the interrupts that come back."""

    def __init__(self, loop: Loop, fd: int) -> None:
        self._loop = loop
        self._interrupts: Counter[int] = Counter()
        self._waiting: dict[int, list[Wait[None]]] = {}
        self.messages: deque[tuple[int, int]] = deque(maxlen=MAX_MESSAGES)  # (address, data) of each MSI
        self._channel = Channel(
            loop, loop.kernel.socket_of(fd), "portal", on_notify=self._on_notify, on_close=self._on_close
        )

    async def mmio_read(self, offset: int, size: int) -> bytes:
        """Registers, behind every write before it."""
        data: bytes = (await self._channel.ask("MMIO_READ", {"offset": offset, "size": size})).body["data"]
        return data

    def mmio_write(self, offset: int, data: bytes) -> None:
        self._channel.notify("MMIO_WRITE", {"offset": offset, "data": data})

    async def drain(self) -> None:
        """Returns when the device is idle."""
        await IdxdDevice(self).command(Command.DRAIN_ALL)

    def movdir64b(self, wq: int, descriptor: bytes) -> None:
        """A posted write: nobody says whether the queue took it."""
        self._channel.notify("MOVDIR64B", {"wq": wq, "descriptor": descriptor})

    async def enqcmd(self, wq: int, descriptor: bytes) -> bool:
        """True: the shared queue was full, try again."""
        retry: bool = (await self._channel.ask("ENQCMD", {"wq": wq, "descriptor": descriptor})).body["retry"]
        return retry

    async def wait_interrupt(self, handle: int) -> None:
        """One completion interrupt with that handle, received already or to come.  PeerError: no device."""
        if self._interrupts[handle]:
            self._interrupts[handle] -= 1
            return
        if self._channel.closed:  # nobody would ever wake us
            raise PeerError(GONE)
        wait: Wait[None] = Wait()
        self._waiting.setdefault(handle, []).append(wait)
        await self._loop.result(wait)

    def close(self) -> None:
        if not self._channel.closed:
            self._channel.close()

    def _on_notify(self, _: Channel, body: Body, fds: Fds) -> None:
        if body.get("op") == "MSI":
            self._take_message(body.get("addr"), body.get("data"))
            return
        handle = body.get("handle")
        if body.get("op") != "MSIX" or type(handle) is not int:
            raise PeerError(f"portal: unknown notification {body.get('op')!r:.60}")
        waiting = self._waiting.get(handle)
        if waiting:
            waiting.pop(0).set(None)
        else:
            self._interrupts[handle] += 1

    def _take_message(self, addr: object, data: object) -> None:
        if type(addr) is not int or type(data) is not int:
            raise PeerError(f"portal: MSI to {addr!r:.60} with {data!r:.60}")
        self.messages.append((addr, data))

    def _on_close(self, _: Channel) -> None:
        waiting = [wait for waits in self._waiting.values() for wait in waits]
        self._waiting.clear()
        for wait in waiting:
            wait.fail(PeerError(GONE))
