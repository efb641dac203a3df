"""Kernel objects that user space holds as fds: one end of a socketpair is the fd, the other is ours.

What the kernel calls a file reference is here a real one: every copy of the fd, in whatever process,
keeps the object; when the last is closed or its holder dies, our end sees the hang-up and `on_release`
runs.  A copy that comes back with a message is recognised by its inode, as fget() knows a file by its
operations, so nobody can forge one (docs/decisions/0004).
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import TypeVar

from protocol.errors import UapiError
from protocol.rpc.channel import Channel
from protocol.rpc.loop import Loop
from protocol.rpc.service import Service

Obj = TypeVar("Obj")


def _socket_device() -> int:
    with socket.socket(socket.AF_UNIX) as made:
        return os.fstat(made.fileno()).st_dev


SOCKET_DEVICE = _socket_device()


def inode_of(fd: int) -> int:
    """The number that names the open file behind a socket fd, in every process; 0 for any other file: anybody
    can make one somewhere whose inode has a number they like.
    """
    stat = os.fstat(fd)
    return stat.st_ino if stat.st_dev == SOCKET_DEVICE else 0


class Files:
    """The open files of one daemon, by inode."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._objects: dict[int, object] = {}
        self._channels: dict[int, Channel] = {}

    def open(
        self, service: Service[Obj], obj: Obj, on_release: Callable[[Obj], None] | None = None
    ) -> tuple[int, int, Channel]:
        """A new fd for `obj`: (fd to send away, its inode, our channel).  Without room for one `obj` is
        released, and UapiError raised: EMFILE, ENOMEM.
        """
        try:
            return self._open(service, obj, on_release)
        except OSError as error:
            if on_release is not None:
                on_release(obj)
            raise UapiError(error.errno or errno.EMFILE, f"no file for a new {service.name}") from None

    def _open(
        self, service: Service[Obj], obj: Obj, on_release: Callable[[Obj], None] | None
    ) -> tuple[int, int, Channel]:
        ours, theirs = socket.socketpair()
        inode = inode_of(theirs.fileno())

        def closed(_: Channel) -> None:
            del self._objects[inode], self._channels[inode]
            if on_release is not None:
                on_release(obj)

        try:
            channel = Channel(
                self._loop,
                ours,
                f"{service.name}:{inode}",
                on_request=service.bind(obj),
                on_notify=service.bind_notify(obj),
                on_close=closed,
            )
        except OSError:
            theirs.close()
            raise
        self._objects[inode] = obj
        self._channels[inode] = channel
        return theirs.detach(), inode, channel

    def find(self, fd: int, kind: type[Obj]) -> Obj:
        """The object behind `fd`, which somebody sent.  Raises UapiError(EINVAL) if it is no `kind` of
        ours.
        """
        obj = self._objects.get(inode_of(fd))
        if not isinstance(obj, kind):
            raise UapiError(errno.EINVAL, f"the file descriptor is not a {kind.__name__}")
        return obj

    def close(self) -> None:
        """Hang up on every holder."""
        for channel in list(self._channels.values()):
            channel.close()

    def __len__(self) -> int:
        return len(self._objects)
