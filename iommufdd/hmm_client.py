"""The host's memory management as iommufdd reaches it: one process's memory, by its mm fd.

The fd is presented at kvmd's door for importers and not kept: it is no reference on the process
(`protocol/uapi/hmm.py`).  Registering brings the windows the process's pages lie in, and the lease of
whoever reaches them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from iommufdd.core.hmm import HmmPage, HmmRange, HostPin, Invalidate, PinnedRange, UserFd
from iommufdd.kvmd_channel import KvmdChannel
from iommufdd.lent import LentWindows
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.loop import Loop
from protocol.rpc.service import Method, Service
from protocol.uapi import hmm as uapi
from protocol.units import Hpa, Hva


class HmmMirror(KvmdChannel):
    """The port `ProcessMemory`.  `on_invalidate` returns when nobody uses what was taken away."""

    def __init__(
        self, loop: Loop, kvmd: Path, mm_fd: UserFd, on_invalidate: Invalidate, on_gone: Callable[[], None]
    ) -> None:
        super().__init__(loop, kvmd, on_gone)
        self.on_invalidate = on_invalidate
        self._mm_fd = mm_fd  # presented while it is lent to us, and not used after

    async def open(self) -> None:
        await self.present("HMM_MIRROR_GET", self._mm_fd, "hmm", on_request=HMM_MIRROR.bind(self))

    async def register(self, account: str) -> LentWindows:
        return await self.borrow("HMM_REGISTER", {"account": account})

    async def watch(self, hva: Hva, size: int) -> None:
        await self.call("HMM_WATCH", {"start": hva, "size": size})

    async def unwatch(self, hva: Hva, size: int) -> None:
        await self.call("HMM_UNWATCH", {"start": hva, "size": size})

    async def range_fault(self, hva: Hva, size: int, *, write: bool, fault: bool) -> HmmRange:
        return await self._find(
            "HMM_RANGE_FAULT", {"start": hva, "size": size, "write": write, "fault": fault}
        )

    async def pin(self, hva: Hva, size: int, *, write: bool, area: int, file: int = 0) -> HmmRange:
        asked = {"start": hva, "size": size, "write": write, "area": area, "file": file}
        return await self._find("HMM_PIN", asked, whole=True)

    async def open_file(self, fd: UserFd) -> int:
        return (await self.ask(uapi.HmmFileReply, "HMM_FILE_GET", {}, fd)).file

    async def close_file(self, file: int) -> None:
        await self.call("HMM_FILE_PUT", {"file": file})

    async def change_process(self, mm_fd: UserFd) -> None:
        await self.call("HMM_CHANGE_PROCESS", {}, mm_fd)

    async def undo_change_process(self) -> None:
        await self.call("HMM_CHANGE_PROCESS", {"undo": True})

    async def unpin(self, hva: Hva, size: int, *, area: int) -> None:
        await self.call("HMM_UNPIN", {"start": hva, "size": size, "area": area})

    async def pinned(self, hva: Hva, size: int, *, area: int) -> PinnedRange:
        asked = {"start": hva, "size": size, "area": area}
        found = await self.ask(uapi.HmmPinnedReply, "HMM_PINNED", asked)
        pins = [HostPin(Hva(at), Hpa(hpa), size) for at, hpa, size in found.pins]
        return PinnedRange(pins, Hva(found.end), found.total)

    def release(self) -> None:
        self.hang_up()

    async def _find(self, op: str, asked: Body, *, whole: bool = False) -> HmmRange:
        """`whole`: without gaps."""
        found = await self.ask(uapi.HmmFoundReply, op, asked)
        at, end = asked["start"], min(found.end, asked["start"] + asked["size"])
        if end <= at:
            raise UapiError(errno.EIO, f"{op} of {at:#x} stopped at {found.end:#x}")
        pages: list[HmmPage] = []
        for hva, hpa, size, writable in found.pages:
            page = HmmPage(Hva(hva), Hpa(hpa), size, writable)
            if page.end <= at or (at < hva and whole) or end <= hva or (pages and hva < at):
                raise UapiError(errno.EIO, f"{op}: of {at:#x}..{end:#x} kvmd answers {hva:#x}+{size:#x}")
            pages.append(page)
            at = page.end
        if whole and at < end:
            raise UapiError(errno.EIO, f"{op}: of {at:#x}..{end:#x} kvmd answers nothing")
        return HmmRange(pages, Hva(found.end), found.major)


async def _invalidated(mirror: HmmMirror, message: uapi.HmmInvalidate, fds: Fds) -> Body:
    await mirror.on_invalidate(Hva(message.start), message.size)
    return {}


HMM_MIRROR: Service[HmmMirror] = Service(
    "hmm-mirror", {"HMM_INVALIDATE": Method(uapi.HmmInvalidate, _invalidated)}
)
