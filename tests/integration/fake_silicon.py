"""Silicon that is the test itself: it takes what the driver sends, and sends whatever it likes."""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from device_sim.config import FIRST_RID
from device_sim.core.traits import FAULT_RECORDS_AT, capabilities
from protocol.flow import Flows
from protocol.kernel.linux import LINUX
from protocol.kernel.port import StreamSocket
from protocol.rpc.channel import Body, Channel, Fds
from protocol.rpc.loop import Loop
from protocol.rpc.socket import Listener
from qemu_shim.vmm.machine import Host, connect_host
from tests.integration.fake_unit import ENTRY, PQT, FakeUnit
from tests.kit.daemons import System, eventually, short_directory
from tests.kit.vmm import Vmm, bare_vm, bind_device, nothing_left

RID = FIRST_RID


def page_request(
    addr: int,
    prgi: int = 0,
    *,
    rid: int = RID,
    last: bool = True,
    rights: int = 1,
    pasid: int | None = None,
    exec: bool = False,
    priv: bool = False,
) -> bytes:
    """Literal words, as the silicon writes them."""
    qw0 = 1 | (pasid is not None) << 8 | rid << 16 | (pasid or 0) << 32 | exec << 52 | priv << 53
    return struct.pack("<4Q", qw0, rights | last << 2 | prgi << 3 | addr & ~0xFFF, 0, 0)


class FakeSilicon:
    """One unit, `functions` behind it; what the driver posts is kept.  `daemons`: the others."""

    daemons: System

    def __init__(self, loop: Loop, functions: int = 1) -> None:
        self.loop = loop
        self.functions = functions
        self.answers: list[tuple[int, int, int]] = []  # requester, group, code
        self.asked: list[str] = []
        self.link: Channel | None = None
        self.unit: FakeUnit | None = None
        self.memory: object = 1  # what it says a set of windows is called
        self.fro = FAULT_RECORDS_AT
        self.lets_go = False  # does it, of all it was lent, when the link ends?
        self.gives = 0  # fds with each answer, more than it should have
        self.given: list[int] = []
        self.is_early = False  # does it ask for a page before it was told to translate?
        self.step = 8  # from one function to the next
        self._held: list[int] = []  # leases and windows
        self._windows: list[tuple[int, memoryview]] = []  # of the driver's: where, and the bytes
        self._doors: list[Channel] = []

    def on_connect(self, sock: StreamSocket) -> None:
        self._doors.append(Channel(self.loop, sock, "fake door", on_request=self._serve))

    def _serve(self, channel: Channel, request_id: int, body: Body, fds: Fds) -> None:
        op = body["op"]
        self.asked.append(op)
        if op == "LINK":
            ours, theirs = socket.socketpair()
            self._windows.clear()
            self.link = Channel(self.loop, ours, "fake link", on_request=self._serve, on_close=self._gone)
            channel.answer(request_id, {}, [theirs.detach(), *self._unwanted()])
        elif op == "CAPS":
            channel.answer(request_id, self._caps())
        elif op == "UNIT":
            self.unit = FakeUnit(self.loop, self._at, self._answered, fds.peek(0))
            channel.answer(request_id, {}, self.unit.give_fds())
            if self.is_early:
                self.unit.show(PQT, ENTRY, 8)
                self.unit.page_request.signal()
        elif op == "MEMORY_ADD":
            self._map(body["windows"], fds)
            self._held += [fds.take(n) for n in range(len(fds))]
            channel.answer(request_id, {"memory": self.memory})
        elif op == "MEMORY_REMOVE":
            self.let_go()
            channel.answer(request_id, {})
        else:
            channel.answer(request_id, {}, self._unwanted())

    def _unwanted(self) -> list[int]:
        """Fds that nobody asked for: of pipes whose other ends are ours."""
        pipes = [os.pipe() for _ in range(self.gives)]
        self.given += [ours for _, ours in pipes]
        return [theirs for theirs, _ in pipes]

    def still_held(self) -> int:
        """How many of those that were given somebody has open: a pipe that nobody reads is in error."""
        poller = select.poll()
        for fd in self.given:
            poller.register(fd, 0)
        return len(self.given) - len(poller.poll(0))

    def _caps(self) -> Body:
        cap, ecap = capabilities(fro=self.fro)
        usual = dict.fromkeys(("pasid", "ats", "pri", "pasid_required"), True)
        functions = [
            {
                "rid": RID + self.step * n,
                "name": f"dsa{n}",
                "unit": 0,
                "group": n,
                "fault_capability": "full",
                **usual,
            }
            for n in range(self.functions)
        ]
        return {"units": [(cap.value, ecap.value)], "functions": functions}

    def _map(self, windows: list[tuple[str, int, int]], fds: Fds) -> None:
        """Those the units' structures lie in come first, before any unit is asked for."""
        for n, (kind, base, size) in enumerate(windows if self.unit is None else []):
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if kind == "queues" else 0)
            view = memoryview(mmap.mmap(fds.peek(n), size, mmap.MAP_SHARED, protection))
            self._windows.append((base, view))

    def _at(self, hpa: int) -> memoryview:
        return next(view[hpa - base :] for base, view in self._windows if 0 <= hpa - base < len(view))

    def _answered(self, rid: int, prgi: int, code: int) -> None:
        self.answers.append((rid, prgi, code))

    def send(self, *entries: bytes, overflow: bool = False) -> None:
        assert self.unit is not None
        self.unit.send(*entries, overflow=overflow)

    def _gone(self, _: Channel) -> None:
        unit, self.unit = self.unit, None
        if unit is not None:
            unit.close()
        if self.lets_go:
            self.let_go()

    async def wait_answers(self, count: int) -> list[tuple[int, int, int]]:
        """Exactly that many, and no more while iommufdd answers something else."""

        async def look() -> int:
            return len(self.answers)

        await eventually(look, lambda seen: seen >= count, f"{count} answers")
        return self.answers[:]

    def let_go(self) -> None:
        for fd in self._held:
            os.close(fd)
        self._held.clear()

    def close(self) -> None:
        self.let_go()
        for fd in self.given:
            os.close(fd)
        for channel in (self.link, *self._doors):
            if channel is not None:
                channel.close()


@asynccontextmanager
async def hostile(functions: int = 1) -> AsyncIterator[tuple[FakeSilicon, Vmm]]:
    """kvmd and iommufdd as they are, the silicon is ours; device 0 attached to a KVM HWPT.

    Both daemons must end with status 0.
    """
    crashes: list[BaseException] = []
    with short_directory() as directory:
        running = System(directory)
        try:
            running.start("kvmd")
            loop = Loop(LINUX, Flows(crashes.append))
            fake = FakeSilicon(loop, functions)
            fake.daemons = running
            async with trio.open_nursery() as nursery:
                nursery.start_soon(loop.serve)
                doors = running.link, running.socket("device_sim")
                listeners = [Listener(loop, path, fake.on_connect) for path in doors]
                await trio.to_thread.run_sync(running.start, "iommufdd")
                async with connect_host(directory) as host:
                    rig = await _attached(host)
                    try:
                        yield fake, rig
                    finally:
                        rig.close()
                    await nothing_left(host)
                fake.close()
                for listener in listeners:
                    listener.close()
                nursery.cancel_scope.cancel()
            loop.close()
            assert crashes == []
            running.check_stop()
        finally:
            running.stop()


async def _attached(host: Host) -> Vmm:
    rig = await bare_vm(host)
    rig.tdp_fd = await rig.vm.create_tdp_fd()
    await bind_device(rig)
    iommu, device = rig.bound
    rig.hwpt_id = await iommu.hwpt_alloc_kvm(rig.device_id, rig.tdp_fd)
    await device.attach(rig.hwpt_id)
    return rig
