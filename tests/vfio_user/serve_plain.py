"""`python -m tests.vfio_user.serve_plain PATH`: a process that serves a DSA's endpoint with memory behind it.

A store to the last qword of BAR 2 raises the vector it names; what a reset finds in memory it clears.  Ends
with its standard input; its exit status says whether there was a mistake of its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Protocol

import trio

from protocol.flow import Flows
from protocol.kernel.linux import LINUX
from protocol.rpc.loop import Loop
from protocol.rpc.socket import Listener
from tests.kit.vfio_user_dsa import PlainSilicon
from vfio_user.connection import FunctionDoor
from vfio_user.core.pci.dsa import BAR2_BYTES, dsa_endpoint
from vfio_user.core.pci.endpoint import PciEndpoint, PciSilicon

DOORBELL = BAR2_BYTES - 8
BUG = BAR2_BYTES - 16  # a store here is a mistake of the function's


class RingingSilicon(PlainSilicon):
    def __init__(self) -> None:
        super().__init__()
        self.endpoint = dsa_endpoint(self)

    async def write(self, bar: int, offset: int, data: bytes) -> None:
        assert (bar, offset) != (2, BUG), "a planted mistake"
        if (bar, offset) == (2, DOORBELL):
            self.endpoint.msix.raise_vector(int.from_bytes(data, "little") % 9)
        else:
            await super().write(bar, offset, data)

    async def reset(self) -> None:
        await super().reset()
        for memory in self.bars.values():
            memory[:] = bytes(len(memory))


class EndpointSilicon(PciSilicon, Protocol):
    @property
    def endpoint(self) -> PciEndpoint: ...


async def serve(path: Path, silicon: EndpointSilicon) -> int:
    """Until standard input ends: the number of mistakes."""
    mistakes: list[BaseException] = []
    loop = Loop(LINUX, Flows(mistakes.append))
    door = FunctionDoor(loop, silicon.endpoint)
    stop = trio.Event()

    def on_stdin(_: int) -> None:
        if not os.read(0, 64):
            loop.unregister(0)
            loop.kick()
            stop.set()

    loop.register(0, on_stdin)
    listener = Listener(loop, path, door.open)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.serve)
        await stop.wait()
        nursery.cancel_scope.cancel()
    listener.close()
    door.close()
    loop.settle()
    loop.close()
    return len(mistakes)


if __name__ == "__main__":
    sys.exit(trio.run(serve, Path(sys.argv[1]), RingingSilicon()))
