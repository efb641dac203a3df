"""KVM as iommufdd reaches it: a TDP FD presented at kvmd's door for importers becomes an importer's
channel, a VM fd one over which KVM says what its vCPUs faulted in.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from iommufdd.core.hwpt_kvm import Invalidate
from iommufdd.kvmd_channel import KvmdChannel, nothing
from iommufdd.lent import LentWindows
from protocol.errors import UapiError
from protocol.pt.meta import ExportedTdpMeta
from protocol.rpc.channel import Body, Fds
from protocol.rpc.loop import Loop
from protocol.rpc.service import Method, Notification, Service
from protocol.uapi import kvm
from protocol.uapi import tdp_fd as uapi
from protocol.units import Gfn, Gpa

IMPORTER_NAME = "iommufd"


class KvmTdp(KvmdChannel):
    """One TDP FD, which is ours, held and imported: the port `HeldTdpFd`."""

    def __init__(self, loop: Loop, kvmd: Path, mm_cookie: int, tdp_fd: int) -> None:
        super().__init__(loop, kvmd, nothing)
        self.on_invalidate: Invalidate = _unconcerned
        self._mm_cookie = mm_cookie  # a bare number: no reference on the process [RFC 15/42]
        self._tdp_fd = tdp_fd

    async def open(self) -> None:
        await self.present("TDP_FD_GET", self._tdp_fd, "tdp", on_request=IMPORTER.bind(self))

    async def metadata(self) -> ExportedTdpMeta:
        """EFAULT if what KVM says is no metadata; if it says none, its own errno (defect B-36)."""
        answer = await self.call("TDP_GET_METADATA")
        try:
            return ExportedTdpMeta.from_bytes(answer["meta"])
        except (ValueError, KeyError, TypeError) as error:
            raise UapiError(errno.EFAULT, f"no metadata of the exported TDP: {error}") from None

    async def register(self) -> LentWindows:
        body = {"name": IMPORTER_NAME, "mm": self._mm_cookie}
        return await self.borrow("TDP_REGISTER_IMPORTER", body)

    async def fault(self, gfn: Gfn, *, read: bool, write: bool, exec: bool) -> None:
        body = {"mm": self._mm_cookie, "gfn": gfn, "read": read, "write": write, "exec": exec}
        await self.call("TDP_FAULT", body)

    async def pin(self, gfn: Gfn, npages: int) -> int:
        body = {"gfn": gfn, "npages": npages}
        return (await self.ask(uapi.TdpPinReply, "TDP_PIN", body)).pin

    async def pin_all(self) -> int:
        return (await self.ask(uapi.TdpPinReply, "TDP_PIN_ALL")).pin

    async def unpin(self, pin: int) -> None:
        await self.call("TDP_UNPIN", {"pin": pin})

    async def unregister(self) -> None:
        await self.call("TDP_UNREGISTER_IMPORTER")

    def release(self) -> None:
        """Drop the reference on the TDP FD."""
        self.hang_up()
        if self._tdp_fd >= 0:
            self._loop.kernel.close_received(self._tdp_fd)  # a user's, whatever it is
            self._tdp_fd = -1


async def _invalidated(tdp: KvmTdp, message: uapi.TdpInvalidate, fds: Fds) -> Body:
    await tdp.on_invalidate(Gpa(message.start), message.size, message.epoch)
    return {}


async def _unconcerned(start: Gpa, size: int, epoch: int) -> None:
    """Nothing was made of it yet."""


IMPORTER: Service[KvmTdp] = Service(
    "tdp-importer", {"TDP_INVALIDATE": Method(uapi.TdpInvalidate, _invalidated)}
)


class FaultNotes(KvmdChannel):
    """What the vCPUs of one VM fault in; `on_note(gfn, npages)`.  Gone: the VM, or KVM."""

    def __init__(
        self,
        loop: Loop,
        kvmd: Path,
        vm_fd: int,
        on_note: Callable[[Gfn, int], None],
        on_gone: Callable[[], None],
    ) -> None:
        super().__init__(loop, kvmd, on_gone)
        self.on_note = on_note
        self._vm_fd = vm_fd  # presented while it is lent to us, and not used after

    async def open(self) -> None:
        told = NOTES.bind_notify(self)
        await self.present("KVM_FAULT_NOTES_GET", self._vm_fd, "fault-notes", on_notify=told)


def _faulted_in(notes: FaultNotes, message: kvm.KvmFaultedIn) -> None:
    notes.on_note(Gfn(message.gfn), message.npages)


NOTES: Service[FaultNotes] = Service(
    "fault-notes", {}, notifications={"KVM_FAULTED_IN": Notification(kvm.KvmFaultedIn, _faulted_in)}
)
