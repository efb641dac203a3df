"""The exported TDP: a root lent out, the metadata that describes it, and the importers to be told of flushes.

Models struct kvm_exported_tdp and kvm_tdp_fd.c [RFC 04/42], [RFC 06/42], [RFC 35/42]: creation with the
series' checks in its order, importers keyed by who they are (so a second one cannot push out the first,
defect B-09), and notification in whole-table or byte-range form.  References are not counted here: the
fd itself is the reference (`protocol/rpc/files.py`), and this object lives until its last copy is
closed.

Invariants: I10 the root stays put while exported; I15 after unregister returns an importer hears
nothing more, and one that is registered hears of every later flush.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvmd.core.tdp_mmu import Root
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.pt.meta import ExportedTdpMeta
from protocol.units import PAGE_SHIFT, WHOLE_SIZE, GfnSpan


@dataclass(frozen=True, slots=True)
class FaultType:
    """struct kvm_tdp_fault_type: what the device wanted [RFC 07/42]."""

    read: bool
    write: bool
    exec: bool


class ImporterOps(Protocol):
    """Who is told [RFC 01/42]: `invalidate` in bytes of gpa; start 0 with all ones is everything."""

    def invalidate(self, start: int, size: int, epoch: int) -> Wait[None]:
        """Drop cached translations; the Wait is set once no walker of the importer's uses one."""


class ExportedTdp:
    """What a TDP FD stands for."""

    def __init__(self, as_id: int, root: Root, meta: ExportedTdpMeta) -> None:
        assert root.hpa == meta.root_hpa
        self.as_id = as_id
        self.root = root
        self.meta = meta
        self._importers: dict[str, ImporterOps] = {}

    def register_importer(self, name: str, ops: ImporterOps) -> None:
        """EBUSY: an importer of that name is registered already."""
        if name in self._importers:
            raise UapiError(errno.EBUSY, f"importer {name!r} is registered on this TDP FD already")
        self._importers[name] = ops

    def unregister_importer(self, name: str, ops: ImporterOps) -> None:
        """Removes only what the same importer added; unknown ones are no error (RFC-106)."""
        if self._importers.get(name) is ops:
            del self._importers[name]

    def flush_notify(self, span: GfnSpan | None, epoch: int) -> list[Wait[None]]:
        """Tell every importer [RFC 08/42]; one Wait each."""
        if span is None:
            start, size = 0, WHOLE_SIZE
        else:
            start, size = span.start << PAGE_SHIFT, span.npages << PAGE_SHIFT
        return [ops.invalidate(start, size, epoch) for ops in list(self._importers.values())]

    @property
    def importers(self) -> int:
        return len(self._importers)

    @property
    def importer_names(self) -> list[str]:
        return sorted(self._importers)


@dataclass(frozen=True, slots=True)
class CreateTdpFd:
    """struct kvm_create_tdp_fd, as the caller sent it."""

    as_id: int
    mode: int
    pad: int


def check_create(
    request: CreateTdpFd, address_spaces: int, taken: Callable[[int], bool], *, vcpus: int, maxphyaddr: int
) -> None:
    """The series' checks, in its order [RFC 04/42], [RFC 35/42]."""
    if request.as_id >= address_spaces or request.pad or request.mode:
        raise UapiError(
            errno.EINVAL,
            f"as_id {request.as_id} of {address_spaces}, mode {request.mode}, pad {request.pad} (both 0)",
        )
    if taken(request.as_id):
        raise UapiError(errno.EEXIST, f"address space {request.as_id} is exported already")
    if request.as_id != 0:
        raise UapiError(errno.EINVAL, f"address space {request.as_id}: only 0 can be exported on x86")
    if vcpus == 0:
        raise UapiError(errno.EINVAL, "the VM has no vCPU yet, so its guest physical width is not known")
    if maxphyaddr < 32:
        raise UapiError(errno.EINVAL, f"guest MAXPHYADDR is {maxphyaddr}: set every vCPU's CPUID first")
