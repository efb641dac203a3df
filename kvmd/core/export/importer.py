"""A TDP FD from its creation to its end, and its importers from register to the end of their leases.

Models kvm_tdp_fd.c as [RFC 04/42] and [RFC 06/42] order it, and what stands in for a reference where an
importer is another process: a lease, open as long as anything may walk the table on its behalf.

- A create makes all of it, takes its reference on the VM, and is published last (R13).
- A register is refused whole or done whole: alive, of this process, of a name nobody has.  From then on the
  importer hears every flush of the root (I15), and may pin.
- It leaves in this order: it asks no more; its lease ends, so nothing walks for it (I13); its pins go; only
  then it hears no more, for what walked until now was to hear of every flush until now.
- The last close of the fd waits for the leases first, those of importers that register meanwhile too: a root
  that goes behind a walker would be read as a table after it was reused (I7).  Then the export ends, and with
  it the reference.

An importer's channel holds no reference: its TDP FD does.
"""

from __future__ import annotations

import errno
from enum import Enum, auto

from kvmd.core.export.exports import Exports
from kvmd.core.export.pinning import Account
from kvmd.core.export.tdp_fd import CreateTdpFd, ExportedTdp, ImporterOps, TdpFaultType
from kvmd.core.faults.fault_path import FaultPath
from kvmd.core.faults.page_fault import IO_ERRNO, RESOLVED
from kvmd.core.lease import Lease
from kvmd.core.users import VmUsers
from protocol.errors import UapiError
from protocol.lifecycle import LifeCycle
from protocol.units import Gfn, GfnSpan


class TdpFd:
    """What the fd holds: an exported TDP, and its VM, whose faults take `fault_path`."""

    def __init__(
        self, users: VmUsers, exports: Exports, fault_path: FaultPath, exported: ExportedTdp
    ) -> None:
        self.users = users
        self.exports = exports
        self.fault_path = fault_path
        self.exported = exported
        self.leases: list[Lease] = []  # of importers that have not left
        users.get()

    # awaits: users, exports, fault_path: cannot change: the VM's for good, and it is kept while the request
    # runs
    @classmethod
    async def create(
        cls, users: VmUsers, exports: Exports, fault_path: FaultPath, request: CreateTdpFd
    ) -> TdpFd:
        """KVM_CREATE_TDP_FD.  Errors as of `Exports.create`."""
        return cls(users, exports, fault_path, await exports.create(request))

    async def release(self) -> None:
        """The last copy of the fd is closed."""
        while leases := [lease for lease in self.leases if not lease.ended.done]:
            await leases[0].ended  # and then for who registered meanwhile
        await self.exports.close(self.exported)
        self.users.put()


class RegistrationState(Enum):
    REGISTERED = auto()
    LEAVING = auto()  # it asks nothing, and something may still walk for it
    GONE = auto()


class RegistrationEvent(Enum):
    LEAVE = auto()
    LEASE_ENDED = auto()  # and its pins have gone


REGISTRATION_LIFE = LifeCycle(
    "importer registered on a TDP FD",
    RegistrationState.REGISTERED,
    {
        (RegistrationState.REGISTERED, RegistrationEvent.LEAVE): RegistrationState.LEAVING,
        (RegistrationState.LEAVING, RegistrationEvent.LEASE_ENDED): RegistrationState.GONE,
    },
)


class Registration:
    """One importer on one TDP FD."""

    def __init__(self, tdp: TdpFd, name: str, ops: ImporterOps, lease: Lease) -> None:
        """EBUSY: the name is another's; ENODEV: released."""
        tdp.exported.register_importer(name, ops)
        tdp.leases.append(lease)
        self.name = name
        self.pins: Account = tdp.exports.pinning.open()
        self._tdp = tdp
        self._ops = ops
        self._lease = lease
        self._state = REGISTRATION_LIFE.born

    async def leave(self) -> None:
        self._happens(RegistrationEvent.LEAVE)
        await self._lease.ended
        await self._tdp.exports.pinning.close(self.pins)
        self._tdp.leases.remove(self._lease)
        self._tdp.exported.unregister_importer(self.name, self._ops)
        self._happens(RegistrationEvent.LEASE_ENDED)

    def _happens(self, event: RegistrationEvent) -> None:
        self._state = REGISTRATION_LIFE.after(self._state, event)


class Importer:
    """What an importer may ask over its channel; it registers once at a time.  The channel keeps no VM: what
    needs one is ENODEV once the TDP FD is released, which keeps it until then.
    """

    def __init__(self, tdp: TdpFd) -> None:
        self._tdp = tdp
        self._registration: Registration | None = None

    def metadata(self) -> bytes:
        """ENODEV: released."""
        self._tdp.exported.check_alive()
        return self._tdp.exported.meta.to_bytes()

    def check_register(self, mm_cookie: int | None) -> None:
        """Before anything is lent.  EBUSY: registered; EINVAL: another process's."""
        if self._registration is not None:
            raise UapiError(errno.EBUSY, f"this channel is registered as {self._registration.name!r}")
        if mm_cookie not in (None, self._tdp.exported.mm.cookie):
            raise UapiError(errno.EINVAL, "the importer's process is not the VM's: it could fault nothing in")

    def register(self, name: str, mm_cookie: int | None, ops: ImporterOps, lease: Lease) -> None:
        """Errors as of `check_register` and `Registration`."""
        self.check_register(mm_cookie)
        self._registration = Registration(self._tdp, name, ops, lease)

    async def unregister(self) -> None:
        """Asked for, or the channel is closed.  One that is not registered has nothing to undo."""
        registration, self._registration = self._registration, None
        if registration is not None:
            await registration.leave()

    async def fault(self, mm_cookie: int, gfn: Gfn, kind: TdpFaultType) -> None:
        """Map the page, or say why a device gets an error.  Errors as of `ExportedTdp.fault`, and of
        IO_ERRNO: what the fault came to."""
        tdp = self._tdp
        tdp.exported.check_alive()
        result = await tdp.users.holding(tdp.exported.fault(tdp.fault_path, mm_cookie, gfn, kind))
        if result not in RESOLVED:
            raise UapiError(IO_ERRNO[result], f"gfn {gfn:#x}: {result.name.lower()}")

    # -- pins ------------------------------------------------------------------------------------------

    async def pin(self, span: GfnSpan) -> int:
        """The request's name.  Errors as of `Pinning.pin`."""
        self._tdp.exported.check_alive()
        return await self._tdp.users.holding(self._tdp.exports.pinning.pin(self._pins, span))

    async def pin_all(self) -> int:
        self._tdp.exported.check_alive()
        return await self._tdp.users.holding(self._tdp.exports.pinning.pin_all(self._pins))

    async def unpin(self, name: int) -> int:
        """How many pages that was."""
        self._tdp.exported.check_alive()
        return await self._tdp.users.holding(self._tdp.exports.pinning.unpin(self._pins, name))

    @property
    def _pins(self) -> Account:
        if self._registration is None:
            raise UapiError(errno.EINVAL, "an importer must be registered to pin: its pins end with it")
        return self._registration.pins
