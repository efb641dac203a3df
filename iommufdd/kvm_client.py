"""KVM as iommufdd reaches it: a TDP FD presented at kvmd's front door becomes an importer's channel.

Only kvmd can say whether an fd is a TDP FD, and only the fd opens the door: iommufdd never speaks to
what a user handed it (docs/decisions/0004).
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from protocol.errors import UapiError
from protocol.pt.meta import ExportedTdpMeta
from protocol.rpc.channel import Body, Channel, Fds, PeerGone
from protocol.rpc.loop import Loop
from protocol.rpc.service import Method, Service
from protocol.rpc.socket import connect_now
from protocol.uapi import tdp_fd as uapi

IMPORTER_NAME = "iommufd"

Invalidate = Callable[[int, int, int], Coroutine[Any, None, None]]


class KvmTdp:
    """One TDP FD, held and imported.  `on_invalidate` is called for every flush, `on_gone` if kvmd hangs
    up.
    """

    def __init__(self, mm: int, tdp_fd: int, on_gone: Callable[[], None]) -> None:
        self.on_invalidate: Invalidate | None = None
        self._mm = mm  # a bare number: no reference on the process [RFC 15/42]
        self._tdp_fd = tdp_fd
        self._on_gone = on_gone
        self._channel: Channel | None = None

    async def open(self, loop: Loop, kvmd: Path) -> None:
        """EOPNOTSUPP: no KVM; EINVAL: not a TDP FD; EMFILE."""
        try:
            copy = os.dup(self._tdp_fd)
        except OSError:
            raise UapiError(errno.EMFILE, "no room in our fd table") from None
        try:
            door = Channel(loop, connect_now(kvmd), "kvmd")
        except OSError as error:
            os.close(copy)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise UapiError(errno.EMFILE, "no room in our fd table") from None
            raise UapiError(errno.EOPNOTSUPP, f"KVM is not loaded: {kvmd}: {error.strerror}") from None
        try:
            reply = await door.call("TDP_FD_GET", {}, [copy])
        except PeerGone:
            raise UapiError(errno.EOPNOTSUPP, "KVM went away") from None
        finally:
            door.close()
        sock = socket.socket(fileno=reply.fds.take(0))
        self._channel = Channel(
            loop, sock, "tdp", on_request=IMPORTER.bind(self), on_close=lambda _: self._on_gone()
        )

    async def metadata(self) -> ExportedTdpMeta:
        """EFAULT if what KVM says is no metadata; if it says none, its own errno (defect B-36)."""
        reply = await self._ask("TDP_GET_METADATA")
        try:
            return ExportedTdpMeta.from_bytes(reply["meta"])
        except (ValueError, KeyError, TypeError) as error:
            raise UapiError(errno.EFAULT, f"no metadata of the exported TDP: {error}") from None

    async def register(self) -> tuple[list[Any], Fds]:
        """Be told of flushes from now on; (windows, their fds and the lease).  EBUSY; EINVAL: wrong mm."""
        assert self._channel is not None
        try:
            body = {"name": IMPORTER_NAME, "mm": self._mm}
            reply = await self._channel.call("TDP_REGISTER_IMPORTER", body)
        except PeerGone:
            raise UapiError(errno.ENODEV, "KVM went away") from None
        return reply.body["windows"], reply.fds

    async def fault(self, gfn: int, *, read: bool, write: bool, exec: bool) -> None:
        assert self._channel is not None
        body = {"mm": self._mm, "gfn": gfn, "read": read, "write": write, "exec": exec}
        try:
            await self._channel.call("TDP_FAULT", body)  # not through _ask: this is the path of every fault
        except PeerGone:
            raise UapiError(errno.ENODEV, "KVM went away") from None

    async def pin(self, gfn: int, npages: int) -> None:
        await self._ask("TDP_PIN", {"gfn": gfn, "npages": npages})

    async def unpin(self, gfn: int, npages: int) -> None:
        await self._ask("TDP_UNPIN", {"gfn": gfn, "npages": npages})

    async def pin_all(self, *, on: bool) -> None:
        await self._ask("TDP_PIN_ALL", {"on": on})

    async def unregister(self) -> None:
        await self._ask("TDP_UNREGISTER_IMPORTER")

    def release(self) -> None:
        """Drop the reference on the TDP FD."""
        if self._channel is not None:
            self._on_gone = _nothing
            self._channel.close()
        if self._tdp_fd >= 0:
            os.close(self._tdp_fd)
            self._tdp_fd = -1

    async def _ask(self, op: str, body: Body | None = None) -> Body:
        assert self._channel is not None
        try:
            return (await self._channel.call(op, body)).body
        except PeerGone:
            raise UapiError(errno.ENODEV, "KVM went away") from None


def _nothing() -> None: ...


async def _invalidated(tdp: KvmTdp, message: uapi.TdpInvalidate, fds: Fds) -> Body:
    if tdp.on_invalidate is not None:
        await tdp.on_invalidate(message.start, message.size, message.epoch)
    return {}


IMPORTER: Service[KvmTdp] = Service(
    "tdp-importer", {"TDP_INVALIDATE": Method(uapi.TdpInvalidate, _invalidated)}
)
