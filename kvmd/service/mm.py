"""A process's address space: requests of `protocol/uapi/mm.py`.

They stand for the system calls the process makes, and for what the host does to its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from kvmd.core.mm.failure import poison
from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.madvise import ADVICE, collapse
from kvmd.core.mm.mappable import Mappable
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.mremap import mremap
from kvmd.core.mm.reclaim import age, merge, migrate, numa_hint, swap_out
from kvmd.core.mm.stats import pagemap
from kvmd.core.mm.thp import split
from kvmd.core.mm.userfaultfd import Userfaultfd
from kvmd.core.mm.vma import Prot
from kvmd.service.memfd import MEMFD
from kvmd.service.objects import App, GuestMemfdFile, MemfdFile, MmFile, UffdFile
from kvmd.service.userfaultfd import UFFD, uffd_closed
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Answer, Method, Service
from protocol.uapi import mm as uapi
from protocol.units import Hva, Level

_LEVEL_OF_SIZE = {4096: Level(1), 2 << 20: Level(2), 1 << 30: Level(3)}
_PROT = {"none": Prot.NONE, "r": Prot.READ, "w": Prot.WRITE, "rw": Prot.READ | Prot.WRITE}
_HOST_ACTIONS: dict[str, Callable[[Mm, Hva, int], Coroutine[Any, None, int]]] = {
    "swap_out": swap_out,
    "migrate": migrate,
    "merge": merge,
    "numa_hint": numa_hint,
    "poison": poison,
    "collapse": collapse,
    "split": split,
    "age": age,
}


async def _mmap(held: MmFile, message: uapi.Mmap, fds: Fds) -> Body:
    hva = None if message.addr is None else Hva(message.addr)
    file = _mappable(held.app, fds.peek(0)) if message.kind.startswith("file") else None
    addr = await held.mm.mmap(
        hva,
        message.size,
        _PROT[message.prot],
        _LEVEL_OF_SIZE[message.page_size],
        shared=message.kind.endswith("shared"),
        file=file,
        offset=message.offset,
        fixed=message.fixed,
    )
    return {"addr": addr}


def _mappable(app: App, fd: int) -> Mappable:
    """What an fd lets one map.  EINVAL: nothing."""
    found = app.files.find(fd, object)
    if isinstance(found, GuestMemfdFile):
        return found.memfd
    return app.files.find(fd, MemfdFile).file


async def _munmap(held: MmFile, message: uapi.Munmap, fds: Fds) -> Body:
    await held.mm.munmap(Hva(message.addr), message.size)
    return {}


async def _mprotect(held: MmFile, message: uapi.Mprotect, fds: Fds) -> Body:
    await held.mm.mprotect(Hva(message.addr), message.size, _PROT[message.prot])
    return {}


async def _mremap(held: MmFile, message: uapi.Mremap, fds: Fds) -> Body:
    new = None if message.new_addr is None else Hva(message.new_addr)
    return {"addr": await mremap(held.mm, Hva(message.addr), message.old_size, message.new_size, new)}


async def _madvise(held: MmFile, message: uapi.Madvise, fds: Fds) -> Body:
    await ADVICE[message.advice](held.mm, Hva(message.addr), message.size)
    return {}


async def _move_pages(held: MmFile, message: uapi.MovePages, fds: Fds) -> Body:
    return {"moved": await migrate(held.mm, Hva(message.addr), message.size)}


async def _host_action(held: MmFile, message: uapi.HostAction, fds: Fds) -> Body:
    return {"pages": await _HOST_ACTIONS[message.action](held.mm, Hva(message.addr), message.size)}


def _pagemap(held: MmFile, message: uapi.Pagemap, fds: Fds) -> Body:
    return pagemap(held.mm, Hva(message.addr), message.size)


async def _mm_read(held: MmFile, message: uapi.MmRead, fds: Fds) -> Body:
    return {"data": await held.mm.read(Hva(message.addr), message.size)}


async def _mm_write(held: MmFile, message: uapi.MmWrite, fds: Fds) -> Body:
    await held.mm.write(Hva(message.addr), message.data)
    return {}


# -- what comes with an fd of its own ------------------------------------------------------------------------


def open_mm(app: App, mm: Mm) -> int:
    """The fd of an address space; its last close is the process's exit."""
    held = MmFile(app, mm)
    fd, mm.cookie, _ = app.files.open(MM, held, _mm_closed)
    app.mms[mm.cookie] = held
    return fd


def _mm_closed(held: MmFile) -> None:
    held.app.mms.pop(held.mm.cookie, None)  # not there yet if its fd found no room
    held.app.loop.flows.spawn(held.app.host.exit_mm(held.mm))


async def _fork(held: MmFile, message: uapi.Fork, fds: Fds) -> Answer:
    return Answer({}, [open_mm(held.app, await held.app.host.fork_mm(held.mm))])


def _memfd_create(held: MmFile, message: uapi.MemfdCreate, fds: Fds) -> Answer:
    file = MemoryFile(held.app.host.memory, message.name, message.size)
    fd, _, _ = held.app.files.open(MEMFD, MemfdFile(file), lambda closed: closed.file.put())
    return Answer({}, [fd])


def _userfaultfd(held: MmFile, message: uapi.CreateUserfaultfd, fds: Fds) -> Answer:
    uffd = Userfaultfd(held.mm, user_mode_only=message.user_mode_only)
    fd, _, _ = held.app.files.open(UFFD, UffdFile(held.app, uffd), uffd_closed)
    return Answer({}, [fd])


MM: Service[MmFile] = Service(
    "mm",
    {
        "MMAP": Method(uapi.Mmap, _mmap, 1, lambda asked: int(asked.kind.startswith("file"))),
        "MUNMAP": Method(uapi.Munmap, _munmap),
        "MPROTECT": Method(uapi.Mprotect, _mprotect),
        "MREMAP": Method(uapi.Mremap, _mremap),
        "MADVISE": Method(uapi.Madvise, _madvise),
        "MOVE_PAGES": Method(uapi.MovePages, _move_pages),
        "HOST_ACTION": Method(uapi.HostAction, _host_action),
        "PAGEMAP": Method(uapi.Pagemap, _pagemap),
        "READ": Method(uapi.MmRead, _mm_read),
        "WRITE": Method(uapi.MmWrite, _mm_write),
        "FORK": Method(uapi.Fork, _fork),
        "MEMFD_CREATE": Method(uapi.MemfdCreate, _memfd_create),
        "USERFAULTFD": Method(uapi.CreateUserfaultfd, _userfaultfd),
    },
)
