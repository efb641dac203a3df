"""An fd that answers requests: what every object of the daemons looks like to the VMM.

Every object is a channel of its own, over the fd the kernel would have given; closing it drops the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from protocol.rpc.channel import Channel, PeerGone, Reply
from protocol.rpc.loop import Loop


class File:
    """An fd that answers requests."""

    def __init__(self, loop: Loop, fd: int, name: str) -> None:
        self.loop = loop
        self._fd = fd
        self._channel = Channel(loop, loop.kernel.socket_of(fd), name)

    async def ask(self, op: str, fds: Sequence[int] = (), **body: Any) -> Reply:
        """One request; raises UapiError, or PeerGone when the daemon hung up."""
        return await self._channel.ask(op, body, fds)

    @property
    def number(self) -> int:
        """The fd, as this process numbers it."""
        return self._fd

    def dup(self) -> int:
        """A copy of the fd, to pass on.  PeerGone: the daemon hung up; the number may be another file's."""
        if self.closed:
            raise PeerGone(f"{self._channel.name} hung up")
        return self.loop.kernel.dup(self._fd)

    @property
    def closed(self) -> bool:
        return self._channel.closed

    def close(self) -> None:
        """Drop our reference."""
        if not self._channel.closed:
            self._channel.close()


def copies(files: Iterable[File], *had: int) -> list[int]:
    """The fds `had` already and a copy of each file's behind them, to pass on: all, or none is left."""
    fds = list(had)
    for file in files:
        try:
            fds.append(file.dup())
        except BaseException:
            for fd in fds:
                file.loop.kernel.close(fd)
            raise
    return fds
