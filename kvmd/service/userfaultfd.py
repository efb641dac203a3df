"""A userfaultfd: its ioctls, and the read that waits for a fault (`protocol/uapi/mm.py`)."""

from __future__ import annotations

from kvmd.service.objects import UffdFile
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Method, Service
from protocol.uapi import mm as uapi
from protocol.units import Hva


async def _register(held: UffdFile, message: uapi.UffdioRegister, fds: Fds) -> Body:
    modes = message.mode.split("+")
    await held.uffd.register(Hva(message.start), message.len, missing="missing" in modes, wp="wp" in modes)
    return {}


async def _unregister(held: UffdFile, message: uapi.UffdioUnregister, fds: Fds) -> Body:
    await held.uffd.unregister(Hva(message.start), message.len)
    return {}


async def _copy(held: UffdFile, message: uapi.UffdioCopy, fds: Fds) -> Body:
    await held.uffd.copy(Hva(message.dst), message.data, wp=message.wp)
    return {}


async def _zeropage(held: UffdFile, message: uapi.UffdioZeropage, fds: Fds) -> Body:
    await held.uffd.zeropage(Hva(message.start), message.len)
    return {}


async def _writeprotect(held: UffdFile, message: uapi.UffdioWriteprotect, fds: Fds) -> Body:
    await held.uffd.writeprotect(Hva(message.start), message.len, on=message.on)
    return {}


async def _read_event(held: UffdFile, message: uapi.ReadEvent, fds: Fds) -> Body:
    event = await held.uffd.next_event()
    flags = [name for name, is_set in (("WRITE", event.write), ("WP", event.wp)) if is_set]
    return {"address": event.address, "flags": flags}


def uffd_closed(held: UffdFile) -> None:
    held.app.loop.flows.spawn(held.uffd.close())


UFFD: Service[UffdFile] = Service(
    "userfaultfd",
    {
        "UFFDIO_REGISTER": Method(uapi.UffdioRegister, _register),
        "UFFDIO_UNREGISTER": Method(uapi.UffdioUnregister, _unregister),
        "UFFDIO_COPY": Method(uapi.UffdioCopy, _copy),
        "UFFDIO_ZEROPAGE": Method(uapi.UffdioZeropage, _zeropage),
        "UFFDIO_WRITEPROTECT": Method(uapi.UffdioWriteprotect, _writeprotect),
        "READ_EVENT": Method(uapi.ReadEvent, _read_event),
    },
)
