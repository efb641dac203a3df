"""Ours: the messages of an IO page fault, and none of the work between them.

Three processes in a line: the device tells iommufdd of a page request, iommufdd asks kvmd for the page
and awaits the reply in a flow, then tells the device the page group's response.  Messages, models,
loop, channels and services are the daemons' own; the hardware records in them are made once.

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
from protocol.hw.prq import PageRequest
from protocol.hw.qi import PageGroupResponse, ResponseCode, encode
from protocol.rpc.channel import Channel
from protocol.rpc.loop import Loop
from protocol.rpc.service import Notification, Service
from protocol.uapi.link import LinkQi, PageRequests
from protocol.units import Iova

RID = 0x6A08
ENTRY = PageRequest(rid=RID, prgi=1, addr=Iova(0x1234_5000), last=True, read=True, write=True).to_bytes()
RESPONSE = encode(PageGroupResponse(rid=RID, prgi=1, code=ResponseCode.SUCCESS))


class Device:
    """Waits for the response to its one request."""

    def __init__(self) -> None:
        self.answered: Wait[None] = Wait()


class Driver:
    def __init__(self, kvm: Channel) -> None:
        self.kvm = kvm
        self.link: Channel | None = None

    async def handle(self) -> None:
        await self.kvm.call("TDP_FAULT", REQUEST)
        assert self.link is not None, "requests come over the link"
        self.link.notify("QI", {"descriptors": RESPONSE, "prq_consumed": 1})


def main(count: int) -> None:
    async def ask(loop: Loop, sock: socket.socket) -> list[float]:
        """Nanoseconds of each of `count` page requests; a tenth more goes first, untimed."""
        took: list[float] = []
        device = Device()
        link = Channel(loop, sock, "link", on_notify=QUEUE.bind_notify(device))
        for n in range(-(count // 10), count):
            device.answered = Wait()
            start = perf_counter_ns()
            link.notify("PAGE_REQUESTS", {"entries": ENTRY, "overflow": False})
            await loop.result(device.answered)
            if n >= 0:
                took.append(perf_counter_ns() - start)
        link.close()
        return took

    processes.main(ask, drive)


def drive(up: socket.socket) -> int:
    """The middle process; the exit status of the one behind it."""
    ours, theirs = socket.socketpair()
    child = processes.fork(lambda: serve(theirs), close=(up, ours))
    theirs.close()

    def attach(loop: Loop, sock: socket.socket, on_close: Callable[[Channel], None]) -> None:
        kvm = Channel(loop, ours, "kvmd")
        driver = Driver(kvm)

        def closed(link: Channel) -> None:
            kvm.close()  # the hang-up is how the process behind us learns that it may go
            on_close(link)

        driver.link = Channel(
            loop, sock, "link", on_notify=INTERRUPTS.bind_notify((loop, driver)), on_close=closed
        )

    trio.run(processes.serve, up, attach)
    return processes.wait(child)


def serve(sock: socket.socket) -> int:
    def attach(loop: Loop, sock: socket.socket, on_close: Callable[[Channel], None]) -> None:
        Channel(loop, sock, "importer", on_request=FAULTS.bind(None), on_close=on_close)

    trio.run(processes.serve, sock, attach)
    return 0


def page_requests(at: tuple[Loop, Driver], message: PageRequests) -> None:
    loop, driver = at
    loop.flows.spawn(driver.handle())


def queue(device: Device, message: LinkQi) -> None:
    device.answered.set(None)


INTERRUPTS: Service[tuple[Loop, Driver]] = Service(
    "interrupts", {}, notifications={"PAGE_REQUESTS": Notification(PageRequests, page_requests)}
)
QUEUE: Service[Device] = Service("queue", {}, notifications={"QI": Notification(LinkQi, queue)})


if __name__ == "__main__":
    main(int(sys.argv[1]))
