"""A memory file's fd: requests of `protocol/uapi/mm.py` that change or read the file itself."""

from __future__ import annotations

from kvmd.service.objects import MemfdFile
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Method, Service
from protocol.uapi import mm as uapi


async def _ftruncate(held: MemfdFile, message: uapi.Ftruncate, fds: Fds) -> Body:
    await held.file.truncate(message.size)
    return {}


async def _punch_hole(held: MemfdFile, message: uapi.PunchHole, fds: Fds) -> Body:
    await held.file.punch_hole(message.offset, message.size)
    return {}


def _pread(held: MemfdFile, message: uapi.Pread, fds: Fds) -> Body:
    return {"data": held.file.pread(message.offset, message.size)}


async def _pwrite(held: MemfdFile, message: uapi.Pwrite, fds: Fds) -> Body:
    await held.file.pwrite(message.offset, message.data)
    return {}


MEMFD: Service[MemfdFile] = Service(
    "memfd",
    {
        "FTRUNCATE": Method(uapi.Ftruncate, _ftruncate),
        "PUNCH_HOLE": Method(uapi.PunchHole, _punch_hole),
        "PREAD": Method(uapi.Pread, _pread),
        "PWRITE": Method(uapi.Pwrite, _pwrite),
    },
)
