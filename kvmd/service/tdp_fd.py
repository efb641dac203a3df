"""The TDP FD and the channel of an importer: requests of `protocol/uapi/tdp_fd.py`.

The TDP FD itself answers nothing: what it is for is held by its importers' channels [RFC 01/42].  What comes
before what, from a register to the last close, is `kvmd/core/export/importer.py`.
"""

from __future__ import annotations

import errno

from kvmd.core.export.tdp_fd import TdpFaultType
from kvmd.importers import TDP_WINDOWS, RemoteImporter, lent
from kvmd.service.objects import ImporterFile, TdpFile
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Answer, Method, Service
from protocol.uapi import tdp_fd as tdp
from protocol.units import Gfn, GfnSpan

# Any ioctl on the TDP FD is ENODEV [RFC 04/42].
TDP_FD: Service[TdpFile] = Service("tdp_fd", {}, unknown_errno=errno.ENODEV)


def tdp_fd_closed(held: TdpFile) -> None:
    held.app.loop.flows.spawn(held.tdp.release())


def importer_closed(held: ImporterFile) -> None:
    held.app.loop.flows.spawn(held.importer.unregister())


def _get_metadata(held: ImporterFile, message: tdp.TdpGetMetadata, fds: Fds) -> Body:
    return {"meta": held.importer.metadata()}


def _register(held: ImporterFile, message: tdp.TdpRegisterImporter, fds: Fds) -> Answer:
    held.importer.check_register(message.mm)
    assert held.channel is not None
    with lent(held.app.loop, held.app.memory, TDP_WINDOWS) as loan:
        ops = RemoteImporter(held.channel, loan.lease, "TDP_INVALIDATE", "epoch")
        held.importer.register(message.name, message.mm, ops, loan.lease)
    return Answer({"windows": loan.windows}, loan.fds)


async def _unregister(held: ImporterFile, message: tdp.TdpUnregisterImporter, fds: Fds) -> Body:
    await held.importer.unregister()
    return {}


async def _fault(held: ImporterFile, message: tdp.TdpFault, fds: Fds) -> Body:
    kind = TdpFaultType(message.read, message.write, message.exec)
    await held.importer.fault(message.mm, Gfn(message.gfn), kind)
    return {}


async def _pin(held: ImporterFile, message: tdp.TdpPin, fds: Fds) -> Body:
    return {"pin": await held.importer.pin(GfnSpan.of_pages(Gfn(message.gfn), message.npages))}


async def _unpin(held: ImporterFile, message: tdp.TdpUnpin, fds: Fds) -> Body:
    return {"pages": await held.importer.unpin(message.pin)}


async def _pin_all(held: ImporterFile, message: tdp.TdpPinAll, fds: Fds) -> Body:
    return {"pin": await held.importer.pin_all()}


IMPORTER: Service[ImporterFile] = Service(
    "tdp-importer",
    {
        "TDP_GET_METADATA": Method(tdp.TdpGetMetadata, _get_metadata),
        "TDP_REGISTER_IMPORTER": Method(tdp.TdpRegisterImporter, _register),
        "TDP_UNREGISTER_IMPORTER": Method(tdp.TdpUnregisterImporter, _unregister),
        "TDP_FAULT": Method(tdp.TdpFault, _fault),
        "TDP_PIN": Method(tdp.TdpPin, _pin),
        "TDP_UNPIN": Method(tdp.TdpUnpin, _unpin),
        "TDP_PIN_ALL": Method(tdp.TdpPinAll, _pin_all),
    },
)
