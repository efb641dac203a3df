"""The TDP FD and the channel of an importer: requests of `protocol/uapi/tdp_fd.py`.

The TDP FD itself answers nothing: what it is for is held by its importers' channels [RFC 01/42].
"""

from __future__ import annotations

import errno

from kvmd.core.export.pinning import Account
from kvmd.core.export.tdp_fd import TdpFaultType
from kvmd.core.faults.page_fault import IO_ERRNO, RESOLVED
from kvmd.importers import TDP_WINDOWS, RemoteImporter, lent
from kvmd.service.objects import Importer, TdpFile, holding
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Answer, Method, Service
from protocol.uapi import tdp_fd as tdp
from protocol.units import Gfn, GfnSpan

# Any ioctl on the TDP FD is ENODEV [RFC 04/42].
TDP_FD: Service[TdpFile] = Service("tdp_fd", {}, unknown_errno=errno.ENODEV)


def tdp_fd_closed(held: TdpFile) -> None:
    held.owner.app.loop.flows.spawn(_release_tdp_fd(held))


async def _release_tdp_fd(held: TdpFile) -> None:
    """The last copy is closed; an importer that died may have left a walker behind, so wait for its lease,
    and for those of importers that register meanwhile (I13)."""
    while leases := [lease for lease in held.leases if not lease.ended.done]:
        await leases[0].ended
    await held.owner.vm.close_tdp_fd(held.exported)
    held.owner.app.put_vm(held.owner)


def _get_metadata(importer: Importer, message: tdp.TdpGetMetadata, fds: Fds) -> Body:
    importer.tdp.exported.check_alive()
    return {"meta": importer.tdp.exported.meta.to_bytes()}


def _register(importer: Importer, message: tdp.TdpRegisterImporter, fds: Fds) -> Answer:
    if importer.ops is not None:
        raise UapiError(errno.EBUSY, f"this channel is registered as {importer.name!r}")
    vm = importer.tdp.owner.vm
    if message.mm not in (None, vm.mm.cookie):
        raise UapiError(
            errno.EINVAL, f"the importer's process is not that of VM {vm.id}: it could fault nothing in"
        )
    assert importer.channel is not None
    app = importer.tdp.owner.app
    with lent(app.loop, app.memory, TDP_WINDOWS) as loan:
        ops = RemoteImporter(importer.channel, loan.lease, "TDP_INVALIDATE", "epoch")
        importer.tdp.exported.register_importer(message.name, ops)
    importer.name, importer.ops, importer.lease = message.name, ops, loan.lease
    importer.tdp.leases.append(loan.lease)
    importer.pins = vm.pinning.open()
    return Answer({"windows": loan.windows}, loan.fds)


async def _unregister(importer: Importer, message: tdp.TdpUnregisterImporter, fds: Fds) -> Body:
    await _forget_importer(importer)
    return {}


async def _forget_importer(importer: Importer) -> None:
    """It is told of flushes until its lease ends: until then something may walk on its behalf (I13)."""
    ops, lease, name, importer.ops = importer.ops, importer.lease, importer.name, None
    pins, importer.pins = importer.pins, None
    if ops is not None and lease is not None:
        await lease.ended
        if pins is not None:
            await importer.tdp.owner.vm.pinning.close(pins)
        importer.tdp.leases.remove(lease)
        importer.tdp.exported.unregister_importer(name, ops)  # the channel may be another's by now


def importer_closed(importer: Importer) -> None:
    importer.tdp.owner.app.loop.flows.spawn(_forget_importer(importer))


async def _fault(importer: Importer, message: tdp.TdpFault, fds: Fds) -> Body:
    exported, vm = importer.tdp.exported, importer.tdp.owner.vm
    kind = TdpFaultType(message.read, message.write, message.exec)
    flow = vm.fault_exported(exported, message.mm, Gfn(message.gfn), kind)
    result = await holding(importer.tdp.owner, flow)
    if result not in RESOLVED:
        raise UapiError(IO_ERRNO[result], f"gfn {message.gfn:#x}: {result.name.lower()}")
    return {}


# -- pinning ---------------------------------------------------------------------------------------------


def _pins(importer: Importer) -> Account:
    if importer.pins is None:
        raise UapiError(errno.EINVAL, "an importer must be registered to pin: its pins end with it")
    return importer.pins


async def _pin(importer: Importer, message: tdp.TdpPin, fds: Fds) -> Body:
    owner, pins = importer.tdp.owner, _pins(importer)
    span = GfnSpan.of_pages(Gfn(message.gfn), message.npages)
    return {"pin": await holding(owner, owner.vm.pinning.pin(pins, span))}


async def _unpin(importer: Importer, message: tdp.TdpUnpin, fds: Fds) -> Body:
    owner, pins = importer.tdp.owner, _pins(importer)
    return {"pages": await holding(owner, owner.vm.pinning.unpin(pins, message.pin))}


async def _pin_all(importer: Importer, message: tdp.TdpPinAll, fds: Fds) -> Body:
    owner, pins = importer.tdp.owner, _pins(importer)
    return {"pin": await holding(owner, owner.vm.pinning.pin_all(pins))}


IMPORTER: Service[Importer] = Service(
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
