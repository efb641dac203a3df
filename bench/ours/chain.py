"""Ours: the messages and events of an IO page fault, and none of the work between them.

Three processes in a line: the device raises its page request event, iommufdd asks kvmd for the page and
awaits the reply in a flow, then kicks the device for the page group's response.  Messages, models, loop,
channels, services and events are the daemons' own; what lies in memory between the first two costs nothing.

    python -m bench.ours.chain COUNT
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from time import perf_counter_ns

import trio

from bench.ours import processes
from bench.ours.round_trip import FAULTS, REQUEST
from protocol.flow import Wait
from protocol.kernel.linux import LINUX
from protocol.kernel.port import SharedEvent
from protocol.rpc.channel import Channel
from protocol.rpc.loop import Loop


class Driver:
    def __init__(self, loop: Loop, kvm: Channel, request: SharedEvent, kick: SharedEvent) -> None:
        self._loop = loop
        self._kvm = kvm
        self._request = request
        self._kick = kick
        loop.register(request.fd, self._interrupted)

    def _interrupted(self, _: int) -> None:
        self._request.drain()
        self._loop.flows.spawn(self._handle())

    async def _handle(self) -> None:
        await self._kvm.call("TDP_FAULT", REQUEST)
        self._loop.mark_dirty(self)

    def flush(self) -> None:
        self._kick.signal()


def main(count: int) -> None:
    request, kick = LINUX.event(), LINUX.event()

    async def ask(loop: Loop, sock: socket.socket) -> list[float]:
        """Nanoseconds of each of `count` page requests; a tenth more goes first, untimed."""
        took: list[float] = []
        answered: Wait[None] = Wait()

        def kicked(_: int) -> None:
            kick.drain()
            answered.set(None)

        loop.register(kick.fd, kicked)
        link = Channel(loop, sock, "link")
        for n in range(-(count // 10), count):
            answered = Wait()
            start = perf_counter_ns()
            request.signal()
            await loop.result(answered)
            if n >= 0:
                took.append(perf_counter_ns() - start)
        link.close()
        return took

    processes.main(ask, lambda up: drive(up, request, kick))


def drive(up: socket.socket, request: SharedEvent, kick: SharedEvent) -> int:
    """The middle process; the exit status of the one behind it."""
    ours, theirs = socket.socketpair()
    child = processes.fork(lambda: serve(theirs), close=(up, ours))
    theirs.close()

    def attach(loop: Loop, sock: socket.socket, on_close: Callable[[Channel], None]) -> None:
        kvm = Channel(loop, ours, "kvmd")
        Driver(loop, kvm, request, kick)

        def closed(link: Channel) -> None:
            kvm.close()  # the hang-up is how the process behind us learns that it may go
            on_close(link)

        Channel(loop, sock, "link", on_close=closed)

    trio.run(processes.serve, up, attach)
    return processes.wait(child)


def serve(sock: socket.socket) -> int:
    def attach(loop: Loop, sock: socket.socket, on_close: Callable[[Channel], None]) -> None:
        Channel(loop, sock, "importer", on_request=FAULTS.bind(None), on_close=on_close)

    trio.run(processes.serve, sock, attach)
    return 0


if __name__ == "__main__":
    main(int(sys.argv[1]))
