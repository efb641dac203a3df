"""The in-kernel interface of an exported TDP, between kvmd and an importer [RFC 01/42].

The TDP FD itself answers no ioctl (ENODEV).  An importer presents it at kvmd's door for importers and is
given a channel of its own, over which it asks for metadata, registers, forwards faults; kvmd sends it
invalidations over the same channel, whose reply is the ack.  Registering hands over the memory windows and a
lease: a socket end that whoever walks the table must keep open, and close only once it walks no more.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from protocol.uapi.message import U64, Checked, Message, Name


class TdpFdGet(Message):
    """At kvmd's door for importers (EPERM elsewhere), with the TDP FD (EINVAL if it is something else); the
    reply carries the importer's channel.
    """


class TdpGetMetadata(Message):
    """The reply's `meta` is struct kvm_exported_tdp_meta_vmx, 104 bytes."""


class TdpRegisterImporter(Message):
    """EBUSY: `name` is registered.  Reply: `windows` [[kind, base, size]...], fds: one each, then the
    lease.  `mm`, for an importer that will fault pages in: EINVAL if it is not the VM's, for all its faults
    would fail (defect B-38).
    """

    name: Name
    mm: U64 | None = None


class TdpUnregisterImporter(Message):
    """Nothing is sent to the importer once this is answered."""


class TdpFault(Message):
    """Populate one gfn.  `mm` is the cookie of the mm fd of whoever made the HWPT."""

    mm: U64
    gfn: U64
    read: bool
    write: bool
    exec: bool


class TdpPinReply(Checked):
    """Of TDP_PIN and TDP_PIN_ALL."""

    pin: U64


class TdpPin(Message):
    """Pin gfn..gfn+npages for long and map it, writable: the importer's device will reach it without asking.
    Reply: `pin`, the request's name, for TDP_UNPIN.  Pins count, and end with the importer [RFC 00/42] or
    with their slot.  Before registering: EINVAL.
    """

    gfn: U64
    npages: Annotated[int, Field(ge=1, lt=1 << 52)]


class TdpUnpin(Message):
    """Take back what is left of the request that was answered with `pin`; reply: `pages`, how many pages
    that is.  EINVAL: this importer has no such request."""

    pin: U64


class TdpPinAll(Message):
    """Pin every slot and each that is added: for a device that cannot fault.  Reply as of TDP_PIN."""


class TdpInvalidate(Message):
    """kvmd -> importer: drop gpa range start..start+size; 0 and all ones is everything.  The reply is the
    ack.
    """

    start: U64
    size: U64
    epoch: Annotated[int, Field(ge=1)]
