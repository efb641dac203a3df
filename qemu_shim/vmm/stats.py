"""STATS of a daemon that has more objects than one answer tells of."""

from __future__ import annotations

from typing import Any

from protocol.rpc.channel import Body, Channel
from protocol.uapi.message import MAX_TOLD


async def ask_all(channel: Channel, told: str, number: str) -> tuple[Body, list[Any]]:
    """The last answer, and everything under `told` of all of them; `number` orders what is there."""
    found: list[Any] = []
    while True:
        after = {"after": found[-1][number]} if found else {}
        body = (await channel.ask("STATS", after)).body
        found += body[told]
        if len(body[told]) < MAX_TOLD:
            return body, found
