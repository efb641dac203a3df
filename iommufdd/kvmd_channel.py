"""What kvmd gives for an fd presented at its door for importers: a channel of its own, until kvmd is gone.

Only kvmd can say whether an fd is a TDP FD, a process's or a VM's, and only the fd opens the door: iommufdd
never speaks to what a user handed it (docs/decisions/0004).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from iommufdd.lent import LentWindows
from protocol.errors import UapiError
from protocol.kernel.asked import refusal
from protocol.rpc.channel import Body, Channel, PeerGone, Reply
from protocol.rpc.loop import Loop
from protocol.rpc.socket import connect_now
from protocol.uapi.message import Checked, LentReply

Answered = TypeVar("Answered", bound=Checked)
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EAGAIN)


class KvmdChannel:
    """`on_gone` is called if kvmd hangs up, not if we do."""

    def __init__(self, loop: Loop, kvmd: Path, on_gone: Callable[[], None]) -> None:
        self.on_gone = on_gone
        self._loop = loop
        self._kvmd = kvmd
        self._channel: Channel | None = None

    @property
    def is_gone(self) -> bool:
        return self._channel is not None and self._channel.closed

    async def present(self, op: str, fd: int, name: str, **handlers: Any) -> None:
        """A copy of `fd` for a channel.  EOPNOTSUPP: no KVM; EINVAL: the wrong kind of fd; EMFILE, ENOMEM;
        EAGAIN: too many wait for kvmd to let them in.
        """
        loop, kvmd, copy = self._loop, self._kvmd, self._dup(op, fd)
        try:
            door = Channel(loop, connect_now(loop.kernel, kvmd), "kvmd")
        except OSError as error:
            loop.kernel.close(copy)
            if error.errno in _NO_ROOM:
                raise refusal(error, f"no room for a connection to {kvmd}") from None
            raise UapiError(errno.EOPNOTSUPP, f"KVM is not loaded: {kvmd}: {error.strerror}") from None
        try:
            reply = await door.call(op, {}, [copy])
        except PeerGone:
            why = "it went away, or has no room for another connection"
            raise UapiError(errno.EOPNOTSUPP, f"KVM is not to be had: {kvmd}: {why}") from None
        finally:
            door.close()
        try:
            sock = loop.kernel.socket_of(reply.fds.peek(0))
            reply.fds.take(0)
        except OSError as error:
            raise UapiError(errno.EIO, f"{op}: kvmd's answer is no channel: {error.strerror}") from None
        finally:
            reply.fds.close()
        try:
            self._channel = Channel(loop, sock, name, on_close=self._closed, **handlers)
        except OSError as error:
            raise refusal(error, f"no room for the {name} channel") from None

    async def ask(
        self, model: type[Answered], op: str, body: Body | None = None, fd: int | None = None
    ) -> Answered:
        """The answer as `model` has it.  Errors as of `call`, and of `answered`."""
        return answered(model, op, await self.call(op, body, fd))

    async def borrow(self, op: str, body: Body) -> LentWindows:
        """What is lent with the answer.  The same errors."""
        reply = await self.call_for_fds(op, body)
        try:
            windows = answered(LentReply, op, reply.body).windows
            if len(reply.fds) != len(windows) + 1:
                raise UapiError(errno.EIO, f"{op}: {len(windows)} windows with {len(reply.fds)} fds")
        except UapiError:
            reply.fds.close()
            raise
        return LentWindows(windows, reply.fds)

    async def call(self, op: str, body: Body | None = None, fd: int | None = None) -> Body:
        """The answer, which has no fds to be kept; with a copy of `fd`, if one is given.  ENODEV once kvmd is
        gone; EMFILE."""
        reply = await self.call_for_fds(op, body, fd)
        reply.fds.close()
        return reply.body

    async def call_for_fds(self, op: str, body: Body | None = None, fd: int | None = None) -> Reply:
        """The same, whose fds are the caller's."""
        assert self._channel is not None
        try:
            return await self._channel.call(op, body, [] if fd is None else [self._dup(op, fd)])
        except PeerGone:
            raise UapiError(errno.ENODEV, "KVM went away") from None

    def _dup(self, op: str, fd: int) -> int:
        """What is no socket is not even copied: each close of a file may sleep, of a socket only the last."""
        kernel = self._loop.kernel
        if not kernel.cookie_of(fd):
            raise UapiError(errno.EINVAL, f"{op}: the file descriptor is no object of KVM's")
        try:
            return kernel.dup(fd)
        except OSError as error:
            raise refusal(error, f"{op}: no room in our fd table") from None

    def _closed(self, _: Channel) -> None:
        self.on_gone()

    def hang_up(self) -> None:
        if self._channel is not None:
            self.on_gone = nothing
            self._channel.close()


def answered(model: type[Answered], op: str, body: Body) -> Answered:
    """EIO: what kvmd answered is not that."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        raise UapiError(errno.EIO, f"{op}: kvmd's answer is none: {where}: {wrong['msg']}") from None


def nothing() -> None: ...
