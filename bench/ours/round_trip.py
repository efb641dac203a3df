"""Ours: one validated request and its reply between two processes, as the rivals do.

Both run the daemons' own message loop, channel and service over a Unix stream; what is asked is a fault, a
map of six keys checked on arrival.

    python -m bench.ours.round_trip COUNT
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from time import perf_counter_ns

import trio

from bench.ours import processes
from protocol.rpc.channel import Body, Channel, Fds
from protocol.rpc.loop import Loop
from protocol.rpc.service import Method, Service
from protocol.uapi.tdp_fd import TdpFault

REQUEST: Body = {"mm": 7, "gfn": 0x1_2345, "read": True, "write": True, "exec": False}
REPLY: Body = {}


def main(count: int) -> None:
    async def ask(loop: Loop, sock: socket.socket) -> list[float]:
        """Nanoseconds of each of `count` requests; a tenth more goes first, untimed."""
        took: list[float] = []
        channel = Channel(loop, sock, "server")
        for _ in range(count // 10):
            await channel.ask("TDP_FAULT", REQUEST)
        for _ in range(count):
            start = perf_counter_ns()
            await channel.ask("TDP_FAULT", REQUEST)
            took.append(perf_counter_ns() - start)
        channel.close()
        return took

    processes.main(ask, serve)


def serve(sock: socket.socket) -> int:
    trio.run(processes.serve, sock, attach)
    return 0


def attach(loop: Loop, sock: socket.socket, on_close: Callable[[Channel], None]) -> None:
    Channel(loop, sock, "asker", on_request=FAULTS.bind(None), on_close=on_close)


def fault(_: None, message: TdpFault, fds: Fds) -> Body:
    return REPLY


FAULTS: Service[None] = Service("faults", {"TDP_FAULT": Method(TdpFault, fault)})


if __name__ == "__main__":
    main(int(sys.argv[1]))
