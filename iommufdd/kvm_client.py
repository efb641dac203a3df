"""KVM as iommufdd reaches it: a TDP FD presented at kvmd's door for importers becomes an importer's
channel, a VM fd one over which KVM says what its vCPUs faulted in.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from iommufdd.kvmd_channel import KvmdChannel
from protocol.errors import UapiError
from protocol.pt.meta import ExportedTdpMeta
from protocol.rpc.channel import Body, Fds
from protocol.rpc.closer import CLOSER
from protocol.rpc.loop import Loop
from protocol.rpc.service import Method, Notification, Service
from protocol.uapi import kvm
from protocol.uapi import tdp_fd as uapi
from protocol.units import Gfn, Gpa

IMPORTER_NAME = "iommufd"

Invalidate = Callable[[Gpa, int, int], Coroutine[Any, None, None]]


class KvmTdp(KvmdChannel):
    """One TDP FD, held and imported.  `on_invalidate` is called for every flush."""

    def __init__(self, mm: int, tdp_fd: int, on_gone: Callable[[], object]) -> None:
        super().__init__(on_gone)
        self.on_invalidate: Invalidate | None = None
        self._mm = mm  # a bare number: no reference on the process [RFC 15/42]
        self._tdp_fd = tdp_fd

    async def open(self, loop: Loop, kvmd: Path) -> None:
        """EOPNOTSUPP: no KVM; EINVAL: not a TDP FD; EMFILE."""
        await self.present(loop, kvmd, "TDP_FD_GET", self._tdp_fd, "tdp", on_request=IMPORTER.bind(self))

    async def metadata(self) -> ExportedTdpMeta:
        """EFAULT if what KVM says is no metadata; if it says none, its own errno (defect B-36)."""
        reply = await self.call("TDP_GET_METADATA")
        try:
            return ExportedTdpMeta.from_bytes(reply.body["meta"])
        except (ValueError, KeyError, TypeError) as error:
            raise UapiError(errno.EFAULT, f"no metadata of the exported TDP: {error}") from None

    async def register(self) -> tuple[list[Any], Fds]:
        """Be told of flushes from now on; (windows, their fds and the lease).  EBUSY; EINVAL: wrong mm."""
        reply = await self.call("TDP_REGISTER_IMPORTER", {"name": IMPORTER_NAME, "mm": self._mm})
        return reply.body["windows"], reply.fds

    async def fault(self, gfn: Gfn, *, read: bool, write: bool, exec: bool) -> None:
        body = {"mm": self._mm, "gfn": gfn, "read": read, "write": write, "exec": exec}
        await self.call("TDP_FAULT", body)

    async def pin(self, gfn: Gfn, npages: int) -> int:
        reply = await self.call("TDP_PIN", {"gfn": gfn, "npages": npages})
        return int(reply.body["pin"])

    async def pin_all(self) -> int:
        return int((await self.call("TDP_PIN_ALL")).body["pin"])

    async def unpin(self, pin: int) -> None:
        await self.call("TDP_UNPIN", {"pin": pin})

    async def unregister(self) -> None:
        await self.call("TDP_UNREGISTER_IMPORTER")

    def release(self) -> None:
        """Drop the reference on the TDP FD."""
        self.hang_up()
        if self._tdp_fd >= 0:
            CLOSER.close(self._tdp_fd)  # a user's, whatever it is
            self._tdp_fd = -1


async def _invalidated(tdp: KvmTdp, message: uapi.TdpInvalidate, fds: Fds) -> Body:
    if tdp.on_invalidate is not None:
        await tdp.on_invalidate(Gpa(message.start), message.size, message.epoch)
    return {}


IMPORTER: Service[KvmTdp] = Service(
    "tdp-importer", {"TDP_INVALIDATE": Method(uapi.TdpInvalidate, _invalidated)}
)


class FaultNotes(KvmdChannel):
    """What the vCPUs of one VM fault in; `on_note(gfn, npages)`.  Gone: the VM, or KVM."""

    def __init__(self, on_note: Callable[[Gfn, int], None], on_gone: Callable[[], object]) -> None:
        super().__init__(on_gone)
        self.on_note = on_note

    async def open(self, loop: Loop, kvmd: Path, vm_fd: int) -> None:
        """EOPNOTSUPP: no KVM; EINVAL: not a VM; EMFILE."""
        told = NOTES.bind_notify(self)
        await self.present(loop, kvmd, "KVM_FAULT_NOTES_GET", vm_fd, "fault-notes", on_notify=told)


def _faulted_in(notes: FaultNotes, message: kvm.KvmFaultedIn) -> None:
    notes.on_note(Gfn(message.gfn), message.npages)


NOTES: Service[FaultNotes] = Service(
    "fault-notes", {}, notifications={"KVM_FAULTED_IN": Notification(kvm.KvmFaultedIn, _faulted_in)}
)
