"""IOMMU_HWPT_ALLOC: a KVM HWPT on a TDP FD, or one on an IOAS.

Models flow 2 of the series: take the TDP FD, ask what it is, look whether the unit can walk it, register as
its importer, and only then is there an HWPT [RFC 12/42], [RFC 14/42], [RFC 18/42]; and
iommufd_hwpt_paging_alloc [iommufd hw_pagetable.c].  The checks come in the series' order.  Whatever fails
leaves the TDP FD's references as they were (defect B-08), and other importers of it (defect B-09): what was
not registered is only released, what was goes the whole way of `HwptKvm.destroy`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Protocol

from iommufdd.core.device import IommufdDevice
from iommufdd.core.domain import Domain
from iommufdd.core.hardware import Hardware, LentMemory
from iommufdd.core.hwpt_kvm import HwptKvm, Invalidate, Tdp
from iommufdd.core.hwpt_mirror import HwptMirror
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.io_pagetable import IoPageTable
from iommufdd.core.ioas import Ioas
from iommufdd.core.ioas_on_demand import IoasOnDemand
from iommufdd.core.iommufd import IommufdCtx
from iommufdd.core.kvm_domain import KvmDomain, check_metadata
from iommufdd.core.object import Object
from iommufdd.core.platform import Platform
from protocol.errors import UapiError
from protocol.pt.mem import TableWriter
from protocol.pt.meta import ExportedTdpMeta
from protocol.pt.table_pool import TablePool
from protocol.units import Level

LEAST_LEVELS = Level(4)


class HeldTdpFd(Tdp, Protocol):
    """A TDP FD that is held: `release` lets go of it, and of whatever was made through it.

    `on_invalidate` is called for every flush, `on_gone` if KVM goes first.  Each call may raise UapiError.
    """

    on_invalidate: Invalidate
    on_gone: Callable[[], None]

    async def open(self) -> None:
        """EOPNOTSUPP: no KVM; EINVAL: not a TDP FD."""

    async def metadata(self) -> ExportedTdpMeta: ...

    async def register(self) -> LentMemory:
        """Be told of flushes from now on.  EBUSY; EINVAL: another process's."""


class LentTables(Protocol):
    """The window that tables of iommufd's own lie in."""

    @property
    def writer(self) -> TableWriter: ...
    @property
    def pool(self) -> TablePool: ...

    def lend(self) -> LentMemory:
        """EMFILE: no room for its fds."""


# -- on a TDP FD -----------------------------------------------------------------------------------------


async def alloc_kvm(ctx: IommufdCtx, device: IommufdDevice, tdp: HeldTdpFd, flags: int) -> int:
    """The HWPT's id.  `tdp` is ours from now on.  EBADF: the iommufd was closed meanwhile; ENODEV: the unit,
    or KVM, went; EINVAL, EOPNOTSUPP: the TDP is not one the unit can walk; EBUSY, ENOSPC, ENOMEM, EFAULT.
    """
    try:
        # await: ctx: it may be closed; asked again: `check_open`
        # (tests/unit/iommufdd/test_hwpt_alloc.py::test_an_iommufd_closed_meanwhile_is_ebadf) | tdp: cannot
        # change: ours
        hwpt = await _import_tdp(ctx.platform, device, tdp, flags)
    except UapiError:
        tdp.release()
        raise
    try:
        ctx.check_open()
        if not hwpt.maintained:
            raise UapiError(errno.ENODEV, "KVM went away")
        return ctx.objects.add(hwpt)
    except UapiError:
        await ctx.platform.destroy_hwpt(hwpt)
        raise


# awaits: device: its unit may go; asked again: `hardware_of`
# (tests/unit/iommufdd/test_hwpt_alloc.py::test_a_unit_that_goes_meanwhile_is_enodev) | hwpt: its KVM may go;
# asked again: `alloc_kvm`
# (tests/unit/iommufdd/test_hwpt_alloc.py::test_kvm_that_goes_before_there_is_an_hwpt) | domain, platform,
# tdp: cannot change: ours, and frozen
async def _import_tdp(platform: Platform, device: IommufdDevice, tdp: HeldTdpFd, flags: int) -> HwptKvm:
    await tdp.open()
    meta = await tdp.metadata()
    hardware = platform.hardware_of(device)
    check_metadata(meta, flags)
    domain = KvmDomain(meta.root_hpa, meta.level, platform.new_did(), meta.max_huge_page_level)
    _check_unit(device, domain)
    hwpt = platform.hwpts[domain.did] = HwptKvm(domain, hardware, tdp)
    tdp.on_invalidate = hwpt.invalidate  # before it is registered: the first flush may come with the answer
    tdp.on_gone = lambda: platform.spawn(platform.lose_kvm(hwpt))
    try:
        hwpt.memory = await hardware.add_memory(await tdp.register())
    except UapiError:
        del platform.hwpts[domain.did]
        raise
    return hwpt


def _check_unit(device: IommufdDevice, domain: Domain) -> None:
    missing = domain.what_is_missing(device.unit.cap, device.unit.ecap)
    if missing is not None:
        raise UapiError(errno.EOPNOTSUPP, f"the remapping unit cannot walk this table: {missing}")


# -- on an IOAS ------------------------------------------------------------------------------------------


# awaits: ctx: it may be closed; asked again: `check_open`
# (tests/unit/iommufdd/test_hwpt_alloc.py::test_an_iommufd_closed_meanwhile_is_ebadf) | ioas, hwpt, platform:
# cannot change: the caller uses the IOAS, nobody else has the HWPT
async def alloc_paging(
    ctx: IommufdCtx, device: IommufdDevice, ioas: Ioas, memory: LentTables, premap_pages: int
) -> int:
    """The HWPT's id.  EBADF: the iommufd was closed meanwhile; ENODEV: the unit, or those that have the
    memory of the IOAS, went; EOPNOTSUPP: the unit cannot walk what we make; ENOSPC, ENOMEM, EADDRINUSE,
    EFAULT.
    """
    platform = ctx.platform
    hardware = platform.hardware_of(device)
    if any(source.lent and source.bus is not hardware for source in ioas.sources):
        why = f"IOAS {ioas.id} lent its memory to units that are gone: make another"
        raise UapiError(errno.ENODEV, why)
    hwpt = _paging(platform, hardware, device, ioas, memory, premap_pages)
    try:
        hwpt.memory = await hardware.add_memory(memory.lend())
        await ioas.add_hwpt(hwpt)
        ctx.check_open()
        return ctx.objects.add(hwpt)
    except UapiError:
        await platform.destroy_hwpt(hwpt)
        raise


def _paging(
    platform: Platform,
    hardware: Hardware,
    device: IommufdDevice,
    ioas: Ioas,
    memory: LentTables,
    premap_pages: int,
) -> HwptPaging:
    """With an empty table, of as few levels as the unit has, and its domain id taken."""
    did, cap = platform.new_did(), device.unit.cap
    levels = min(cap.levels, default=LEAST_LEVELS)
    table = IoPageTable(memory.writer, memory.pool, levels, cap.max_huge_page_level)
    domain = Domain(table.root, levels, did, cap.max_huge_page_level)
    try:
        _check_unit(device, domain)
    except UapiError:
        table.release()
        raise
    if isinstance(ioas, IoasOnDemand):
        hwpt: HwptPaging = HwptMirror(domain, hardware, ioas, ioas.watched, table, premap_pages)
    else:
        hwpt = HwptPaging(domain, hardware, ioas, table)
    platform.hwpts[did] = hwpt
    return hwpt


def parent_of(ctx: IommufdCtx, pt_id: int) -> Ioas:
    """The IOAS that `pt_id` says.  EINVAL: it is none."""
    try:
        parent = ctx.objects.get(pt_id, Object)
    except UapiError:
        raise UapiError(errno.EINVAL, f"pt_id {pt_id}: there is no such object") from None
    if isinstance(parent, HwptKvm):
        raise UapiError(
            errno.EINVAL,
            f"pt_id {pt_id}: a KVM HWPT is no nest parent, faults of a nested domain are not handled",
        )
    if not isinstance(parent, Ioas):
        raise UapiError(
            errno.EINVAL, f"pt_id {pt_id} is a {type(parent).__name__}: neither IOAS nor nest parent"
        )
    return parent
