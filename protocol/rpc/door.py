"""A daemon's door: every connection to its socket is a channel served by one service.

What is asked there needs no fd; what is handed out there is one (`protocol/rpc/files.py`).  Hanging up on
the door ends nothing that was handed out.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from protocol.kernel.port import StreamSocket
from protocol.rpc.channel import Channel
from protocol.rpc.loop import Loop
from protocol.rpc.service import Service

Obj = TypeVar("Obj")


class Door(Generic[Obj]):
    def __init__(self, loop: Loop, service: Service[Obj], obj: Obj) -> None:
        self._loop = loop
        self._name = service.name
        self._serve = service.bind(obj)
        self._channels: dict[Channel, None] = {}

    def open(self, sock: StreamSocket) -> None:
        """Somebody connected."""
        channel = Channel(
            self._loop, sock, self._name, on_request=self._serve, on_close=self._channels.pop, is_ours=True
        )
        self._channels[channel] = None

    def close(self) -> None:
        """Hang up on everybody."""
        for channel in list(self._channels):
            channel.close()
