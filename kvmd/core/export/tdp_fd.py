"""The exported TDP: a root lent out, the metadata that describes it, and the importers to be told of flushes.

Models struct kvm_exported_tdp and kvm_tdp_fd.c [RFC 04/42], [RFC 06/42], [RFC 35/42]: creation with the
series' checks in its order, importers keyed by who they are (so a second one cannot push out the first,
defect B-09), and notification in whole-table or byte-range form.  References are not counted here: the
fd itself is the reference (`protocol/rpc/files.py`), and this object lives until its last copy is
closed.

Invariants: I10 the root stays put while exported; I15 after unregister returns an importer hears
nothing more, and one that is registered hears of every later flush of the root.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from kvmd.core.faults.fault_path import FaultPath
from kvmd.core.faults.page_fault import FaultResult, FaultSource, PageFault
from kvmd.core.host import Obstacle
from kvmd.core.mm.mm import Mm
from kvmd.core.tables.tdp_table import Root
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.lifecycle import LifeCycle
from protocol.pt.geometry import gfn_limit
from protocol.pt.meta import ExportedTdpMeta
from protocol.units import PAGE_SHIFT, WHOLE_SIZE, Gfn, GfnSpan, Hva


@dataclass(frozen=True, slots=True)
class TdpFaultType:
    """struct kvm_tdp_fault_type: what the device wanted [RFC 07/42]."""

    read: bool
    write: bool
    exec: bool


class ImporterOps(Protocol):
    """Who is told [RFC 01/42]: `invalidate` in bytes of gpa; start 0 with all ones is everything."""

    def invalidate(self, start: int, size: int, epoch: int, /) -> Wait[None]:
        """Drop cached translations; the Wait is set once no walker of the importer's uses one."""


class ExportState(Enum):
    LENT = auto()
    CLOSING = auto()  # the last copy of the fd is closed; pins go
    RELEASED = auto()


class ExportEvent(Enum):
    CLOSE = auto()
    RELEASE = auto()


EXPORT_LIFE = LifeCycle(
    "exported TDP",
    ExportState.LENT,
    {
        (ExportState.LENT, ExportEvent.CLOSE): ExportState.CLOSING,
        (ExportState.CLOSING, ExportEvent.RELEASE): ExportState.RELEASED,
    },
)


class ExportedTdp:
    """What a TDP FD stands for: a root that maps memory of `mm`."""

    def __init__(self, mm: Mm, as_id: int, root: Root, meta: ExportedTdpMeta) -> None:
        assert root.hpa == meta.root_hpa
        self.mm = mm
        self.as_id = as_id
        self.root = root
        self.meta = meta
        self._state = EXPORT_LIFE.born
        self._importers: dict[str, ImporterOps] = {}
        self._told: list[Wait[None]] = []  # and perhaps not acked

    def happens(self, event: ExportEvent) -> None:
        self._state = EXPORT_LIFE.after(self._state, event)

    def check_alive(self) -> None:
        """ENODEV: the last copy of the TDP FD is closed, so nothing is behind this any more (defect B-36).

        An importer's channel holds no reference, so whoever drops its TDP FD can still ask.
        """
        if self._state is not ExportState.LENT:
            raise UapiError(errno.ENODEV, f"the TDP FD of address space {self.as_id} was released")

    async def fault(self, fault_path: FaultPath, mm_cookie: int, gfn: Gfn, kind: TdpFaultType) -> FaultResult:
        """The TDP FD's fault op [RFC 07/42].  EINVAL: no right asked, or another process's; EPERM: it exited;
        ENODEV: released.
        """
        self.check_alive()
        if not (kind.read or kind.write or kind.exec):
            raise UapiError(errno.EINVAL, f"fault at gfn {gfn:#x} asks for no access")
        if mm_cookie != self.mm.cookie:
            raise UapiError(errno.EINVAL, f"fault at gfn {gfn:#x}: the HWPT belongs to another process")
        if not self.mm.alive:
            raise UapiError(errno.EPERM, f"fault at gfn {gfn:#x}: the VM's process has exited")
        if gfn >= gfn_limit(self.root.role.level):
            return FaultResult.NO_SLOT
        return await fault_path.handle_fault(PageFault(gfn, kind.write, FaultSource.IO))

    def register_importer(self, name: str, ops: ImporterOps) -> None:
        """EBUSY: an importer of that name is registered already; ENODEV: released."""
        self.check_alive()
        if name in self._importers:
            raise UapiError(errno.EBUSY, f"importer {name!r} is registered on this TDP FD already")
        self._importers[name] = ops

    def unregister_importer(self, name: str, ops: ImporterOps) -> None:
        """Removes only what the same importer added; unknown ones are no error (RFC-106)."""
        if self._importers.get(name) is ops:
            del self._importers[name]

    def flush_notify(self, span: GfnSpan | None, epoch: int) -> list[Wait[None]]:
        """Tell every importer [RFC 08/42]; one Wait each.  Of a root that is not told all and did not
        change there is nothing to tell: then only what was told before is to be waited for.
        """
        self._told = [wait for wait in self._told if not wait.done]
        if not (self.root.role.policy.told_all or self.root.stale):
            return self._told
        self.root.stale = False
        if span is None:
            start, size = 0, WHOLE_SIZE
        else:
            start, size = span.start << PAGE_SHIFT, span.npages << PAGE_SHIFT
        told = [ops.invalidate(start, size, epoch) for ops in list(self._importers.values())]
        self._told += told
        return told

    @property
    def importers(self) -> int:
        return len(self._importers)

    @property
    def importer_names(self) -> list[str]:
        return sorted(self._importers)


CREATE_TDP_FD_BYTES = 16


@dataclass(frozen=True, slots=True)
class CreateTdpFd:
    """struct kvm_create_tdp_fd; `argp` is where it lies in the caller's memory, if the caller said."""

    as_id: int
    mode: int
    pad: int
    argp: Hva | None = None


Check = tuple[bool, int, str]  # does it fail, with which errno, why

# What each obstacle is called at the check that meets it.
_WHY = {
    Obstacle.COMPILED_OUT: "this KVM was built without exported TDPs",
    Obstacle.AMD: "the vendor module of these CPUs has no metadata for an exported TDP",
    Obstacle.NO_TDP_MMU: "the TDP MMU is off, and only its roots can be exported",
    Obstacle.HYPERV: "this KVM was built for Hyper-V, whose flushes importers would not hear of",
    Obstacle.PRESENT_BIT_11: "this KVM marks present entries by bit 11, which the remapping unit reserves",
}


@dataclass(frozen=True, slots=True)
class Exporter:
    """What the checks ask of a VM and its KVM."""

    vcpus: int = 0
    maxphyaddr: int = 0
    noncoherent_dma: int = 0
    obstacles: frozenset[Obstacle] = frozenset()


def check_create(
    request: CreateTdpFd, address_spaces: int, taken: Callable[[int], bool], vm: Exporter
) -> None:
    """The first check that fails speaks; the order is the series' [RFC 04/42], [RFC 35/42], [RFC 38/42]."""

    def meet(number: int, *obstacles: Obstacle) -> Iterator[Check]:
        return ((obstacle in vm.obstacles, number, _WHY[obstacle]) for obstacle in obstacles)

    as_id, fields = request.as_id, f"mode {request.mode}, pad {request.pad} (both 0)"
    checks: tuple[Check, ...] = (
        *meet(errno.EOPNOTSUPP, Obstacle.COMPILED_OUT),
        (
            as_id >= address_spaces or bool(request.pad or request.mode),
            errno.EINVAL,
            f"as_id {as_id} of {address_spaces}, {fields}",
        ),
        (taken(as_id), errno.EEXIST, f"address space {as_id} is exported already"),
        *meet(errno.EOPNOTSUPP, Obstacle.AMD),
        (as_id != 0, errno.EINVAL, f"address space {as_id}: only 0 can be exported on x86"),
        *meet(errno.EINVAL, Obstacle.NO_TDP_MMU, Obstacle.HYPERV, Obstacle.PRESENT_BIT_11),
        (vm.vcpus == 0, errno.EINVAL, "the VM has no vCPU yet, so its guest physical width is not known"),
        (
            vm.maxphyaddr < 32,
            errno.EINVAL,
            f"guest MAXPHYADDR is {vm.maxphyaddr}: set every vCPU's CPUID first",
        ),
        (
            vm.noncoherent_dma > 0,
            errno.EINVAL,
            f"non-coherent DMA is registered {vm.noncoherent_dma} times: entries would need vCPU state",
        ),
    )
    for fails, number, why in checks:
        if fails:
            raise UapiError(number, f"KVM_CREATE_TDP_FD: {why}")
