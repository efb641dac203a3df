"""The channel of another MMU to a process's memory: requests of `protocol/uapi/hmm.py`.

A look or a fault is answered in the turn in which the core looked, so that an invalidation follows it.
"""

from __future__ import annotations

from kvmd.core.mm.hmm import FoundPages, Mirror
from kvmd.core.mm.mm import Mm
from kvmd.importers import FRAME_WINDOWS, RemoteImporter, lent
from kvmd.service.objects import App, MemfdFile, MirrorFile, MmFile
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Answer, Method, Service
from protocol.uapi import hmm as uapi
from protocol.units import PAGE_SHIFT, Hva, size_of_level


def open_mirror(app: App, mm: Mm) -> int:
    """The fd of a channel; what it holds ends with it, once its lease has ended."""
    held = MirrorFile(app, Mirror(mm))
    fd, _, held.channel = app.files.open(HMM_MIRROR, held, _mirror_closed)
    return fd


def _mirror_closed(held: MirrorFile) -> None:
    held.app.loop.flows.spawn(held.app.host.release_mirror(held.mirror))


async def _register(held: MirrorFile, message: uapi.HmmRegister, fds: Fds) -> Answer:
    assert held.channel is not None
    with lent(held.app.loop, held.app.memory, FRAME_WINDOWS) as loan:
        ops = RemoteImporter(held.channel, loan.lease, "HMM_INVALIDATE", "seq")
        await held.mirror.register(ops, loan.lease, message.account)
    return Answer({"windows": loan.windows}, loan.fds)


def _watch(held: MirrorFile, message: uapi.HmmWatch, fds: Fds) -> Body:
    held.mirror.watch(Hva(message.start), message.size)
    return {}


def _unwatch(held: MirrorFile, message: uapi.HmmUnwatch, fds: Fds) -> Body:
    held.mirror.unwatch(Hva(message.start), message.size)
    return {}


async def _range_fault(held: MirrorFile, message: uapi.HmmRangeFault, fds: Fds) -> Body:
    start, write = Hva(message.start), message.write
    return _body(await held.mirror.range_fault(start, message.size, write=write, fault=message.fault))


async def _pin(held: MirrorFile, message: uapi.HmmPin, fds: Fds) -> Body:
    start, write = Hva(message.start), message.write
    return _body(
        await held.mirror.pin(start, message.size, write=write, area=message.area, file=message.file)
    )


async def _unpin(held: MirrorFile, message: uapi.HmmUnpin, fds: Fds) -> Body:
    return {"pages": await held.mirror.unpin(Hva(message.start), message.size, area=message.area)}


def _pinned(held: MirrorFile, message: uapi.HmmPinned, fds: Fds) -> Body:
    pins, end = held.mirror.pinned_in(Hva(message.start), message.size, area=message.area)
    runs = [(run.hva, run.pfn << PAGE_SHIFT, run.npages << PAGE_SHIFT) for run in pins]
    return {"pins": runs, "end": end, "total": len(held.mirror.pins)}


def _file_get(held: MirrorFile, message: uapi.HmmFileGet, fds: Fds) -> Body:
    return {"file": held.mirror.open_file(held.app.files.find(fds.peek(0), MemfdFile).file)}


def _file_put(held: MirrorFile, message: uapi.HmmFilePut, fds: Fds) -> Body:
    held.mirror.files.close(message.file)
    return {}


async def _change_process(held: MirrorFile, message: uapi.HmmChangeProcess, fds: Fds) -> Body:
    payer = None if message.undo else held.app.files.find(fds.peek(0), MmFile).mm
    await held.app.host.change_process(held.mirror, payer)
    return {}


def _body(found: FoundPages) -> Body:
    pages = [
        (page.hva, page.pfn << PAGE_SHIFT, size_of_level(page.level), page.writable) for page in found.pages
    ]
    return {"pages": pages, "end": found.end, "major": found.major}


HMM_MIRROR: Service[MirrorFile] = Service(
    "hmm-mirror",
    {
        "HMM_REGISTER": Method(uapi.HmmRegister, _register),
        "HMM_WATCH": Method(uapi.HmmWatch, _watch),
        "HMM_UNWATCH": Method(uapi.HmmUnwatch, _unwatch),
        "HMM_RANGE_FAULT": Method(uapi.HmmRangeFault, _range_fault),
        "HMM_FILE_GET": Method(uapi.HmmFileGet, _file_get, 1),
        "HMM_FILE_PUT": Method(uapi.HmmFilePut, _file_put),
        "HMM_CHANGE_PROCESS": Method(uapi.HmmChangeProcess, _change_process, 1),
        "HMM_PIN": Method(uapi.HmmPin, _pin),
        "HMM_UNPIN": Method(uapi.HmmUnpin, _unpin),
        "HMM_PINNED": Method(uapi.HmmPinned, _pinned),
    },
)
