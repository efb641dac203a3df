"""A process's address space: requests of `protocol/uapi/mm.py`.

They stand for the system calls the process makes, and for what the host does to its memory.
"""

from __future__ import annotations

from kvmd.core.host_mm import Prot
from kvmd.service.objects import MmFile
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Method, Service
from protocol.uapi import mm as uapi
from protocol.units import Hva, Level

_LEVEL_OF_SIZE = {4096: Level(1), 2 << 20: Level(2), 1 << 30: Level(3)}
_PROT = {"none": Prot.NONE, "r": Prot.READ, "rw": Prot.READ | Prot.WRITE}


async def _mmap(held: MmFile, message: uapi.Mmap, fds: Fds) -> Body:
    hva = None if message.addr is None else Hva(message.addr)
    level = _LEVEL_OF_SIZE[message.page_size]
    return {"addr": await held.mm.mmap(hva, message.size, _PROT[message.prot], level)}


async def _munmap(held: MmFile, message: uapi.Munmap, fds: Fds) -> Body:
    await held.mm.munmap(Hva(message.addr), message.size)
    return {}


async def _madvise(held: MmFile, message: uapi.Madvise, fds: Fds) -> Body:
    await held.mm.madvise_dontneed(Hva(message.addr), message.size)
    return {}


async def _move_pages(held: MmFile, message: uapi.MovePages, fds: Fds) -> Body:
    return {"moved": await held.mm.migrate(Hva(message.addr), message.size)}


def _mm_read(held: MmFile, message: uapi.MmRead, fds: Fds) -> Body:
    return {"data": held.mm.read(Hva(message.addr), message.size)}


def _mm_write(held: MmFile, message: uapi.MmWrite, fds: Fds) -> Body:
    held.mm.write(Hva(message.addr), message.data)
    return {}


MM: Service[MmFile] = Service(
    "mm",
    {
        "MMAP": Method(uapi.Mmap, _mmap),
        "MUNMAP": Method(uapi.Munmap, _munmap),
        "MADVISE": Method(uapi.Madvise, _madvise),
        "MOVE_PAGES": Method(uapi.MovePages, _move_pages),
        "READ": Method(uapi.MmRead, _mm_read),
        "WRITE": Method(uapi.MmWrite, _mm_write),
    },
)
