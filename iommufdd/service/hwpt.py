"""IOMMU_HWPT_ALLOC: a KVM HWPT on a TDP FD, or one on an IOAS.

The checks come in the series' order [RFC 12/42], [RFC 14/42], [RFC 18/42]; whatever fails leaves the TDP
FD's references as they were (defect B-08), and other importers of it (defect B-09).
"""

from __future__ import annotations

import errno

from iommufdd.core.device import IommufdDevice
from iommufdd.core.domain import Domain
from iommufdd.core.hwpt_kvm import HwptKvm
from iommufdd.core.hwpt_mirror import HwptMirror
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.io_pagetable import IoPageTable
from iommufdd.core.ioas import Ioas
from iommufdd.core.ioas_on_demand import IoasOnDemand
from iommufdd.core.kvm_domain import KvmDomain, check_metadata
from iommufdd.core.object import Object
from iommufdd.kvm_client import KvmTdp
from iommufdd.service.objects import App, IommuFile
from iommufdd.silicon import Silicon
from protocol.errors import UapiError
from protocol.rpc.channel import Body, Fds
from protocol.uapi import iommufd as uapi
from protocol.uapi import names
from protocol.units import Level

INT_MAX = (1 << 31) - 1
LEAST_LEVELS = Level(4)


async def hwpt_alloc(held: IommuFile, message: uapi.IommuHwptAlloc, fds: Fds) -> Body:
    if message.reserved:
        raise UapiError(errno.EOPNOTSUPP, "__reserved is not zero")
    if message.data_type == names.IOMMU_HWPT_DATA_NONE and message.data_len:
        raise UapiError(errno.EINVAL, f"data_type NONE with {message.data_len} bytes of data")
    device = held.objects.get(message.dev_id, IommufdDevice)
    if message.data_type == names.IOMMU_HWPT_DATA_KVM:
        return {"out_hwpt_id": await _alloc_kvm(held, device, message, fds)}
    return {"out_hwpt_id": await _alloc_paging(held, device, message)}


# -- KVM -----------------------------------------------------------------------------------------------


async def _alloc_kvm(held: IommuFile, device: IommufdDevice, message: uapi.IommuHwptAlloc, fds: Fds) -> int:
    app = held.app
    hwpt: HwptKvm | None = None

    def gone() -> None:
        if hwpt is not None:
            app.loop.flows.spawn(app.lose_kvm(hwpt))

    tdp = KvmTdp(held.mm, _tdp_fd_of(app, message, fds), gone)
    try:
        hwpt = await _import_tdp(app, device, tdp, message.flags)
        if held.closed:
            raise UapiError(errno.EBADF, "the iommufd was closed meanwhile")
        return held.objects.add(hwpt)
    except UapiError:
        if hwpt is not None:
            await app.destroy_hwpt(hwpt)
        else:
            tdp.release()
        raise


def _tdp_fd_of(app: App, message: uapi.IommuHwptAlloc, fds: Fds) -> int:
    """The TDP FD that struct iommu_hwpt_kvm_info names; it becomes ours."""
    if message.data_len != names.HWPT_KVM_INFO_SIZE or message.data_uptr is None:
        raise UapiError(
            errno.EINVAL, f"data_len {message.data_len}: {names.HWPT_KVM_INFO_SIZE} bytes at data_uptr"
        )
    if len(message.data_uptr) < message.data_len:
        raise UapiError(errno.EFAULT, "data_uptr cannot be read")
    if not app.settings.kvm_hwpt:
        raise UapiError(errno.EOPNOTSUPP, "built without KVM HWPTs (IOMMUFD_KVM_HWPT)")
    number = int.from_bytes(message.data_uptr[: message.data_len], "little")
    if number > INT_MAX:
        raise UapiError(errno.EINVAL, f"fd {number:#x} is no fd number")
    if number not in message.fd_table:
        raise UapiError(errno.EBADF, f"fd {number} is not open")
    return fds.take(message.fd_table.index(number))


async def _import_tdp(app: App, device: IommufdDevice, tdp: KvmTdp, flags: int) -> HwptKvm:
    await tdp.open(app.loop, app.settings.kvmd)
    meta = await tdp.metadata()
    silicon = app.silicon_of(device)
    check_metadata(meta, flags)
    domain = KvmDomain(meta.root_hpa, meta.level, app.new_did(), meta.max_huge_page_level)
    _check_unit(device, domain)
    hwpt = app.hwpts[domain.did] = HwptKvm(domain, silicon, tdp)
    tdp.on_invalidate = hwpt.invalidate
    try:
        windows, fds = await tdp.register()
        hwpt.memory = await silicon.add_memory(windows, [fds.take(n) for n in range(len(fds))])
    except UapiError:
        del app.hwpts[domain.did]
        raise
    return hwpt


def _check_unit(device: IommufdDevice, domain: Domain) -> None:
    missing = domain.what_is_missing(device.unit.cap, device.unit.ecap)
    if missing is not None:
        raise UapiError(errno.EOPNOTSUPP, f"the remapping unit cannot walk this table: {missing}")


# -- paging --------------------------------------------------------------------------------------------


async def _alloc_paging(held: IommuFile, device: IommufdDevice, message: uapi.IommuHwptAlloc) -> int:
    app = held.app
    ioas = _ioas_of(held, message.pt_id)
    if message.flags or message.data_type != names.IOMMU_HWPT_DATA_NONE:
        raise UapiError(
            errno.EOPNOTSUPP,
            f"flags {message.flags:#x}, data_type {message.data_type}: no nesting, no dirty tracking",
        )
    silicon = app.silicon_of(device)
    if any(source.lent and source.bus is not silicon for source in ioas.sources):
        why = f"IOAS {ioas.id} lent its memory to units that are gone: make another"
        raise UapiError(errno.ENODEV, why)
    did = app.new_did()
    cap = device.unit.cap
    levels, largest = min(cap.levels, default=LEAST_LEVELS), cap.max_huge_page_level
    table = IoPageTable(app.tables.writer, app.tables.pool, levels, largest)
    domain = Domain(table.root, levels, did, largest)
    try:
        _check_unit(device, domain)
    except UapiError:
        table.release()
        raise
    hwpt = app.hwpts[did] = _on(ioas, domain, app, silicon, table)
    try:
        hwpt.memory = await silicon.add_memory([app.tables.window], app.tables.fds(2))
        await ioas.add_hwpt(hwpt)
        if held.closed:
            raise UapiError(errno.EBADF, "the iommufd was closed meanwhile")
        return held.objects.add(hwpt)
    except UapiError:
        await app.destroy_hwpt(hwpt)
        raise


def _on(ioas: Ioas, domain: Domain, app: App, silicon: Silicon, table: IoPageTable) -> HwptPaging:
    if isinstance(ioas, IoasOnDemand):
        return HwptMirror(domain, silicon, ioas, ioas.watched, table, app.settings.premap_pages)
    return HwptPaging(domain, silicon, ioas, table)


def _ioas_of(held: IommuFile, pt_id: int) -> Ioas:
    try:
        parent = held.objects.get(pt_id, Object)
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
