"""The front doors of those daemons that live, for who only asks how they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import trio

from protocol.errors import leaves
from protocol.flow import Flows
from protocol.kernel.linux import LINUX
from protocol.rpc.channel import Channel
from protocol.rpc.loop import Loop
from protocol.rpc.socket import connect_now
from tests.patience import PATIENCE_S
from tests.torture.daemons import StruckDaemons

CHECKED = ("kvmd", "iommufdd")  # those that have CHECK


class Silent(Exception):
    """Somebody does not answer, or not with what was asked for."""


class Doors:
    def __init__(self, channels: Mapping[str, Channel]) -> None:
        self._channels = channels
        self.names = list(channels)

    async def ask(self, name: str, op: str) -> dict[str, Any]:
        with trio.move_on_after(PATIENCE_S):
            return (await self._channels[name].ask(op)).body
        raise Silent(f"{name} does not answer {op} within {PATIENCE_S:.0f} s")

    async def stats(self) -> dict[str, dict[str, Any]]:
        return {name: await self.ask(name, "STATS") for name in self.names}

    async def violations(self) -> list[str]:
        asked = [name for name in self.names if name in CHECKED]
        return [line for name in asked for line in (await self.ask(name, "CHECK"))["violations"]]


@asynccontextmanager
async def doors_of(daemons: StruckDaemons, names: list[str]) -> AsyncIterator[Doors]:
    crashes: list[BaseException] = []
    loop = Loop(LINUX, Flows(crashes.append))
    try:
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            nursery.start_soon(loop.serve)
            stack.callback(nursery.cancel_scope.cancel)
            channels = {}
            for name in names:
                channels[name] = Channel(loop, connect_now(LINUX, daemons.socket(name)), name)
                stack.callback(channels[name].close)
            yield Doors(channels)
    except ExceptionGroup as group:
        raise Silent("; ".join(map(str, leaves(group)))) from group
    finally:
        loop.close()
    assert not crashes, crashes
