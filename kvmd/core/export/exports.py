"""The TDPs that one VM lends out, from KVM_CREATE_TDP_FD to the last close.

Models kvm_exported_tdp's creation and release [RFC 04/42], [RFC 35/42], [RFC 38/42].

- Nothing waits between the checks and the reservation, so that nobody gets the same root twice (defect B-02).
- What cannot be told to the caller is taken back before anybody sees it (defect B-06).
- At the end pins go first, while the root is still there to be unpinned in; then the root goes back to the
  CPUs, valid and mapped if they run on it.  A root that devices alone walked goes with its last export.
"""

from __future__ import annotations

import errno

from kvmd.core.cpu.vcpus import Vcpus
from kvmd.core.export.pinning import Pinning
from kvmd.core.export.tdp_fd import (
    CREATE_TDP_FD_BYTES,
    CreateTdpFd,
    ExportedTdp,
    Exporter,
    ExportEvent,
    check_create,
)
from kvmd.core.host import HostKernel
from kvmd.core.mm.uaccess import copy_from_user, copy_to_user
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.guest_frames import GuestFrames
from kvmd.core.tables.tdp import VmTdp
from kvmd.core.tables.tdp_table import RootEvent, RootState
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.pt.meta import TYPE_EPT, ExportedTdpMeta, promised_masks
from protocol.units import GfnSpan


class Exports:
    """Of one VM; `tdps` by address space."""

    def __init__(
        self,
        host: HostKernel,
        frames: GuestFrames,
        tdp: VmTdp,
        dirty_log: DirtyLog,
        pinning: Pinning,
        vcpus: Vcpus,
    ) -> None:
        self.tdps: dict[int, ExportedTdp] = {}
        self.made = 0  # TDP FDs so far
        self.noncoherent_dma = 0  # how often it is registered
        self.pinning = pinning
        self._host = host
        self._slots = frames.slots
        self._mm = frames.mm
        self._tdp = tdp
        self._dirty_log = dirty_log
        self._vcpus = vcpus

    # awaits: exported: cannot change: nobody else has it before this returns
    async def create(self, request: CreateTdpFd) -> ExportedTdp:
        """KVM_CREATE_TDP_FD: lend the root of an address space out [RFC 04/42].

        The fd gets its number where it arrives, so what is written to the struct is what was there.
        """
        struct = (
            b"" if request.argp is None else await copy_from_user(self._mm, request.argp, CREATE_TDP_FD_BYTES)
        )
        exported = self._reserve(request)
        try:
            if request.argp is not None:
                await copy_to_user(self._mm, request.argp, struct)
        except UapiError:
            await self.close(exported)
            raise
        self.made += 1
        return exported

    def _reserve(self, request: CreateTdpFd) -> ExportedTdp:
        host, vcpus, mmu = self._host, self._vcpus, self._tdp.mmu
        check = Exporter(len(vcpus), vcpus.maxphyaddr, self.noncoherent_dma, host.obstacles)
        check_create(request, self._slots.address_spaces, self.tdps.__contains__, check)
        if not self._dirty_log.uses_bitmap:
            raise UapiError(errno.EINVAL, "dirty rings without bitmaps cannot log a device's stores")
        root = mmu.get_root(host.features.role_of(vcpus.maxphyaddr, request.as_id, mmu.lent_policy))
        root.happens(RootEvent.EXPORT)
        if self._dirty_log.lend(root):
            vcpus.flush_tlb(None)
        meta = ExportedTdpMeta(
            TYPE_EPT,
            root.role.level,
            root.hpa,
            min(root.role.policy.max_huge_page_level, host.features.max_page_level),
            promised_masks(host.ept_rules),
        )
        exported = self.tdps[request.as_id] = ExportedTdp(self._mm, request.as_id, root, meta)
        return exported

    # awaits: exported, root: cannot change: its last fd is closed, nobody else closes it
    async def close(self, exported: ExportedTdp) -> None:
        """The last copy of the TDP FD is closed, and nothing walks for an importer any more."""
        exported.happens(ExportEvent.CLOSE)  # nobody registers or faults from now on
        await self.pinning.close_all()
        root = exported.root
        self.release(exported)
        if not root.role.policy.cpus:
            async with self._slots.lock:
                if root.state is not RootState.DISMANTLED:
                    await self._tdp.zapper.dismantle([root])

    def release(self, exported: ExportedTdp) -> None:
        """The root stays valid and mapped if vCPUs run on it: no importer is left whose caches could be stale
        (defect B-18 zapped here without a flush)."""
        assert self.tdps[exported.as_id] is exported
        del self.tdps[exported.as_id]
        exported.happens(ExportEvent.RELEASE)
        exported.root.happens(RootEvent.RELEASE)
        if not exported.root.role.policy.cpus:
            exported.root.happens(RootEvent.INVALIDATE)
        self._tdp.mmu.put_root(exported.root)

    def flush_notify(self, span: GfnSpan | None, epoch: int) -> list[Wait[None]]:
        """Tell the importers of every one."""
        return [wait for exported in self.tdps.values() for wait in exported.flush_notify(span, epoch)]

    # -- what a lent table cannot bear -----------------------------------------------------------------

    def check_width(self, maxphyaddr: int) -> None:
        """EINVAL: a vCPU of that width would leave the shared table without anybody noticing (defect
        B-28)."""
        for exported in self.tdps.values():
            if self.is_apart(exported, maxphyaddr):
                own, lent = self._host.features.root_level(maxphyaddr), exported.root.role.level
                raise UapiError(
                    errno.EINVAL,
                    f"MAXPHYADDR {maxphyaddr}: takes a {own}-level root, the exported has {lent}",
                )

    def is_apart(self, exported: ExportedTdp, maxphyaddr: int) -> bool:
        """Does a vCPU of that width need another root than the exported one?"""
        return self._host.features.root_level(maxphyaddr) != exported.root.role.level

    def register_noncoherent_dma(self) -> None:
        """A device's DMA does not snoop.  EBUSY while a TDP is exported, whose entries promise write-back
        (defect B-27).
        """
        if self.tdps:
            raise UapiError(
                errno.EBUSY,
                f"non-coherent DMA: address space {min(self.tdps)} is exported, as write-back memory",
            )
        self.noncoherent_dma += 1

    def unregister_noncoherent_dma(self) -> None:
        if self.noncoherent_dma == 0:
            raise UapiError(errno.EINVAL, "non-coherent DMA is not registered")
        self.noncoherent_dma -= 1
