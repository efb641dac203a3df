"""Kernel objects that user space holds as fds: one end of a socketpair is the fd, the other is ours.

What the kernel calls a file reference is here a real one: every copy of the fd, in whatever process,
keeps the object; when the last is closed or its holder dies, our end sees the hang-up and `on_release`
runs.  A copy that comes back with a message is recognised by its socket's cookie, as fget() knows a file by
its operations, so nobody can forge one (docs/decisions/0004).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from protocol.errors import UapiError
from protocol.kernel.asked import refusal
from protocol.rpc.channel import Channel
from protocol.rpc.loop import Loop
from protocol.rpc.service import Service

Obj = TypeVar("Obj")


class Files:
    """The open files of one daemon, by cookie."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._objects: dict[int, object] = {}
        self._channels: dict[int, Channel] = {}

    def open(
        self, service: Service[Obj], obj: Obj, on_release: Callable[[Obj], None] | None = None
    ) -> tuple[int, int, Channel]:
        """A new fd for `obj`: (fd to send away, its cookie, our channel).  Without room for one `obj` is
        released, and UapiError raised: EMFILE, ENOMEM.
        """
        try:
            return self._open(service, obj, on_release)
        except OSError as error:
            if on_release is not None:
                on_release(obj)
            raise refusal(error, f"no file for a new {service.name}") from None

    def _open(
        self, service: Service[Obj], obj: Obj, on_release: Callable[[Obj], None] | None
    ) -> tuple[int, int, Channel]:
        kernel = self._loop.kernel
        ours, theirs = kernel.socketpair()
        cookie = kernel.cookie_of(theirs.fileno())

        def closed(_: Channel) -> None:
            del self._objects[cookie], self._channels[cookie]
            if on_release is not None:
                on_release(obj)

        try:
            channel = Channel(
                self._loop,
                ours,
                f"{service.name}:{cookie}",
                on_request=service.bind(obj),
                on_notify=service.bind_notify(obj),
                on_close=closed,
                is_ours=True,
            )
        except OSError:
            theirs.close()
            raise
        self._objects[cookie] = obj
        self._channels[cookie] = channel
        return theirs.detach(), cookie, channel

    def find(self, fd: int, kind: type[Obj]) -> Obj:
        """The object behind `fd`, which somebody sent.  Raises UapiError(EINVAL) if it is no `kind` of
        ours.
        """
        obj = self._objects.get(self._loop.kernel.cookie_of(fd))
        if not isinstance(obj, kind):
            raise UapiError(errno.EINVAL, f"the file descriptor is not a {kind.__name__}")
        return obj

    def close(self) -> None:
        """Hang up on every holder."""
        for channel in list(self._channels.values()):
            channel.close()

    def __len__(self) -> int:
        return len(self._objects)
